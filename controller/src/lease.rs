//! Leader election by a Lease object: leads while it can renew, hands over at once when it stops.
//!
//! The work of a leader is a future that gets a [`Term`]. It is told to stop by [`Term::ended`], and must not
//! begin a write once [`Term::is_valid`] is false, which is also so when this process was frozen and has not
//! yet noticed that it lost. Its future is awaited before the Lease is given up.

pub mod state;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use state::{Election, LeaseView, Step, Timing};

/// The name of the Lease object.
pub const LEASE_NAME: &str = "landfall-controller";

/// A leader's term of office.
#[derive(Clone, Debug)]
pub struct Term {
    ended: CancellationToken,
    origin: Instant,
    valid_until_ms: Arc<AtomicU64>,
}

impl Term {
    fn new(origin: Instant) -> Self {
        Self {
            ended: CancellationToken::new(),
            origin,
            valid_until_ms: Arc::new(AtomicU64::new(0)),
        }
    }

    /// A term that lasts until cancelled: for one process without rivals, and for tests.
    pub fn unlimited() -> Self {
        let term = Self::new(Instant::now());
        term.valid_until_ms.store(u64::MAX, Ordering::Release);
        term
    }

    fn extend(&self, until: Option<Duration>) {
        let millis = until.map_or(0, |until| {
            u64::try_from(until.as_millis()).unwrap_or(u64::MAX)
        });
        self.valid_until_ms.store(millis, Ordering::Release);
    }

    /// Whether a write may begin now.
    pub fn is_valid(&self) -> bool {
        let now = u64::try_from(self.origin.elapsed().as_millis()).unwrap_or(u64::MAX);
        !self.ended.is_cancelled() && now < self.valid_until_ms.load(Ordering::Acquire)
    }

    /// Waits until the term is over.
    pub async fn ended(&self) {
        self.ended.cancelled().await;
    }

    /// Ends it.
    pub fn end(&self) {
        self.ended.cancel();
    }
}

/// A candidate for the lead.
pub struct Candidate {
    /// The API of the Lease's namespace.
    pub api: Api<Lease>,
    /// Who we are; no two live processes may share it.
    pub identity: String,
    /// The times.
    pub timing: Timing,
}

impl Candidate {
    /// Leads as often and as long as it can, until `shutdown`. `work` is run for each term.
    pub async fn run<F: Future<Output = ()>>(
        self,
        shutdown: CancellationToken,
        mut work: impl FnMut(Term) -> F,
    ) {
        let origin = Instant::now();
        let mut election = Election::new(self.identity.clone(), self.timing);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = self.acquire(&mut election, origin) => {}
            }
            let term = Term::new(origin);
            term.extend(election.valid_until());
            tracing::info!(identity = %self.identity, "leading");
            {
                let work = work(term.clone());
                tokio::pin!(work);
                let mut worked = false;
                tokio::select! {
                    () = &mut work => worked = true,
                    () = self.keep(&mut election, &term, origin) => {
                        tracing::warn!("the Lease could not be renewed: not leading any more");
                    }
                    () = shutdown.cancelled() => {}
                }
                term.end();
                if !worked {
                    work.await;
                }
            }
            if election.valid_until().is_some() {
                self.release().await;
            }
            election.lost();
            if shutdown.is_cancelled() {
                return;
            }
            // A leader whose work ended by itself lets others try first.
            tokio::time::sleep(self.timing.retry).await;
        }
    }

    /// Returns once the Lease is ours.
    async fn acquire(&self, election: &mut Election, origin: Instant) {
        let mut complained = false;
        loop {
            match self.attempt(election, origin).await {
                Ok(true) => return,
                Ok(false) => complained = false,
                Err(error) => {
                    if !complained {
                        tracing::warn!(%error, "cannot read or write the Lease, trying on");
                    }
                    complained = true;
                }
            }
            // Half the interval: a released Lease is noticed soon.
            tokio::time::sleep(self.timing.retry / 2).await;
        }
    }

    /// Renews until that fails for too long or somebody else leads.
    async fn keep(&self, election: &mut Election, term: &Term, origin: Instant) {
        loop {
            let valid_until = election.valid_until().unwrap_or_default();
            let until = origin + valid_until;
            if tokio::time::timeout_at(until, tokio::time::sleep(self.timing.retry))
                .await
                .is_err()
            {
                break;
            }
            match tokio::time::timeout_at(until, self.attempt(election, origin)).await {
                Ok(Ok(true)) => term.extend(election.valid_until()),
                Ok(Ok(false)) | Err(_) => break,
                Ok(Err(error)) => tracing::warn!(%error, "cannot renew the Lease, trying on"),
            }
        }
        election.lost();
        term.extend(None);
    }

    /// One look at the Lease, and a write if it can be ours. True when it is.
    async fn attempt(&self, election: &mut Election, origin: Instant) -> Result<bool, LeaseError> {
        let lease = timeout(self.timing.retry, self.api.get_opt(LEASE_NAME))
            .await
            .map_err(|_| LeaseError::Timeout)??;
        let step = election.observe(lease.as_ref().map(view), origin.elapsed());
        let started = origin.elapsed();
        let written = match step {
            Step::Wait => return Ok(false),
            Step::Create => {
                let lease = self.fresh(None);
                timeout(
                    self.timing.retry,
                    self.api.create(&PostParams::default(), &lease),
                )
                .await
            }
            Step::Take => {
                let lease = self.fresh(lease);
                let params = PostParams::default();
                timeout(
                    self.timing.retry,
                    self.api.replace(LEASE_NAME, &params, &lease),
                )
                .await
            }
        };
        match written.map_err(|_| LeaseError::Timeout)? {
            Ok(lease) => {
                election.written(started);
                election.observe(Some(view(&lease)), origin.elapsed());
                Ok(true)
            }
            // Somebody was quicker; the next look says who.
            Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// The Lease as we want it, over what was read.
    fn fresh(&self, before: Option<Lease>) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let mut lease = before.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(LEASE_NAME.into()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if spec.holder_identity.as_deref() != Some(&self.identity) {
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or_default() + 1);
        }
        spec.holder_identity = Some(self.identity.clone());
        let seconds = self.timing.duration.as_secs().max(1);
        spec.lease_duration_seconds = i32::try_from(seconds).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Gives the Lease up, so that the next leader need not wait.
    async fn release(&self) {
        let release = async {
            let Some(mut lease) = self.api.get_opt(LEASE_NAME).await? else {
                return Ok(());
            };
            if view(&lease).holder.as_ref() != Some(&self.identity) {
                return Ok(());
            }
            if let Some(spec) = &mut lease.spec {
                spec.holder_identity = None;
                spec.lease_duration_seconds = Some(1);
            }
            self.api
                .replace(LEASE_NAME, &PostParams::default(), &lease)
                .await?;
            Ok::<(), kube::Error>(())
        };
        match timeout(self.timing.retry, release).await {
            Ok(Ok(())) => tracing::info!("released the Lease"),
            Ok(Err(error)) => tracing::warn!(%error, "cannot release the Lease: it will expire"),
            Err(_) => tracing::warn!("releasing the Lease took too long: it will expire"),
        }
    }
}

/// Why the Lease could not be read or written.
#[derive(Debug, thiserror::Error)]
enum LeaseError {
    #[error("the API server did not answer in time")]
    Timeout,
    #[error(transparent)]
    Api(#[from] kube::Error),
}

fn view(lease: &Lease) -> LeaseView {
    let spec = lease.spec.as_ref();
    LeaseView {
        holder: spec
            .and_then(|spec| spec.holder_identity.clone())
            .filter(|holder| !holder.is_empty()),
        version: lease.metadata.resource_version.clone().unwrap_or_default(),
        duration: spec
            .and_then(|spec| spec.lease_duration_seconds)
            .and_then(|seconds| u64::try_from(seconds).ok())
            .map_or(Duration::from_secs(15), Duration::from_secs),
    }
}
