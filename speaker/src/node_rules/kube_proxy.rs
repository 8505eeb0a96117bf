//! What kube-proxy serves on this node: the keys of its nftables map `service-ips`, read once and followed by events.

use std::io;
use std::net::IpAddr;

use landfall_core::model::Protocol;

use super::netfilter::{Event, Query, Served, TableFamily};

const TABLE: &str = "kube-proxy";
const MAP: &str = "service-ips";

/// The keys by family; `None` where kube-proxy in nftables mode has no table.
#[derive(Debug, Default)]
pub(super) struct KubeProxy {
    ip: Option<Served>,
    ip6: Option<Served>,
}

impl KubeProxy {
    /// Reads both families.
    pub(super) fn read(query: &Query) -> io::Result<Self> {
        Ok(Self {
            ip: query.keys(TableFamily::Ip, TABLE, MAP)?,
            ip6: query.keys(TableFamily::Ip6, TABLE, MAP)?,
        })
    }

    /// Follows a change. Events older than what was read do no harm: the last one about a key decides.
    pub(super) fn apply(&mut self, event: &Event) {
        match event {
            Event::Table {
                family,
                table,
                there,
            } if table == TABLE => {
                let Some(served) = self.family(*family) else {
                    return;
                };
                if *there {
                    served.get_or_insert_default();
                } else {
                    *served = None;
                }
            }
            Event::Keys {
                family,
                table,
                map,
                keys,
                there,
            } if table == TABLE && map == MAP => {
                let Some(served) = self.family(*family) else {
                    return;
                };
                let served = served.get_or_insert_default();
                for key in keys {
                    if *there {
                        served.insert(*key);
                    } else {
                        served.remove(key);
                    }
                }
            }
            Event::Table { .. } | Event::Keys { .. } | Event::Taken { .. } | Event::Lost => {}
        }
    }

    /// Whether it has rules for this port; `None` without its table.
    pub(super) fn serves(&self, vip: IpAddr, protocol: Protocol, port: u16) -> Option<bool> {
        let served = match vip {
            IpAddr::V4(_) => &self.ip,
            IpAddr::V6(_) => &self.ip6,
        };
        Some(served.as_ref()?.contains(&(vip, protocol, port)))
    }

    fn family(&mut self, family: TableFamily) -> Option<&mut Option<Served>> {
        match family {
            TableFamily::Inet | TableFamily::Bridge => None,
            TableFamily::Ip => Some(&mut self.ip),
            TableFamily::Ip6 => Some(&mut self.ip6),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_keys(there: bool) -> Event {
        Event::Keys {
            family: TableFamily::Ip,
            table: TABLE.to_owned(),
            map: MAP.to_owned(),
            keys: vec![("10.88.0.200".parse().unwrap(), Protocol::Tcp, 80)],
            there,
        }
    }

    #[test]
    fn follows_keys_and_tables() {
        let mut proxy = KubeProxy::default();
        let serves =
            |proxy: &KubeProxy| proxy.serves("10.88.0.200".parse().unwrap(), Protocol::Tcp, 80);
        assert_eq!(serves(&proxy), None);
        let table = |there| Event::Table {
            family: TableFamily::Ip,
            table: TABLE.to_owned(),
            there,
        };
        proxy.apply(&table(true));
        assert_eq!(serves(&proxy), Some(false));
        proxy.apply(&mk_keys(true));
        assert_eq!(serves(&proxy), Some(true));
        proxy.apply(&mk_keys(false));
        assert_eq!(serves(&proxy), Some(false));
        proxy.apply(&table(false));
        assert_eq!(serves(&proxy), None);
    }
}
