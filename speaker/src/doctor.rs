//! What on this node keeps Landfall from working, or will: `landfall doctor` asks for it over the control socket.
//!
//! What can be seen from elsewhere is said in statuses; this is about the node itself, which others share: their rules,
//! programs and settings.

mod marks;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use landfall_ebpf_common::egress::judge::cilium::BORROWED;
use landfall_runtime::control::{Diagnosis, Finding, Verdict};
use nix::sys::utsname::uname;
use serde_json::Value;

use crate::datapath::egress::State;
use crate::datapath::{Attachment, Delivery};
use crate::node_rules;
use marks::{Deed, Mark, User};

/// The check of who else uses bits of marks.
const MARKS: &str = "marks";
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
    /// It has IPv4 addresses and no default route.
    pub(crate) filters: bool,
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
    /// The uplinks without the programs that look at what leaves, and why.
    pub(crate) unguarded: BTreeMap<String, String>,
    /// Where Cilium's maps are, if the programs judge beside it.
    pub(crate) cilium: Option<PathBuf>,
    /// How many nodes there are, and those of them whose speaker is not heard.
    pub(crate) nodes: usize,
    pub(crate) unheard: Vec<String>,
    /// As a gateway it does what there is to do.
    pub(crate) hears_most: bool,
    /// Pools have addresses, and those are in no interface's subnet.
    pub(crate) is_far: bool,
}

impl Patient {
    /// Looks at everything.
    pub(crate) async fn examine(self) -> Diagnosis {
        let mut findings = vec![kernel()];
        findings.extend(self.uplinks.iter().filter_map(attached));
        if self.is_far {
            findings.push(note(
                "subnets",
                "no interface that is up has an address of a pool in its subnet: this node announces where an L2Advertisement names an interface, or where its default route is, if at all".to_owned(),
                Some("if it is to: give it an address in the pools' subnet, or the pools addresses of the nodes' subnet"),
            ));
        }
        findings.push(self.gateway());
        findings.extend(self.unguarded.iter().map(unguarded));
        findings.extend(self.cilium());
        findings.extend(self.marks().await);
        findings.extend(self.reverse_paths());
        findings.extend(ipvs(&self.uplinks));
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

    /// Cilium's data path takes pods' packets past the packet filter, which judges them on other nodes.
    fn cilium(&self) -> Option<Finding> {
        let check = "cilium";
        let is_there = Path::new(SETTINGS).join(CILIUMS).exists();
        let found = format!("Cilium is on this node ({CILIUMS})");
        let Some(maps) = self.cilium.as_ref().filter(|_| self.egress_mark.is_some()) else {
            return is_there.then(|| match self.egress_mark {
                None => note(check, found, None),
                Some(_) => problem(
                    check,
                    format!(
                        "{found}: what its pods send does not reach the packet filter, which judges it for egress policies, or bears Cilium's marks: it is dropped, or leaves as if there were none"
                    ),
                    "start the speakers of nodes with Cilium with --cilium (the chart's egress.cilium.enabled: true)",
                ),
            });
        };
        if !is_there {
            return Some(problem(
                check,
                format!(
                    "--cilium, and no Cilium on this node ({CILIUMS}): what policies' pods send is masqueraded before a program sees it, and dropped"
                ),
                "start the speakers of nodes without Cilium without --cilium (the chart's egress.cilium.enabled: false)",
            ));
        }
        let masqueraded = node_rules::masqueraded().unwrap_or_default();
        if masqueraded > 0 {
            return Some(problem(
                check,
                format!(
                    "{found} and masquerades by iptables: {masqueraded} packets of policies' pods had another address already, and were dropped"
                ),
                "have Cilium masquerade by eBPF (bpf.masquerade=true of its chart)",
            ));
        }
        let lacking = BORROWED.iter().filter(|of| !maps.join(of.pin).exists());
        let lacking: Vec<String> = lacking.map(|of| of.pin.to_owned()).collect();
        // It may have one family only.
        if lacking.len() > BORROWED.len() / 2 {
            return Some(problem(
                check,
                format!(
                    "{found}, and its maps are not at {} ({}): whom policies' pods answer outside is not known, and their answers are dropped",
                    maps.display(),
                    listed(&lacking)
                ),
                "say where they are (--cilium=DIRECTORY), have the node's bpf file system in the speaker's pod, and Cilium masquerade by eBPF (bpf.masquerade=true of its chart)",
            ));
        }
        Some(ok(
            check,
            format!("{found}; a program judges what policies' pods send"),
        ))
    }

    /// Whose rules use the bits of marks that are Landfall's.
    async fn marks(&self) -> Vec<Finding> {
        let mut read = Users::default();
        let nftables = tokio::task::spawn_blocking(marks::of_nftables).await;
        match nftables.map_err(std::io::Error::other).and_then(|it| it) {
            Ok(users) => read.users.extend(users),
            Err(error) => read.lack("the rules of nftables", &error),
        }
        read.legacy().await;
        read.routing().await;
        Own::of(self).judged(&read)
    }

    /// Strict filtering drops what comes in where answers would not leave by the main table.
    fn reverse_paths(&self) -> Vec<Finding> {
        let strict = self.uplinks.iter().filter(|uplink| {
            let of = |name: &str| setting(&Path::new(SETTINGS).join(name).join("rp_filter"));
            // The kernel goes by the greater one.
            of("all").max(of(&uplink.name)) == Some(1) && uplink.filters
        });
        let found = strict.map(|uplink| {
            let name = &uplink.name;
            problem(
                "rp_filter",
                format!("{name} has no default route and filters strictly (rp_filter=1): packets of clients behind a router are dropped"),
                // Names may have dots.
                &format!("sysctl -w net/ipv4/conf/all/rp_filter=2 net/ipv4/conf/{name}/rp_filter=2"),
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
        let advice = "if a speaker is to run there (its nodeSelector, tolerations): see its pod's log; nodes must reach each other's gossip port (TCP and UDP), with one key";
        if self.egress_mark.is_some() && !self.hears_most {
            let found = format!(
                "{found}; with less than half of those that were there this one is no gateway"
            );
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

    fn judged(&self, read: &Users) -> Vec<Finding> {
        let mut shared: BTreeMap<(String, Deed, Mark), Shared> = BTreeMap::new();
        let mut taken = node_rules::Config::default().mark_mask;
        for user in &read.users {
            let used = user.used;
            let is_whole = used.bits == u32::MAX;
            if !is_whole {
                taken |= used.bits;
            }
            let bits = used.bits & self.bits(used.mark);
            let is_others = used.deed == Deed::Knows && used.bits != bits;
            if bits == 0 || is_others {
                continue;
            }
            let owner = user.owner().unwrap_or("another").to_owned();
            let entry = shared.entry((owner, used.deed, used.mark)).or_default();
            entry.bits |= bits;
            entry.is_whole |= is_whole;
            let place = user.to_string();
            if !entry.places.contains(&place) {
                entry.places.push(place);
            }
        }
        let mut findings: Vec<Finding> = shared
            .into_iter()
            .map(|((owner, deed, mark), shared)| self.finding(&owner, deed, mark, &shared, taken))
            .collect();
        let lacking = read.lacking.iter();
        findings.extend(lacking.map(|lacking| note(MARKS, lacking.clone(), None)));
        if findings.is_empty() {
            let found = format!(
                "nobody else uses bits {:#x} of the packet mark",
                self.packet
            );
            findings.push(ok(MARKS, found));
        }
        findings
    }

    fn finding(&self, owner: &str, deed: Deed, mark: Mark, shared: &Shared, taken: u32) -> Finding {
        let does = match deed {
            Deed::Writes => "changes",
            Deed::Reads | Deed::Knows => "goes by",
        };
        let of = match mark {
            Mark::Packet => "packet mark",
            Mark::Connection => "connection mark",
        };
        let found = format!(
            "{owner} {does} bits {:#x} of the {of}, which are Landfall's: {}",
            shared.bits,
            listed(&shared.places)
        );
        // Answers by another interface than the VIP's are what comes of it, if at all.
        if shared.bits & self.egress == 0 {
            let advice = "Landfall needs them where answers leave by the VIP's interface and their route does not: move the other's";
            return note(MARKS, found, Some(advice));
        }
        let pair = marks::free_pair(taken).filter(|_| !shared.is_whole);
        let advice = pair.map_or_else(
            || "no other bits are free of it: move the other's".to_owned(),
            |pair| format!("start all speakers with --egress-mark={pair:#x} (the chart's egress.mark), if no rule on the other nodes uses these"),
        );
        problem(MARKS, found, &advice)
    }
}

/// Bits of Landfall's that somebody else uses.
#[derive(Default)]
struct Shared {
    bits: u32,
    /// The whole mark is changed, or compared.
    is_whole: bool,
    places: Vec<String>,
}

/// Who uses marks, and what could not be read of that.
#[derive(Default)]
struct Users {
    users: Vec<User>,
    lacking: Vec<String>,
}

impl Users {
    fn lack(&mut self, what: &str, error: &dyn std::fmt::Display) {
        self.lacking
            .push(format!("{what} could not be read: {error}"));
    }

    /// Takes in the rules of iptables' legacy kind, where there are any.
    async fn legacy(&mut self) {
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
                Ok(saved) => self.users.extend(marks::of_saved(tool, &saved)),
                Err(error) => self.lack("tables of legacy iptables are there, and", &error),
            }
        }
    }

    /// Takes in the routing rules, but for our own.
    async fn routing(&mut self) {
        let ours = node_rules::Config::default().priorities();
        for flag in ["-4", "-6"] {
            if flag == "-6" && !Path::new("/proc/sys/net/ipv6").exists() {
                continue;
            }
            let printed = match node_rules::run("ip", &[flag, "-j", "rule", "show"], "").await {
                Ok(printed) => printed,
                Err(error) => {
                    self.lack("the routing rules", &error);
                    continue;
                }
            };
            let rules: Vec<BTreeMap<String, Value>> = match serde_json::from_str(&printed) {
                Ok(rules) => rules,
                Err(error) => {
                    self.lack("the routing rules", &error);
                    continue;
                }
            };
            for rule in &rules {
                let priority = rule.get("priority").and_then(Value::as_u64);
                let priority = priority
                    .and_then(|it| u32::try_from(it).ok())
                    .unwrap_or_default();
                let bits = |of: &str| marks::parse_bits(rule.get(of)?.as_str()?);
                let Some(value) = bits("fwmark").filter(|_| !ours.contains(&priority)) else {
                    continue;
                };
                let mask = bits("fwmask").unwrap_or(u32::MAX);
                let known = (!rule.contains_key("not")).then_some(value);
                self.users.push(User {
                    place: format!("ip {flag} rule {priority}"),
                    chain: String::new(),
                    used: marks::Use::read(Mark::Packet, mask, known),
                });
            }
        }
    }
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
    if version < (5, 10) {
        let found = format!("{release} is older than Landfall's programs need");
        return problem(check, found, "5.10 or later; 6.6 or later has TCX");
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

fn unguarded((uplink, reason): (&String, &String)) -> Finding {
    problem(
        &format!("guard on {uplink}"),
        format!("not attached: {reason}"),
        "mend that; until then what the packet filter has not judged leaves by it, and beside Cilium all that pods send",
    )
}

/// With IPVS every node has the VIPs on an interface, and answers for them unless it is told not to.
fn ipvs(uplinks: &[Uplink]) -> Option<Finding> {
    let settings = Path::new(SETTINGS);
    settings.join("kube-ipvs0").exists().then(|| {
        // The kernel goes by the greater of what is set for all and for the interface.
        let least = |name: &str| {
            let of = |interface: &str| setting(&settings.join(interface).join(name));
            let each = uplinks.iter().map(|uplink| of(&uplink.name).max(of("all")));
            each.min().unwrap_or_else(|| of("all")).unwrap_or_default()
        };
        let check = "ipvs";
        if least("arp_ignore") >= 1 && least("arp_announce") >= 2 {
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
