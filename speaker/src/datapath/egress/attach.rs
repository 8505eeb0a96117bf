//! The gateway's programs at the uplinks, each in front of all others, and kept there.

use std::collections::{BTreeMap, BTreeSet};

use aya::Ebpf;
use aya::programs::TcAttachType;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use landfall_ebpf_common::{GATEWAY_EGRESS, GATEWAY_INGRESS, tcx};

use super::super::pins::{Pins, remove_link};
use super::super::uplink::{UplinkError, ahead, behind, chain, classifier, interface_name, taken};

/// Where at an interface a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Side {
    Ingress,
    Egress,
}

impl Side {
    const ALL: [Self; 2] = [Self::Ingress, Self::Egress];

    const fn program(self) -> &'static str {
        match self {
            Self::Ingress => GATEWAY_INGRESS,
            Self::Egress => GATEWAY_EGRESS,
        }
    }

    const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }

    const fn hook(self) -> tcx::Hook {
        match self {
            Self::Ingress => tcx::Hook::Ingress,
            Self::Egress => tcx::Hook::Egress,
        }
    }

    /// The pins of those that go before it.
    const fn ahead(self) -> &'static [&'static str] {
        match self {
            Self::Ingress => &[],
            Self::Egress => &["egress", "guard"],
        }
    }

    /// What the pin of its link is called.
    const fn word(self) -> &'static str {
        match self {
            Self::Ingress => "gateway",
            Self::Egress => "gateway-out",
        }
    }
}

/// The programs, and where they are.
#[derive(Debug)]
pub(super) struct Attached {
    ids: BTreeMap<Side, u32>,
    interfaces: BTreeSet<u32>,
}

impl Attached {
    /// Loads the programs, and puts each in the place of the one that an earlier process left.
    pub(super) fn adopt(ebpf: &mut Ebpf, pins: &Pins) -> Result<Self, UplinkError> {
        let mut ids = BTreeMap::new();
        for side in Side::ALL {
            let program = classifier(ebpf, side.program())?;
            program.load()?;
            ids.insert(side, program.info()?.id());
        }
        let mut interfaces = BTreeSet::new();
        for side in Side::ALL {
            for interface in pins.linked(side.word()) {
                match replace(ebpf, pins, interface, side) {
                    Ok(()) => {
                        interfaces.insert(interface);
                    }
                    Err(error) => {
                        tracing::debug!(interface, %error, "a pinned link is of no use");
                        remove(pins, interface, side);
                    }
                }
            }
        }
        Ok(Self { ids, interfaces })
    }

    /// Sees to it that the programs are at these interfaces, in front of all others, and at no others. One that fails keeps
    /// none of the others from it.
    pub(super) fn ensure(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        wanted: &BTreeSet<u32>,
    ) -> Result<(), UplinkError> {
        let gone: Vec<u32> = self.interfaces.difference(wanted).copied().collect();
        for interface in gone {
            self.detach(pins, interface);
        }
        let mut outcome = Ok(());
        for interface in wanted {
            for side in Side::ALL {
                let ensured = self.ensure_at(ebpf, pins, *interface, side);
                outcome = outcome.and(ensured);
            }
            self.interfaces.insert(*interface);
        }
        outcome
    }

    fn ensure_at(
        &self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        interface: u32,
        side: Side,
    ) -> Result<(), UplinkError> {
        let name = interface_name(interface)?;
        let programs = tcx::programs(interface, side.hook()).map_err(|error| {
            let reason = match error.raw_os_error() {
                Some(libc::EINVAL) => "a gateway needs TCX (kernel 6.6)".to_owned(),
                _ => error.to_string(),
            };
            UplinkError::Attach(name.clone(), reason)
        })?;
        let ahead = ahead(pins, interface, side.ahead(), &programs);
        if programs.get(ahead.len()) == self.ids.get(&side) {
            return Ok(());
        }
        // A program can be at a hook once only: out first, then in again, some microseconds later.
        remove(pins, interface, side);
        let (order, _last) = behind(pins, interface, &ahead)?;
        let options = TcAttachOptions::TcxOrder(order);
        let program = classifier(ebpf, side.program())?;
        let id = program
            .attach_with_options(&name, side.attach_type(), options)
            .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
        taken(program, id)?
            .pin(pins.link(interface, side.word()))
            .map_err(|error| UplinkError::Attach(name, chain(&error)))?;
        Ok(())
    }

    fn detach(&mut self, pins: &Pins, interface: u32) {
        for side in Side::ALL {
            remove(pins, interface, side);
        }
        self.interfaces.remove(&interface);
    }

    /// Takes the programs off all interfaces.
    pub(super) fn detach_all(&mut self, pins: &Pins) {
        for interface in std::mem::take(&mut self.interfaces) {
            self.detach(pins, interface);
        }
    }
}

/// Whether both programs are pinned at some interface.
pub(super) fn is_attached(pins: &Pins) -> bool {
    let sides = Side::ALL.map(|side| pins.linked(side.word()));
    sides.iter().all(|interfaces| !interfaces.is_empty())
}

/// Puts the program in the place of the one that a pinned link holds.
fn replace(ebpf: &mut Ebpf, pins: &Pins, interface: u32, side: Side) -> Result<(), UplinkError> {
    let link: FdLink = PinnedLink::from_pin(pins.link(interface, side.word()))?.into();
    let link = SchedClassifierLink::try_from(link)?;
    let program = classifier(ebpf, side.program())?;
    let id = program.attach_to_link(link)?;
    taken(program, id).map(drop)
}

fn remove(pins: &Pins, interface: u32, side: Side) {
    let path = pins.link(interface, side.word());
    if let Err(error) = remove_link(&path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove a pinned link");
    }
}
