//! `landfall egress explain`.

use std::net::{IpAddr, SocketAddr};

use landfall_core::egress::{Explanation, Outcome};
use landfall_core::model::ObjectKey;
use serde_json::json;

use super::cluster::read;
use super::parse_pod;
use crate::ask::{ApiArgs, Format};
use crate::print;
use crate::table::aligned;

// Without line breaks: clap breaks lines where the terminal does.
const KNOWN: &str = "\
It says what controller and speakers conclude from the objects of the API. What only speakers know of each other is not \
asked: an address of a node that its Node object does not list stays in the cluster, and counts as outside here.";

#[derive(Debug, clap::Args)]
#[command(after_help = KNOWN)]
pub(super) struct Args {
    /// Whose packet.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = parse_pod)]
    pod: String,
    /// Where to: an address, or an address and a port (`198.51.100.7:25`, `[2001:db8::7]:25`).
    #[arg(long, value_name = "ADDRESS[:PORT]", value_parser = parse_to)]
    to: To,
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Format,
    #[command(flatten)]
    api: ApiArgs,
}

/// Where a packet goes. Which port makes no difference to policies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct To(IpAddr);

fn parse_to(text: &str) -> Result<To, String> {
    let address = text.parse::<IpAddr>();
    let address = address.or_else(|_| text.parse::<SocketAddr>().map(|it| it.ip()));
    address
        .map(To)
        .map_err(|_| "write an address, as 198.51.100.7, 198.51.100.7:25 or [2001:db8::7]:25; names are not looked up".to_owned())
}

/// Prints what becomes of it; whether it is not dropped.
pub(super) async fn run(args: Args) -> anyhow::Result<bool> {
    let client = args.api.client().await?;
    let mut read = read(&client).await?;
    read.read_networks(&client).await?;
    let (namespace, name) = args.pod.split_once('/').unwrap_or_default();
    let pod = ObjectKey::new(namespace, name);
    let Some(found) = read.index.explain(&pod, args.to.0, &read.cluster) else {
        anyhow::bail!(
            "no pod {pod} has an address: it is not there, has not begun, or has ended (kubectl get pod -n {namespace} {name})"
        );
    };
    match args.output {
        Format::Json => print::result(serde_json::to_string_pretty(&as_json(&found))?)?,
        Format::Table => print::result(as_text(&found))?,
    }
    Ok(!matches!(found.outcome, Outcome::Dropped { .. }))
}

fn as_text(found: &Explanation) -> String {
    let steps = found.steps.iter();
    let rows: Vec<Vec<String>> = steps
        .map(|(topic, text)| vec![topic.to_string(), text.clone()])
        .collect();
    let table = aligned(&["", ""], &rows);
    format!(
        "{}\n\nA flow that it begins: {}.",
        table.trim_start(),
        found.outcome
    )
}

fn as_json(found: &Explanation) -> serde_json::Value {
    let steps = found.steps.iter();
    let steps: Vec<_> = steps
        .map(|(topic, text)| json!({"about": topic.to_string(), "found": text}))
        .collect();
    let mut said = match &found.outcome {
        Outcome::Leaves {
            policy,
            address,
            gateway,
        } => json!({"outcome": "Leaves", "policy": policy, "address": address, "gateway": gateway}),
        Outcome::Stays => json!({"outcome": "Stays"}),
        Outcome::Plain => json!({"outcome": "Plain"}),
        Outcome::Dropped { policy, .. } => json!({"outcome": "Dropped", "policy": policy}),
    };
    said["message"] = found.outcome.to_string().into();
    said["steps"] = steps.into();
    said
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use landfall_core::egress::Topic;

    #[test]
    fn destinations_are_read_with_and_without_ports() {
        let of = |text| parse_to(text).map(|to| to.0.to_string());
        assert_eq!(of("198.51.100.7").unwrap(), "198.51.100.7");
        assert_eq!(of("198.51.100.7:25").unwrap(), "198.51.100.7");
        assert_eq!(of("2001:db8::7").unwrap(), "2001:db8::7");
        assert_eq!(of("[2001:db8::7]:25").unwrap(), "2001:db8::7");
        assert!(
            of("mail.example.org:25")
                .unwrap_err()
                .contains("not looked up")
        );
    }

    #[test]
    fn it_reads_as_text_and_as_json() {
        let found = Explanation {
            steps: vec![
                (Topic::Pod, "a/mta on n1: 10.0.0.5".into()),
                (
                    Topic::Destination,
                    "198.51.100.7 is outside the cluster".into(),
                ),
            ],
            outcome: Outcome::Dropped {
                policy: Some("mail".into()),
                why: "there is no gateway".into(),
            },
        };
        let expected = "pod           a/mta on n1: 10.0.0.5\n\
                        destination   198.51.100.7 is outside the cluster\n\n\
                        A flow that it begins: it is dropped: there is no gateway.";
        assert_eq!(as_text(&found), expected);
        let json = as_json(&found);
        assert_eq!(json["outcome"], "Dropped");
        assert_eq!(json["policy"], "mail");
        assert_eq!(json["steps"][1]["about"], "destination");
    }
}
