//! Annotations on Services: Landfall's own, and `MetalLB`'s read as aliases.

use std::collections::BTreeMap;
use std::net::IpAddr;

use landfall_core::ip::Family;
use landfall_core::model::AddressRequest;

/// Explicit addresses, separated by commas: at most one a family.
pub const IPS: &str = "landfall.dev/ips";
/// The pool to take from.
pub const POOL: &str = "landfall.dev/pool";
/// Services with the same key may share an address, if their ports are disjoint.
pub const SHARING_KEY: &str = "landfall.dev/sharing-key";

/// `ports`: a client's UDP flows are told apart by their ports, and may go to different nodes. For Services whose
/// datagrams are never fragmented.
pub const UDP_HASH: &str = "landfall.dev/udp-hash";

const IPS_ALIASES: [&str; 3] = [
    IPS,
    "metallb.io/loadBalancerIPs",
    "metallb.universe.tf/loadBalancerIPs",
];
const POOL_ALIASES: [&str; 3] = [
    POOL,
    "metallb.io/address-pool",
    "metallb.universe.tf/address-pool",
];
const SHARING_KEY_ALIASES: [&str; 3] = [
    SHARING_KEY,
    "metallb.io/allow-shared-ip",
    "metallb.universe.tf/allow-shared-ip",
];

/// What a Service asks for, by its annotations and `spec.loadBalancerIP`.
///
/// What cannot be understood is said in [`AddressRequest::malformed`], so that nothing is allocated by half a wish.
pub fn address_request(
    annotations: &BTreeMap<String, String>,
    load_balancer_ip: Option<&str>,
) -> AddressRequest {
    let mut request = AddressRequest::default();
    let mut wrong = Vec::new();

    let ips = pick(annotations, &IPS_ALIASES, &mut wrong);
    let pool = pick(annotations, &POOL_ALIASES, &mut wrong);
    let sharing_key = pick(annotations, &SHARING_KEY_ALIASES, &mut wrong);
    let field = load_balancer_ip.filter(|text| !text.is_empty());

    let wish = match (ips, field) {
        (Some((key, text)), Some(field)) if text.trim() != field => {
            wrong.push(format!(
                "annotation {key} asks for {text} and spec.loadBalancerIP for {field}: remove one of them"
            ));
            None
        }
        (Some((key, text)), _) => Some((format!("annotation {key}"), text)),
        (None, Some(field)) => Some(("spec.loadBalancerIP".to_owned(), field)),
        (None, None) => None,
    };
    if let Some((source, text)) = wish {
        match parse_addresses(text) {
            Ok(addresses) => request.addresses = addresses,
            Err(problem) => wrong.push(format!("{source}: {problem}")),
        }
    }
    request.pool = pool.map(|(_, name)| name.trim().to_owned());
    request.sharing_key = sharing_key.map(|(_, key)| key.to_owned());
    request.malformed = (!wrong.is_empty()).then(|| wrong.join("; "));
    request
}

/// The value under the first of `keys` that is set; the others must not contradict it.
fn pick<'a>(
    annotations: &'a BTreeMap<String, String>,
    keys: &[&'static str],
    wrong: &mut Vec<String>,
) -> Option<(&'static str, &'a str)> {
    let mut found: Option<(&'static str, &'a str)> = None;
    for key in keys {
        let Some(value) = annotations.get(*key) else {
            continue;
        };
        match found {
            Some((first, kept)) if kept != value => wrong.push(format!(
                "annotations {first}={kept:?} and {key}={value:?} contradict each other: remove one of them"
            )),
            Some(_) => {}
            None => found = Some((key, value)),
        }
    }
    found.filter(|(_, value)| !value.trim().is_empty())
}

fn parse_addresses(text: &str) -> Result<Vec<IpAddr>, String> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for part in text.split(',').map(str::trim) {
        let address: IpAddr = part.parse().map_err(|_| {
            format!("{part:?} is no IP address: write one address a family, separated by a comma")
        })?;
        if addresses
            .iter()
            .any(|other| Family::of(*other) == Family::of(address))
        {
            return Err(format!(
                "{text:?} asks for two {} addresses: a Service has at most one a family",
                Family::of(address)
            ));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_request(annotations: &[(&str, &str)], field: Option<&str>) -> AddressRequest {
        let annotations = annotations
            .iter()
            .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
            .collect();
        address_request(&annotations, field)
    }

    #[test]
    fn reads_aliases() {
        for key in IPS_ALIASES {
            let request = mk_request(&[(key, "192.0.2.1, fd00::1")], None);
            assert_eq!(request.addresses.len(), 2, "{key}");
            assert_eq!(request.malformed, None);
        }
        let request = mk_request(
            &[
                ("metallb.io/address-pool", "mail"),
                ("metallb.universe.tf/allow-shared-ip", "k"),
            ],
            None,
        );
        assert_eq!(request.pool.as_deref(), Some("mail"));
        assert_eq!(request.sharing_key.as_deref(), Some("k"));
    }

    #[test]
    fn field_is_a_wish_too() {
        let request = mk_request(&[], Some("192.0.2.1"));
        assert_eq!(request.addresses, ["192.0.2.1".parse::<IpAddr>().unwrap()]);
        assert_eq!(mk_request(&[], Some("")), AddressRequest::default());
    }

    #[test]
    fn contradictions_are_refused() {
        for (annotations, field, expected) in [
            (vec![(IPS, "192.0.2.1")], Some("192.0.2.2"), "remove one"),
            (
                vec![(POOL, "a"), ("metallb.io/address-pool", "b")],
                None,
                "contradict",
            ),
            (vec![(IPS, "192.0.2.300")], None, "no IP address"),
            (
                vec![(IPS, "192.0.2.1,192.0.2.2")],
                None,
                "at most one a family",
            ),
        ] {
            let malformed = mk_request(&annotations, field).malformed.unwrap();
            assert!(malformed.contains(expected), "{malformed}");
        }
    }
}
