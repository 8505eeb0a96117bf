//! What the control socket answers ([`landfall_runtime::control`] says what that is for): who leaves by what, and the way
//! out of it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::response::Json;
use axum::routing::{get, post};
use landfall_ebpf_common::egress::gateway::PolicyCount;
use landfall_runtime::control::{
    Armed, Binding, Bindings, Diagnosis, Egress, PodUse, Pods, PolicyUse, path,
};
use serde::Deserialize;
use tokio::time::Instant;

use crate::datapath::egress::{Bound, FlowState, Usage, drops};
use crate::egress::PolicyName;
use crate::runtime::Shared;

/// How many bindings an answer has, unless it is asked for another number.
const MOST: usize = 1000;
/// How long another node may take to become the gateway instead.
const HAND_OVER: Duration = Duration::from_secs(4);
/// How long pods' nodes may take to follow.
const FOLLOW: Duration = Duration::from_millis(500);
const STEP: Duration = Duration::from_millis(50);

type Refusal = (StatusCode, String);

/// The speaker, and its clock.
#[derive(Clone)]
struct Asked {
    shared: Shared,
    now: Arc<dyn Fn() -> Duration + Send + Sync>,
}

/// The answers.
pub(crate) fn router(shared: Shared, now: impl Fn() -> Duration + Send + Sync + 'static) -> Router {
    let asked = Asked {
        shared,
        now: Arc::new(now),
    };
    Router::new()
        .route(path::EGRESS, get(egress))
        .route(path::BINDINGS, get(bindings))
        .route(path::PODS, get(pods))
        .route(path::DISARM, post(disarm))
        .route(path::ARM, post(arm))
        .route(path::DOCTOR, get(doctor))
        .with_state(asked)
}

async fn doctor(State(asked): State<Asked>) -> Json<Diagnosis> {
    let patient = asked.shared.lock().patient();
    Json(patient.examine().await)
}

async fn egress(State(asked): State<Asked>) -> Json<Egress> {
    let speaker = asked.shared.lock();
    let known = speaker.policies();
    let mut policies: BTreeMap<String, PolicyUse> = known
        .map(|policy| (policy.to_string(), PolicyUse::default()))
        .collect();
    for (policy, usage) in speaker.usage() {
        policies.insert(policy.to_string(), use_of(usage));
    }
    for (policy, dropped) in speaker.dropped_for_no_gateway() {
        let known = policies.entry(policy.to_string()).or_default();
        known.dropped.insert("no-gateway".to_owned(), *dropped);
    }
    for (policy, coverage) in speaker.copied() {
        let known = policies.entry(policy.to_string()).or_default();
        known.standbys = Some(coverage.standbys);
        let lag = u64::try_from(coverage.lag.as_millis()).unwrap_or(u64::MAX);
        known.replication_lag_milliseconds = Some(lag);
    }
    Json(Egress {
        node: speaker.election().me().to_string(),
        enabled: speaker.treats_egress(),
        disarmed: speaker.is_disarmed(),
        gateway_of: names(&speaker.gateway_of()),
        policies,
    })
}

fn use_of(usage: &Usage) -> PolicyUse {
    let limit = |quota: u32| (quota > 0).then_some(quota);
    let total = usage.total();
    let drops = usage.drops().into_iter();
    PolicyUse {
        ports: usage.ports,
        quota: limit(usage.quota),
        quota_per_pod: limit(usage.quota_per_pod),
        bindings: total.live,
        resting: total.resting,
        out_packets: usage.count.out_packets,
        out_bytes: usage.count.out_bytes,
        in_packets: usage.count.in_packets,
        in_bytes: usage.count.in_bytes,
        dropped: drops
            .map(|(reason, packets)| (reason.to_owned(), packets))
            .collect(),
        ..PolicyUse::default()
    }
}

fn names(policies: &BTreeSet<PolicyName>) -> Vec<String> {
    policies.iter().map(ToString::to_string).collect()
}

/// Which bindings are asked for.
#[derive(Clone, Debug, Default, Deserialize)]
struct Which {
    policy: Option<String>,
    /// `namespace/name`.
    pod: Option<String>,
    most: Option<usize>,
}

/// Bindings as the maps have them, and the names of pods by address.
struct Found {
    node: String,
    bound: Vec<Bound>,
    more: usize,
    copies: usize,
    pods: HashMap<IpAddr, String>,
}

/// Looks through all bindings, and says of each that is asked for whether it is to be shown, of so many at most.
async fn find(
    asked: &Asked,
    which: Which,
    most: usize,
    shown: impl Fn(&Bound, Option<&String>) -> bool + Send + 'static,
) -> Result<Found, Refusal> {
    let (reader, node, led, pods) = {
        let speaker = asked.shared.lock();
        let judged = speaker.egress().judged().iter();
        let pods: HashMap<IpAddr, String> = judged
            .map(|(address, judged)| (*address, judged.pod.to_string()))
            .collect();
        let node = speaker.election().me().to_string();
        (speaker.bindings(), node, speaker.led_egress(), pods)
    };
    if let Some(pod) = &which.pod
        && !pods.values().any(|known| known == pod)
    {
        let said = format!("no pod {pod} is known here (is it namespace/name?)\n");
        return Err((StatusCode::NOT_FOUND, said));
    }
    // All of them are read: a million take a second.
    let read = tokio::task::spawn_blocking(move || {
        let copies = AtomicUsize::new(0);
        let wanted = |bound: &Bound| {
            let policy = which.policy.as_deref();
            let of_policy = policy.is_none_or(|name| bound.policy.as_deref() == Some(name));
            let known = pods.get(&bound.pod.ip());
            let of_pod = which.pod.as_ref().is_none_or(|pod| known == Some(pod));
            if !of_policy || !of_pod {
                return false;
            }
            // Kept for the address's gateway, or until they end: they leave there.
            let is_copy = !led.contains(&bound.egress.ip());
            copies.fetch_add(usize::from(is_copy), Ordering::Relaxed);
            !is_copy && shown(bound, known)
        };
        let read = reader.list(most, &wanted);
        read.map(|(bound, more)| Found {
            node,
            bound,
            more,
            copies: copies.load(Ordering::Relaxed),
            pods,
        })
    });
    let read = read.await.map_err(std::io::Error::other).flatten();
    read.map_err(|error| unreadable("bindings", &error))
}

fn unreadable(what: &str, error: &std::io::Error) -> Refusal {
    let said = format!("the {what} cannot be read: {error}\n");
    (StatusCode::INTERNAL_SERVER_ERROR, said)
}

async fn bindings(
    State(asked): State<Asked>,
    Query(which): Query<Which>,
) -> Result<Json<Bindings>, Refusal> {
    let most = which.most.unwrap_or(MOST);
    let found = find(&asked, which, most, |_, _| true).await?;
    let bindings = found.bound.iter().map(|bound| Binding {
        policy: bound.policy.as_ref().map(ToString::to_string),
        pod: found.pods.get(&bound.pod.ip()).cloned(),
        pod_address: bound.pod,
        egress: bound.egress,
        remote: bound.remote,
        protocol: protocol(bound.protocol),
        idle_seconds: bound.idle.as_secs(),
        state: bound.state.word().to_owned(),
    });
    Ok(Json(Bindings {
        bindings: bindings.collect(),
        node: found.node,
        more: found.more,
        copies: found.copies,
    }))
}

fn protocol(number: u8) -> String {
    match number {
        6 => "TCP".to_owned(),
        17 => "UDP".to_owned(),
        1 | 58 => "ICMP".to_owned(),
        other => other.to_string(),
    }
}

async fn pods(
    State(asked): State<Asked>,
    Query(which): Query<Which>,
) -> Result<Json<Pods>, Refusal> {
    let most = which.most.unwrap_or(MOST);
    let sums = Arc::new(Mutex::new(Sums::default()));
    let all = Arc::clone(&sums);
    let only = which.clone();
    // Summed up as they are read: all of them would not fit beside what else the speaker holds.
    let found = find(&asked, which, 0, move |bound, pod| {
        lock(&all).add(bound, pod);
        false
    });
    let found = found.await?;
    let mut sums = std::mem::take(&mut *lock(&sums));
    let reader = asked.shared.lock().bindings();
    let counts = tokio::task::spawn_blocking(move || reader.counts()).await;
    let counts = counts.map_err(std::io::Error::other).flatten();
    let counts = counts.map_err(|error| unreadable("packet counts", &error))?;
    for (address, (pod, policy)) in tenants(&asked, &only) {
        if let Some(count) = counts.get(&address) {
            sums.count(&pod, &policy, count);
        }
    }
    let mut pods = sums.finish();
    pods.truncate(most);
    Ok(Json(Pods {
        node: found.node,
        pods,
        copies: found.copies,
    }))
}

/// The pods that are asked for, by address, of policies that this node is the gateway of.
fn tenants(asked: &Asked, which: &Which) -> HashMap<IpAddr, (String, PolicyName)> {
    let speaker = asked.shared.lock();
    let here = speaker.gateway_of();
    let judged = speaker.egress().judged().iter();
    let tenants = judged.filter_map(|(address, judged)| {
        let policy = judged.tenant.as_ref()?.policy.clone();
        Some((*address, (judged.pod.to_string(), policy)))
    });
    tenants
        .filter(|(_, (_, policy))| here.contains(policy))
        .filter(|(_, (_, policy))| which.policy.as_deref().is_none_or(|it| it == &**policy))
        .filter(|(_, (pod, _))| which.pod.as_ref().is_none_or(|it| it == pod))
        .collect()
}

fn lock(sums: &Mutex<Sums>) -> MutexGuard<'_, Sums> {
    sums.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many pairs of pod and remote are told apart; more than that are counted for their pods only.
const MAX_TARGETS: usize = 100_000;

/// By pod (by address, if nobody has it) and policy.
type ByPod = BTreeMap<String, BTreeMap<Option<PolicyName>, PodUse>>;

/// What pods have and have sent.
#[derive(Default)]
struct Sums {
    pods: ByPod,
    targets: HashMap<(IpAddr, SocketAddr, u8), u64>,
}

fn of<'a>(pods: &'a mut ByPod, pod: &str, policy: Option<&PolicyName>) -> &'a mut PodUse {
    let of_pod = pods.entry(pod.to_owned()).or_default();
    of_pod.entry(policy.cloned()).or_insert_with(|| PodUse {
        policy: policy.map(ToString::to_string),
        pod: pod.to_owned(),
        bindings: 0,
        resting: 0,
        most_to_one: 0,
        busiest: None,
        traffic: None,
    })
}

impl Sums {
    fn add(&mut self, one: &Bound, pod: Option<&String>) {
        let address = one.pod.ip();
        let pod = pod.cloned().unwrap_or_else(|| address.to_string());
        let known = of(&mut self.pods, &pod, one.policy.as_ref());
        if one.state == FlowState::Resting {
            known.resting += 1;
            return;
        }
        known.bindings += 1;
        let target = (address, one.remote, one.protocol);
        if self.targets.len() >= MAX_TARGETS && !self.targets.contains_key(&target) {
            return;
        }
        let ports = self.targets.entry(target).or_default();
        *ports += 1;
        if *ports > known.most_to_one {
            known.most_to_one = *ports;
            known.busiest = Some(one.remote);
        }
    }

    /// Adds what was counted of a pod by one of its addresses. One that has neither bindings nor counts is not listed.
    fn count(&mut self, pod: &str, policy: &PolicyName, count: &PolicyCount) {
        let is_listed = || {
            let of_pod = self.pods.get(pod);
            of_pod.is_some_and(|policies| policies.contains_key(&Some(policy.clone())))
        };
        if *count == PolicyCount::default() && !is_listed() {
            return;
        }
        let known = of(&mut self.pods, pod, Some(policy));
        let traffic = known.traffic.get_or_insert_default();
        traffic.out_packets += count.out_packets;
        traffic.out_bytes += count.out_bytes;
        traffic.in_packets += count.in_packets;
        traffic.in_bytes += count.in_bytes;
        for (reason, packets) in drops(count) {
            if packets > 0 {
                *traffic.dropped.entry(reason.to_owned()).or_default() += packets;
            }
        }
    }

    /// Who has most first.
    fn finish(self) -> Vec<PodUse> {
        let pods = self.pods.into_values();
        let mut pods: Vec<PodUse> = pods.flat_map(BTreeMap::into_values).collect();
        pods.sort_by_key(|pod| std::cmp::Reverse(pod.bindings));
        pods
    }
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct How {
    /// Also if nobody can take over what this node is the gateway of.
    #[serde(default)]
    force: bool,
}

/// First another node becomes the gateway of what this one is the gateway of, and the pods' nodes follow: or else their
/// packets would pass here and leave by this node's own address.
async fn disarm(
    State(asked): State<Asked>,
    Query(how): Query<How>,
) -> Result<Json<Armed>, Refusal> {
    // To its end, also if whoever asked does not wait for that.
    let done = tokio::spawn(hand_over_and_disarm(asked, how)).await;
    done.unwrap_or_else(|error| {
        Err((
            StatusCode::INTERNAL_SERVER_ERROR,
            format!("disarming ended: {error}\n"),
        ))
    })
}

async fn hand_over_and_disarm(asked: Asked, how: How) -> Result<Json<Armed>, Refusal> {
    let before = {
        let mut speaker = asked.shared.lock();
        if !speaker.treats_egress() {
            let said = "this speaker runs without --egress: there is nothing to disarm\n";
            return Err((StatusCode::CONFLICT, said.to_owned()));
        }
        let before = speaker.gateway_of();
        speaker.hand_over_egress(true);
        before
    };
    let begun = Instant::now();
    let mut left = before.clone();
    while !left.is_empty() && begun.elapsed() < HAND_OVER {
        tokio::time::sleep(STEP).await;
        left = asked.shared.lock().gateway_of();
    }
    if !left.is_empty() && !how.force {
        asked.shared.lock().hand_over_egress(false);
        let list = names(&left).join(", ");
        let said = format!(
            "this node is the gateway of {list}, and no other node can take over: packets of other nodes' pods would \
             leave by this node's own address. Nothing was disarmed. Let another node be a gateway, or say --force\n"
        );
        return Err((StatusCode::CONFLICT, said));
    }
    if !before.is_empty() {
        tokio::time::sleep(FOLLOW).await;
    }
    let mut speaker = asked.shared.lock();
    speaker.disarm(true, (asked.now)());
    Ok(Json(Armed {
        node: speaker.election().me().to_string(),
        disarmed: true,
        handed_over: names(&(&before - &left)),
        abandoned: names(&left),
    }))
}

async fn arm(State(asked): State<Asked>) -> Result<Json<Armed>, Refusal> {
    let mut speaker = asked.shared.lock();
    if !speaker.treats_egress() {
        let said = "this speaker runs without --egress: there is nothing to arm\n";
        return Err((StatusCode::CONFLICT, said.to_owned()));
    }
    speaker.disarm(false, (asked.now)());
    Ok(Json(Armed {
        node: speaker.election().me().to_string(),
        ..Armed::default()
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn mk_bound(pod: &str, remote: &str, state: FlowState) -> Bound {
        Bound {
            policy: Some("mail".into()),
            pod: pod.parse().unwrap(),
            egress: "192.0.2.1:4000".parse().unwrap(),
            remote: remote.parse().unwrap(),
            protocol: 6,
            idle: Duration::ZERO,
            state,
        }
    }

    #[test]
    fn pods_are_summed_up() {
        let bound = [
            mk_bound("10.1.0.1:1", "198.51.100.1:25", FlowState::Established),
            mk_bound("10.1.0.2:1", "198.51.100.1:25", FlowState::Established),
            mk_bound("10.1.0.2:2", "198.51.100.2:25", FlowState::Opening),
            mk_bound("10.1.0.2:3", "198.51.100.2:25", FlowState::Closing),
            mk_bound("10.1.0.2:4", "198.51.100.2:25", FlowState::Resting),
            // The same pod by its other address.
            mk_bound("[fd00::2]:1", "[2001:db8::1]:25", FlowState::Established),
        ];
        let mut sums = Sums::default();
        for one in &bound {
            let name = "a/mta".to_owned();
            sums.add(
                one,
                one.pod.ip().to_string().ends_with('2').then_some(&name),
            );
        }
        let count = PolicyCount {
            out_packets: 3,
            out_bytes: 300,
            quota: 2,
            ..PolicyCount::default()
        };
        for _ in 0..2 {
            sums.count("a/mta", &"mail".into(), &count);
        }
        sums.count("a/refused", &"mail".into(), &count);
        sums.count("a/quiet", &"mail".into(), &PolicyCount::default());
        let pods = sums.finish();
        let of = |pod: &PodUse| (pod.pod.clone(), pod.bindings, pod.resting, pod.most_to_one);
        let of: Vec<_> = pods.iter().map(of).collect();
        assert_eq!(
            of,
            [
                ("a/mta".into(), 4, 1, 2),
                ("10.1.0.1".into(), 1, 0, 1),
                ("a/refused".into(), 0, 0, 0)
            ]
        );
        let traffic = pods[0].traffic.as_ref().unwrap();
        assert_eq!((traffic.out_packets, traffic.out_bytes), (6, 600));
        assert_eq!(traffic.dropped, BTreeMap::from([("quota".into(), 4)]));
        assert_eq!(
            pods[1].traffic, None,
            "its flows go on, and it is not known"
        );
        assert_eq!(pods[0].busiest, Some("198.51.100.2:25".parse().unwrap()));
    }
}
