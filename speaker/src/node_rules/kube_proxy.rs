//! What kube-proxy serves on this node: the keys of its nftables map `service-ips`.

use std::collections::HashSet;
use std::net::IpAddr;

use landfall_core::model::Protocol;
use serde_json::Value;

use super::tool::run;

/// A port of an address that kube-proxy has rules for.
pub(super) type Served = HashSet<(IpAddr, Protocol, u16)>;

/// Reads the maps of both families; `None` when there is no kube-proxy in nftables mode here.
pub(super) async fn read() -> Option<Served> {
    let mut served = None;
    for family in ["ip", "ip6"] {
        if let Ok(printed) = run(
            "nft",
            &["-j", "list", "map", family, "kube-proxy", "service-ips"],
            "",
        )
        .await
        {
            parse(&printed, served.get_or_insert_default());
        }
    }
    served
}

/// Keys are `address . protocol . port`.
fn parse(printed: &str, served: &mut Served) {
    let Ok(document) = serde_json::from_str::<Value>(printed) else {
        return;
    };
    let elements = document["nftables"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|object| object["map"]["elem"].as_array())
        .flatten();
    for element in elements {
        let key = &element[0];
        // An element with a comment or a timeout is wrapped once more.
        let key = if key["elem"].is_object() {
            &key["elem"]["val"]
        } else {
            key
        };
        let Some([address, protocol, port]) = key["concat"].as_array().map(Vec::as_slice) else {
            continue;
        };
        let protocol = match protocol.as_str() {
            Some("tcp") => Protocol::Tcp,
            Some("udp") => Protocol::Udp,
            Some("sctp") => Protocol::Sctp,
            _ => continue,
        };
        let address = address.as_str().and_then(|text| text.parse().ok());
        let port = port.as_u64().and_then(|port| u16::try_from(port).ok());
        if let (Some(address), Some(port)) = (address, port) {
            served.insert((address, protocol, port));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_plain_and_commented_elements() {
        let printed = r#"{"nftables": [{"metainfo": {"version": "1.0.6"}}, {"map": {"family": "ip", "name": "service-ips",
            "table": "kube-proxy", "type": ["ipv4_addr", "inet_proto", "inet_service"], "handle": 9, "map": "verdict",
            "elem": [
              [{"concat": ["10.88.0.200", "tcp", 80]}, {"goto": {"target": "external-x"}}],
              [{"elem": {"val": {"concat": ["10.88.0.201", "udp", 53]}, "comment": "dns"}}, {"goto": {"target": "y"}}]
            ]}}]}"#;
        let mut served = Served::new();
        parse(printed, &mut served);
        assert!(served.contains(&("10.88.0.200".parse().unwrap(), Protocol::Tcp, 80)));
        assert!(served.contains(&("10.88.0.201".parse().unwrap(), Protocol::Udp, 53)));
        assert_eq!(served.len(), 2);
    }

    #[test]
    fn nonsense_is_nothing() {
        let mut served = Served::new();
        parse("not json", &mut served);
        parse(
            r#"{"nftables": [{"map": {"elem": [[{"concat": [1]}], 7]}}]}"#,
            &mut served,
        );
        assert!(served.is_empty());
    }
}
