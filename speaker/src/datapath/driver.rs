//! The program at the drivers of uplinks, by XDP, where the user wants it and the driver can run it.
//!
//! It spares the kernel the way of those frames up to the traffic classifier that go on to another node. It is never
//! there without the program at the uplink, which does all the rest.

use std::collections::{BTreeMap, BTreeSet};

use aya::Ebpf;
use aya::maps::{HashMap, MapData, MapError};
use aya::programs::links::{FdLink, PinnedLink};
use aya::programs::xdp::XdpLink;
use aya::programs::{ProgramError, Xdp, XdpMode};
use landfall_ebpf_common::link::Link;
use landfall_ebpf_common::{Driver, UPLINK_DRIVER, map, offload};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;

use super::attached::{Restored, interface_name};
use super::pins::{Pins, remove_link};
use super::tables::{self, TablesError};
use super::uplink::{UplinkError, chain};

/// What its links' pins are called after.
const PLACE: &str = "xdp";

/// Why an interface's driver does not run the program, though the user wants it.
#[derive(Debug, thiserror::Error)]
pub(super) enum DriverError {
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    #[error("the XDP program: {}", chain(.0))]
    Program(#[from] ProgramError),
    #[error("another XDP program is attached to {0}: there is room for one")]
    Taken(String),
    #[error("the driver of {0} has no native XDP, or not with this MTU and these offloads ({1})")]
    NotNative(String, String),
    #[error(
        "{0} takes VLAN tags out of frames before XDP sees them, and frames of other VLANs would be taken for its \
         own: `ethtool -K {0} rxvlan off`"
    )]
    StripsTags(String),
    #[error("{0} is a bond: frames come in by its ports, where no VIP is")]
    Bond(String),
    #[error("{0} has no Ethernet address")]
    NoAddress(String),
    #[error("what {0} is cannot be read: {1}")]
    Unreadable(String, std::io::Error),
    #[error("telling the XDP program: {0}")]
    Map(#[from] MapError),
}

/// The drivers' program: where it is.
#[derive(Debug)]
pub(super) struct Drivers {
    /// Their Ethernet addresses.
    addresses: HashMap<MapData, u32, Driver>,
    told: BTreeMap<u32, [u8; 6]>,
    loaded: bool,
    /// The interfaces it was attached to, by this process or an earlier one.
    attached: BTreeSet<u32>,
}

impl Drivers {
    /// With the object's map, to be taken once.
    pub(super) fn adopt(ebpf: &mut Ebpf) -> Result<Self, TablesError> {
        Ok(Self {
            addresses: tables::taken(ebpf, map::DRIVERS)?,
            told: BTreeMap::new(),
            loaded: false,
            attached: BTreeSet::new(),
        })
    }

    /// Puts the program in the place of the one that an earlier process left at a driver, in one step; takes that off
    /// where it is not wanted any more.
    pub(super) fn inherit(&mut self, ebpf: &mut Ebpf, pins: &Pins, wanted: &BTreeSet<String>) {
        for interface in pins.linked(PLACE) {
            let name = interface_name(interface);
            let still = name.as_ref().is_ok_and(|name| wanted.contains(name));
            match still
                .then(|| self.replace(ebpf, pins, interface))
                .transpose()
            {
                Ok(Some(())) => {
                    self.attached.insert(interface);
                }
                Ok(None) => self.detach(pins, interface),
                Err(error) => {
                    // The interface is gone, and its index may be another's by now.
                    tracing::debug!(interface, %error, "a driver's pinned link is of no use");
                    self.detach(pins, interface);
                }
            }
        }
    }

    /// The interfaces that carry it, as far as this process knows.
    pub(super) fn attached(&self) -> BTreeSet<u32> {
        self.attached.clone()
    }

    /// Sees to it that the program is at the interface's driver.
    pub(super) fn ensure(
        &mut self,
        ebpf: &mut Ebpf,
        pins: &Pins,
        interface: u32,
    ) -> Result<Option<Restored>, DriverError> {
        let name = interface_name(interface)?;
        let address = fit(&name)?;
        self.tell(interface, address)?;
        let pin = pins.link(interface, PLACE);
        if Link::open(&pin)
            .and_then(|link| link.xdp_interface())
            .is_ok_and(|at| at == interface)
            && self.attached.contains(&interface)
        {
            return Ok(None);
        }
        let restored = self
            .attached
            .remove(&interface)
            .then_some(Restored::Removed);
        remove_link(&pin).map_err(|error| DriverError::Unreadable(name.clone(), error))?;
        let program = self.load(ebpf)?;
        let id = program
            .attach_to_if_index(interface, XdpMode::Driver)
            .map_err(|error| refusal(&name, error))?;
        let link = program.take_link(id)?;
        FdLink::try_from(link)
            .map_err(UplinkError::from)?
            .pin(&pin)
            .map_err(|error| UplinkError::Attach(name, chain(&error)))?;
        self.attached.insert(interface);
        Ok(restored)
    }

    /// Takes the program off the interface's driver.
    pub(super) fn detach(&mut self, pins: &Pins, interface: u32) {
        let pin = pins.link(interface, PLACE);
        if let Err(error) = remove_link(&pin) {
            tracing::warn!(path = %pin.display(), %error, "cannot remove a pinned link");
        }
        self.forget(interface);
        self.attached.remove(&interface);
    }

    /// Says which frames are for this host.
    pub(super) fn tell(&mut self, interface: u32, mac: [u8; 6]) -> Result<(), MapError> {
        if self.told.get(&interface) != Some(&mac) {
            self.addresses
                .insert(interface, Driver { mac, zero: [0; 2] }, 0)?;
            self.told.insert(interface, mac);
        }
        Ok(())
    }

    /// None are any more.
    pub(super) fn forget(&mut self, interface: u32) {
        if self.told.remove(&interface).is_some() {
            // It was there.
            let _ = self.addresses.remove(&interface);
        }
    }

    fn replace(&mut self, ebpf: &mut Ebpf, pins: &Pins, interface: u32) -> Result<(), DriverError> {
        let address = fit(&interface_name(interface)?)?;
        self.tell(interface, address)?;
        let link: FdLink = PinnedLink::from_pin(pins.link(interface, PLACE))
            .map_err(UplinkError::from)?
            .into();
        let link = XdpLink::try_from(link).map_err(UplinkError::from)?;
        let program = self.load(ebpf)?;
        let id = program.attach_to_link(link)?;
        FdLink::try_from(program.take_link(id)?)
            .map(drop)
            .map_err(|error| UplinkError::from(error).into())
    }

    /// The program, loaded when it is first needed: kernels that cannot are asked only where the user wants it.
    fn load<'a>(&mut self, ebpf: &'a mut Ebpf) -> Result<&'a mut Xdp, DriverError> {
        let program = driver(ebpf)?;
        if !self.loaded {
            program.load()?;
            self.loaded = true;
        }
        Ok(program)
    }
}

/// The program in the object.
pub(super) fn driver(ebpf: &mut Ebpf) -> Result<&mut Xdp, UplinkError> {
    Ok(ebpf
        .program_mut(UPLINK_DRIVER)
        .ok_or(UplinkError::Missing(UPLINK_DRIVER))?
        .try_into()?)
}

/// The interface's Ethernet address, if frames are seen at its driver as they were on the wire.
fn fit(name: &str) -> Result<[u8; 6], DriverError> {
    let unreadable = |error| DriverError::Unreadable(name.to_owned(), error);
    let found = getifaddrs()
        .map_err(|error| unreadable(error.into()))?
        .find_map(|it| {
            let address = it.address.as_ref()?.as_link_addr()?.addr()?;
            (it.interface_name == name).then_some((it.flags, address))
        });
    let Some((flags, address)) = found else {
        return Err(DriverError::NoAddress(name.to_owned()));
    };
    if flags.contains(InterfaceFlags::IFF_MASTER) {
        return Err(DriverError::Bond(name.to_owned()));
    }
    if offload::strips_tags(name).map_err(unreadable)? {
        return Err(DriverError::StripsTags(name.to_owned()));
    }
    Ok(address)
}

/// What an error of the attachment means.
fn refusal(name: &str, error: ProgramError) -> DriverError {
    let code = match &error {
        ProgramError::SyscallError(error) => error.io_error.raw_os_error(),
        _ => None,
    };
    match code {
        Some(libc::EBUSY | libc::EEXIST) => DriverError::Taken(name.to_owned()),
        Some(libc::EOPNOTSUPP | libc::ERANGE | libc::EINVAL) => {
            DriverError::NotNative(name.to_owned(), chain(&error))
        }
        _ => error.into(),
    }
}
