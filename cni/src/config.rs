//! What the container runtime says: the environment, and the network configuration on the standard input.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use serde::Deserialize;
use serde_json::Value;

use crate::boot::BOOT;
use crate::call::{Attachment, SOCKET, WAIT};
use crate::error::CniError;

/// The network configuration, as far as it is read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Network {
    /// The version of the specification that the result is to follow.
    #[serde(default)]
    pub cni_version: String,
    /// The result of the plugins before, which is handed on.
    pub prev_result: Option<Value>,
    /// Where the speaker listens; [`SOCKET`] unless it is named.
    pub socket: Option<PathBuf>,
    /// What to load while no speaker judges; [`BOOT`] unless it is named.
    pub boot: Option<PathBuf>,
    /// How long a pod waits for it, in milliseconds; at most 10 000, [`WAIT`] unless it is named.
    pub wait_milliseconds: Option<u64>,
}

impl Network {
    /// From the standard input.
    pub fn parse(text: &str) -> Result<Self, CniError> {
        serde_json::from_str(text).map_err(|error| CniError::Unreadable(error.to_string()))
    }

    /// Where the speaker listens.
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| SOCKET.into())
    }

    /// What to load while it does not judge.
    pub fn boot(&self) -> PathBuf {
        self.boot.clone().unwrap_or_else(|| BOOT.into())
    }

    /// How long to wait for it.
    pub fn wait(&self) -> Duration {
        self.wait_milliseconds
            .map_or(WAIT, |wait| Duration::from_millis(wait.min(10_000)))
    }

    /// The addresses that the plugins before have given, of whatever version their result is.
    fn addresses(&self) -> Vec<IpAddr> {
        let result = self.prev_result.as_ref();
        let listed = result.and_then(|result| result["ips"].as_array());
        let listed = listed.into_iter().flatten().map(|ip| &ip["address"]);
        // Before version 0.3.0.
        let named = ["ip4", "ip6"]
            .into_iter()
            .filter_map(|family| result.map(|result| &result[family]["ip"]));
        listed
            .chain(named)
            .filter_map(|address| address.as_str())
            .filter_map(|text| match text.parse::<IpNet>() {
                Ok(network) => Some(network.addr()),
                Err(_) => text.parse().ok(),
            })
            .collect()
    }

    /// The interfaces outside the pod.
    fn host_interfaces(&self) -> Vec<String> {
        let result = self.prev_result.as_ref();
        let listed = result.and_then(|result| result["interfaces"].as_array());
        listed
            .into_iter()
            .flatten()
            .filter(|interface| interface["sandbox"].as_str().unwrap_or_default().is_empty())
            .filter_map(|interface| interface["name"].as_str().map(str::to_owned))
            .collect()
    }
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// An interface is added.
    Add,
    /// One is removed.
    Del,
    /// Is all as it was left?
    Check,
    /// Attachments that are not named are gone.
    Gc,
    /// Is the plugin ready?
    Status,
    /// Which versions are understood?
    Version,
}

/// The environment.
#[derive(Clone, Debug, Default)]
pub struct Environment(pub BTreeMap<String, String>);

impl Environment {
    fn get(&self, name: &'static str) -> Option<&str> {
        self.0
            .get(name)
            .map(String::as_str)
            .filter(|value| !value.is_empty())
    }

    fn required(&self, name: &'static str) -> Result<&str, CniError> {
        self.get(name)
            .ok_or_else(|| CniError::Environment(name, String::new()))
    }

    /// `CNI_COMMAND`.
    pub fn command(&self) -> Result<Command, CniError> {
        Ok(match self.required("CNI_COMMAND")? {
            "ADD" => Command::Add,
            "DEL" => Command::Del,
            "CHECK" => Command::Check,
            "GC" => Command::Gc,
            "STATUS" => Command::Status,
            "VERSION" => Command::Version,
            other => return Err(CniError::Environment("CNI_COMMAND", other.into())),
        })
    }

    /// The interface that this is about, with what the plugins before have made of it.
    pub fn attachment(&self, network: &Network) -> Result<Attachment, CniError> {
        // `KEY=value;KEY=value`
        let arguments: BTreeMap<&str, &str> = self
            .get("CNI_ARGS")
            .unwrap_or_default()
            .split(';')
            .filter_map(|pair| pair.split_once('='))
            .collect();
        let argument = |key: &str| arguments.get(key).map(|value| (*value).to_owned());
        Ok(Attachment {
            container: self.required("CNI_CONTAINERID")?.into(),
            interface: self.required("CNI_IFNAME")?.into(),
            namespace: argument("K8S_POD_NAMESPACE"),
            name: argument("K8S_POD_NAME"),
            uid: argument("K8S_POD_UID"),
            addresses: network.addresses(),
            host_interfaces: network.host_interfaces(),
        })
    }
}
