//! Many established flows, counted again after a fault.

use std::net::SocketAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::measure::stream::{Fate, Flow};
use crate::netns::Netns;

/// How long a flow may take to answer before it counts as stalled.
const PATIENCE: Duration = Duration::from_secs(5);

/// How many flows met which fate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Census {
    /// Answered a request after the fault.
    pub alive: usize,
    /// Were reset.
    pub reset: usize,
    /// Did not answer within 5 s.
    pub stalled: usize,
    /// Had their pods on the node that died, and were bound to die; counted above too.
    pub on_dead_node: usize,
}

impl Census {
    /// Those that had their pods on nodes that live.
    pub fn on_living_nodes(&self) -> usize {
        (self.alive + self.reset + self.stalled).saturating_sub(self.on_dead_node)
    }

    fn count(&mut self, fate: Fate) {
        match fate {
            Fate::Alive => self.alive += 1,
            Fate::Reset => self.reset += 1,
            Fate::Stalled => self.stalled += 1,
        }
    }
}

/// Flows that wait to be counted.
#[derive(Debug)]
pub struct Flows {
    count: Option<oneshot::Sender<()>>,
    thread: std::thread::JoinHandle<Vec<(String, Fate)>>,
}

impl Flows {
    /// Opens `number` flows to a pod's line server, each with one request answered. Returns at once.
    pub fn open(from: &Netns, to: SocketAddr, number: usize) -> Self {
        let (count, counted) = oneshot::channel();
        let thread = from.spawn("census", move || {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs but a few descriptors")
                .block_on(census(to, number, counted))
        });
        Self {
            count: Some(count),
            thread,
        }
    }

    /// Asks every flow once more and counts; at most 5 s. Flows that never came about are in no count.
    pub fn count(self) -> Census {
        self.count_apart(|_| false)
    }

    /// The same, when these pods' node has died.
    pub fn count_apart(self, is_dead: impl Fn(&str) -> bool) -> Census {
        let mut census = Census::default();
        for (pod, fate) in self.fates() {
            census.count(fate);
            census.on_dead_node += usize::from(is_dead(&pod));
        }
        census
    }

    /// Asks every flow once more; what became of each, by the pod that it leads to.
    pub fn fates(mut self) -> Vec<(String, Fate)> {
        drop(self.count.take());
        self.thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// What became of each flow, by the pod that it leads to.
async fn census(
    to: SocketAddr,
    number: usize,
    counted: oneshot::Receiver<()>,
) -> Vec<(String, Fate)> {
    let mut opening = JoinSet::new();
    for _ in 0..number {
        opening.spawn(async move {
            let mut flow = Flow::open(to).await.ok()?;
            let answer = timeout(PATIENCE, flow.ask()).await.ok()?.ok()?;
            let pod = answer.split_whitespace().next()?.to_owned();
            Some((pod, flow))
        });
    }
    let flows: Vec<(String, Flow)> = opening.join_all().await.into_iter().flatten().collect();
    let _ = counted.await;
    let mut asking = JoinSet::new();
    for (pod, mut flow) in flows {
        asking.spawn(async move {
            let fate = match timeout(PATIENCE, flow.ask()).await {
                Ok(Ok(_)) => Fate::Alive,
                Ok(Err(_)) => Fate::Reset,
                Err(_) => Fate::Stalled,
            };
            (pod, fate)
        });
    }
    asking.join_all().await
}
