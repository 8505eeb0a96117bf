//! What netlink has told of links, addresses and default routes: pure, fed with messages.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    InfoPortKind, LinkAttribute, LinkEvent, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Interface, MacAddr};

/// An interface, and what the announcer alone must know of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) interface: Interface,
    /// The usable link-local address, which advertisements are sent from.
    pub(super) link_local: Option<Ipv6Addr>,
}

/// What a message calls for besides what it changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Effect {
    /// Read the default routes anew: the kernel drops routes with a link or an address without a word.
    pub(super) routes: bool,
    /// The neighbours should be told anew who is here, on this interface.
    pub(super) notify: Option<u32>,
    /// Messages were lost: read all anew.
    pub(super) lost: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Device {
    name: Arc<str>,
    mac: MacAddr,
    mtu: u32,
    up: bool,
    enslaved: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Address {
    net: IpNet,
    link: bool,
    /// Not in doubt for duplicate address detection.
    usable: bool,
}

/// All links of the namespace that speak ARP or ND.
#[derive(Debug, Default)]
pub(super) struct Links {
    devices: BTreeMap<u32, Device>,
    addresses: BTreeMap<u32, BTreeMap<IpNet, Address>>,
    /// By interface, and whether it is IPv6's: the router, if there is one.
    default_routes: BTreeMap<(u32, bool), Option<IpAddr>>,
}

impl Links {
    /// The links as the announcer sees them.
    pub(super) fn view(&self) -> BTreeMap<u32, Link> {
        self.devices
            .iter()
            .map(|(&index, device)| (index, self.link(index, device)))
            .collect()
    }

    fn link(&self, index: u32, device: &Device) -> Link {
        let addresses = self.addresses.get(&index);
        let of = || addresses.into_iter().flat_map(BTreeMap::values);
        Link {
            interface: Interface {
                index,
                name: Arc::clone(&device.name),
                mac: device.mac,
                mtu: device.mtu,
                up: device.up,
                enslaved: device.enslaved,
                addresses: of()
                    .filter(|address| !address.link)
                    .map(|address| address.net)
                    .collect(),
                default_route: (
                    self.default_routes.contains_key(&(index, false)),
                    self.default_routes.contains_key(&(index, true)),
                ),
                routers: self.routers(index),
            },
            link_local: of()
                .filter(|address| address.link && address.usable)
                .find_map(|address| match address.net.addr() {
                    IpAddr::V6(address) => Some(address),
                    IpAddr::V4(_) => None,
                }),
        }
    }

    fn routers(&self, index: u32) -> (Option<Ipv4Addr>, Option<Ipv6Addr>) {
        let of = |six| self.default_routes.get(&(index, six)).copied().flatten();
        let v4 = match of(false) {
            Some(IpAddr::V4(router)) => Some(router),
            _ => None,
        };
        let v6 = match of(true) {
            Some(IpAddr::V6(router)) => Some(router),
            _ => None,
        };
        (v4, v6)
    }

    /// Takes in a message.
    pub(super) fn apply(&mut self, payload: NetlinkPayload<RouteNetlinkMessage>) -> Effect {
        match payload {
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
                self.new_link(&message)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(message)) => {
                self.gone_link(&message)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(message)) => {
                self.new_address(&message)
            }
            NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(message)) => {
                self.gone_address(&message)
            }
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewRoute(message) | RouteNetlinkMessage::DelRoute(message),
            ) => Effect {
                routes: is_default(&message),
                ..Effect::default()
            },
            NetlinkPayload::Overrun(_) => Effect {
                lost: true,
                ..Effect::default()
            },
            _ => Effect::default(), // other kinds of messages, which nobody subscribed to
        }
    }

    pub(super) fn new_link(&mut self, message: &LinkMessage) -> Effect {
        // A bridge speaks of its ports in messages of its own family.
        if message.header.interface_family != AddressFamily::Unspec {
            return Effect::default();
        }
        let index = message.header.index;
        let Some(device) = device(message) else {
            let known = self.devices.remove(&index).is_some();
            return Effect {
                routes: known,
                ..Effect::default()
            };
        };
        let notify = message.attributes.iter().any(|attribute| {
            matches!(
                attribute,
                LinkAttribute::Event(LinkEvent::BondingFailover | LinkEvent::NotifyPeers)
            )
        });
        let before = self.devices.insert(index, device.clone());
        Effect {
            routes: before.is_none_or(|before| before.up != device.up),
            notify: notify.then_some(index),
            lost: false,
        }
    }

    fn gone_link(&mut self, message: &LinkMessage) -> Effect {
        if message.header.interface_family != AddressFamily::Unspec {
            return Effect::default();
        }
        let index = message.header.index;
        self.addresses.remove(&index);
        self.default_routes
            .retain(|(interface, _), _| *interface != index);
        Effect {
            routes: self.devices.remove(&index).is_some(),
            ..Effect::default()
        }
    }

    pub(super) fn new_address(&mut self, message: &AddressMessage) -> Effect {
        if let Some(address) = address(message) {
            self.addresses
                .entry(message.header.index)
                .or_default()
                .insert(address.net, address);
        }
        Effect::default()
    }

    fn gone_address(&mut self, message: &AddressMessage) -> Effect {
        let index = message.header.index;
        let Some(address) = address(message) else {
            return Effect::default();
        };
        if let Some(addresses) = self.addresses.get_mut(&index) {
            addresses.remove(&address.net);
        }
        Effect {
            routes: self.devices.contains_key(&index),
            ..Effect::default()
        }
    }

    /// Replaces all default routes. Of several by one interface the one with the lowest metric tells the router.
    pub(super) fn set_default_routes(&mut self, routes: &[RouteMessage]) {
        let mut routes: Vec<&RouteMessage> =
            routes.iter().filter(|route| is_default(route)).collect();
        routes.sort_by_key(|route| std::cmp::Reverse(metric(route)));
        self.default_routes = routes
            .into_iter()
            .flat_map(|route| {
                let six = route.header.address_family == AddressFamily::Inet6;
                ways(route)
                    .into_iter()
                    .map(move |(index, router)| ((index, six), router))
            })
            .collect();
    }
}

/// The device, if it is an Ethernet link with neighbours.
fn device(message: &LinkMessage) -> Option<Device> {
    let flags = message.header.flags;
    if message.header.link_layer_type != LinkLayerType::Ether || flags.contains(LinkFlags::Noarp) {
        return None;
    }
    let (mut name, mut mac, mut mtu) = (None, None, None);
    let (mut port, mut vrf) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(value) => name = Some(Arc::from(value.as_str())),
            LinkAttribute::Address(value) => {
                mac = <[u8; 6]>::try_from(value.as_slice()).ok().map(MacAddr);
            }
            LinkAttribute::Mtu(value) => mtu = Some(*value),
            LinkAttribute::Controller(controller) => port = *controller != 0,
            LinkAttribute::LinkInfo(infos) => {
                vrf = infos
                    .iter()
                    .any(|info| matches!(info, LinkInfo::PortKind(InfoPortKind::Vrf)));
            }
            _ => {} // statistics and the like
        }
    }
    Some(Device {
        name: name?,
        mac: mac?,
        mtu: mtu?,
        up: flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        // A VRF takes over a link's routing, not its frames.
        enslaved: port && !vrf,
    })
}

/// The address, if it is of global or link scope.
fn address(message: &AddressMessage) -> Option<Address> {
    let link = match message.header.scope {
        AddressScope::Universe | AddressScope::Site => false,
        AddressScope::Link => true,
        _ => return None,
    };
    let (mut address, mut local) = (None, None);
    let mut doubtful = message
        .header
        .flags
        .intersects(AddressHeaderFlags::Tentative | AddressHeaderFlags::Dadfailed);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Address(value) => address = Some(*value),
            AddressAttribute::Local(value) => local = Some(*value),
            AddressAttribute::Flags(flags) => {
                doubtful = flags.intersects(AddressFlags::Tentative | AddressFlags::Dadfailed);
            }
            _ => {} // lifetimes, labels
        }
    }
    let net = IpNet::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some(Address {
        net,
        link,
        usable: !doubtful,
    })
}

/// Whether it is a default route of the main table.
fn is_default(route: &RouteMessage) -> bool {
    let table = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Table(table) => Some(*table),
            _ => None,
        })
        .unwrap_or(u32::from(route.header.table));
    route.header.destination_prefix_length == 0
        && route.header.kind == RouteType::Unicast
        && table == u32::from(RouteHeader::RT_TABLE_MAIN)
}

/// The interfaces a route leads out of, and the routers there.
fn ways(route: &RouteMessage) -> Vec<(u32, Option<IpAddr>)> {
    let router = |attributes: &[RouteAttribute]| {
        attributes.iter().find_map(|attribute| match attribute {
            RouteAttribute::Gateway(RouteAddress::Inet(router)) => Some(IpAddr::V4(*router)),
            RouteAttribute::Gateway(RouteAddress::Inet6(router)) => Some(IpAddr::V6(*router)),
            _ => None,
        })
    };
    let own = router(&route.attributes);
    route
        .attributes
        .iter()
        .flat_map(|attribute| match attribute {
            RouteAttribute::Oif(index) => vec![(*index, own)],
            RouteAttribute::MultiPath(hops) => hops
                .iter()
                .map(|hop| (hop.interface_index, router(&hop.attributes)))
                .collect(),
            _ => vec![],
        })
        .collect()
}

fn metric(route: &RouteMessage) -> u32 {
    let mut attributes = route.attributes.iter();
    attributes
        .find_map(|attribute| match attribute {
            RouteAttribute::Priority(metric) => Some(*metric),
            _ => None,
        })
        .unwrap_or_default()
}

#[cfg(test)]
mod tests;
