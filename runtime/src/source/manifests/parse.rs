//! From the text of a file to objects.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Namespace, Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use landfall_api::{IPAddressPool, L2Advertisement};
use landfall_core::model::{Kind, Object};
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::project::Project;

/// What is wrong with a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Wrong {
    /// Where, counted from 1.
    pub(super) line: Option<u64>,
    /// What, and what to do.
    pub(super) message: String,
}

/// Reads one document: its text, the lines before it, and the line its object begins at.
type Parser = fn(&str, u64, u64) -> Result<Object, Wrong>;

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Header {
    api_version: Option<String>,
    kind: Option<String>,
}

/// The objects of `kinds` in all documents of `text`; the first mistake refuses the whole text.
pub(super) fn objects(text: &str, kinds: &BTreeSet<Kind>) -> Result<Vec<Object>, Wrong> {
    let mut objects = Vec::new();
    for (offset, document) in documents(text) {
        if blank(&document) {
            continue;
        }
        objects.extend(object(&document, offset, kinds)?);
    }
    Ok(objects)
}

/// Splits at lines that begin with `---`; each document comes with the number of lines before it.
fn documents(text: &str) -> Vec<(u64, String)> {
    let mut documents = vec![(0, String::new())];
    for (number, line) in (1..).zip(text.lines()) {
        if line.starts_with("---") {
            documents.push((number, String::new()));
        } else if let Some((_, document)) = documents.last_mut() {
            document.push_str(line);
            document.push('\n');
        }
    }
    documents
}

fn blank(document: &str) -> bool {
    document
        .lines()
        .all(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
}

fn object(document: &str, offset: u64, kinds: &BTreeSet<Kind>) -> Result<Option<Object>, Wrong> {
    let first_line = offset
        + document
            .lines()
            .take_while(|line| line.trim().is_empty() || line.trim_start().starts_with('#'))
            .count() as u64
        + 1;
    let header: Header = read(document, offset)?;
    let (Some(version), Some(kind)) = (header.api_version, header.kind) else {
        return Err(Wrong {
            line: Some(first_line),
            message: "apiVersion or kind is missing: write a whole Kubernetes object".into(),
        });
    };
    let (parsed, known): (Parser, Kind) = match (version.as_str(), kind.as_str()) {
        ("v1", "Service") => (typed::<Service>, Kind::Service),
        ("v1", "Node") => (typed::<Node>, Kind::Node),
        ("v1", "Namespace") => (typed::<Namespace>, Kind::Namespace),
        ("discovery.k8s.io/v1", "EndpointSlice") => (typed::<EndpointSlice>, Kind::EndpointSlice),
        ("landfall.dev/v1alpha1", "IPAddressPool") => (typed::<IPAddressPool>, Kind::Pool),
        ("landfall.dev/v1alpha1", "L2Advertisement") => {
            (typed::<L2Advertisement>, Kind::Advertisement)
        }
        _ => {
            return Err(Wrong {
                line: Some(first_line),
                message: format!(
                    "{version} {kind} is not read from manifests: use v1 Service, Node or Namespace, \
                         discovery.k8s.io/v1 EndpointSlice, landfall.dev/v1alpha1 IPAddressPool or L2Advertisement"
                ),
            });
        }
    };
    let object = parsed(document, offset, first_line)?;
    Ok(kinds.contains(&known).then_some(object))
}

fn typed<K: DeserializeOwned + Project>(
    document: &str,
    offset: u64,
    first_line: u64,
) -> Result<Object, Wrong> {
    let object: K = read(document, offset)?;
    let wrong = |message| Wrong {
        line: Some(first_line),
        message,
    };
    match object.project() {
        Err(problem) => Err(wrong(problem.to_string())),
        // Here its author is told at once, and the file as it was stays in force.
        Ok(Object::Pool(pool)) => match pool.flaw {
            Some(flaw) => Err(wrong(format!("IPAddressPool {}: {flaw}", pool.name))),
            None => Ok(Object::Pool(pool)),
        },
        Ok(object) => Ok(object),
    }
}

fn read<T: DeserializeOwned>(document: &str, offset: u64) -> Result<T, Wrong> {
    serde_saphyr::from_str(document).map_err(|problem| {
        let line = problem.location().map(|location| offset + location.line());
        // Only the first line of the message: the rest draws the text around the spot.
        let message = problem.to_string();
        Wrong {
            line,
            message: message.lines().next().unwrap_or("is no YAML").to_owned(),
        }
    })
}
