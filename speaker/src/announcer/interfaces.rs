//! Watches the interfaces by netlink: reads them once, then is told of every change.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use anyhow::Context;
use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt, StreamExt, TryStreamExt};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::SocketAddr;
use rtnetlink::{MulticastGroup, RouteMessageBuilder};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::links::{Link, Links};
use super::metrics::Metrics;

const GROUPS: [MulticastGroup; 5] = [
    MulticastGroup::Link,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];
/// How long to wait before netlink is opened anew after it failed.
const RETRY: Duration = Duration::from_secs(1);

/// The interfaces after a change.
#[derive(Debug)]
pub(super) struct Change {
    pub(super) links: BTreeMap<u32, Link>,
    /// Those whose neighbours should be told anew: a bond failed over, a machine migrated.
    pub(super) notify: BTreeSet<u32>,
}

type Message = NetlinkMessage<RouteNetlinkMessage>;

/// The open sockets: one that is told, one that asks, so that no answer is lost among news.
struct Netlink {
    news: UnboundedReceiver<(Message, SocketAddr)>,
    handle: rtnetlink::Handle,
    _connections: [AbortOnDropHandle<()>; 2],
}

impl Netlink {
    fn open() -> io::Result<Self> {
        let (news_connection, _, news) = rtnetlink::new_multicast_connection(&GROUPS)?;
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            news,
            handle,
            _connections: [
                AbortOnDropHandle::new(tokio::spawn(news_connection)),
                AbortOnDropHandle::new(tokio::spawn(connection)),
            ],
        })
    }

    /// Reads all.
    async fn read(&self) -> anyhow::Result<Links> {
        let mut links = Links::default();
        let mut messages = self.handle.link().get().execute();
        while let Some(message) = messages.try_next().await.context("reading links")? {
            links.new_link(&message);
        }
        let mut messages = self.handle.address().get().execute();
        while let Some(message) = messages.try_next().await.context("reading addresses")? {
            links.new_address(&message);
        }
        self.read_routes(&mut links).await?;
        Ok(links)
    }

    async fn read_routes(&self, links: &mut Links) -> anyhow::Result<()> {
        let mut routes = Vec::new();
        for query in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            let mut messages = self.handle.route().get(query).execute();
            while let Some(route) = messages.try_next().await.context("reading routes")? {
                if route.header.destination_prefix_length == 0 {
                    routes.push(route);
                }
            }
        }
        links.set_default_routes(&routes);
        Ok(())
    }
}

/// Watches until nobody listens. The sockets are opened by the calling thread, in its network namespace.
pub(super) fn watch(
    metrics: Metrics,
    to: mpsc::Sender<Change>,
) -> anyhow::Result<AbortOnDropHandle<()>> {
    let mut netlink = Netlink::open().context("opening netlink")?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let Err(error) = follow(&mut netlink, &metrics, &to).await else {
                return;
            };
            metrics.failed("netlink");
            tracing::warn!(%error, "netlink failed; opening it anew");
            loop {
                tokio::time::sleep(RETRY).await;
                match Netlink::open() {
                    Ok(opened) => break netlink = opened,
                    Err(error) => tracing::warn!(%error, "netlink cannot be opened"),
                }
            }
        }
    })))
}

/// Ends well once nobody listens.
async fn follow(
    netlink: &mut Netlink,
    metrics: &Metrics,
    to: &mpsc::Sender<Change>,
) -> anyhow::Result<()> {
    let mut links = netlink.read().await?;
    let mut view = links.view();
    let first = Change {
        links: view.clone(),
        notify: BTreeSet::new(),
    };
    if to.send(first).await.is_err() {
        return Ok(());
    }
    loop {
        let mut next = netlink.news.next().await;
        let (mut routes, mut lost, mut notify) = (false, false, BTreeSet::new());
        loop {
            let (message, _) = next.context("the socket was closed")?;
            let effect = links.apply(message.payload);
            routes |= effect.routes;
            lost |= effect.lost;
            notify.extend(effect.notify);
            // News come in bursts: a link that comes up has half a dozen.
            match netlink.news.next().now_or_never() {
                Some(more) => next = more,
                None => break,
            }
        }
        if lost {
            metrics.resyncs.inc();
            links = netlink.read().await?;
        } else if routes {
            netlink.read_routes(&mut links).await?;
        }
        let now = links.view();
        if now != view || !notify.is_empty() {
            view.clone_from(&now);
            if to.send(Change { links: now, notify }).await.is_err() {
                return Ok(());
            }
        }
    }
}
