//! The task that makes [`Rules`] so, and keeps them so.

use std::collections::BTreeSet;
use std::process::Stdio;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};

use super::metrics::{ByFamily, Metrics};
use super::routes::{self, PolicyRoute};
use super::ruleset::{self, TABLE};
use super::tool::{ToolError, run};
use super::{Config, Rules, Shared, kube_proxy};

/// How long after a failure to try again.
const RETRY: Duration = Duration::from_secs(1);
/// How often the kernel's counters are read for the metrics.
const COUNTERS: Duration = Duration::from_secs(15);
/// How long after a sign of interference the table is looked at.
const SETTLE: Duration = Duration::from_millis(200);
/// How old an answer about kube-proxy may be.
const FRESH: Duration = Duration::from_millis(400);

pub(super) struct Worker {
    pub(super) config: Config,
    pub(super) wanted: watch::Receiver<Option<Rules>>,
    pub(super) metrics: Metrics,
    /// What the table says now, as far as we wrote it.
    pub(super) written: Option<Rules>,
    pub(super) routes: BTreeSet<PolicyRoute>,
    pub(super) complaints: Vec<String>,
}

impl Worker {
    pub(super) async fn run(mut self) {
        let mut monitor = Monitor::start();
        let mut counters = Instant::now() + COUNTERS;
        let mut check: Option<Instant> = None;
        let mut retry: Option<Instant> = None;
        loop {
            tokio::select! {
                changed = self.wanted.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    retry = self.write_or_retry().await;
                }
                () = at(retry) => {
                    retry = self.write_or_retry().await;
                }
                () = monitor.disturbed() => {
                    check.get_or_insert(Instant::now() + SETTLE);
                }
                () = at(check) => {
                    check = None;
                    if self.written.is_some() && !self.is_whole().await {
                        tracing::warn!("the nftables table inet {TABLE} was taken away by somebody else; putting it back");
                        self.metrics.restored.inc();
                        self.written = None;
                        retry = self.write_or_retry().await;
                    }
                }
                () = sleep_until(counters) => {
                    counters = Instant::now() + COUNTERS;
                    self.read_counters().await;
                }
            }
        }
    }

    async fn write_or_retry(&mut self) -> Option<Instant> {
        let problem = self.write().await.err()?;
        tracing::error!(%problem, "this node's rules are not what they should be; trying again");
        self.metrics.failures.inc();
        self.written = None;
        Some(Instant::now() + RETRY)
    }

    async fn write(&mut self) -> Result<(), ToolError> {
        let Some(rules) = self.wanted.borrow_and_update().clone() else {
            return Ok(());
        };
        let (planned, complaints) = routes::plan(&rules, &self.config).await?;
        if complaints != self.complaints {
            for complaint in &complaints {
                tracing::warn!("{complaint}");
            }
            self.complaints = complaints;
        }
        let rerouted = planned != self.routes;
        if rerouted {
            routes::install(&planned, &self.config).await?;
            self.routes = planned;
        }
        let change = self
            .written
            .as_ref()
            .filter(|_| !rerouted)
            .and_then(|written| ruleset::change(written, &rules));
        let text = change.unwrap_or_else(|| {
            ruleset::whole(&rules, &routes::marks(&self.routes), self.config.mark_mask)
        });
        if !text.is_empty() {
            run("nft", &["-f", "-"], &text).await?;
        }
        self.written = Some(rules);
        Ok(())
    }

    /// Whether the table still has its guard; the rest comes and goes with it.
    async fn is_whole(&self) -> bool {
        let printed = run("nft", &["list", "chain", "inet", TABLE, "forward"], "").await;
        printed.is_ok_and(|text| text.contains("guard4") && text.contains("guard6"))
    }

    async fn read_counters(&self) {
        for (name, family) in [("guard4", "IPv4"), ("guard6", "IPv6")] {
            let Ok(printed) = run("nft", &["list", "counter", "inet", TABLE, name], "").await
            else {
                continue;
            };
            let mut words = printed.split_whitespace();
            if words.any(|word| word == "packets")
                && let Some(packets) = words.next().and_then(|word| word.parse().ok())
            {
                self.metrics
                    .guard_drops
                    .get_or_create(&ByFamily { family })
                    .set(packets);
            }
        }
    }
}

/// Answers questions about kube-proxy: reads its map when somebody asked, at most once in [`FRESH`].
pub(super) async fn follow_kube_proxy(shared: Arc<Shared>) {
    loop {
        let served = kube_proxy::read().await;
        *shared.served.lock().unwrap_or_else(PoisonError::into_inner) = served;
        sleep(FRESH).await;
        shared.asked.notified().await;
    }
}

/// `nft monitor`: a line for each rule, chain or table that goes.
struct Monitor {
    child: Option<(Child, Lines<BufReader<ChildStdout>>)>,
}

impl Monitor {
    fn start() -> Self {
        let mut command = Command::new("nft");
        command
            .args(["monitor", "destroy"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .kill_on_drop(true);
        let child = command.spawn().ok().and_then(|mut child| {
            let lines = BufReader::new(child.stdout.take()?).lines();
            Some((child, lines))
        });
        Self { child }
    }

    /// Returns when something of our table may have gone, or when the monitor ended and events may be lost.
    async fn disturbed(&mut self) {
        loop {
            let Some((_, lines)) = &mut self.child else {
                sleep(RETRY).await;
                *self = Self::start();
                return;
            };
            match lines.next_line().await {
                Ok(Some(line)) => {
                    if is_ours(&line) {
                        return;
                    }
                }
                Ok(None) | Err(_) => self.child = None,
            }
        }
    }
}

fn is_ours(line: &str) -> bool {
    ["table", "chain", "rule"]
        .iter()
        .any(|what| line.starts_with(&format!("delete {what} inet {TABLE}")))
}

async fn at(when: Option<Instant>) {
    match when {
        Some(when) => sleep_until(when).await,
        None => std::future::pending().await,
    }
}
