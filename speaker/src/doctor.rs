//! What on this node keeps Landfall from working, or will: `landfall doctor` asks for it over the control socket.
//!
//! What can be seen from elsewhere is said in statuses; this is about the node itself, which others share: their rules,
//! programs and settings.

mod marks;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use landfall_runtime::control::{Diagnosis, Finding, Verdict};
use nix::sys::utsname::uname;

use crate::datapath::egress::State;
use crate::datapath::{Attachment, Delivery};
use crate::node_rules;
use marks::{Mark, User};

/// What is named of each kind, at most.
const MOST: usize = 5;
/// The settings of interfaces, of the network namespace of who reads them.
const SETTINGS: &str = "/proc/sys/net/ipv4/conf";
/// An interface that Cilium makes on each node.
const CILIUMS: &str = "cilium_host";

/// An interface that VIPs are announced on, or would be.
#[derive(Clone, Debug)]
pub(crate) struct Uplink {
    pub(crate) name: String,
    pub(crate) has_default_route: bool,
    /// Nothing, if nobody has tried.
    pub(crate) attachment: Option<Attachment>,
}

/// What the speaker knows, to be seen beside what the node says.
#[derive(Clone, Debug)]
pub(crate) struct Patient {
    pub(crate) node: String,
    pub(crate) uplinks: Vec<Uplink>,
    pub(crate) delivery: Delivery,
    /// The bits of the mark, where pods' packets are treated by egress policies.
    pub(crate) egress_mark: Option<u32>,
    pub(crate) disarmed: bool,
    pub(crate) gateway: State,
    /// How many nodes there are, and those of them whose speaker is not heard.
    pub(crate) nodes: usize,
    pub(crate) unheard: Vec<String>,
}

impl Patient {
    /// Looks at everything.
    pub(crate) async fn examine(self) -> Diagnosis {
        let mut findings = vec![kernel()];
        findings.extend(self.uplinks.iter().filter_map(attached));
        if self.uplinks.is_empty() {
            findings.push(problem(
                "uplinks",
                "no interface that is up has addresses of a pool in its subnet: this node can announce nothing".to_owned(),
                "give the node an address in the pools' subnet, or the pools addresses of the nodes' subnet",
            ));
        }
        findings.push(self.gateway());
        findings.extend(self.cilium());
        findings.extend(self.marks().await);
        findings.extend(self.reverse_paths());
        findings.extend(ipvs());
        findings.push(self.peers());
        findings.extend(cpu_limit());
        Diagnosis {
            node: self.node,
            findings,
        }
    }

    fn gateway(&self) -> Finding {
        let check = "egress";
        if self.egress_mark.is_none() {
            let found = "off: egress policies are not in effect on this node (--egress)";
            return ok(check, found.to_owned());
        }
        if self.disarmed {
            let found = "disarmed: its pods leave by other addresses than their policies'";
            return problem(check, found.to_owned(), "landfall egress arm");
        }
        match &self.gateway {
            State::Idle => ok(check, "on; there is no policy".to_owned()),
            State::Armed(_) => ok(check, "on; the gateway's programs are attached".to_owned()),
            State::Failed(why) => problem(
                check,
                format!("this node cannot be a gateway: {why}"),
                "mend that; until then another node is the gateway, if there is one that can be",
            ),
        }
    }

    /// Cilium's data path takes pods' packets past the packet filter that judges them, and has its own in their marks.
    fn cilium(&self) -> Option<Finding> {
        if !Path::new(SETTINGS).join(CILIUMS).exists() {
            return None;
        }
        let found = format!("Cilium is on this node ({CILIUMS})");
        Some(if self.egress_mark.is_some() {
            problem(
                "cilium",
                format!(
                    "{found}: what its pods send does not reach the packet filter, which judges it for egress policies, or bears Cilium's marks: it is dropped, or leaves as if there were none"
                ),
                "do not use egress policies on nodes with Cilium yet (the chart's egress.enabled: false)",
            )
        } else {
            note("cilium", found, None)
        })
    }

    /// Whose rules use the bits of marks that are Landfall's.
    async fn marks(&self) -> Vec<Finding> {
        let check = "marks";
        let mut lacking = Vec::new();
        let read = tokio::task::spawn_blocking(marks::users).await;
        let mut users = match read.map_err(std::io::Error::other).and_then(|read| read) {
            Ok(users) => users,
            Err(error) => {
                lacking.push(note(
                    check,
                    format!("the rules of nftables could not be read: {error}"),
                    None,
                ));
                Vec::new()
            }
        };
        users.extend(legacy(&mut lacking).await);
        users.extend(routing_rules(&mut lacking).await);
        let own = Own::of(self);
        let mut findings = own.judged(&users);
        findings.extend(lacking);
        findings
    }

    /// Strict filtering drops what comes in where answers would not leave by the main table.
    fn reverse_paths(&self) -> Vec<Finding> {
        let strict = self.uplinks.iter().filter(|uplink| {
            let of = |name: &str| setting(&Path::new(SETTINGS).join(name).join("rp_filter"));
            // The kernel goes by the greater one.
            of("all").max(of(&uplink.name)) == Some(1) && !uplink.has_default_route
        });
        let found = strict.map(|uplink| {
            let name = &uplink.name;
            problem(
                "rp_filter",
                format!("{name} has no default route and filters strictly (rp_filter=1): packets of clients behind a router are dropped"),
                &format!("sysctl -w net.ipv4.conf.all.rp_filter=2 net.ipv4.conf.{name}.rp_filter=2"),
            )
        });
        found.collect()
    }

    fn peers(&self) -> Finding {
        let check = "nodes";
        if self.unheard.is_empty() {
            return ok(check, format!("all {} are heard", self.nodes));
        }
        let named = listed(&self.unheard);
        let found = format!(
            "{} of {} are not heard: {named}",
            self.unheard.len(),
            self.nodes
        );
        let advice = "kubectl get pods -o wide of the speakers; the gossip's port must be open between nodes (TCP and UDP), with one key on all";
        if 2 * self.unheard.len() > self.nodes {
            let found = format!("{found}: with less than half of the nodes this one is no gateway");
            problem(check, found, advice)
        } else {
            note(check, found, Some(advice))
        }
    }
}

/// The bits that are Landfall's here.
struct Own {
    packet: u32,
    connection: u32,
    egress: u32,
}

impl Own {
    fn of(patient: &Patient) -> Self {
        let answers = node_rules::Config::default().mark_mask;
        let egress = patient.egress_mark.unwrap_or_default();
        let translated = patient.delivery == Delivery::Native;
        Self {
            packet: answers | egress,
            connection: egress | if translated { answers } else { 0 },
            egress,
        }
    }

    fn bits(&self, mark: Mark) -> u32 {
        match mark {
            Mark::Packet => self.packet,
            Mark::Connection => self.connection,
        }
    }

    fn judged(&self, users: &[User]) -> Vec<Finding> {
        let check = "marks";
        let mut others: BTreeMap<(String, bool, Mark), (u32, Vec<String>)> = BTreeMap::new();
        let mut taken = node_rules::Config::default().mark_mask;
        for user in users
            .iter()
            .filter(|user| !user.place.ends_with(" landfall"))
        {
            let used = user.used;
            let whole = used.bits == u32::MAX;
            if !whole {
                taken |= used.bits;
            }
            let shared = used.bits & self.bits(used.mark);
            // What is compared as a whole is another's value, which does not come about with our bits in it.
            if shared == 0 || whole && !used.writes {
                continue;
            }
            let owner = user.owner().unwrap_or("unknown").to_owned();
            let entry = others.entry((owner, used.writes, used.mark)).or_default();
            entry.0 |= shared;
            let place = if user.chain.is_empty() {
                user.place.clone()
            } else {
                format!("{}, chain {}", user.place, user.chain)
            };
            if !entry.1.contains(&place) {
                entry.1.push(place);
            }
        }
        let own = format!("{:#x}", self.packet);
        if others.is_empty() {
            return vec![ok(
                check,
                format!("nobody else uses bits {own} of the packet mark"),
            )];
        }
        let advice = if self.egress == 0 {
            "move the other's bits away from them".to_owned()
        } else {
            marks::free_pair(taken).map_or_else(
                || "no two neighbouring bits are free: move the other's away".to_owned(),
                |pair| {
                    format!(
                        "start all speakers with --egress-mark={pair:#x}, which nobody uses here"
                    )
                },
            )
        };
        let found = others
            .into_iter()
            .map(|((owner, writes, mark), (bits, places))| {
                let does = if writes { "changes" } else { "goes by" };
                let of = match mark {
                    Mark::Packet => "packet mark",
                    Mark::Connection => "connection mark",
                };
                let who = if owner == "unknown" {
                    "another"
                } else {
                    &owner
                };
                let found = format!(
                    "{who} {does} bits {bits:#x} of the {of}, which are Landfall's ({own}): {}",
                    listed(&places)
                );
                problem(check, found, &advice)
            });
        found.collect()
    }
}

/// What rules of iptables' legacy kind do, where there are any.
async fn legacy(lacking: &mut Vec<Finding>) -> Vec<User> {
    let mut users = Vec::new();
    for (names, tool) in [
        (
            "/proc/thread-self/net/ip_tables_names",
            "iptables-legacy-save",
        ),
        (
            "/proc/thread-self/net/ip6_tables_names",
            "ip6tables-legacy-save",
        ),
    ] {
        // To ask for tables that are not there would make them.
        let there = fs::read_to_string(names).unwrap_or_default();
        if there.trim().is_empty() {
            continue;
        }
        match node_rules::run(tool, &[], "").await {
            Ok(saved) => users.extend(marks::of_saved(tool, &saved)),
            Err(error) => lacking.push(note(
                "marks",
                format!("tables of legacy iptables are there and could not be read: {error}"),
                None,
            )),
        }
    }
    users
}

/// What the routing rules go by, but for our own.
async fn routing_rules(lacking: &mut Vec<Finding>) -> Vec<User> {
    #[derive(serde::Deserialize)]
    struct Rule {
        priority: u32,
        fwmark: Option<String>,
        fwmask: Option<String>,
    }
    let ours = node_rules::Config::default().priorities();
    let mut users = Vec::new();
    for flag in ["-4", "-6"] {
        let printed = match node_rules::run("ip", &[flag, "-j", "rule", "show"], "").await {
            Ok(printed) => printed,
            Err(error) => {
                let found = format!("the routing rules could not be read: {error}");
                lacking.push(note("marks", found, None));
                continue;
            }
        };
        let rules: Vec<Rule> = serde_json::from_str(&printed).unwrap_or_default();
        users.extend(rules.into_iter().filter_map(|rule| {
            rule.fwmark.as_ref()?;
            let mask = rule
                .fwmask
                .as_deref()
                .map_or(Some(u32::MAX), marks::parse_bits);
            (!ours.contains(&rule.priority)).then(|| User {
                place: format!("ip {flag} rule {}", rule.priority),
                chain: String::new(),
                used: marks::Use {
                    mark: Mark::Packet,
                    bits: mask.unwrap_or(u32::MAX),
                    writes: false,
                },
            })
        }));
    }
    users
}

fn kernel() -> Finding {
    let check = "kernel";
    let release = uname().map_or_else(
        |_| "unknown".to_owned(),
        |name| name.release().to_string_lossy().into_owned(),
    );
    let mut numbers = release.split(['.', '-']).map_while(|it| it.parse().ok());
    let version: (u32, u32) = (
        numbers.next().unwrap_or_default(),
        numbers.next().unwrap_or_default(),
    );
    if version >= (6, 6) {
        return ok(check, release);
    }
    let found = format!("{release} has no TCX: programs of others may come in front of Landfall's");
    note(check, found, Some("6.6 or later has it"))
}

fn attached(uplink: &Uplink) -> Option<Finding> {
    let check = format!("programs on {}", uplink.name);
    Some(match uplink.attachment.as_ref()? {
        Attachment::Tcx => ok(&check, "attached by TCX, in front of others'".to_owned()),
        Attachment::Xdp => ok(&check, "attached to the driver".to_owned()),
        Attachment::Clsact => note(
            &check,
            "attached by a clsact filter: who removes the qdisc removes them, for a second"
                .to_owned(),
            None,
        ),
        Attachment::Absent { reason } => problem(
            &check,
            format!("not attached: {reason}"),
            "mend that; until then this node neither steers nor is a gateway there",
        ),
    })
}

/// With IPVS every node has the VIPs on an interface, and answers for them unless it is told not to.
fn ipvs() -> Option<Finding> {
    let settings = Path::new(SETTINGS);
    settings.join("kube-ipvs0").exists().then(|| {
        let all = |name: &str| setting(&settings.join("all").join(name)).unwrap_or_default();
        let check = "ipvs";
        if all("arp_ignore") >= 1 && all("arp_announce") >= 2 {
            return ok(check, "kube-proxy's IPVS, with strict ARP".to_owned());
        }
        problem(
            check,
            "kube-proxy's IPVS without strict ARP: every node answers for every VIP".to_owned(),
            "set ipvs.strictARP: true in kube-proxy's configuration",
        )
    })
}

/// A process that may not run is not heard by the others in time.
fn cpu_limit() -> Option<Finding> {
    let own = fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = own.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let limit = fs::read_to_string(Path::new("/sys/fs/cgroup").join(path).join("cpu.max")).ok()?;
    let (quota, period) = limit.trim().split_once(' ')?;
    let (quota, period): (f64, f64) = (quota.parse().ok()?, period.parse().ok()?);
    Some(note(
        "cpu limit",
        format!(
            "the speaker may use {:.2} CPUs: when it has, it stands still, and others take over from it",
            quota / period
        ),
        Some("take resources.limits.cpu away from the speaker's container"),
    ))
}

fn setting(path: &Path) -> Option<u32> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn listed(all: &[String]) -> String {
    let mut parts = all.iter().take(MOST).cloned().collect::<Vec<_>>();
    if all.len() > MOST {
        parts.push(format!("and {} more", all.len() - MOST));
    }
    parts.join("; ")
}

fn ok(check: &str, found: String) -> Finding {
    finding(check, Verdict::Ok, found, None)
}

fn note(check: &str, found: String, advice: Option<&str>) -> Finding {
    finding(check, Verdict::Note, found, advice)
}

fn problem(check: &str, found: String, advice: &str) -> Finding {
    finding(check, Verdict::Problem, found, Some(advice))
}

fn finding(check: &str, verdict: Verdict, found: String, advice: Option<&str>) -> Finding {
    Finding {
        check: check.to_owned(),
        verdict,
        found,
        advice: advice.map(str::to_owned),
    }
}

#[cfg(test)]
mod tests;
