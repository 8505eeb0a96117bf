//! A router on the way takes smaller packets only, and says so to the VIP.

use std::sync::atomic::AtomicU64;

use landfall_lab::Network;

use super::cluster::{mk_three, vips};
use super::flow::elsewhere;

/// How much goes each way.
const BYTES: u64 = 20_000_000;
/// Less than the lab's links take, and not less than IPv6 demands.
const MTU: u32 = 1300;

/// "Fragmentation needed" and "packet too big" come to the node and the pod that have the flow: with packets that must not
/// be fragmented the transfer would stand still otherwise.
#[test]
fn a_router_with_a_smaller_mtu_is_heard() {
    let (cluster, leader) = mk_three(false);
    let [v4, v6] = Network::Remote.both(100);
    // Neither end's link is the narrow one.
    cluster
        .lab
        .router()
        .ip_batch(&format!(
            "route add {v4}/32 dev eth1 mtu lock {MTU}\nroute add {v6}/128 dev eth1 mtu {MTU}\n"
        ))
        .unwrap();
    for (vip, client) in vips().into_iter().zip([v4, v6]) {
        let flow = elsewhere(cluster.lab.remote(), vip, &leader);
        let pod = cluster.lab.host(&flow.pod).unwrap();
        let known = || {
            let route = pod.ip(&format!("route get {client}")).unwrap();
            route.contains(&format!("mtu {MTU}"))
        };
        assert!(!known(), "nothing large was sent yet");
        flow.exchange(BYTES, &AtomicU64::new(0)).unwrap();
        assert!(known(), "the pod has not heard of the MTU");
    }
    println!("{:?}", cluster.verdicts());
}
