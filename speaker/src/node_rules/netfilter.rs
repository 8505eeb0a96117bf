//! The little of nfnetlink that the node rules read: a counter, who changed which table, and the keys of a map.
//!
//! The `nft` tool writes; it does not read here: beside the rules of some thousand Services each of its listings
//! costs the better part of a second, and its monitor holds all of them in memory.

use std::collections::HashSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use landfall_core::model::Protocol;
use rtnetlink::sys::protocols::NETLINK_NETFILTER;

use crate::netlink::{DUMP, Listener, Message, Requests, find, messages, put, split, text};

/// The multicast group of nftables (`NFNLGRP_NFTABLES`), as a mask.
const GROUP: u32 = 1 << 6;
/// nfnetlink's number of nftables (`NFNL_SUBSYS_NFTABLES`), in the upper byte of a message's type.
const NFTABLES: u16 = 10;

const NEW_TABLE: u8 = 0;
const DELETE_TABLE: u8 = 2;
const DELETE_CHAIN: u8 = 5;
const GET_RULE: u8 = 7;
const DELETE_RULE: u8 = 8;
const DELETE_SET: u8 = 11;
const NEW_ELEMENTS: u8 = 12;
const GET_ELEMENTS: u8 = 13;
const DELETE_ELEMENTS: u8 = 14;
const GET_OBJECT: u8 = 19;
const DELETE_OBJECT: u8 = 20;

/// The family of a table (`NFPROTO_…`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TableFamily {
    Inet = 1,
    Ip = 2,
    Bridge = 7,
    Ip6 = 10,
}

/// A port of an address that kube-proxy has rules for.
pub(super) type Served = HashSet<(IpAddr, Protocol, u16)>;

/// What happened to the ruleset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// Something of a table of family `inet` or `bridge` was taken away.
    Taken {
        /// The table.
        table: String,
        /// The netlink port of who did it: the process id of an `nft`.
        by: u32,
    },
    /// A table appeared or went.
    Table {
        /// Its family, if it is one of those we read.
        family: TableFamily,
        /// Its name.
        table: String,
        /// It appeared.
        there: bool,
    },
    /// Keys of a map appeared or went.
    Keys {
        /// The family of the map's table.
        family: TableFamily,
        /// The map's table.
        table: String,
        /// The map.
        map: String,
        /// The keys, those that are address, protocol and port.
        keys: Vec<(IpAddr, Protocol, u16)>,
        /// They appeared.
        there: bool,
    },
    /// Events were lost: whatever was concluded from them has to be read anew.
    Lost,
}

/// A rule, as the kernel shows it.
pub(crate) struct Rule {
    /// Its table's family, as `nft` says it.
    pub(crate) family: &'static str,
    pub(crate) table: String,
    pub(crate) chain: String,
    /// `NFTA_RULE_EXPRESSIONS`.
    pub(crate) expressions: Vec<u8>,
}

/// A socket to ask with. It belongs to the network namespace of the thread that opened it.
#[derive(Debug)]
pub(super) struct Query(Requests);

impl Query {
    pub(super) fn open() -> io::Result<Self> {
        Requests::open(NETLINK_NETFILTER).map(Self)
    }

    /// The packets that a named counter has counted.
    pub(super) fn counter(&self, family: TableFamily, table: &str, name: &str) -> io::Result<u64> {
        const COUNTER: u32 = 1;
        let mut body = Vec::new();
        put(&mut body, 1, &c_string(table));
        put(&mut body, 2, &c_string(name));
        put(&mut body, 3, &COUNTER.to_be_bytes());
        let mut packets = None;
        self.ask(GET_OBJECT, 0, family, &body, |attributes| {
            let data = find(attributes, 4).and_then(|counter| find(counter, 2));
            packets = data
                .and_then(|bytes| bytes.try_into().ok())
                .map(u64::from_be_bytes);
        })?;
        packets.ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    /// The keys of a map whose keys are address, protocol and port; `None` without such a table or map.
    pub(super) fn keys(
        &self,
        family: TableFamily,
        table: &str,
        map: &str,
    ) -> io::Result<Option<Served>> {
        const TRIES: u32 = 5;
        let mut body = Vec::new();
        put(&mut body, 1, &c_string(table));
        put(&mut body, 2, &c_string(map));
        for _ in 0..TRIES {
            let mut served = Served::new();
            match self.ask(GET_ELEMENTS, DUMP, family, &body, |attributes| {
                served.extend(keys(attributes));
            }) {
                Ok(()) => return Ok(Some(served)),
                // The ruleset changed meanwhile.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        Err(io::ErrorKind::Interrupted.into())
    }

    /// The rules of the tables through which packets of the node and of its pods go.
    pub(super) fn rules(&self) -> io::Result<Vec<Rule>> {
        const TRIES: u32 = 5;
        let mut rules = Vec::new();
        for (family, name) in [
            (TableFamily::Inet, "inet"),
            (TableFamily::Ip, "ip"),
            (TableFamily::Ip6, "ip6"),
        ] {
            let mut tries = 0;
            let before = rules.len();
            loop {
                let read = self.ask(GET_RULE, DUMP, family, &[], |attributes| {
                    let named = |kind| find(attributes, kind).map(text).unwrap_or_default();
                    rules.push(Rule {
                        family: name,
                        table: named(1),
                        chain: named(2),
                        expressions: find(attributes, 4).unwrap_or_default().to_vec(),
                    });
                });
                tries += 1;
                match read {
                    Ok(()) => break,
                    // The ruleset changed meanwhile.
                    Err(error) if error.kind() == io::ErrorKind::Interrupted && tries < TRIES => {
                        rules.truncate(before);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(rules)
    }

    fn ask(
        &self,
        message: u8,
        flags: u16,
        family: TableFamily,
        body: &[u8],
        mut each: impl FnMut(&[u8]),
    ) -> io::Result<()> {
        let kind = NFTABLES << 8 | u16::from(message);
        let body = [&[family as u8, 0, 0, 0], body].concat();
        self.0.ask(kind, flags, &body, |payload| {
            each(payload.get(4..).unwrap_or_default());
        })
    }
}

/// A socket that hears of every change of the ruleset of its network namespace.
pub(super) struct Watch(Listener);

impl Watch {
    pub(super) fn open() -> io::Result<Self> {
        Listener::open(NETLINK_NETFILTER, GROUP).map(Self)
    }

    /// The next events, in order; may be none. Can be dropped at any time without losing one.
    pub(super) async fn next(&mut self) -> io::Result<Vec<Event>> {
        Ok(match self.0.next().await? {
            Some(datagram) => messages(datagram)
                .filter_map(|message| event(&message))
                .collect(),
            None => vec![Event::Lost],
        })
    }
}

fn event(message: &Message<'_>) -> Option<Event> {
    if message.kind >> 8 != NFTABLES {
        return None;
    }
    let [kind, _] = message.kind.to_le_bytes();
    let family = match *message.payload.first()? {
        1 => TableFamily::Inet,
        2 => TableFamily::Ip,
        7 => TableFamily::Bridge,
        10 => TableFamily::Ip6,
        _ => return None,
    };
    let attributes = message.payload.get(4..)?;
    // In every message of nftables but those of generations the first attribute is the table's name.
    let table = || find(attributes, 1).map(text);
    match (kind, family) {
        (
            DELETE_TABLE | DELETE_CHAIN | DELETE_RULE | DELETE_SET | DELETE_ELEMENTS
            | DELETE_OBJECT,
            TableFamily::Inet | TableFamily::Bridge,
        ) => Some(Event::Taken {
            table: table()?,
            by: message.port,
        }),
        (NEW_TABLE | DELETE_TABLE, _) => Some(Event::Table {
            family,
            table: table()?,
            there: kind == NEW_TABLE,
        }),
        (NEW_ELEMENTS | DELETE_ELEMENTS, TableFamily::Ip | TableFamily::Ip6) => Some(Event::Keys {
            family,
            table: table()?,
            map: find(attributes, 2).map(text)?,
            keys: keys(attributes).collect(),
            there: kind == NEW_ELEMENTS,
        }),
        _ => None,
    }
}

/// The keys in a list of elements that are address, protocol and port.
fn keys(attributes: &[u8]) -> impl Iterator<Item = (IpAddr, Protocol, u16)> + '_ {
    let elements = find(attributes, 3).unwrap_or_default();
    split(elements).filter_map(|(_, element)| {
        let key = find(element, 1).and_then(|key| find(key, 1))?;
        // Each part of a concatenation is padded to four bytes.
        let (address, rest) = match key.len() {
            12 => {
                let (address, rest) = key.split_first_chunk::<4>()?;
                (IpAddr::from(Ipv4Addr::from(*address)), rest)
            }
            24 => {
                let (address, rest) = key.split_first_chunk::<16>()?;
                (IpAddr::from(Ipv6Addr::from(*address)), rest)
            }
            _ => return None,
        };
        let protocol = match i32::from(rest[0]) {
            libc::IPPROTO_TCP => Protocol::Tcp,
            libc::IPPROTO_UDP => Protocol::Udp,
            libc::IPPROTO_SCTP => Protocol::Sctp,
            _ => return None,
        };
        Some((address, protocol, u16::from_be_bytes([rest[4], rest[5]])))
    })
}

fn c_string(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

#[cfg(test)]
mod tests;
