//! A route of ours, as `ip route` wants it and as it shows it.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use serde::Deserialize;

/// A metric behind all others'.
const LAST: u32 = 0xff00_0000;

/// A route of a table.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Entry {
    /// When the others are gone. The first to be written.
    Blackhole,
    Throw(IpNet),
    Link(IpNet, Arc<str>),
    /// By a next hop that is there whatever the network says.
    Via(IpNet, IpAddr, Arc<str>),
    Default {
        via: Option<IpAddr>,
        dev: Arc<str>,
        mtu: Option<u32>,
    },
}

impl Entry {
    /// What of it tells routes of a table apart: one that is written takes the place of another.
    pub(super) fn place(&self) -> (Option<IpNet>, u32) {
        match self {
            Self::Blackhole => (None, LAST),
            Self::Default { .. } => (None, 0),
            Self::Throw(net) | Self::Link(net, _) | Self::Via(net, ..) => (Some(*net), 0),
        }
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Blackhole => write!(f, "blackhole default metric {LAST}"),
            Self::Throw(net) => write!(f, "throw {net}"),
            Self::Link(net, dev) => write!(f, "{net} dev {dev}"),
            Self::Via(net, via, dev) => write!(f, "{net} via {via} dev {dev} onlink"),
            Self::Default { via, dev, mtu } => {
                write!(f, "default")?;
                if let Some(via) = via {
                    write!(f, " via {via}")?;
                }
                write!(f, " dev {dev}")?;
                if via.is_some() {
                    write!(f, " onlink")?;
                }
                mtu.map_or(Ok(()), |mtu| write!(f, " mtu {mtu}"))
            }
        }
    }
}

/// A route, as `ip -j route` prints it.
#[derive(Debug, Deserialize)]
pub(super) struct Shown {
    #[serde(rename = "type")]
    kind: Option<String>,
    pub(super) dst: String,
    pub(super) gateway: Option<IpAddr>,
    pub(super) dev: Option<Arc<str>>,
    #[serde(default)]
    metrics: Vec<Metrics>,
}

#[derive(Debug, Deserialize)]
struct Metrics {
    mtu: Option<u32>,
}

impl Shown {
    /// The same as one of ours; nothing, if it is of no such kind.
    pub(super) fn entry(self) -> Option<Entry> {
        let net = || -> Option<IpNet> {
            let address = || self.dst.parse().map(|address: IpAddr| IpNet::from(address));
            self.dst.parse().or_else(|_| address()).ok()
        };
        let is_default = self.dst == "default";
        match self.kind.as_deref() {
            Some("blackhole") if is_default => Some(Entry::Blackhole),
            Some("throw") => net().map(Entry::Throw),
            None | Some("unicast") if is_default => Some(Entry::Default {
                via: self.gateway,
                mtu: self.metrics.iter().find_map(|metrics| metrics.mtu),
                dev: self.dev?,
            }),
            None | Some("unicast") => {
                let (net, dev) = net().zip(self.dev)?;
                Some(match self.gateway {
                    Some(via) => Entry::Via(net, via, dev),
                    None => Entry::Link(net, dev),
                })
            }
            _ => None,
        }
    }
}
