//! A second gateway at the segment, which would take over from the first, and the replication between the two.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use landfall_core::model::Bandwidth;
use landfall_ebpf_common::egress::binding::Times;
use landfall_lab::{Mac, Netns};
use landfall_speaker::datapath::egress::{
    Gateway, GatewayConfig, Licence, PeerId, Standing, State, Surroundings,
};
use landfall_speaker::egress::{self, Egress};
use landfall_speaker::keys::Keys;
use landfall_speaker::replication::{Config, Copying as _, Replication, Role, Roles};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::runtime::Runtime;

use super::world::{Bpffs, EGRESS, PATIENCE, World, ip, mac_of};

const KEY: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
/// Where they speak with each other.
const PORT: u16 = 7953;
const GW: &str = "10.88.0.11";
const SECOND: &str = "10.88.0.13";

/// A node's replication, on threads in its namespace.
pub(super) struct Speaks {
    replication: Option<Replication>,
    runtime: Option<Runtime>,
    registry: Registry,
}

impl Speaks {
    fn start(netns: &Netns, name: &str, at: &str, gateway: &Gateway) -> Self {
        let (bindings, happened) = gateway.replicate();
        let config = Config::new(name.into(), SocketAddr::new(ip(at), PORT));
        let mut registry = Registry::default();
        let (runtime, replication) = netns.run(|| {
            let runtime = Runtime::new().unwrap();
            let keys = Keys::parse(KEY).unwrap();
            let started = Replication::start(config, keys, bindings, happened, &mut registry);
            let replication = runtime.block_on(started).unwrap();
            (runtime, replication)
        });
        Self {
            replication: Some(replication),
            runtime: Some(runtime),
            registry,
        }
    }

    /// What it is to the egress addresses: in this epoch their gateway, or the standby of who is.
    pub(super) fn is(&self, epoch: u64, gateway: Option<(&str, &str)>) {
        let gateway = gateway.map(|(name, at)| (name.into(), SocketAddr::new(ip(at), PORT)));
        let role = Role {
            epoch,
            addresses: EGRESS.map(ip).into(),
            policies: BTreeSet::from(["mail".into()]),
            gateway,
        };
        let roles = Roles::from([("mail".into(), role)]);
        self.replication.as_ref().unwrap().take_roles(roles);
    }

    /// A metric's value, by the beginning of its line.
    pub(super) fn metric(&self, name: &str) -> f64 {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().last()?.parse().ok())
            .unwrap_or(0.0)
    }
}

impl Drop for Speaks {
    fn drop(&mut self) {
        let inside = self.runtime.as_ref().map(Runtime::enter);
        drop(self.replication.take());
        drop(inside);
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(Duration::from_secs(5));
        }
    }
}

/// Two gateways.
pub(super) struct Pair {
    pub(super) first: Option<Speaks>,
    pub(super) second: Option<Speaks>,
    gateway: Option<Gateway>,
    /// The second's.
    pub(super) config: GatewayConfig,
    pub(super) world: World,
    pub(super) host: Netns,
    around: Surroundings,
    egress: Egress,
    _bpffs: Bpffs,
}

/// The same for both egress addresses.
fn both(standing: Standing) -> BTreeMap<IpAddr, Standing> {
    EGRESS.map(|address| (ip(address), standing)).into()
}

fn leads() -> Standing {
    Standing::Leads {
        since: Instant::now(),
        licence: Licence::Full,
    }
}

impl Pair {
    /// The first leads, the second stands by; nobody speaks yet.
    pub(super) fn build() -> Self {
        Self::build_with(Times::default())
    }

    /// The same, with idle times of one's own.
    pub(super) fn build_with(times: Times) -> Self {
        let mut world = World::bare();
        world.config.times = times;
        let host = world.neighbour("gw2", 13);
        host.enable_forwarding().unwrap();
        let uplink = host.interface_index("eth0").unwrap();
        let mut around = world.around.clone();
        around.node = "gw2".into();
        let (_, mut link) = around.uplinks.pop_first().unwrap();
        link.mac = mac_of(&host, "eth0");
        link.addresses = [ip(SECOND), ip("fd00:88::13")].into();
        around.uplinks.insert(uplink, link);
        let (peer, node) = around.peers.pop_first().unwrap();
        let peer = PeerId {
            interface: uplink,
            ..peer
        };
        around.peers.insert(peer, node);
        let mut egress = world.egress.clone();
        let policy = egress.policies.get_mut("mail").unwrap();
        policy.gateway = policy.gateway.take().map(|gateway| egress::Gateway {
            interface: uplink,
            mac: Some(mac_of(&world.gw, "eth0")),
            ..gateway
        });
        world.launch();
        world.gateway().stand(&both(leads()));
        world.tell();
        world.await_state(|state| matches!(state, State::Armed(_)));
        let bpffs = Bpffs::mount();
        let mut pair = Self {
            config: GatewayConfig {
                times,
                ..GatewayConfig::new(bpffs.pin_dir())
            },
            first: None,
            second: None,
            gateway: None,
            world,
            host,
            around,
            egress,
            _bpffs: bpffs,
        };
        pair.launch_second();
        pair.stand(Some(Standing::StandsBy));
        pair
    }

    /// Starts the second gateway's process.
    pub(super) fn launch_second(&mut self) {
        let config = self.config.clone();
        let gateway = self
            .host
            .run(|| Gateway::start(config, &mut Registry::default()));
        self.gateway = Some(gateway);
        self.tell_second();
        eventually("the second gateway is armed", || {
            matches!(self.gateway().state(), State::Armed(_))
        });
    }

    /// How fast the policy's pods may be, at both.
    pub(super) fn limit(&mut self, bandwidth: Option<Bandwidth>) {
        self.world.policy().bandwidth = bandwidth;
        self.world.tell();
        let policy = self.egress.policies.get_mut("mail").unwrap();
        policy.bandwidth = bandwidth;
        self.tell_second();
        eventually("it is in force", || {
            self.world.gateway().is_settled() && self.gateway().is_settled()
        });
    }

    /// What the second is to the egress addresses.
    pub(super) fn stand(&self, standing: Option<Standing>) {
        let standings = standing.map(both).unwrap_or_default();
        self.gateway().stand(&standings);
    }

    fn tell_second(&self) {
        self.gateway()
            .set(Arc::new(self.egress.clone()), Arc::new(self.around.clone()));
    }

    pub(super) fn gateway(&self) -> &Gateway {
        self.gateway.as_ref().unwrap()
    }

    /// Both speak; the first leads in this epoch.
    pub(super) fn speak(&mut self, epoch: u64) {
        self.speak_first(epoch);
        self.speak_second(epoch);
    }

    pub(super) fn speak_first(&mut self, epoch: u64) {
        let first = Speaks::start(&self.world.gw, "gw", GW, self.world.gateway());
        first.is(epoch, None);
        self.first = Some(first);
    }

    pub(super) fn speak_second(&mut self, epoch: u64) {
        let second = Speaks::start(&self.host, "gw2", SECOND, self.gateway());
        second.is(epoch, Some(("gw", GW)));
        self.second = Some(second);
    }

    /// The second gateway's process ends.
    pub(super) fn stop_second(&mut self) {
        self.second = None;
        self.gateway = None;
    }

    /// How many ports are in use at the second.
    pub(super) fn used(&self) -> u64 {
        let usage = self.gateway().usage();
        usage.get("mail").map_or(0, |usage| usage.ports)
    }

    /// The first has no power any more.
    pub(super) fn power_off(&self) {
        self.world.gw.ip("link set eth0 down").unwrap();
    }

    /// The second is the gateway, and everybody knows it.
    pub(super) fn take_over(&mut self, epoch: u64) {
        let uplink = self.host.interface_index("eth0").unwrap();
        let policy = self.egress.policies.get_mut("mail").unwrap();
        policy.gateway = Some(egress::Gateway {
            node: "gw2".into(),
            uplink: "eth0".into(),
            interface: uplink,
            mac: None,
            epoch,
            settled: true,
        });
        self.stand(Some(leads()));
        self.tell_second();
        self.second.as_ref().unwrap().is(epoch, None);
        eventually("it is in force", || self.gateway().is_settled());
        self.announce(&self.host, [SECOND, "fd00:88::13"]);
    }

    /// The first is there again, as the standby of the second.
    pub(super) fn return_first(&mut self, epoch: u64) {
        let gw = &self.world.gw;
        gw.ip("link set eth0 up").unwrap();
        // What went with the link.
        gw.ip_batch(
            "addr replace fd00:88::11/64 dev eth0 nodad\n\
             route replace default via 10.88.0.1 dev eth0 table 100\n\
             route replace default via fd00:88::1 dev eth0 table 100\n",
        )
        .unwrap();
        let uplink = gw.interface_index("eth0").unwrap();
        let mac = mac_of(&self.host, "eth0");
        self.world.policy().gateway = Some(egress::Gateway {
            node: "gw2".into(),
            uplink: "eth0".into(),
            interface: uplink,
            mac: Some(mac),
            epoch,
            settled: true,
        });
        self.world.gateway().stand(&both(Standing::StandsBy));
        self.world.tell();
        let first = self.first.as_ref().unwrap();
        first.is(epoch, Some(("gw2", SECOND)));
    }

    /// The second has no power any more, and the first is the gateway again.
    pub(super) fn take_back(&mut self, epoch: u64) {
        self.host.ip("link set eth0 down").unwrap();
        let policy = self.world.policy();
        policy.gateway = policy.gateway.take().map(|gateway| egress::Gateway {
            node: "gw".into(),
            mac: None,
            epoch,
            ..gateway
        });
        self.world.gateway().stand(&both(leads()));
        self.world.tell();
        self.first.as_ref().unwrap().is(epoch, None);
        eventually("it is in force", || self.world.gateway().is_settled());
        self.announce(&self.world.gw, [GW, "fd00:88::11"]);
    }

    /// Everybody knows that the gateway is here.
    fn announce(&self, gateway: &Netns, at: [&str; 2]) {
        let lladdr = Mac(mac_of(gateway, "eth0"));
        for host in [&self.world.router, &self.world.server] {
            for egress in EGRESS {
                let neighbour =
                    format!("neigh replace {egress} lladdr {lladdr} dev eth0 nud permanent");
                host.ip(&neighbour).unwrap();
            }
        }
        for (family, via) in ["", "-6 "].into_iter().zip(at) {
            for table in ["main", "100"] {
                let route =
                    format!("{family}route replace default via {via} dev eth0 table {table}");
                self.world.node.ip(&route).unwrap();
            }
        }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.first = None;
        self.stop_second();
        let pins = self.config.pin_dir.clone();
        let _ = self
            .host
            .run(|| landfall_speaker::datapath::uninstall(&pins));
    }
}

/// Until it holds.
pub(super) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(10));
    }
}
