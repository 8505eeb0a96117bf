//! What a firewall in the forward hook of a pod's node says holds, for steered packets too.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpStream};
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Duration;

use landfall_lab::manifests::LINES;
use landfall_lab::{Netns, Network};

use super::cluster::{Cluster, PATIENCE, mk_three, vips};
use super::flow::{Flow, all_alive, elsewhere, open_from};

/// How many flows each client has with a VIP: all three nodes have some of them.
const FLOWS: usize = 30;
/// For how long silence is silence.
const SILENCE: Duration = Duration::from_secs(2);

/// Loads a chain with these rules in the forward hook, as a CNI plugin that enforces policies does.
fn forward(node: &Netns, rules: &str) {
    node.nft(&format!(
        "table inet firewall
        delete table inet firewall
        table inet firewall {{
            chain forward {{
                type filter hook forward priority filter
                {rules}
            }}
        }}"
    ))
    .unwrap();
}

/// Connects many times at once: the flows that came about, and why the others did not.
fn connect(from: &Netns, vip: IpAddr) -> (Vec<Flow>, Vec<ErrorKind>) {
    let to = (vip, LINES).into();
    let connected: Vec<_> = from.run(|| {
        thread::scope(|scope| {
            let threads: Vec<_> = (0..FLOWS)
                .map(|_| scope.spawn(|| TcpStream::connect_timeout(&to, SILENCE)))
                .collect();
            let results = threads.into_iter().map(|thread| thread.join().unwrap());
            results.collect()
        })
    });
    let mut flows = Vec::new();
    let mut errors = Vec::new();
    for result in connected {
        match result {
            Ok(stream) => flows.push(Flow::over(stream).unwrap()),
            Err(error) => errors.push(error.kind()),
        }
    }
    (flows, errors)
}

/// A client is cut off from the pods of one node, in the middle of its flows: it alone, and from them alone.
#[test]
fn a_drop_by_client_holds() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    let node = lab.nodes().iter().find(|node| node.name != leader).unwrap();
    for (vip, denied) in vips().into_iter().zip(Network::Lan.both(100)) {
        let (mut cut, mut rest): (Vec<Flow>, Vec<Flow>) = open_from(lab.client(), vip, FLOWS)
            .into_iter()
            .partition(|flow| flow.node() == node.name);
        rest.extend(open_from(lab.remote(), vip, FLOWS));
        assert!(!cut.is_empty() && rest.iter().any(|flow| flow.node() == node.name));

        let family = if vip.is_ipv4() { "ip" } else { "ip6" };
        forward(&node.netns, &format!("{family} saddr {denied} drop"));
        for flow in &mut cut {
            flow.ask().unwrap();
            flow.set_patience(Duration::from_millis(1));
        }
        thread::sleep(SILENCE);
        for flow in &mut cut {
            let error = flow.answer().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::WouldBlock, "not silence: {error}");
            flow.set_patience(PATIENCE);
        }
        all_alive(&cluster, &mut rest, "of another client or another node");
        let (new, errors) = connect(lab.client(), vip);
        println!("{vip}: {} new flows, {} refused", new.len(), errors.len());
        assert!(new.iter().all(|flow| flow.node() != node.name));
        assert!(!new.is_empty() && !errors.is_empty());
        assert!(errors.iter().all(|error| *error == ErrorKind::TimedOut));
        let (new, errors) = connect(lab.remote(), vip);
        assert!(new.iter().any(|flow| flow.node() == node.name));
        assert_eq!(errors, [], "another client");

        forward(&node.netns, "");
        for flow in &mut cut {
            let pod = flow.answer().unwrap();
            assert_eq!(pod, flow.pod, "another pod answered");
        }
        all_alive(&cluster, &mut cut, "let in again");
    }
}

/// Connection tracking of the pods' nodes understands what it sees.
#[test]
fn nothing_is_invalid() {
    let (cluster, leader) = mk_three(false);
    let lab = &cluster.lab;
    let open_all = |cluster: &Cluster| -> Vec<Flow> {
        let clients = [cluster.lab.client(), cluster.lab.remote()];
        vips()
            .into_iter()
            .flat_map(|vip| clients.map(|from| open_from(from, vip, FLOWS)))
            .flatten()
            .collect()
    };
    let mut flows = open_all(&cluster);
    for node in lab.nodes() {
        forward(&node.netns, "ct state invalid counter drop");
    }
    all_alive(&cluster, &mut flows, "established before");
    let mut new = open_all(&cluster);
    all_alive(&cluster, &mut new, "opened since");
    for vip in vips() {
        let flow = elsewhere(lab.client(), vip, &leader);
        flow.exchange(20_000_000, &AtomicU64::new(0)).unwrap();
    }
    all_alive(&cluster, &mut flows, "established before");
    // Flows end in order, too.
    drop(flows);
    drop(new);
    thread::sleep(Duration::from_millis(500));
    for node in lab.nodes() {
        let chain = node
            .netns
            .exec("nft list chain inet firewall forward")
            .unwrap();
        println!("{}: {chain}", node.name);
        assert!(
            chain.contains("counter packets 0 bytes 0"),
            "{}: {chain}",
            node.name
        );
    }
}
