//! Who may lead, as decided from what a Lease says and when that was seen: pure, on a monotonic clock.
//!
//! As in client-go, other processes' clocks are never read: a Lease is expired when it was *seen unchanged* for
//! its duration. A leader counts its own validity from before its last successful renewal was sent, and gives
//! up well before anybody else can take over.

use std::time::Duration;

/// The times of an election.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// How long a Lease is honoured by others after they saw it renewed.
    pub duration: Duration,
    /// How long after its last renewal a leader may go on writing.
    pub deadline: Duration,
    /// How often to renew, or to look whether the Lease is free.
    pub retry: Duration,
}

impl Timing {
    /// A write begun at the last moment must be over before another leader may begin: this much is left for it.
    pub fn write_timeout(&self) -> Duration {
        self.duration.saturating_sub(self.deadline) * 3 / 4
    }
}

/// What a Lease object says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeaseView {
    /// Its holder; `None` when it was released.
    pub holder: Option<String>,
    /// Its resource version, which changes with every renewal.
    pub version: String,
    /// For how long the holder wants it honoured.
    pub duration: Duration,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Create the Lease, which does not exist.
    Create,
    /// Write ourselves into it: it is free, expired, or already ours.
    Take,
    /// Look again later.
    Wait,
}

/// One process's view of the election.
#[derive(Debug)]
pub struct Election {
    identity: String,
    timing: Timing,
    seen: Option<(LeaseView, Duration)>,
    valid_until: Option<Duration>,
}

impl Election {
    /// An election that has seen nothing yet.
    pub fn new(identity: String, timing: Timing) -> Self {
        Self {
            identity,
            timing,
            seen: None,
            valid_until: None,
        }
    }

    /// Takes in what was read at `now`, and says what to do.
    pub fn observe(&mut self, lease: Option<LeaseView>, now: Duration) -> Step {
        let Some(lease) = lease else {
            self.seen = None;
            return Step::Create;
        };
        let ours = lease.holder.as_deref() == Some(self.identity.as_str());
        let free = lease.holder.is_none();
        let since = match &self.seen {
            Some((before, since)) if *before == lease => *since,
            Some(_) | None => now,
        };
        let expired = now >= since + lease.duration;
        if !ours {
            // Somebody else wrote it: whatever we believed is over.
            self.valid_until = None;
        }
        self.seen = Some((lease, since));
        if ours || free || expired {
            Step::Take
        } else {
            Step::Wait
        }
    }

    /// Our write, begun at `started`, succeeded.
    pub fn written(&mut self, started: Duration) {
        self.valid_until = Some(started + self.timing.deadline);
    }

    /// Somebody else was quicker, or we gave the Lease up.
    pub fn lost(&mut self) {
        self.valid_until = None;
    }

    /// Until when we may write; `None` when we do not lead.
    pub fn valid_until(&self) -> Option<Duration> {
        self.valid_until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing {
        duration: Duration::from_secs(12),
        deadline: Duration::from_secs(8),
        retry: Duration::from_secs(2),
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn mk_lease(holder: &str, version: &str) -> LeaseView {
        LeaseView {
            holder: (!holder.is_empty()).then(|| holder.into()),
            version: version.into(),
            duration: TIMING.duration,
        }
    }

    #[test]
    fn a_missing_or_released_lease_is_taken_at_once() {
        let mut election = Election::new("a".into(), TIMING);
        assert_eq!(election.observe(None, at(0)), Step::Create);
        assert_eq!(election.observe(Some(mk_lease("", "1")), at(1)), Step::Take);
    }

    #[test]
    fn a_lease_expires_only_when_seen_unchanged_for_its_duration() {
        let mut election = Election::new("a".into(), TIMING);
        for (seconds, version, step) in [
            (100, "1", Step::Wait),
            (111, "1", Step::Wait),
            (111, "2", Step::Wait),
            (122, "2", Step::Wait),
            (123, "2", Step::Take),
        ] {
            assert_eq!(
                election.observe(Some(mk_lease("b", version)), at(seconds)),
                step,
                "{seconds}"
            );
        }
    }

    #[test]
    fn a_process_that_returns_under_its_name_goes_on() {
        let mut election = Election::new("a".into(), TIMING);
        assert_eq!(
            election.observe(Some(mk_lease("a", "1")), at(0)),
            Step::Take
        );
        assert_eq!(election.valid_until(), None, "but leads only once it wrote");
    }

    #[test]
    fn validity_counts_from_before_the_write_and_ends_before_the_lease() {
        let mut election = Election::new("a".into(), TIMING);
        election.observe(None, at(0));
        election.written(at(1));
        assert_eq!(election.valid_until(), Some(at(9)));
        assert!(TIMING.deadline + TIMING.write_timeout() < TIMING.duration);
        election.observe(Some(mk_lease("b", "7")), at(3));
        assert_eq!(election.valid_until(), None, "another's name ends it");
    }

    /// Two processes that see the Lease with any delay never may write at the same time.
    #[test]
    fn no_two_leaders_in_any_interleaving() {
        for pause in 0..30 {
            let mut a = Election::new("a".into(), TIMING);
            let mut b = Election::new("b".into(), TIMING);
            a.observe(None, at(0));
            a.written(at(0));
            let mut lease = mk_lease("a", "0");
            for second in 0..60 {
                // `a` renews every 2 s, but not while it is frozen or cut off.
                if second % 2 == 0 && !(10..10 + pause).contains(&second) {
                    let step = a.observe(Some(lease.clone()), at(second));
                    if step == Step::Take {
                        lease = mk_lease("a", &second.to_string());
                        a.written(at(second));
                    }
                }
                if b.observe(Some(lease.clone()), at(second)) == Step::Take {
                    lease = mk_lease("b", &second.to_string());
                    b.written(at(second));
                }
                let leads = |e: &Election| e.valid_until().is_some_and(|until| at(second) < until);
                assert!(
                    !(leads(&a) && leads(&b)),
                    "both lead at {second} s, pause {pause} s"
                );
            }
        }
    }
}
