//! `landfall egress bindings`.

use std::collections::BTreeMap;

use clap::builder::RangedU64ValueParser;
use landfall_runtime::control::{self, Binding, Bindings, Egress, PodUse, Pods, path};

use super::{parse_pod, parse_policy};
use crate::ask::{Format, SpeakerArgs};
use crate::table::{aligned, or_none};
use crate::{exec, print};

/// How far a copy may be behind before that is said, in milliseconds: a busy gateway's is some tens.
const MAX_LAG_MS: u64 = 1000;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only those of this policy's pods.
    #[arg(long, value_parser = parse_policy)]
    policy: Option<String>,
    /// Only those of this pod.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_pod)]
    pod: Option<String>,
    /// How many each pod has, who has most first; the bytes of its packets, and how many were not let through, by reason.
    #[arg(long)]
    by_pod: bool,
    /// Show so many at most.
    #[arg(
        long,
        default_value_t = 1000,
        value_name = "NUMBER",
        value_parser = RangedU64ValueParser::<usize>::new().range(1..)
    )]
    most: usize,
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Format,
    #[command(flatten)]
    speaker: SpeakerArgs,
}

impl Args {
    /// The same, for a speaker's pod.
    fn words(&self) -> Vec<String> {
        let mut words = vec![
            "egress".to_owned(),
            "bindings".to_owned(),
            format!("--most={}", self.most),
        ];
        words.extend(self.policy.iter().map(|it| format!("--policy={it}")));
        words.extend(self.pod.iter().map(|it| format!("--pod={it}")));
        words.extend(self.by_pod.then(|| "--by-pod".to_owned()));
        words.extend((self.output == Format::Json).then(|| "--output=json".to_owned()));
        words
    }

    /// Names need no escaping.
    fn query(&self, path: &str) -> String {
        let mut query = format!("{path}?most={}", self.most);
        if let Some(policy) = &self.policy {
            query = format!("{query}&policy={policy}");
        }
        if let Some(pod) = &self.pod {
            query = format!("{query}&pod={pod}");
        }
        query
    }
}

/// Prints them; whether there are any.
pub(super) async fn run(args: Args) -> anyhow::Result<bool> {
    if let Some(node) = &args.speaker.node {
        return exec::at(node, &args.speaker, &args.words()).await;
    }
    let socket = &args.speaker.socket;
    let here: Egress = control::get(socket, path::EGRESS).await?;
    let (text, any, copies) = if args.by_pod {
        let found: Pods = control::get(socket, &args.query(path::PODS)).await?;
        let text = match args.output {
            Format::Json => serde_json::to_string_pretty(&found)?,
            Format::Table => pods(&found, &here),
        };
        (text, !found.pods.is_empty(), found.copies)
    } else {
        let found: Bindings = control::get(socket, &args.query(path::BINDINGS)).await?;
        if found.more > 0 && args.output == Format::Table {
            print::note(format_args!("{} more: see --most", found.more));
        }
        let text = match args.output {
            Format::Json => serde_json::to_string_pretty(&found)?,
            Format::Table => table(&found),
        };
        (text, !found.bindings.is_empty(), found.copies)
    };
    let is_json = args.output == Format::Json;
    if any || is_json {
        print::result(text)?;
    }
    if any && is_json {
        return Ok(true);
    }
    if !any {
        print::note(why_none(&here, args.policy.as_deref()));
    }
    if copies > 0 {
        let node = &here.node;
        print::note(format_args!(
            "{copies} more are kept at {node} for the gateway of their addresses, which is another node (`landfall egress list`)."
        ));
    }
    for note in dropped(&here, args.policy.as_deref()) {
        print::note(note);
    }
    if let Some(note) = uncopied(&here, args.policy.as_deref()) {
        print::note(note);
    }
    Ok(any)
}

/// What a node has not let through of each policy, or of this one.
fn dropped(here: &Egress, policy: Option<&str>) -> Vec<String> {
    let policies = here.policies.iter();
    let asked = policies.filter(|(name, _)| policy.is_none_or(|policy| policy == **name));
    let lines = asked.filter_map(|(name, used)| {
        let reasons = reasons(&used.dropped)?;
        Some(format!(
            "Packets of {name} not let through at {}: {reasons}.",
            here.node
        ))
    });
    lines.collect()
}

/// Which policies' flows, or whether this one's, would not outlive the node, or not all of them.
fn uncopied(here: &Egress, policy: Option<&str>) -> Option<String> {
    let policies = here.policies.iter();
    let asked = policies.filter(|(name, _)| policy.is_none_or(|policy| policy == **name));
    let (mut nowhere, mut late) = (Vec::new(), Vec::new());
    for (name, used) in asked {
        let lag = used.replication_lag_milliseconds.unwrap_or(0);
        if used.standbys == Some(0) {
            nowhere.push(name.as_str());
        } else if lag > MAX_LAG_MS {
            let seconds = lag / 1000;
            late.push(format!("{name} ({seconds} s)"));
        }
    }
    let node = &here.node;
    let mut said = Vec::new();
    if !nowhere.is_empty() {
        let list = nowhere.join(", ");
        said.push(format!(
            "No other node has a copy of all flows of {list}: they would end with {node}."
        ));
    }
    if !late.is_empty() {
        let list = late.join(", ");
        said.push(format!(
            "Copies are behind: {list}. What began since would end with {node}."
        ));
    }
    (!said.is_empty()).then(|| said.join(" "))
}

/// Numbers of packets by reason, if there are any.
fn reasons(dropped: &BTreeMap<String, u64>) -> Option<String> {
    let some = dropped.iter().filter(|(_, packets)| **packets > 0);
    let some: Vec<String> = some
        .map(|(reason, packets)| format!("{reason} {packets}"))
        .collect();
    (!some.is_empty()).then(|| some.join(", "))
}

/// So many bytes, in three digits.
fn bytes(number: u64) -> String {
    const UNITS: [&str; 6] = ["kB", "MB", "GB", "TB", "PB", "EB"];
    if number < 1000 {
        return format!("{number} B");
    }
    let power = number.ilog10() / 3;
    let unit = 1000_u64.pow(power);
    let (whole, tenths) = (number / unit, number % unit / (unit / 10));
    let unit = UNITS[power as usize - 1];
    if whole < 100 {
        format!("{whole}.{tenths} {unit}")
    } else {
        format!("{whole} {unit}")
    }
}

/// What a node is, that has no bindings.
fn why_none(here: &Egress, policy: Option<&str>) -> String {
    let node = &here.node;
    if !here.enabled {
        return format!("None: the speaker of {node} runs without --egress.");
    }
    if here.disarmed {
        return format!("None: egress is disarmed on {node} (`landfall egress arm` ends that).");
    }
    if let Some(policy) = policy.filter(|policy| !here.policies.contains_key(*policy)) {
        return format!(
            "None: {node} knows no EgressPolicy {policy} (`landfall egress list` says which there are)."
        );
    }
    if here.gateway_of.is_empty() {
        return format!(
            "None: {node} is no policy's gateway (`landfall egress list` says which nodes are)."
        );
    }
    let of = here.gateway_of.join(", ");
    format!("None. {node} is the gateway of {of}.")
}

fn table(found: &Bindings) -> String {
    let row = |it: &Binding| {
        vec![
            or_none(it.pod.as_ref()),
            it.pod_address.to_string(),
            it.egress.to_string(),
            it.remote.to_string(),
            it.protocol.clone(),
            format!("{}s", it.idle_seconds),
            it.state.clone(),
            or_none(it.policy.as_ref()),
        ]
    };
    let rows: Vec<Vec<String>> = found.bindings.iter().map(row).collect();
    let header = [
        "POD",
        "FROM",
        "LEAVES BY",
        "REMOTE",
        "PROTOCOL",
        "IDLE",
        "STATE",
        "POLICY",
    ];
    aligned(&header, &rows)
}

fn pods(found: &Pods, here: &Egress) -> String {
    let row = |it: &PodUse| {
        let policy = it.policy.as_ref().and_then(|name| here.policies.get(name));
        let quota = policy.and_then(|policy| policy.quota_per_pod);
        let quota = quota.map_or(String::new(), |quota| format!("/{quota}"));
        let traffic = it.traffic.as_ref();
        vec![
            it.pod.clone(),
            or_none(it.policy.as_ref()),
            it.bindings.to_string(),
            it.resting.to_string(),
            format!("{}{quota}", it.most_to_one),
            or_none(it.busiest),
            or_none(traffic.map(|traffic| bytes(traffic.out_bytes))),
            or_none(traffic.map(|traffic| bytes(traffic.in_bytes))),
            or_none(traffic.and_then(|traffic| reasons(&traffic.dropped))),
        ]
    };
    let rows: Vec<Vec<String>> = found.pods.iter().map(row).collect();
    let header = [
        "POD",
        "POLICY",
        "BINDINGS",
        "RESTING",
        "MOST TO ONE",
        "REMOTE",
        "OUT",
        "IN",
        "DROPPED",
    ];
    aligned(&header, &rows)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn bindings_are_lines() {
        let found = Bindings {
            node: "n1".into(),
            bindings: vec![Binding {
                policy: Some("mail".into()),
                pod: None,
                pod_address: "10.0.0.5:4000".parse().unwrap(),
                egress: "192.0.2.32:4000".parse().unwrap(),
                remote: "198.51.100.7:25".parse().unwrap(),
                protocol: "TCP".into(),
                idle_seconds: 7,
                state: "established".into(),
            }],
            more: 0,
            copies: 0,
        };
        let text = table(&found);
        let lines: Vec<&str> = text.lines().collect();
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        let expected = [
            "-",
            "10.0.0.5:4000",
            "192.0.2.32:4000",
            "198.51.100.7:25",
            "TCP",
            "7s",
            "established",
            "mail",
        ];
        assert_eq!(words, expected);
        assert_eq!(lines[0].find("STATE"), lines[1].find("established"));
    }

    #[test]
    fn bytes_are_short() {
        for (number, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1_000, "1.0 kB"),
            (99_999, "99.9 kB"),
            (100_000, "100 kB"),
            (123_456_789, "123 MB"),
            (u64::MAX, "18.4 EB"),
        ] {
            assert_eq!(bytes(number), text);
        }
    }

    #[test]
    fn what_was_dropped_is_said() {
        let mut here = Egress {
            node: "n1".into(),
            ..Egress::default()
        };
        for (policy, dropped) in [
            ("mail", [("bandwidth", 12), ("quota", 3), ("others", 0)]),
            ("shop", [("bandwidth", 0), ("quota", 0), ("others", 0)]),
        ] {
            let dropped = dropped.map(|(reason, packets)| (reason.to_owned(), packets));
            let used = control::PolicyUse {
                dropped: dropped.into(),
                ..control::PolicyUse::default()
            };
            here.policies.insert(policy.into(), used);
        }
        let expected = ["Packets of mail not let through at n1: bandwidth 12, quota 3."];
        assert_eq!(dropped(&here, None), expected);
        assert_eq!(dropped(&here, Some("mail")), expected);
        assert!(dropped(&here, Some("shop")).is_empty());
    }

    #[test]
    fn what_no_other_node_has_is_said() {
        let mut here = Egress {
            node: "n1".into(),
            ..Egress::default()
        };
        for (policy, standbys, lag) in [
            ("elsewhere", None, None),
            ("lone", Some(0), Some(0)),
            ("mail", Some(1), Some(40)),
            ("shop", Some(1), Some(2_300)),
        ] {
            let used = control::PolicyUse {
                standbys,
                replication_lag_milliseconds: lag,
                ..control::PolicyUse::default()
            };
            here.policies.insert(policy.into(), used);
        }
        let lone = "No other node has a copy of all flows of lone: they would end with n1.";
        let shop = "Copies are behind: shop (2 s). What began since would end with n1.";
        assert_eq!(uncopied(&here, None), Some(format!("{lone} {shop}")));
        assert_eq!(uncopied(&here, Some("lone")).as_deref(), Some(lone));
        for policy in ["elsewhere", "mail"] {
            assert_eq!(uncopied(&here, Some(policy)), None);
        }
    }

    #[test]
    fn why_there_are_none_is_said() {
        let mut here = Egress {
            node: "n1".into(),
            enabled: true,
            ..Egress::default()
        };
        assert!(why_none(&here, None).contains("no policy's gateway"));
        here.gateway_of.push("mail".into());
        assert!(why_none(&here, None).contains("the gateway of mail"));
        here.policies
            .insert("mail".into(), control::PolicyUse::default());
        let of = |policy| why_none(&here, Some(policy));
        assert!(of("mail").contains("the gateway of mail"));
        assert!(of("male").contains("no EgressPolicy male"));
        here.disarmed = true;
        assert!(why_none(&here, None).contains("disarmed"));
        here.enabled = false;
        assert!(why_none(&here, None).contains("without --egress"));
    }
}
