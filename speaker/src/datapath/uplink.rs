//! The programs at the uplinks: loading them, and where each has its place.

use std::collections::BTreeSet;
use std::sync::Mutex;

use aya::maps::MapType;
use aya::programs::links::LinkError;
use aya::programs::{ProgramError, SchedClassifier};
use aya::{Ebpf, EbpfError, EbpfLoader};
use landfall_ebpf_common::egress::guard;
use landfall_ebpf_common::{TUNNEL_INGRESS, UPLINK_EGRESS, UPLINK_INGRESS, tcx};

use super::attached::{self, Attached, Restored, Side as _};
use super::driver::{DriverError, Drivers};
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
}

impl Side {
    /// Those that have something to do.
    const fn wanted(delivery: Delivery) -> &'static [Self] {
        match delivery {
            Delivery::KubeProxy => &[Self::Ingress, Self::Tunnel, Self::Guard],
            Delivery::Native => Self::ALL,
        }
    }
}

impl attached::Side for Side {
    const ALL: &'static [Self] = &[Self::Ingress, Self::Egress, Self::Tunnel, Self::Guard];

    fn program(self) -> &'static str {
        match self {
            Self::Ingress => UPLINK_INGRESS,
            Self::Egress => UPLINK_EGRESS,
            Self::Tunnel => TUNNEL_INGRESS,
            Self::Guard => guard::PROGRAM,
        }
    }

    fn hook(self) -> tcx::Hook {
        match self {
            Self::Ingress | Self::Tunnel => tcx::Hook::Ingress,
            Self::Egress | Self::Guard => tcx::Hook::Egress,
        }
    }

    fn priority(self) -> u16 {
        match self {
            Self::Egress => 1,
            Self::Ingress | Self::Guard => 2,
            Self::Tunnel => 3,
        }
    }

    fn ahead(self) -> &'static [&'static str] {
        match self {
            Self::Ingress | Self::Tunnel => &["gateway"],
            Self::Egress => &[],
            Self::Guard => &["egress"],
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Tunnel => "tunnel",
            Self::Guard => "guard",
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
}

impl Uplink {
    /// Loads the programs beside the pinned maps, and puts each in the place of the one that an earlier process left
    /// at each uplink: in one step, so that no packet passes uncounted. A program that is not wanted is taken off.
    pub(super) fn load(pins: &Pins, config: &Config) -> Result<Self, UplinkError> {
        let mut ebpf = object(Some(pins))?;
        let mut drivers = Drivers::adopt(&mut ebpf)?;
        drivers.inherit(&mut ebpf, pins, &config.xdp);
        let wanted = Side::wanted(config.delivery);
        let attached = Attached::adopt(&mut ebpf, pins, config.hook, wanted)?;
        Ok(Self {
            ebpf,
            pins: pins.clone(),
            attached,
            drivers,
        })
    }

    /// The maps, to be taken once.
    pub(super) fn tables(&mut self) -> Result<Tables, TablesError> {
        Tables::adopt(&mut self.ebpf)
    }

    /// The maps of flows, to be taken once.
    pub(super) fn flows(&mut self) -> Result<FlowMaps, TablesError> {
        FlowMaps::taken(&mut self.ebpf)
    }

    /// The interfaces that carry programs, as far as this process knows; the guard apart.
    pub(super) fn attached(&self) -> BTreeSet<u32> {
        self.attached.interfaces(|side| side != Side::Guard)
    }

    /// The interfaces that carry the guard.
    pub(super) fn guarded(&self) -> BTreeSet<u32> {
        self.attached.interfaces(|side| side == Side::Guard)
    }

    /// Sees to it that the guard is at the interface, in front of all programs but ours.
    pub(super) fn guard(
        &mut self,
        interface: u32,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        self.attached.ensure(&mut self.ebpf, interface, Side::Guard)
    }

    /// Takes it off.
    pub(super) fn unguard(&mut self, interface: u32) {
        self.attached.detach(interface, Side::Guard);
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
            .filter(|side| *side != Side::Guard && (*side == Side::Tunnel) == is_tunnel)
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
pub(super) fn object(pins: Option<&Pins>) -> Result<Ebpf, UplinkError> {
    let mut loader = EbpfLoader::new();
    if let Some(pins) = pins {
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
    }
    Ok(load(&mut loader)?)
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
