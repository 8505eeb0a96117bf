//! From the text of a file to objects.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use landfall_api::{EgressPolicy, IPAddressPool, L2Advertisement};
use landfall_core::model::{Kind, Object};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
        ("v1", "Pod") => (typed::<Pod>, Kind::Pod),
        ("discovery.k8s.io/v1", "EndpointSlice") => (typed::<EndpointSlice>, Kind::EndpointSlice),
        ("networking.k8s.io/v1", "ServiceCIDR") => (typed::<ServiceCIDR>, Kind::ServiceCidr),
        ("landfall.dev/v1alpha1", "IPAddressPool") => (own::<IPAddressPool>, Kind::Pool),
        ("landfall.dev/v1alpha1", "L2Advertisement") => {
            (own::<L2Advertisement>, Kind::Advertisement)
        }
        ("landfall.dev/v1alpha1", "EgressPolicy") => (own::<EgressPolicy>, Kind::EgressPolicy),
        _ => {
            return Err(Wrong {
                line: Some(first_line),
                message: format!(
                    "{version} {kind} is not read from manifests: use v1 Service, Node, Namespace or Pod, \
                         discovery.k8s.io/v1 EndpointSlice, networking.k8s.io/v1 ServiceCIDR, landfall.dev/v1alpha1 \
                         IPAddressPool, L2Advertisement or EgressPolicy"
                ),
            });
        }
    };
    let object = parsed(document, offset, first_line)?;
    Ok(kinds.contains(&known).then_some(object))
}

/// An object of our own kinds, all of whose fields are known: those of others may be newer than this program.
fn own<K: DeserializeOwned + Serialize + Project>(
    document: &str,
    offset: u64,
    first_line: u64,
) -> Result<Object, Wrong> {
    let written: Value = read(document, offset)?;
    let read: K = read(document, offset)?;
    let understood = serde_json::to_value(&read).map_err(|error| Wrong {
        line: Some(first_line),
        message: error.to_string(),
    })?;
    if let Some(path) = not_understood(&written, &understood) {
        return Err(Wrong {
            line: line_of(document, &path).map(|line| offset + line),
            message: format!("{}: there is no such field", path.join(".")),
        });
    }
    typed::<K>(document, offset, first_line)
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

/// The path of the first field that is written and that nobody reads: a field misspelt is a wish ignored.
fn not_understood(written: &Value, understood: &Value) -> Option<Vec<String>> {
    let below = |key: String, written: &Value, understood: &Value| {
        let mut path = not_understood(written, understood)?;
        path.insert(0, key);
        Some(path)
    };
    match (written, understood) {
        (Value::Object(written), Value::Object(understood)) => {
            written
                .iter()
                .find_map(|(key, value)| match understood.get(key) {
                    Some(known) => below(key.clone(), value, known),
                    // What says nothing need not be kept.
                    None if is_empty(value) => None,
                    None => Some(vec![key.clone()]),
                })
        }
        (Value::Array(written), Value::Array(understood)) => written
            .iter()
            .zip(understood)
            .enumerate()
            .find_map(|(place, (value, known))| below(place.to_string(), value, known)),
        _ => None,
    }
}

fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(_) | Value::Number(_) | Value::String(_) => false,
    }
}

/// The line, counted from 1, at which the last field of a path is most likely written.
fn line_of(document: &str, path: &[String]) -> Option<u64> {
    let key = path.last()?;
    let named = |line: &str| {
        line.match_indices(&**key).any(|(at, _)| {
            let before = line[..at].trim_end_matches(['"', '\'']);
            let after = line[at + key.len()..].trim_start_matches(['"', '\'']);
            let starts = before.is_empty() || before.ends_with([' ', '{', ',', '-']);
            starts && after.trim_start().starts_with(':')
        })
    };
    (1..)
        .zip(document.lines())
        .find(|(_, line)| named(line))
        .map(|(number, _)| number)
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
