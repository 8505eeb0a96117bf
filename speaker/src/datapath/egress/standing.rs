//! What this node is to egress addresses, as its election has it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Instant;

use landfall_ebpf_common::VipKey;
use landfall_ebpf_common::egress::binding::tick;
use landfall_ebpf_common::egress::gateway::{EgressState, egress_flag};
use nix::time::{ClockId, clock_gettime};

/// What this node is to an egress address. One that it is neither gateway nor standby of is not named: what is left of its
/// bindings ends by its own time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Its gateway.
    Leads {
        /// Since when. What nobody hears of is idle from then on at the earliest, and for 60 s a connection whose binding
        /// was not copied in time may have its own port again.
        since: Instant,
        /// What it may do.
        licence: Licence,
    },
    /// It would take over: what is bound there are copies, that stay until who leads says that they end.
    StandsBy,
}

/// What a gateway may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Licence {
    /// All.
    Full,
    /// It translates what is bound, and binds nothing: it has no majority.
    Frozen,
    /// Nothing: its lease is over. What comes is dropped.
    Silent,
}

/// By address, as the programs have it.
pub(in super::super) type States = BTreeMap<VipKey, EgressState>;

/// This moment, as the programs have it.
pub(super) fn now() -> u32 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock is always there");
    let nanoseconds = time.tv_sec() * 1_000_000_000 + time.tv_nsec();
    tick(u64::try_from(nanoseconds).expect("it began at 0"))
}

impl Standing {
    fn state(self) -> EgressState {
        match self {
            Self::StandsBy => EgressState {
                flags: egress_flag::STANDBY,
                since: 0,
                policy: 0,
            },
            Self::Leads { since, licence } => {
                let ago = u64::try_from(since.elapsed().as_nanos()).unwrap_or(u64::MAX);
                let more = match licence {
                    Licence::Full => 0,
                    Licence::Frozen => egress_flag::FROZEN,
                    Licence::Silent => egress_flag::SILENT,
                };
                EgressState {
                    flags: egress_flag::LED | more,
                    since: now().wrapping_sub(tick(ago)),
                    policy: 0,
                }
            }
        }
    }
}

pub(in super::super) fn states(standings: &BTreeMap<IpAddr, Standing>) -> States {
    standings
        .iter()
        .map(|(address, standing)| (VipKey::from_address(*address), standing.state()))
        .collect()
}
