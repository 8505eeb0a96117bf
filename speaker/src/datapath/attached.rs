//! Programs at interfaces: each attached in its place, in front of everybody else's, and kept there.
//!
//! With TCX the pinned link is the attachment. With clsact (kernels below 6.6) it is a filter with a handle of our own, by
//! which a later process knows it for ours; no other filter is ever replaced. There the filters' preferences are the order.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::io;
use std::path::Path;

use aya::Ebpf;
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, SchedClassifierLinkId, TcAttachOptions, TcHandle,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::tcx;
use nix::errno::Errno;
use nix::net::if_::{Interface, if_indextoname, if_nameindex};

use super::pins::{Pins, remove_link};
use super::uplink::{UplinkError, chain, classifier};
use super::{Attachment, Hook, qdisc};

/// Our filters' name: "LF", 1.
const CLSACT_HANDLE: TcHandle = TcHandle::new(0x4c46, 1);

/// Where at an interface a program is, among the programs of one object.
pub(super) trait Side: Copy + Ord + Debug + 'static {
    /// All of the object's.
    const ALL: &'static [Self];

    /// The name of its program.
    fn program(self) -> &'static str;
    fn hook(self) -> tcx::Hook;
    /// The preference of its filter with clsact: that of a hook's programs, ours and others', with a lower one goes first. No
    /// two of ours have the same, wherever they are: by it a later process knows the filter.
    fn priority(self) -> u16;
    /// The pins of those of ours that go before it, of whatever object.
    fn ahead(self) -> &'static [&'static str];
    /// What the pin of its link is called.
    fn word(self) -> &'static str;
}

/// What aya calls a hook.
pub(super) fn attach_type(hook: tcx::Hook) -> TcAttachType {
    match hook {
        tcx::Hook::Ingress => TcAttachType::Ingress,
        tcx::Hook::Egress => TcAttachType::Egress,
    }
}

/// What had happened to an attachment that is there again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Restored {
    /// Somebody had removed it.
    Removed,
    /// Somebody had gone in front.
    Overtaken,
}

/// The programs of an object, and where they are.
#[derive(Debug)]
pub(super) struct Attached<S> {
    pins: Pins,
    hook: Hook,
    /// The programs' ids, of those that are wanted.
    ids: BTreeMap<S, u32>,
    /// Where they were attached, by this process or an earlier one.
    places: BTreeSet<(u32, S)>,
}

impl<S: Side> Attached<S> {
    /// Loads the programs that are wanted, and puts each in the place of the one that an earlier process left: in one step,
    /// so that no packet passes by. One that is not wanted is taken off.
    pub(super) fn adopt(
        ebpf: &mut Ebpf,
        pins: &Pins,
        hook: Hook,
        wanted: &[S],
    ) -> Result<Self, UplinkError> {
        let mut ids = BTreeMap::new();
        for side in wanted {
            let program = classifier(ebpf, side.program())?;
            program.load()?;
            ids.insert(*side, program.info()?.id());
        }
        let mut attached = Self {
            pins: pins.clone(),
            hook,
            ids,
            places: BTreeSet::new(),
        };
        for side in S::ALL {
            for interface in left(pins, *side) {
                if !attached.ids.contains_key(side) {
                    attached.detach(interface, *side);
                    continue;
                }
                match attached.replace(ebpf, interface, *side) {
                    Ok(()) => {
                        attached.places.insert((interface, *side));
                    }
                    Err(error) => {
                        // The interface is gone, and its index may be another's by now.
                        tracing::debug!(interface, %error, "what an earlier process has attached is of no use");
                        remove(&pins.link(interface, side.word()));
                    }
                }
            }
        }
        Ok(attached)
    }

    /// Those that are wanted.
    pub(super) fn sides(&self) -> impl Iterator<Item = S> {
        self.ids.keys().copied()
    }

    /// The interfaces that carry some program of these, as far as this process knows.
    pub(super) fn interfaces(&self, of: impl Fn(S) -> bool) -> BTreeSet<u32> {
        let places = self.places.iter().filter(|(_, side)| of(*side));
        places.map(|(interface, _)| *interface).collect()
    }

    /// Sees to it that a program is at an interface, in front of all but those of ours that go before it.
    pub(super) fn ensure(
        &mut self,
        ebpf: &mut Ebpf,
        interface: u32,
        side: S,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        if self.hook == Hook::Clsact {
            return self.ensure_clsact(ebpf, interface, side);
        }
        match tcx::programs(interface, side.hook()) {
            Ok(programs) => self.ensure_tcx(ebpf, interface, side, &programs),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                self.ensure_clsact(ebpf, interface, side)
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                self.detach(interface, side);
                Err(UplinkError::NoInterface(interface))
            }
            Err(error) => Err(UplinkError::Attach(
                interface_name(interface)?,
                error.to_string(),
            )),
        }
    }

    /// Whether programs are attached there by TCX, as far as the kernel and the configuration go.
    pub(super) fn is_by_tcx(&self, interface: u32) -> bool {
        let asked = || tcx::programs(interface, tcx::Hook::Egress);
        let unknown = |error: io::Error| error.raw_os_error() == Some(libc::EINVAL);
        self.hook != Hook::Clsact && !asked().is_err_and(unknown)
    }

    /// Takes it off.
    pub(super) fn detach(&mut self, interface: u32, side: S) {
        remove(&self.pins.link(interface, side.word()));
        if let Ok(name) = interface_name(interface)
            && let Ok(link) = clsact_link(&name, side)
        {
            // Dropping the link deletes the filter; it is an error if there is none.
            drop(link);
        }
        self.places.remove(&(interface, side));
    }

    fn ensure_tcx(
        &mut self,
        ebpf: &mut Ebpf,
        interface: u32,
        side: S,
        programs: &[u32],
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let place = (interface, side);
        let id = self.ids.get(&side);
        let ahead = self.ahead(interface, side, programs);
        let restored = match programs.iter().position(|other| Some(other) == id) {
            Some(there) if there == ahead.len() => {
                self.places.insert(place);
                return Ok((Attachment::Tcx, None));
            }
            Some(_) => Some(Restored::Overtaken),
            None if self.places.contains(&place) => Some(Restored::Removed),
            None => None,
        };
        let name = interface_name(interface)?;
        let pin = self.pins.link(interface, side.word());
        // A program can be at a hook once only: out first, then in again, some microseconds later.
        remove(&pin);
        let (order, _last) = self.behind(interface, &ahead)?;
        let options = TcAttachOptions::TcxOrder(order);
        let program = classifier(ebpf, side.program())?;
        let id = program
            .attach_with_options(&name, attach_type(side.hook()), options)
            .map_err(|error| UplinkError::Attach(name.clone(), chain(&error)))?;
        taken(program, id)?
            .pin(&pin)
            .map_err(|error| UplinkError::Attach(name, chain(&error)))?;
        self.places.insert(place);
        Ok((Attachment::Tcx, restored))
    }

    fn ensure_clsact(
        &mut self,
        ebpf: &mut Ebpf,
        interface: u32,
        side: S,
    ) -> Result<(Attachment, Option<Restored>), UplinkError> {
        let name = interface_name(interface)?;
        qdisc::ensure(self.pins.root(), interface, &name);
        let program = classifier(ebpf, side.program())?;
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: side.priority(),
            handle: CLSACT_HANDLE,
            classid: None,
        });
        let made = program.attach_with_options(&name, attach_type(side.hook()), options);
        let is_new = self.places.insert((interface, side));
        match made {
            Ok(id) => {
                keep(program.take_link(id)?);
                Ok((Attachment::Clsact, (!is_new).then_some(Restored::Removed)))
            }
            // The filter with our handle is there: this process's, or an earlier one's that is to be replaced.
            Err(error) if exists(&error) => {
                if is_new && let Err(error) = replace_clsact(ebpf, interface, side) {
                    self.places.remove(&(interface, side));
                    return Err(error);
                }
                Ok((Attachment::Clsact, None))
            }
            Err(error) => {
                if is_new {
                    self.places.remove(&(interface, side));
                }
                Err(UplinkError::Attach(name, chain(&error)))
            }
        }
    }

    /// Of our programs that are to go before another, by their pins, those that go before all others: in their order.
    fn ahead(&self, interface: u32, side: S, programs: &[u32]) -> Vec<&'static str> {
        let known: Vec<(u32, &'static str)> = side
            .ahead()
            .iter()
            .filter_map(|word| {
                let link = Link::open(&self.pins.link(interface, word)).ok()?;
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
    fn behind(
        &self,
        interface: u32,
        ahead: &[&'static str],
    ) -> Result<(LinkOrder, Option<SchedClassifierLink>), UplinkError> {
        let Some(last) = ahead.last() else {
            return Ok((LinkOrder::first(), None));
        };
        let link: FdLink = PinnedLink::from_pin(self.pins.link(interface, last))?.into();
        let link = SchedClassifierLink::try_from(link)?;
        Ok((LinkOrder::after_link(&link)?, Some(link)))
    }

    /// Puts the program in the place of the one that an earlier process has left.
    fn replace(&self, ebpf: &mut Ebpf, interface: u32, side: S) -> Result<(), UplinkError> {
        let pin = self.pins.link(interface, side.word());
        if !pin.exists() {
            return replace_clsact(ebpf, interface, side);
        }
        let link: FdLink = PinnedLink::from_pin(pin)?.into();
        let link = SchedClassifierLink::try_from(link)?;
        let program = classifier(ebpf, side.program())?;
        let id = program.attach_to_link(link)?;
        taken(program, id).map(drop)
    }
}

/// The interfaces where an earlier process has left a program: by its pinned link, or by its filter.
pub(super) fn left<S: Side>(pins: &Pins, side: S) -> BTreeSet<u32> {
    let pinned: BTreeSet<u32> = pins.linked(side.word()).into_iter().collect();
    if !pinned.is_empty() {
        return pinned;
    }
    let is_ours = |interface: &u32| {
        let filters = qdisc::filters(*interface, side.hook()).unwrap_or_default();
        filters.contains(&(side.priority(), u32::from(CLSACT_HANDLE)))
    };
    let Ok(all) = if_nameindex() else {
        return pinned;
    };
    all.iter().map(Interface::index).filter(is_ours).collect()
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

fn clsact_link<S: Side>(name: &str, side: S) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(
        name,
        attach_type(side.hook()),
        side.priority(),
        CLSACT_HANDLE,
        None,
    )
}

/// Puts the program in the place of the one that our filter has.
fn replace_clsact<S: Side>(ebpf: &mut Ebpf, interface: u32, side: S) -> Result<(), UplinkError> {
    let name = interface_name(interface)?;
    let attach = |error: &dyn std::error::Error| UplinkError::Attach(name.clone(), chain(error));
    let program = classifier(ebpf, side.program())?;
    let link = clsact_link(&name, side).map_err(|error| attach(&error))?;
    let id = program
        .attach_to_link(link)
        .map_err(|error| attach(&error))?;
    keep(program.take_link(id)?);
    Ok(())
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
