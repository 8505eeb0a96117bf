//! The plugin: from a call to what is printed.

use std::fmt::Display;
use std::io;

use serde_json::{Value, json};

use crate::boot::{Armed, arm};
use crate::bridge::announce_changes;
use crate::call::{Reply, Request, ask};
use crate::config::{Command, Environment, Network};
use crate::error::CniError;

/// The versions of the specification whose results are handed on as they are.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// What a call comes to: what to print, and whether it failed.
pub type Outcome = Result<Option<Value>, Value>;

/// Answers a call. `grumble` is told what went wrong without failing the pod.
pub fn answer(environment: &Environment, input: &str, grumble: impl Fn(&dyn Display)) -> Outcome {
    let version = Network::parse(input).map(|network| network.cni_version);
    respond(environment, input, grumble)
        .map_err(|error| error.result(version.as_deref().unwrap_or_default()))
}

fn respond(
    environment: &Environment,
    input: &str,
    grumble: impl Fn(&dyn Display),
) -> Result<Option<Value>, CniError> {
    match environment.command()? {
        Command::Version => {
            let newest = VERSIONS.last().expect("there are some");
            Ok(Some(
                json!({"cniVersion": newest, "supportedVersions": VERSIONS}),
            ))
        }
        // Landfall is never a reason to call a node not ready, nor an interface broken.
        Command::Status | Command::Check | Command::Gc => Ok(None),
        Command::Add => {
            let network = Network::parse(input)?;
            let attachment = environment.attachment(&network)?;
            let result = network.prev_result.clone().ok_or(CniError::NotChained)?;
            for interface in &attachment.host_interfaces {
                if let Err(error) = announce_changes(interface) {
                    grumble(&format_args!(
                        "{interface}: its pods are not told when its address changes: {error}"
                    ));
                }
            }
            if !tell(&network, &Request::Add(attachment), &grumble) {
                close(&network, &grumble);
            }
            Ok(Some(result))
        }
        Command::Del => {
            // What cannot be read cannot be told of, and is gone all the same.
            if let Ok(network) = Network::parse(input)
                && let Ok(attachment) = environment.attachment(&network)
            {
                tell(&network, &Request::Del(attachment), &grumble);
            }
            Ok(None)
        }
    }
}

/// Nobody has judged the pod: nobody is to let it out either.
fn close(network: &Network, grumble: &impl Fn(&dyn Display)) {
    let file = network.boot();
    match arm(&file) {
        Ok(Armed::Now) => grumble(&format_args!(
            "{}: loaded; until the speaker is there no pod of this node begins a connection out of the cluster",
            file.display()
        )),
        Ok(Armed::Before | Armed::Needless) => {}
        Err(error) => grumble(&format_args!("{}: {error}", file.display())),
    }
}

/// Whether the speaker has judged.
fn tell(network: &Network, request: &Request, grumble: &impl Fn(&dyn Display)) -> bool {
    let (Request::Add(attachment) | Request::Del(attachment)) = request;
    let socket = network.socket();
    let pod = match (&attachment.namespace, &attachment.name) {
        (Some(namespace), Some(name)) => format!("pod {namespace}/{name}"),
        _ => format!("container {}", attachment.container),
    };
    match ask(&socket, request, network.wait()) {
        Ok(Reply { judged: true, .. }) => return true,
        Ok(Reply { reason, .. }) => {
            let reason = reason.unwrap_or_else(|| "no reason given".into());
            grumble(&format_args!("{pod} is not judged yet: {reason}"));
        }
        Err(error) => {
            let why = match error.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    "no speaker listens; while a policy exists, what leaves the cluster waits for it".into()
                }
                io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => {
                    format!("the speaker did not answer within {:?}", network.wait())
                }
                _ => error.to_string(),
            };
            grumble(&format_args!("{pod}: {}: {why}", socket.display()));
        }
    }
    false
}
