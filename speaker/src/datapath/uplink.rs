//! The program at the uplinks: loading it, attaching it in front of all others, and keeping it there.
//!
//! With TCX the pinned link is the attachment. With clsact (kernels below 6.6) it is a filter of preference 1
//! with a handle of our own, by which a later process knows it for ours; no other filter is ever replaced.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle,
    qdisc_add_clsact,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfLoader};
use landfall_ebpf_common::{UPLINK_INGRESS, map, tcx};
use nix::errno::Errno;
use nix::net::if_::if_indextoname;

use super::driver::{DriverError, Drivers};
use super::flows::FlowMap;
use super::layout::SHAPES;
use super::pins::{Pins, remove_link};
use super::tables::{self, Tables, TablesError};
use super::{Attachment, Hook};

/// The object that the build script has compiled.
static OBJECT: &[u8] = aya::include_bytes_aligned!(env!("LANDFALL_UPLINK_OBJECT"));

/// The clsact filter's place and name: "LF", 1.
const CLSACT_PRIORITY: u16 = 1;
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

/// The program, loaded.
#[derive(Debug)]
pub(super) struct Uplink {
    ebpf: Ebpf,
    pins: Pins,
    hook: Hook,
    id: u32,
    /// The interfaces it was attached to, by this process or an earlier one.
    attached: BTreeSet<u32>,
    drivers: Drivers,
}

impl Uplink {
    /// Loads the program beside the pinned maps, and puts it in the place of the one that an earlier process left
    /// at each uplink: in one step, so that no packet passes uncounted.
    ///
    /// The same at the drivers of the interfaces with these names.
    pub(super) fn load(
        pins: &Pins,
        hook: Hook,
        xdp: &BTreeSet<String>,
    ) -> Result<Self, UplinkError> {
        let mut ebpf = object(Some(pins))?;
        let mut drivers = Drivers::adopt(&mut ebpf)?;
        drivers.inherit(&mut ebpf, pins, xdp);
        let program = classifier(&mut ebpf)?;
        program.load()?;
        let id = program.info()?.id();
        let mut uplink = Self {
            ebpf,
            pins: pins.clone(),
            hook,
            id,
            attached: BTreeSet::new(),
            drivers,
        };
        for interface in pins.linked() {
            match uplink.adopt(interface) {
                Ok(()) => {
                    uplink.attached.insert(interface);
                }
                Err(error) => {
                    // The interface is gone, and its index may be another's by now.
                    tracing::debug!(interface, %error, "a pinned link is of no use");
                    remove(&pins.link(interface));
                }
            }
        }
        Ok(uplink)
    }

    /// The maps, to be taken once.
    pub(super) fn tables(&mut self) -> Result<Tables, TablesError> {
        Tables::adopt(&mut self.ebpf)
    }

    /// The map of flows, to be taken once.
    pub(super) fn flows(&mut self) -> Result<FlowMap, TablesError> {
        tables::taken(&mut self.ebpf, map::FLOWS)
    }

    /// The interfaces that carry it, as far as this process knows.
    pub(super) fn attached(&self) -> BTreeSet<u32> {
        self.attached.clone()
    }

    /// Sees to it that the program is attached to the interface, in front of all others.
    pub(super) fn ensure(
        &mut self,
        interface: u32,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        if self.hook == Hook::Clsact {
            return self.ensure_clsact(interface);
        }
        match tcx::ingress_programs(interface) {
            Ok(programs) => self.ensure_tcx(interface, &programs),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.ensure_clsact(interface)
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.detach(interface);
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

    /// Takes the program off the interface.
    pub(super) fn detach(&mut self, interface: u32) {
        remove(&self.pins.link(interface));
        if let Ok(name) = interface_name(interface)
            && let Ok(link) = clsact_link(&name)
        {
            // Dropping the link deletes the filter; it is an error if there is none.
            drop(link);
        }
        self.attached.remove(&interface);
    }

    fn ensure_tcx(
        &mut self,
        interface: u32,
        programs: &[u32],
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let restored = match programs.iter().position(|id| *id == self.id) {
            Some(0) => {
                self.attached.insert(interface);
                return Ok((Attachment::Tcx, None));
            }
            Some(_) => Some(Restored::Overtaken),
            None if self.attached.contains(&interface) => Some(Restored::Removed),
            None => None,
        };
        let name = interface_name(interface)?;
        let pin = self.pins.link(interface);
        // A program can be at a hook once only: out first, then in again, some microseconds later.
        remove(&pin);
        let program = classifier(&mut self.ebpf)?;
        let options = TcAttachOptions::TcxOrder(LinkOrder::first());
        let id = program
            .attach_with_options(&name, TcAttachType::Ingress, options)
            .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
        taken(program, id)?
            .pin(&pin)
            .map_err(|error| UplinkError::Attach(name, chain(&error)))?;
        self.attached.insert(interface);
        Ok((Attachment::Tcx, restored))
    }

    fn ensure_clsact(
        &mut self,
        interface: u32,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let name = interface_name(interface)?;
        // It may be there already, ours or another's.
        let _ = qdisc_add_clsact(&name);
        let program = classifier(&mut self.ebpf)?;
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: CLSACT_PRIORITY,
            handle: CLSACT_HANDLE,
            classid: None,
        });
        let made = program.attach_with_options(&name, TcAttachType::Ingress, options);
        let known = self.attached.contains(&interface);
        match made {
            Ok(id) => {
                keep(program.take_link(id)?);
                self.attached.insert(interface);
                Ok((Attachment::Clsact, known.then_some(Restored::Removed)))
            }
            // The filter with our handle is there: this process's, or an earlier one's that is to be replaced.
            Err(error) if exists(&error) => {
                if !known {
                    let link = clsact_link(&name)
                        .map_err(|error| UplinkError::Attach(name.clone(), error.to_string()))?;
                    let id = program
                        .attach_to_link(link)
                        .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
                    keep(program.take_link(id)?);
                    self.attached.insert(interface);
                }
                Ok((Attachment::Clsact, None))
            }
            Err(error) => Err(UplinkError::Attach(name, chain(&error))),
        }
    }

    /// Puts the program in the place of the one that the pinned link holds.
    fn adopt(&mut self, interface: u32) -> Result<(), UplinkError> {
        let link: FdLink = PinnedLink::from_pin(self.pins.link(interface))?.into();
        let link = SchedClassifierLink::try_from(link)?;
        let program = classifier(&mut self.ebpf)?;
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
    }
    Ok(loader.load(OBJECT)?)
}

/// The program in the object.
pub(super) fn classifier(ebpf: &mut Ebpf) -> Result<&mut SchedClassifier, UplinkError> {
    Ok(ebpf
        .program_mut(UPLINK_INGRESS)
        .ok_or(UplinkError::Missing(UPLINK_INGRESS))?
        .try_into()?)
}

/// A link out of aya's hands: dropping what it returns closes a descriptor, and no more if the link is pinned.
fn taken(program: &mut SchedClassifier, id: SchedClassifierLinkId) -> Result<FdLink, UplinkError> {
    let link = program.take_link(id)?;
    Ok(FdLink::try_from(link)?)
}

/// Leaves a clsact filter where it is: it belongs to the kernel, not to this process.
fn keep(link: SchedClassifierLink) {
    std::mem::forget(link);
}

fn clsact_link(name: &str) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        name,
        TcAttachType::Ingress,
        CLSACT_PRIORITY,
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
