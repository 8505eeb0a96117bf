//! The gateway's programs at the uplinks.

use std::collections::BTreeSet;

use aya::Ebpf;
use landfall_ebpf_common::{GATEWAY_EGRESS, GATEWAY_INGRESS, tcx};

use super::super::attached::{self, Attached, Side as _, left};
use super::super::pins::Pins;
use super::super::uplink::UplinkError;

/// Where at an interface a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(in super::super) enum Side {
    Ingress,
    Egress,
}

impl attached::Side for Side {
    const ALL: &'static [Self] = &[Self::Ingress, Self::Egress];

    fn program(self) -> &'static str {
        match self {
            Self::Ingress => GATEWAY_INGRESS,
            Self::Egress => GATEWAY_EGRESS,
        }
    }

    fn hook(self) -> tcx::Hook {
        match self {
            Self::Ingress => tcx::Hook::Ingress,
            Self::Egress => tcx::Hook::Egress,
        }
    }

    fn priority(self) -> u16 {
        match self {
            Self::Ingress => 1,
            Self::Egress => 3,
        }
    }

    fn ahead(self) -> &'static [&'static str] {
        match self {
            Self::Ingress => &[],
            Self::Egress => &["egress", "judge", "guard"],
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "gateway",
            Self::Egress => "gateway-out",
        }
    }
}

/// Sees to it that the programs are at these interfaces and at no others. One that fails keeps none of the others from it.
pub(super) fn ensure(
    attached: &mut Attached<Side>,
    ebpf: &mut Ebpf,
    wanted: &BTreeSet<u32>,
) -> Result<(), UplinkError> {
    for gone in attached.interfaces(|_| true).difference(wanted) {
        detach(attached, *gone);
    }
    let mut outcome = Ok(());
    for interface in wanted {
        for side in Side::ALL {
            let ensured = attached.ensure(ebpf, *interface, *side);
            outcome = outcome.and(ensured.map(drop));
        }
    }
    outcome
}

/// Takes the programs off all interfaces.
pub(super) fn detach_all(attached: &mut Attached<Side>) {
    for interface in attached.interfaces(|_| true) {
        detach(attached, interface);
    }
}

fn detach(attached: &mut Attached<Side>, interface: u32) {
    for side in Side::ALL {
        attached.detach(interface, *side);
    }
}

/// Whether an earlier process has left both programs at some interface.
pub(super) fn is_attached(pins: &Pins) -> bool {
    let mut sides = Side::ALL.iter();
    sides.all(|side| !left(pins, *side).is_empty())
}
