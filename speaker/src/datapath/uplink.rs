//! The programs at the uplinks: loading them, attaching each in front of all others, and keeping them there.
//!
//! With TCX the pinned link is the attachment. With clsact (kernels below 6.6) it is a filter of preference 1
//! with a handle of our own, by which a later process knows it for ours; no other filter is ever replaced.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;
use std::sync::Mutex;

use aya::maps::MapType;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfError, EbpfLoader};
use landfall_ebpf_common::egress::guard;
use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::{TUNNEL_INGRESS, UPLINK_EGRESS, UPLINK_INGRESS, tcx};
use nix::errno::Errno;
use nix::net::if_::if_indextoname;

use super::driver::{DriverError, Drivers};
use super::flows::FlowMaps;
use super::layout::SHAPES;
use super::pins::{Pins, remove_link};
use super::tables::{Tables, TablesError};
use super::worker::lock;
use super::{Attachment, Config, Delivery, Hook, egress, qdisc};

/// The object that the build script has compiled.
pub(super) static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LANDFALL_UPLINK_OBJECT"));

/// The clsact filter's place and name: "LF", 1.
const CLSACT_PRIORITY: u16 = 1;
/// The guard's.
const CLSACT_SECOND: u16 = 2;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0x4c46, 1);

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

/// What had happened to an attachment that is there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restored {
    /// Somebody had removed it.
    Removed,
    /// Somebody had gone in front.
    Overtaken,
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
    pub(super) const ALL: [Self; 4] = [Self::Ingress, Self::Egress, Self::Tunnel, Self::Guard];

    /// Those that have something to do.
    const fn wanted(delivery: Delivery) -> &'static [Self] {
        match delivery {
            Delivery::KubeProxy => &[Self::Ingress, Self::Tunnel, Self::Guard],
            Delivery::Native => &Self::ALL,
        }
    }

    /// The name of its program.
    pub(super) const fn program(self) -> &'static str {
        match self {
            Self::Ingress => UPLINK_INGRESS,
            Self::Egress => UPLINK_EGRESS,
            Self::Tunnel => TUNNEL_INGRESS,
            Self::Guard => guard::PROGRAM,
        }
    }

    pub(super) const fn attach_type(self) -> TcAttachType {
        match self {
            Self::Ingress | Self::Tunnel => TcAttachType::Ingress,
            Self::Egress | Self::Guard => TcAttachType::Egress,
        }
    }

    const fn priority(self) -> u16 {
        match self {
            Self::Ingress | Self::Egress | Self::Tunnel => CLSACT_PRIORITY,
            Self::Guard => CLSACT_SECOND,
        }
    }

    const fn hook(self) -> tcx::Hook {
        match self {
            Self::Ingress | Self::Tunnel => tcx::Hook::Ingress,
            Self::Egress | Self::Guard => tcx::Hook::Egress,
        }
    }

    /// The pins of those that go before it.
    const fn ahead(self) -> &'static [&'static str] {
        match self {
            Self::Ingress | Self::Tunnel => &["gateway"],
            Self::Egress => &[],
            Self::Guard => &["egress"],
        }
    }

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
            Self::Tunnel => "tunnel",
            Self::Guard => "guard",
        }
    }
}

/// A program at an interface.
type Place = (u32, Side);

/// Of our programs that are to go before another, by their pins, those that go before all others: in their order.
pub(super) fn ahead(
    pins: &Pins,
    interface: u32,
    ours: &[&'static str],
    programs: &[u32],
) -> Vec<&'static str> {
    let known: Vec<(u32, &'static str)> = ours
        .iter()
        .filter_map(|word| {
            let link = Link::open(&pins.link(interface, word)).ok()?;
            Some((link.program().ok()?, *word))
        })
        .collect();
    let words = programs.iter().map_while(|program| {
        let mut of_ours = known.iter();
        of_ours.find(|(id, _)| id == program).map(|(_, word)| *word)
    });
    words.collect()
}

/// The place behind those, good for as long as the link is there that comes with it. They were there when the programs
/// were listed; if the last went meanwhile, that is an error, and the next look finds the place anew.
pub(super) fn behind(
    pins: &Pins,
    interface: u32,
    ahead: &[&'static str],
) -> Result<(LinkOrder, Option<SchedClassifierLink>), UplinkError> {
    let Some(last) = ahead.last() else {
        return Ok((LinkOrder::first(), None));
    };
    let link: FdLink = PinnedLink::from_pin(pins.link(interface, last))?.into();
    let link = SchedClassifierLink::try_from(link)?;
    Ok((LinkOrder::after_link(&link)?, Some(link)))
}

/// The programs, loaded.
#[derive(Debug)]
pub(super) struct Uplink {
    ebpf: Ebpf,
    pins: Pins,
    hook: Hook,
    /// The programs' ids, of those that are wanted.
    ids: BTreeMap<Side, u32>,
    /// Where they were attached, by this process or an earlier one.
    attached: BTreeSet<Place>,
    drivers: Drivers,
}

impl Uplink {
    /// Loads the programs beside the pinned maps, and puts each in the place of the one that an earlier process left
    /// at each uplink: in one step, so that no packet passes uncounted. A program that is not wanted is taken off.
    pub(super) fn load(pins: &Pins, config: &Config) -> Result<Self, UplinkError> {
        let mut ebpf = object(Some(pins))?;
        let mut drivers = Drivers::adopt(&mut ebpf)?;
        drivers.inherit(&mut ebpf, pins, &config.xdp);
        let mut ids = BTreeMap::new();
        for side in Side::wanted(config.delivery) {
            let program = classifier(&mut ebpf, side.program())?;
            program.load()?;
            ids.insert(*side, program.info()?.id());
        }
        let mut uplink = Self {
            ebpf,
            pins: pins.clone(),
            hook: config.hook,
            ids,
            attached: BTreeSet::new(),
            drivers,
        };
        for side in Side::ALL {
            for interface in pins.linked(side.word()) {
                let place = (interface, side);
                if !uplink.ids.contains_key(&side) {
                    uplink.detach_from(place);
                    continue;
                }
                match uplink.adopt(place) {
                    Ok(()) => {
                        uplink.attached.insert(place);
                    }
                    Err(error) => {
                        // The interface is gone, and its index may be another's by now.
                        tracing::debug!(interface, %error, "a pinned link is of no use");
                        remove(&pins.link(interface, side.word()));
                    }
                }
            }
        }
        Ok(uplink)
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
        let places = self.attached.iter();
        places
            .filter(|(_, side)| *side != Side::Guard)
            .map(|(interface, _)| *interface)
            .collect()
    }

    /// The interfaces that carry the guard.
    pub(super) fn guarded(&self) -> BTreeSet<u32> {
        let places = self.attached.iter();
        places
            .filter(|(_, side)| *side == Side::Guard)
            .map(|(interface, _)| *interface)
            .collect()
    }

    /// Sees to it that the guard is at the interface, in front of all programs but ours.
    pub(super) fn guard(
        &mut self,
        interface: u32,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        self.ensure_at((interface, Side::Guard))
    }

    /// Takes it off.
    pub(super) fn unguard(&mut self, interface: u32) {
        self.detach_from((interface, Side::Guard));
    }

    /// Sees to it that the programs are attached to the interface, each in front of all others.
    pub(super) fn ensure(
        &mut self,
        interface: u32,
        is_tunnel: bool,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let sides: Vec<Side> = self
            .ids
            .keys()
            .copied()
            .filter(|side| *side != Side::Guard && (*side == Side::Tunnel) == is_tunnel)
            .collect();
        // An earlier process may have wanted more; a filter is known only where it is looked for.
        if !self.attached().contains(&interface) && !sides.contains(&Side::Egress) {
            self.detach_from((interface, Side::Egress));
        }
        let mut outcome = (Attachment::Tcx, None);
        for side in sides {
            let (attachment, restored) = self.ensure_at((interface, side))?;
            outcome = (attachment, restored.or(outcome.1));
        }
        Ok(outcome)
    }

    fn ensure_at(&mut self, place: Place) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let (interface, side) = place;
        if self.hook == Hook::Clsact {
            return self.ensure_clsact(place);
        }
        match tcx::programs(interface, side.hook()) {
            Ok(programs) => self.ensure_tcx(place, &programs),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.ensure_clsact(place),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.detach_from(place);
                Err(UplinkError::NoInterface(interface))
            }
            Err(error) => Err(UplinkError::Attach(
                interface_name(interface)?,
                error.to_string(),
            )),
        }
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
            self.detach_from((interface, side));
        }
    }

    fn detach_from(&mut self, place: Place) {
        let (interface, side) = place;
        remove(&self.pins.link(interface, side.word()));
        if let Ok(name) = interface_name(interface)
            && let Ok(link) = clsact_link(&name, side)
        {
            // Dropping the link deletes the filter; it is an error if there is none.
            drop(link);
        }
        self.attached.remove(&place);
    }

    fn ensure_tcx(
        &mut self,
        place: Place,
        programs: &[u32],
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let (interface, side) = place;
        let id = self.ids.get(&side);
        let ahead = ahead(&self.pins, interface, side.ahead(), programs);
        let restored = match programs.iter().position(|other| Some(other) == id) {
            Some(there) if there == ahead.len() => {
                self.attached.insert(place);
                return Ok((Attachment::Tcx, None));
            }
            Some(_) => Some(Restored::Overtaken),
            None if self.attached.contains(&place) => Some(Restored::Removed),
            None => None,
        };
        let name = interface_name(interface)?;
        let pin = self.pins.link(interface, side.word());
        // A program can be at a hook once only: out first, then in again, some microseconds later.
        remove(&pin);
        let (order, _last) = behind(&self.pins, interface, &ahead)?;
        let options = TcAttachOptions::TcxOrder(order);
        let program = classifier(&mut self.ebpf, side.program())?;
        let id = program
            .attach_with_options(&name, side.attach_type(), options)
            .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
        taken(program, id)?
            .pin(&pin)
            .map_err(|error| UplinkError::Attach(name, chain(&error)))?;
        self.attached.insert(place);
        Ok((Attachment::Tcx, restored))
    }

    fn ensure_clsact(
        &mut self,
        place: Place,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let (interface, side) = place;
        let name = interface_name(interface)?;
        qdisc::ensure(self.pins.root(), interface, &name);
        let program = classifier(&mut self.ebpf, side.program())?;
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: side.priority(),
            handle: CLSACT_HANDLE,
            classid: None,
        });
        let made = program.attach_with_options(&name, side.attach_type(), options);
        let known = self.attached.contains(&place);
        match made {
            Ok(id) => {
                keep(program.take_link(id)?);
                self.attached.insert(place);
                Ok((Attachment::Clsact, known.then_some(Restored::Removed)))
            }
            // The filter with our handle is there: this process's, or an earlier one's that is to be replaced.
            Err(error) if exists(&error) => {
                if !known {
                    let link = clsact_link(&name, side)
                        .map_err(|error| UplinkError::Attach(name.clone(), error.to_string()))?;
                    let id = program
                        .attach_to_link(link)
                        .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
                    keep(program.take_link(id)?);
                    self.attached.insert(place);
                }
                Ok((Attachment::Clsact, None))
            }
            Err(error) => Err(UplinkError::Attach(name, chain(&error))),
        }
    }

    /// Puts the program in the place of the one that the pinned link holds.
    fn adopt(&mut self, (interface, side): Place) -> Result<(), UplinkError> {
        let link: FdLink = PinnedLink::from_pin(self.pins.link(interface, side.word()))?.into();
        let link = SchedClassifierLink::try_from(link)?;
        let program = classifier(&mut self.ebpf, side.program())?;
        let id = program.attach_to_link(link)?;
        taken(program, id).map(drop)
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

/// A link out of aya's hands: dropping what it returns closes a descriptor, and no more if the link is pinned.
pub(super) fn taken(
    program: &mut SchedClassifier,
    id: SchedClassifierLinkId,
) -> Result<FdLink, UplinkError> {
    let link = program.take_link(id)?;
    Ok(FdLink::try_from(link)?)
}

/// Leaves a clsact filter where it is: it belongs to the kernel, not to this process.
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

fn clsact_link(name: &str, side: Side) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        name,
        side.attach_type(),
        side.priority(),
        CLSACT_HANDLE,
        None,
    )
}

/// Whether an attachment failed because there is one already.
fn exists(error: &ProgramError) -> bool {
    chain(error).contains(Errno::EEXIST.desc())
}

pub(super) fn interface_name(interface: u32) -> Result<String, UplinkError> {
    if_indextoname(interface)
        .map(|name| name.to_string_lossy().into_owned())
        .map_err(|_| UplinkError::NoInterface(interface))
}

fn remove(path: &Path) {
    if let Err(error) = remove_link(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove a pinned link");
    }
}
