//! A pod's node that is not on the gateway's segment: its packets come by the tunnel, and their answers go back by it.

use std::net::SocketAddr;

use landfall_ebpf_common::TUNNEL_ID;
use landfall_lab::server::WHO_AM_I;
use landfall_lab::{Mac, Netns, ping};
use landfall_speaker::datapath::egress::{Peer, PeerId, Uplink};
use landfall_speaker::egress::{Pod, Tenant};

use super::bytes::exchange;
use super::routers::hop;
use super::world::{EGRESS, LINES, PATIENCE, REMOTE, SERVER, World, ask, ip, mac_of, tcp_seen_as};

const POD: [&str; 2] = ["10.244.3.10", "fd00:244:3::10"];
/// Where the nodes reach each other.
const GW: &str = "172.16.0.11";
const FAR: &str = "172.16.0.12";
/// Full-sized packets do not fit the path; the route of the pod's packets says so.
const MTU: u32 = 1400;

fn dig(host: &Netns) {
    host.ip_batch(
        "link add landfall0 mtu 65000 type vxlan external dstport 7952 nolearning udp6zerocsumrx\n\
         link set landfall0 addrgenmode none up\n",
    )
    .unwrap();
}

#[test]
fn pods_of_nodes_off_the_segment_leave_by_their_egress_address() {
    let mut world = World::bare();
    let (far, pod) = (world.host("far"), world.host("farpod"));
    far.enable_forwarding().unwrap();
    world.gw.veth("under", &far, "under").unwrap();
    world.gw.ip(&format!("addr add {GW}/24 dev under")).unwrap();
    far.ip(&format!("addr add {FAR}/24 dev under")).unwrap();
    dig(&world.gw);
    dig(&far);
    far.veth("pod", &pod, "eth0").unwrap();
    let gateway = Mac(mac_of(&world.gw, "landfall0"));
    let [four, six] = POD;
    far.ip_batch(&format!(
        "addr add 169.254.0.1/32 dev pod\naddr add fe80::1/64 dev pod nodad\n\
         route add {four} dev pod\nroute add {six} dev pod\n\
         neigh add 169.254.77.1 lladdr {gateway} dev landfall0 nud permanent\n\
         neigh add fe80::77 lladdr {gateway} dev landfall0 nud permanent\n\
         route add default encap ip id {TUNNEL_ID} dst {GW} via 169.254.77.1 dev landfall0 onlink mtu {MTU}\n\
         route add default encap ip id {TUNNEL_ID} dst {GW} via fe80::77 dev landfall0 onlink mtu {MTU}\n"
    ))
    .unwrap();
    pod.ip_batch(&format!(
        "addr add {four}/32 dev eth0\naddr add {six}/128 dev eth0 nodad\n\
         route add 169.254.0.1 dev eth0\nroute add default via 169.254.0.1 dev eth0\n\
         route add default via fe80::1 dev eth0\n"
    ))
    .unwrap();

    let tunnel = world.gw.interface_index("landfall0").unwrap();
    world.around.tunnel = Some(tunnel);
    let uplink = Uplink {
        mac: gateway.0,
        mtu: 65_000,
        addresses: [].into(),
        connected: [].into(),
        router_v4: None,
        router_v6: None,
    };
    world.around.uplinks.insert(tunnel, uplink);
    let id = PeerId {
        node: "far".into(),
        interface: tunnel,
    };
    let peer = Peer {
        mac: mac_of(&far, "landfall0"),
        address: Some(ip(FAR)),
    };
    world.around.peers.insert(id, peer);
    for (address, egress_ip) in POD.into_iter().zip(EGRESS) {
        let tenant = Tenant {
            policy: "mail".into(),
            egress_ip: Some(ip(egress_ip)),
        };
        world.egress.pods.insert(
            ip(address),
            Pod {
                node: "far".into(),
                tenant: Some(tenant),
                identity: 1,
                former: None,
            },
        );
    }
    world.start();

    for (family, egress) in EGRESS.into_iter().enumerate() {
        for to in [SERVER[family], REMOTE[family]].map(ip) {
            assert_eq!(tcp_seen_as(&pod, to), ip(egress), "to {to}");
            let answer = ask(&pod, to, WHO_AM_I.as_bytes()).expect("an answer");
            assert_eq!(ip(&String::from_utf8(answer).unwrap()), ip(egress));
            let data = [7; 4000];
            assert_eq!(ask(&pod, to, &data).as_deref(), Some(&data[..]), "to {to}");
            ping(&pod, to, PATIENCE).unwrap();
            exchange(&pod, SocketAddr::new(to, LINES), 20_000_000);
        }
        // What the gateway itself says goes back by the tunnel, too.
        let (gateway, expired) = [("10.88.0.11", 11), ("fd00:88::11", 3)][family];
        let to = ip(REMOTE[family]);
        assert_eq!(hop(&pod, to, 2), (ip(gateway), expired));
        // Those on the segment are not concerned.
        assert_eq!(tcp_seen_as(&world.pods[0], ip(SERVER[family])), ip(egress));
    }
    println!("{:?}", world.gateway().counts());
    assert_eq!(world.count("forged"), 0);
    world.no_leak();
}
