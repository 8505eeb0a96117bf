//! The programs at the uplinks: loading them, and where each has its place.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use aya::maps::MapType;
use aya::programs::links::LinkError;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use landfall_ebpf_common::egress::{guard, judge};
use landfall_ebpf_common::{TUNNEL_INGRESS, UPLINK_EGRESS, UPLINK_INGRESS, tcx};

use super::attached::{self, Attached, Restored, Side as _};
use super::driver::{DriverError, Drivers};
use super::egress::judge::{BorrowError, Lent, abandon, displace, place};
use super::flows::FlowMaps;
use super::layout::SHAPES;
use super::pins::Pins;
use super::tables::{Tables, TablesError};
use super::worker::lock;
use super::{Attachment, Config, Delivery, egress};

/// The object that the build script has compiled.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LANDFALL_UPLINK_OBJECT"));

/// Why the program is not loaded or attached.
#[derive(Debug, thiserror::Error)]
pub(super) enum UplinkError {
    #[error("loading the eBPF object: {}", chain(.0))]
    Load(#[from] aya::EbpfError),
    #[error("the eBPF object holds no {0}")]
    Missing(&'static str),
    #[error("the eBPF program: {}", chain(.0))]
    Program(#[from] ProgramError),
    #[error("the eBPF link: {}", chain(.0))]
    Link(#[from] LinkError),
    #[error("attaching to {0}: {1}")]
    Attach(String, String),
    #[error("there is no interface with index {0}")]
    NoInterface(u32),
    #[error(
        "{0}: beside Cilium the programs have to be attached by TCX, which the kernel has from 6.6 on"
    )]
    NoTcx(String),
    #[error("Cilium's maps: {0}")]
    Borrow(#[from] BorrowError),
    #[error(transparent)]
    Map(#[from] TablesError),
}

/// An error with what it was caused by, in one line.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let said = error.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        cause = error.source();
    }
    text
}

/// Where at an interface a program is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// What comes in.
    Ingress,
    /// What leaves: only where this node delivers without kube-proxy.
    Egress,
    /// What comes in by the tunnel.
    Tunnel,
    /// What leaves, behind the other: the guard, while pods have addresses of their own.
    Guard,
    /// The same, in front of the guard: it judges, where no packet filter does.
    Judge,
    /// The same, behind all of ours: it gives the packet mark back.
    Restore,
}

impl Side {
    /// Those that have something to do.
    fn wanted(config: &Config) -> Vec<Self> {
        let all = Self::ALL.iter().copied();
        all.filter(|side| match side {
            Self::Egress => config.delivery == Delivery::Native,
            Self::Judge | Self::Restore => config.cilium.is_some(),
            Self::Ingress | Self::Tunnel | Self::Guard => true,
        })
        .collect()
    }

    /// Those of the guard's: while pods have addresses of their own.
    const fn guards(self) -> bool {
        matches!(self, Self::Guard | Self::Judge | Self::Restore)
    }
}

impl attached::Side for Side {
    const ALL: &'static [Self] = &[
        Self::Ingress,
        Self::Egress,
        Self::Tunnel,
        Self::Guard,
        Self::Judge,
        Self::Restore,
    ];

    fn program(self) -> &'static str {
        match self {
            Self::Ingress => UPLINK_INGRESS,
            Self::Egress => UPLINK_EGRESS,
            Self::Tunnel => TUNNEL_INGRESS,
            Self::Guard => guard::PROGRAM,
            Self::Judge => judge::PROGRAM,
            Self::Restore => judge::RESTORE,
        }
    }

    fn hook(self) -> tcx::Hook {
        match self {
            Self::Ingress | Self::Tunnel => tcx::Hook::Ingress,
            Self::Egress | Self::Guard | Self::Judge | Self::Restore => tcx::Hook::Egress,
        }
    }

    fn priority(self) -> u16 {
        match self {
            Self::Egress => 1,
            Self::Ingress | Self::Guard => 2,
            Self::Tunnel => 3,
            // Never written: these are attached by TCX alone.
            Self::Judge => 4,
            Self::Restore => 5,
        }
    }

    fn ahead(self) -> &'static [&'static str] {
        match self {
            Self::Ingress | Self::Tunnel => &["gateway"],
            Self::Egress => &[],
            Self::Judge => &["egress"],
            Self::Guard => &["egress", "judge"],
            Self::Restore => &["egress", "judge", "guard", "gateway-out"],
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Tunnel => "tunnel",
            Self::Guard => "guard",
            Self::Judge => "judge",
            Self::Restore => "restore",
        }
    }
}

/// The programs, loaded.
#[derive(Debug)]
pub(super) struct Uplink {
    ebpf: Ebpf,
    pins: Pins,
    attached: Attached<Side>,
    drivers: Drivers,
    /// Where Cilium's maps are, and which it had; nothing, if a packet filter judges.
    lent: Option<(PathBuf, Lent)>,
}

impl Uplink {
    /// Loads the programs beside the pinned maps, and puts each in the place of the one that an earlier process left
    /// at each uplink: in one step, so that no packet passes uncounted. A program that is not wanted is taken off.
    pub(super) fn load(pins: &Pins, config: &Config) -> Result<Self, UplinkError> {
        let (mut ebpf, lent) = pinned(pins, config.cilium.as_deref())?;
        let mut drivers = Drivers::adopt(&mut ebpf)?;
        drivers.inherit(&mut ebpf, pins, &config.xdp);
        let wanted = Side::wanted(config);
        let attached = Attached::adopt(&mut ebpf, pins, config.hook, &wanted)?;
        Ok(Self {
            ebpf,
            pins: pins.clone(),
            attached,
            drivers,
            lent: config.cilium.clone().zip(lent),
        })
    }

    /// The maps, to be taken once.
    pub(super) fn tables(&mut self) -> Result<Tables, TablesError> {
        Tables::adopt(&mut self.ebpf, self.lent.is_some())
    }

    /// The maps of flows, to be taken once.
    pub(super) fn flows(&mut self) -> Result<FlowMaps, TablesError> {
        FlowMaps::taken(&mut self.ebpf)
    }

    /// The interfaces that carry programs, as far as this process knows; the guard apart.
    pub(super) fn attached(&self) -> BTreeSet<u32> {
        self.attached.interfaces(|side| !side.guards())
    }

    /// The interfaces that carry the guard.
    pub(super) fn guarded(&self) -> BTreeSet<u32> {
        self.attached.interfaces(Side::guards)
    }

    /// Whether the programs judge, and whether Cilium has maps to tell them what they know of flows.
    pub(super) fn judges(&self) -> Option<bool> {
        self.lent.as_ref().map(|(_, lent)| lent.is_any())
    }

    /// Whether Cilium has other maps by now than those that the programs read.
    pub(super) fn is_outdated(&self) -> bool {
        let lent = self.lent.as_ref();
        lent.is_some_and(|(of, lent)| !lent.is_current(of))
    }

    /// Sees to it that the guard is at the interface, in front of all programs but ours, and with it who judges.
    pub(super) fn guard(&mut self, interface: u32) -> Result<Option<Restored>, UplinkError> {
        if self.lent.is_some() && !self.attached.is_by_tcx(interface) {
            return Err(UplinkError::NoTcx(attached::interface_name(interface)?));
        }
        let mut outcome = None;
        // Who guards comes first: without who judges it lets nothing out that is not a gateway's.
        let sides: Vec<Side> = self.attached.sides().filter(|side| side.guards()).collect();
        for side in sides {
            let (_, restored) = self.attached.ensure(&mut self.ebpf, interface, side)?;
            outcome = restored.or(outcome);
        }
        Ok(outcome)
    }

    /// Takes them off: who guards first.
    pub(super) fn unguard(&mut self, interface: u32) {
        for side in Side::ALL.iter().filter(|side| side.guards()) {
            self.attached.detach(interface, *side);
        }
    }

    /// Sees to it that the programs are attached to the interface, each in front of all others.
    pub(super) fn ensure(
        &mut self,
        interface: u32,
        is_tunnel: bool,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let sides: Vec<Side> = self
            .attached
            .sides()
            .filter(|side| !side.guards() && (*side == Side::Tunnel) == is_tunnel)
            .collect();
        // An earlier process may have wanted more; a filter is known only where it is looked for.
        if !self.attached().contains(&interface) && !sides.contains(&Side::Egress) {
            self.attached.detach(interface, Side::Egress);
        }
        let mut outcome = (Attachment::Tcx, None);
        for side in sides {
            let (attachment, restored) = self.attached.ensure(&mut self.ebpf, interface, side)?;
            outcome = (attachment, restored.or(outcome.1));
        }
        Ok(outcome)
    }

    /// The interfaces whose drivers carry the other program, as far as this process knows.
    pub(super) fn drivers(&self) -> BTreeSet<u32> {
        self.drivers.attached()
    }

    /// Sees to it that the interface's driver carries it.
    pub(super) fn ensure_driver(
        &mut self,
        interface: u32,
    ) -> Result<Option<Restored>, DriverError> {
        self.drivers.ensure(&mut self.ebpf, &self.pins, interface)
    }

    /// Takes it off the interface's driver.
    pub(super) fn detach_driver(&mut self, interface: u32) {
        self.drivers.detach(&self.pins, interface);
    }

    /// Takes the programs off the interface.
    pub(super) fn detach(&mut self, interface: u32) {
        for side in [Side::Ingress, Side::Egress, Side::Tunnel] {
            self.attached.detach(interface, side);
        }
    }
}

/// The object, its maps pinned or new.
#[cfg(test)]
pub(super) fn object(pins: Option<&Pins>) -> Result<Ebpf, UplinkError> {
    match pins {
        Some(pins) => Ok(pinned(pins, None)?.0),
        None => Ok(load(&mut EbpfLoader::new())?),
    }
}

/// The object, its maps pinned, with what programs go by that judge beside the Cilium that has its maps in a directory.
fn pinned(pins: &Pins, cilium: Option<&Path>) -> Result<(Ebpf, Option<Lent>), UplinkError> {
    let mut loader = EbpfLoader::new();
    for shape in SHAPES {
        loader.map_pin_path(shape.name, pins.map(shape.name));
    }
    // A gateway's are made by the gateway, where there is one: these are nobody's.
    for shape in egress::SHAPES
        .iter()
        .filter(|shape| shape.kind != MapType::LruHash)
    {
        loader.map_max_entries(shape.name, 1);
    }
    // The least that the kernel makes: a page.
    loader.map_max_entries(egress::CHANGES, 4096);
    let lent = if let Some(of) = cilium {
        Some(place(&mut loader, pins, of)?)
    } else {
        displace(&mut loader);
        abandon(pins);
        None
    };
    Ok((load(&mut loader)?, lent))
}
/// Loads the object, one thread at a time: two that find no pinned map would both make one, and the second fails.
pub(super) fn load(loader: &mut EbpfLoader<'_>) -> Result<Ebpf, EbpfError> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = lock(&ONE_AT_A_TIME);
    loader.load(OBJECT)
}

/// A program in the object.
pub(super) fn classifier<'a>(
    ebpf: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, UplinkError> {
    Ok(ebpf
        .program_mut(name)
        .ok_or(UplinkError::Missing(name))?
        .try_into()?)
}
