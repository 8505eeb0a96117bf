use rtnetlink::packet_route::link::LinkHeader;

use super::*;

fn mk_link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header = LinkHeader {
        index,
        link_layer_type: LinkLayerType::Ether,
        flags: LinkFlags::Up | LinkFlags::LowerUp,
        ..LinkHeader::default()
    };
    message.attributes = vec![
        LinkAttribute::IfName(format!("eth{index}")),
        LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]),
        LinkAttribute::Mtu(1500),
    ];
    message
}

/// The router by an interface.
fn router(index: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a00_0000 + index)
}

fn mk_default_route(index: u32, table: u32) -> RouteMessage {
    let mut route = RouteMessage::default();
    route.header.address_family = AddressFamily::Inet;
    route.header.kind = RouteType::Unicast;
    route.attributes = vec![
        RouteAttribute::Table(table),
        RouteAttribute::Oif(index),
        RouteAttribute::Gateway(RouteAddress::Inet(router(index))),
    ];
    route
}

fn apply(links: &mut Links, message: RouteNetlinkMessage) -> Effect {
    links.apply(NetlinkPayload::InnerMessage(message))
}

#[test]
fn a_bond_that_fails_over_wants_its_neighbours_told() {
    let mut links = Links::default();
    apply(&mut links, RouteNetlinkMessage::NewLink(mk_link(7)));
    for (event, notify) in [
        (LinkEvent::BondingFailover, Some(7)),
        (LinkEvent::NotifyPeers, Some(7)),
        (LinkEvent::Features, None),
    ] {
        let mut message = mk_link(7);
        message.attributes.push(LinkAttribute::Event(event));
        let effect = apply(&mut links, RouteNetlinkMessage::NewLink(message));
        assert_eq!(effect.notify, notify, "{event:?}");
        assert!(!effect.routes, "{event:?}");
    }
}

#[test]
fn lost_messages_call_for_a_new_reading() {
    let effect = Links::default().apply(NetlinkPayload::Overrun(vec![]));
    assert!(effect.lost);
}

#[test]
fn a_bridges_word_on_a_port_is_not_the_links_end() {
    let mut links = Links::default();
    apply(&mut links, RouteNetlinkMessage::NewLink(mk_link(7)));
    let mut message = mk_link(7);
    message.header.interface_family = AddressFamily::Bridge;
    apply(&mut links, RouteNetlinkMessage::DelLink(message));
    assert!(links.view().contains_key(&7));
    apply(&mut links, RouteNetlinkMessage::DelLink(mk_link(7)));
    assert!(links.view().is_empty());
}

#[test]
fn what_has_no_neighbours_is_no_interface() {
    let mut links = Links::default();
    let mut loopback = mk_link(1);
    loopback.header.link_layer_type = LinkLayerType::Loopback;
    let mut dummy = mk_link(2); // kube-ipvs0, with all VIPs on it
    dummy.header.flags |= LinkFlags::Noarp;
    for message in [loopback, dummy] {
        apply(&mut links, RouteNetlinkMessage::NewLink(message));
    }
    assert!(links.view().is_empty());
}

#[test]
fn ports_are_enslaved_but_links_of_a_vrf_are_not() {
    let mut links = Links::default();
    let mut port = mk_link(1);
    port.attributes.push(LinkAttribute::Controller(9));
    let mut routed = port.clone();
    routed.header.index = 2;
    routed
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(
            InfoPortKind::Vrf,
        )]));
    for message in [port, routed] {
        apply(&mut links, RouteNetlinkMessage::NewLink(message));
    }
    let view = links.view();
    assert!(view[&1].interface.enslaved);
    assert!(!view[&2].interface.enslaved);
}

#[test]
fn default_routes_of_other_tables_do_not_count() {
    let mut links = Links::default();
    for index in [1, 2] {
        apply(&mut links, RouteNetlinkMessage::NewLink(mk_link(index)));
    }
    let routes = [mk_default_route(1, 254), mk_default_route(2, 100)];
    let effects = routes
        .clone()
        .map(|route| apply(&mut links, RouteNetlinkMessage::NewRoute(route)).routes);
    assert_eq!(effects, [true, false]);
    links.set_default_routes(&routes);
    let view = links.view();
    assert_eq!(view[&1].interface.default_route, (true, false));
    assert_eq!(view[&2].interface.default_route, (false, false));
    assert_eq!(view[&1].interface.routers, (Some(router(1)), None));
    assert_eq!(view[&2].interface.routers, (None, None));
}

#[test]
fn the_router_of_an_interface_is_that_of_its_best_route() {
    let mut links = Links::default();
    apply(&mut links, RouteNetlinkMessage::NewLink(mk_link(1)));
    let with_metric = |metric: u32, router| {
        let mut route = mk_default_route(1, 254);
        route.attributes.pop();
        route.attributes.extend([
            RouteAttribute::Priority(metric),
            RouteAttribute::Gateway(RouteAddress::Inet(router)),
        ]);
        route
    };
    let routes = [(100, 7), (50, 8), (200, 9)]
        .map(|(metric, last)| with_metric(metric, Ipv4Addr::new(10, 0, 0, last)));
    links.set_default_routes(&routes);
    let (v4, _) = links.view()[&1].interface.routers;
    assert_eq!(v4, Some(Ipv4Addr::new(10, 0, 0, 8)));
}
