//! `landfall egress` and `landfall doctor` against the real thing: what they say, and what disarming a gateway does.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use k8s_openapi::api::events::v1::Event;
use kube::Api;
use kube::api::ListParams;
use landfall_lab::{Lab, Pod, Program};
use landfall_tests::flows::Flow;
use landfall_tests::tenants::{self, near};
use landfall_tests::{Cluster, chart, until, until_some};
use serde_json::Value;

use super::{By, TRY, egress, follow, outside};

/// The command, as it runs in a speaker's pod: with that one's rights.
struct Cli<'a> {
    cluster: &'a Cluster,
    path: PathBuf,
}

impl<'a> Cli<'a> {
    fn new(cluster: &'a Cluster) -> Self {
        Self {
            cluster,
            path: Program::landfall("landfall").unwrap().path,
        }
    }

    fn run(&self, node: &str, args: &[&str]) -> Output {
        let node = self.cluster.lab().node(node).unwrap();
        let mut command: Command = node.netns.command(&self.path);
        command.args(args).output().unwrap()
    }

    /// What reads the API.
    fn reads(&self, args: &[&str]) -> (i32, String) {
        let kubeconfig = self.cluster.speaker_kubeconfig().display().to_string();
        let api = ["--kubeconfig", &kubeconfig];
        ended(&self.run("node1", &[&["egress"], args, &api].concat()))
    }

    /// What asks the speaker of a node.
    fn asks(&self, node: &str, args: &[&str]) -> (i32, String) {
        self.speaker(node, &[&["egress"], args].concat())
    }

    fn speaker(&self, node: &str, args: &[&str]) -> (i32, String) {
        let socket = self.cluster.lab().control_socket(node);
        let socket = ["--socket", &socket.display().to_string()];
        ended(&self.run(node, &[args, &socket].concat()))
    }

    /// The policy, as it is listed now. Statuses follow a change a moment later: until then the exit code is 1.
    fn policies(&self) -> Value {
        let (_, text) = self.reads(&["list", "-o", "json"]);
        let policies: Value = serde_json::from_str(&text).unwrap();
        policies["policies"][0].clone()
    }

    fn gateway(&self) -> String {
        let gateway = self.policies()["gateway"].clone();
        gateway.as_str().unwrap_or_default().to_owned()
    }

    fn explains(&self, pod: &Pod, to: IpAddr) -> (i32, String) {
        let pod = format!("default/{}", pod.name);
        self.reads(&["explain", "--pod", &pod, "--to", &to.to_string()])
    }
}

/// The exit code, and all that was said.
fn ended(output: &Output) -> (i32, String) {
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// Asks, while pods leave by their policy's addresses.
pub(super) fn says_what_is(cluster: &Cluster) {
    let cli = Cli::new(cluster);
    let lab = cluster.lab();
    let text = until_some("the policy to be in force", || {
        let (code, text) = cli.reads(&["list"]);
        (code == 0).then_some(text)
    });
    let policy = cli.policies();
    assert_eq!(policy["ready"], true);
    assert!(text.contains("GatewayElected"), "{text}");
    assert_eq!(policy["name"], "mail");
    assert_eq!(policy["pods"], lab.pods().count());
    let addresses: Vec<String> = egress().iter().map(ToString::to_string).collect();
    assert_eq!(policy["addresses"], Value::from(addresses));
    let gateway = cli.gateway();

    let pod = lab.pods().find(|pod| pod.node != gateway).unwrap();
    for server in outside() {
        let by = egress()
            .into_iter()
            .find(|it| it.is_ipv4() == server.is_ipv4());
        let expected = format!("it leaves by {} at node {gateway}", by.unwrap());
        until(&expected, || match cli.explains(pod, server.ip()) {
            (0, text) if text.contains(&expected) => Ok(()),
            other => Err(other),
        });
    }
    let (code, text) = cli.explains(pod, egress()[0]);
    assert!(
        code == 0 && text.contains("a VIP of this cluster"),
        "{text}"
    );
    let nobody = ["explain", "--pod", "default/nobody", "--to", "203.0.113.1"];
    assert_eq!(cli.reads(&nobody).0, 1);

    holds_a_flow(&cli, pod, &gateway);
}

/// A flow that is open is shown at its gateway, and counted in the status.
fn holds_a_flow(cli: &Cli<'_>, pod: &Pod, gateway: &str) {
    let server: SocketAddr = near()[0];
    let _flow = Flow::open_within(&pod.netns, server, TRY).unwrap();
    let name = format!("default/{}", pod.name);
    let of_pod = ["bindings", "--pod", &name, "-o", "json"];
    let own = until("the flow to be shown", || {
        let (_, text) = cli.asks(gateway, &of_pod);
        let found: Value = serde_json::from_str(&text).map_err(|_| text.clone())?;
        let mut bindings = found["bindings"].as_array().into_iter().flatten();
        let own = bindings.find(|it| it["state"] == "established");
        own.cloned().ok_or(text)
    });
    assert_eq!(own["pod"], *name);
    assert_eq!(own["policy"], "mail");
    assert_eq!(own["remote"], server.to_string());
    assert_eq!(own["protocol"], "TCP");
    let by: SocketAddr = own["egress"].as_str().unwrap().parse().unwrap();
    assert_eq!(by.ip(), egress()[0]);
    let (code, text) = cli.asks(gateway, &["bindings", "--by-pod"]);
    assert!(code == 0 && text.contains(&name), "{text}");
    // Elsewhere there are none, and why is said.
    let (code, text) = cli.asks(&pod.node, &["bindings"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("no policy's gateway"), "{text}");
    // Who stands by has it, and says so of the copy.
    let standby = until_some("a standby", || {
        cli.policies()["standby"].as_str().map(str::to_owned)
    });
    let text = until_some("the copy", || {
        let (code, text) = cli.asks(&standby, &["bindings", "--pod", &name]);
        assert_eq!(code, 1, "{text}");
        text.contains("kept at").then_some(text)
    });
    assert!(!text.contains("established"), "{text}");
    let ports = until_some("ports in use in the status", || {
        cli.policies()["portsInUse"]
            .as_u64()
            .filter(|ports| *ports > 0)
    });
    println!("{ports} ports in use, says the status");
}

/// A node has no problem, until somebody else uses its bits of the packet mark.
pub(super) fn names_problems(cluster: &Cluster) {
    let cli = Cli::new(cluster);
    let node = "node1";
    let (code, text) = cli.speaker(node, &["doctor"]);
    assert_eq!(code, 0, "{text}");
    println!("{text}");
    for said in [
        "attached by TCX",
        "on; the gateway's programs are attached",
        "nobody else uses bits 0x30003000",
        "all 3 are heard",
        "node1: no problem",
    ] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }
    let netns = &cluster.lab().node(node).unwrap().netns;
    let rule = "meta mark set meta mark | 0x20000000";
    let table = format!("table inet other {{\nchain cali-mine {{\n{rule}\n}}\n}}");
    netns.nft(&table).unwrap();
    let (code, text) = cli.speaker(node, &["doctor", "-o", "json"]);
    netns.nft("delete table inet other").unwrap();
    assert_eq!(code, 1, "{text}");
    let found: Value = serde_json::from_str(&text).unwrap();
    let findings = found["findings"].as_array().unwrap();
    let problems: Vec<&Value> = findings
        .iter()
        .filter(|it| it["verdict"] == "problem")
        .collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    let said = problems[0]["found"].as_str().unwrap();
    assert!(said.starts_with("Calico changes bits 0x20000000"), "{said}");
}

/// Disarms the gateway: another takes over, and only the pods of the node itself leave by its address. Then arms it.
pub(super) fn disarms(cluster: &Cluster) {
    let cli = Cli::new(cluster);
    let lab: &Lab = cluster.lab();
    let first = cli.gateway();
    let (code, text) = cli.asks(&first, &["disarm"]);
    assert_eq!(code, 0, "{text}");
    for said in [
        "EGRESS IS DISARMED",
        "Another node is the gateway now of: mail",
    ] {
        assert!(text.contains(said), "{said} is not in\n{text}");
    }
    let (own, others): (Vec<&Pod>, Vec<&Pod>) = lab.pods().partition(|pod| pod.node == first);
    follow(lab, &others, By::Policy, By::Policy);
    follow(lab, &own, By::Policy, By::Node);
    let second = until_some("another gateway", || {
        Some(cli.gateway()).filter(|it| *it != first && !it.is_empty())
    });
    println!("{first} is disarmed, {second} is the gateway");
    let netns = &lab.node(&first).unwrap().netns;
    // They go in two steps: first whose tenant each pod is.
    until("no rule to be left", || {
        let table = netns.exec("nft list table inet landfall").unwrap();
        let is_left = table.contains("egress-judge");
        if is_left { Err(table) } else { Ok(()) }
    });
    let (code, text) = cli.asks(&first, &["arm"]);
    assert_eq!((code, text), (0, format!("{first}: armed\n")));
    follow(lab, &own, By::Node, By::Policy);
    assert_eq!(cli.gateway(), second, "it takes nothing back");
}

/// A pod of a policy that no node may be the gateway of reaches nothing; the command says why, and an Event of the policy
/// says that there were packets.
pub(super) fn names_what_is_dropped(cluster: &Cluster) {
    let cli = Cli::new(cluster);
    let lab = cluster.lab();
    let pod = lab.pods().next().unwrap();
    let policy = format!(
        "
apiVersion: landfall.dev/v1alpha1
kind: EgressPolicy
metadata: {{name: nowhere}}
spec:
  podSelector: {{matchLabels: {{app: echo, pod: {}}}}}
  egressIPs: {{pool: out}}
  gateways: {{nodeSelector: {{matchLabels: {{no: such}}}}}}
",
        pod.name
    );
    chart::apply(cluster.plane(), &policy).unwrap();
    let server = near()[0];
    until_some("the policy without gateway", || {
        let (code, text) = cli.explains(pod, server.ip());
        (code == 1 && text.contains("not selected by the EgressPolicy's gateways.nodeSelector"))
            .then_some(())
    });
    until_some("packets are dropped", || {
        Flow::open_within(&pod.netns, server, TRY).err()
    });
    until("the list to say so", || match cli.reads(&["list"]) {
        (1, text) if text.contains("NoGateway") => Ok(()),
        other => Err(other),
    });
    let note = until_some("the Event", || {
        // More of them, should the first have come before the table was written.
        let _ = Flow::open_within(&pod.netns, server, Duration::from_millis(100));
        dropped(cluster)
    });
    println!("{note}");
    assert!(note.starts_with(&format!("node {} dropped ", pod.node)));
    tenants::delete(cluster, "nowhere").unwrap();
    follow(lab, &[pod], By::Policy, By::Policy);
}

/// What the Event of dropped packets says.
fn dropped(cluster: &Cluster) -> Option<String> {
    let events = cluster.block_on(async {
        let events: Api<Event> = Api::namespaced(cluster.client().await.unwrap(), "default");
        events.list(&ListParams::default()).await.unwrap()
    });
    let mut events = events.items.into_iter();
    let found = events.find(|event| {
        let regarding = event.regarding.as_ref();
        let name = regarding.and_then(|it| it.name.as_deref());
        event.reason.as_deref() == Some("PacketsDroppedNoGateway") && name == Some("nowhere")
    })?;
    let uid = found.regarding.and_then(|it| it.uid);
    assert!(uid.is_some(), "kubectl describe finds Events by it");
    found.note
}
