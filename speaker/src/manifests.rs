//! Handing out addresses in this process, for the manifests source: the controller's index without an API server.
//!
//! Every speaker computes the same assignment from the same files. What it assigned goes back into its own
//! index as `VirtualIp` events, and to a small file if there is a state directory.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use landfall_core::ipam::{Config, Ipam, RecordChange};
use landfall_core::model::{Event, Kind, Object, ObjectId, ObjectKey, VirtualIp};
use serde::{Deserialize, Serialize};

/// The file in the state directory.
const FILE: &str = "addresses.json";
/// Rounds of handing out and noting down that one event can cause; more would be a loop.
const MAX_ROUNDS: usize = 16;

/// A record, as it is kept in the state file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Saved {
    address: IpAddr,
    pool: String,
    group: String,
    services: Vec<ObjectKey>,
    former: Vec<ObjectKey>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    egress_policies: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    former_policies: Vec<String>,
    retain: bool,
}

impl From<&VirtualIp> for Saved {
    fn from(vip: &VirtualIp) -> Self {
        Self {
            address: vip.address,
            pool: vip.pool.to_string(),
            group: vip.group.to_string(),
            services: vip.services.clone(),
            former: vip.former.clone(),
            egress_policies: vip
                .egress_policies
                .iter()
                .map(ToString::to_string)
                .collect(),
            former_policies: vip
                .former_policies
                .iter()
                .map(ToString::to_string)
                .collect(),
            retain: vip.retain,
        }
    }
}

impl From<Saved> for VirtualIp {
    fn from(saved: Saved) -> Self {
        Self {
            services: saved.services,
            former: saved.former,
            egress_policies: saved.egress_policies.into_iter().map(Into::into).collect(),
            former_policies: saved.former_policies.into_iter().map(Into::into).collect(),
            retain: saved.retain,
            ..Self::unheld(saved.address, saved.pool.into(), saved.group.into())
        }
    }
}

/// Hands out addresses and remembers them.
#[derive(Debug)]
pub struct Allocator {
    ipam: Ipam,
    records: BTreeMap<IpAddr, VirtualIp>,
    /// What was last logged of each egress policy that lacks something.
    complaints: BTreeMap<String, String>,
    file: Option<PathBuf>,
}

impl Allocator {
    /// With what an earlier process remembered. Returns the events that make up for its `VirtualIp`s.
    pub fn new(class_less: bool, state_dir: Option<&Path>) -> anyhow::Result<(Self, Vec<Event>)> {
        let file = state_dir.map(|dir| dir.join(FILE));
        let saved = match &file {
            Some(path) => load(path)?,
            None => Vec::new(),
        };
        let ipam = Ipam::new(Config {
            class_less,
            kinds: BTreeSet::from([
                Kind::Service,
                Kind::Pool,
                Kind::Node,
                Kind::VirtualIp,
                Kind::EgressPolicy,
            ]),
        });
        let mut allocator = Self {
            ipam,
            records: BTreeMap::new(),
            complaints: BTreeMap::new(),
            file,
        };
        let mut events = Vec::new();
        for vip in saved.into_iter().map(VirtualIp::from) {
            allocator.records.insert(vip.address, vip.clone());
            events.push(Event::Apply(Object::VirtualIp(vip)));
        }
        events.push(Event::Synced(Kind::VirtualIp));
        for event in &events {
            allocator.ipam.apply(event.clone(), Duration::ZERO);
        }
        Ok((allocator, events))
    }

    /// Takes in what the source said.
    pub fn apply(&mut self, event: Event, now: Duration) {
        self.ipam.apply(event, now);
    }

    /// Hands out what is open. Returns the `VirtualIp`s that appeared, changed or vanished.
    pub fn reconcile(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        let mut policies = false;
        for _ in 0..MAX_ROUNDS {
            let changes = self.ipam.reconcile(now);
            policies |= !changes.policies.is_empty();
            for status in &changes.services {
                if let Some(notice) = &status.notice {
                    let (service, reason) = (&status.key, &notice.reason);
                    if notice.warning {
                        tracing::warn!(%service, reason, "{}", notice.message);
                    } else {
                        tracing::info!(%service, reason, "{}", notice.message);
                    }
                }
            }
            if changes.records.is_empty() {
                break;
            }
            for change in changes.records {
                let event = self.note(change);
                self.ipam.apply(event.clone(), now);
                events.push(event);
            }
        }
        if !events.is_empty() {
            self.save();
        }
        if policies {
            self.complain();
        }
        events
    }

    /// Logs what egress policies lack, each once.
    fn complain(&mut self) {
        let now: BTreeMap<String, String> = self
            .ipam
            .policy_refusals()
            .map(|(name, refusal)| (name.to_string(), refusal.to_string()))
            .collect();
        for (policy, why) in &now {
            if self.complaints.get(policy) != Some(why) {
                tracing::warn!(policy, "{why}");
            }
        }
        self.complaints = now;
    }

    /// When something is due by the passing of time.
    pub fn next_wakeup(&self) -> Option<Duration> {
        self.ipam.next_wakeup()
    }

    /// Why Services and egress policies have no address, for display.
    pub fn refusals(&self) -> BTreeMap<String, String> {
        self.ipam
            .refusals()
            .map(|(key, refusal)| (key.to_string(), refusal.to_string()))
            .chain(self.complaints.clone())
            .collect()
    }

    fn note(&mut self, change: RecordChange) -> Event {
        match change {
            RecordChange::Put(record) => {
                let vip = record.virtual_ip();
                self.records.insert(vip.address, vip.clone());
                Event::Apply(Object::VirtualIp(vip))
            }
            RecordChange::Remove(address) => {
                self.records.remove(&address);
                Event::Delete(ObjectId::VirtualIp(address))
            }
        }
    }

    fn save(&self) {
        let Some(path) = &self.file else { return };
        if let Err(error) = store(path, &self.records) {
            tracing::error!(%error, "assignments are not remembered: after a restart they may be others");
        }
    }
}

fn load(path: &Path) -> anyhow::Result<Vec<Saved>> {
    match std::fs::read(path) {
        Ok(text) => serde_json::from_slice(&text).with_context(|| {
            format!(
                "{} is damaged: mend it, or remove it to have addresses handed out anew",
                path.display()
            )
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

/// Writes beside the file and renames, so that a crash leaves the old or the new one.
fn store(path: &Path, records: &BTreeMap<IpAddr, VirtualIp>) -> anyhow::Result<()> {
    let saved: Vec<Saved> = records.values().map(Saved::from).collect();
    let beside = path.with_extension("json.new");
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    }
    std::fs::write(&beside, serde_json::to_vec_pretty(&saved)?)
        .with_context(|| format!("cannot write {}", beside.display()))?;
    std::fs::rename(&beside, path).with_context(|| format!("cannot write {}", path.display()))
}
