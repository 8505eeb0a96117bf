//! Who else uses bits of the packet mark and of the connection mark: rules of nftables, of iptables in either kind, and
//! routing rules.
//!
//! nftables is asked by netlink: what `iptables-nft` writes its own `nft` cannot show. For the legacy kind there is only
//! the text of `iptables-legacy-save`.

use std::io;

use crate::netlink::{find, split, text};

/// Which of the two marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    Packet,
    Connection,
}

/// Bits that a rule looks at, or changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) mark: Mark,
    pub(super) bits: u32,
    pub(super) writes: bool,
}

impl Use {
    const fn read(mark: Mark, bits: u32) -> Self {
        Self {
            mark,
            bits,
            writes: false,
        }
    }

    const fn written(mark: Mark, bits: u32) -> Self {
        Self {
            mark,
            bits,
            writes: true,
        }
    }
}

/// Where a rule is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct User {
    /// `table inet filter`, `ip rule`.
    pub(super) place: String,
    /// The chain; nothing for routing rules.
    pub(super) chain: String,
    pub(super) used: Use,
}

/// Whose chains begin like this. What is not in here is named by its table and chain only.
const OWNERS: [(&str, &str); 11] = [
    ("cali-", "Calico"),
    ("CILIUM_", "Cilium"),
    ("OLD_CILIUM_", "Cilium"),
    ("FLANNEL", "Flannel"),
    ("ANTREA-", "Antrea"),
    ("WEAVE", "Weave Net"),
    ("KUBE-ROUTER", "kube-router"),
    ("KUBE-", "kube-proxy or the kubelet"),
    ("CNI-", "the CNI's portmap plugin"),
    ("ISTIO_", "Istio"),
    ("DOCKER", "Docker"),
];

impl User {
    /// Who made it, if its name gives that away.
    pub(super) fn owner(&self) -> Option<&'static str> {
        let kubes = ["kube-proxy", "kube-router"];
        let of_table = kubes.iter().find(|name| self.place.ends_with(*name));
        let of_chain = OWNERS
            .iter()
            .find(|(prefix, _)| self.chain.starts_with(prefix));
        of_chain.map(|(_, owner)| *owner).or(of_table.copied())
    }
}

const META_MARK: u32 = 3; // NFT_META_MARK
const CT_MARK: u32 = 3; // NFT_CT_MARK
const ALL: u32 = u32::MAX;

/// What is in a register, as far as marks go: a mark's bits, and what was changed of them.
#[derive(Clone, Copy)]
struct Held {
    register: u32,
    of: Option<Mark>,
    and: u32,
    xor: u32,
}

impl Held {
    /// What writing it to a mark changes there.
    fn changes(&self, mark: Mark) -> u32 {
        if self.of == Some(mark) {
            !self.and | self.xor
        } else {
            ALL
        }
    }
}

/// What a rule of nftables does with marks, by its expressions (`NFTA_RULE_EXPRESSIONS`).
pub(super) fn of_expressions(expressions: &[u8]) -> Vec<Use> {
    let mut used = Vec::new();
    let mut held: Vec<Held> = Vec::new();
    for (_, expression) in split(expressions) {
        let (Some(name), Some(data)) = (find(expression, 1).map(text), find(expression, 2)) else {
            continue;
        };
        let number = |kind| {
            let bytes = find(data, kind).and_then(|bytes| bytes.try_into().ok());
            bytes.map(u32::from_be_bytes)
        };
        let value = |kind| {
            // NFTA_DATA_VALUE; marks are in the host's order.
            let bytes = find(data, kind).and_then(|value| find(value, 1)?.first_chunk().copied());
            bytes.map(u32::from_ne_bytes)
        };
        let in_register = |held: &[Held], register: Option<u32>| {
            let mut held = held.iter().rev();
            held.find(|it| Some(it.register) == register).copied()
        };
        match &*name {
            "meta" | "ct" => {
                let (mark, source, wanted) = if name == "meta" {
                    (Mark::Packet, 3, META_MARK)
                } else {
                    (Mark::Connection, 4, CT_MARK)
                };
                let is_mark = number(2) == Some(wanted);
                if let Some(register) = number(1) {
                    held.push(Held {
                        register,
                        of: is_mark.then_some(mark),
                        and: ALL,
                        xor: 0,
                    });
                } else if is_mark {
                    let held = in_register(&held, number(source));
                    let bits = held.map_or(ALL, |held| held.changes(mark));
                    used.push(Use::written(mark, bits));
                    if let Some((other, held)) =
                        held.and_then(|held| Some((held.of.filter(|of| *of != mark)?, held)))
                    {
                        used.push(Use::read(other, held.and));
                    }
                }
            }
            "bitwise" => {
                if let (Some(from), Some(register)) = (in_register(&held, number(1)), number(2)) {
                    // Shifts and others' operations: any bit may come of any.
                    let (and, xor) = match number(6).unwrap_or_default() {
                        0 => (value(4).unwrap_or(0), value(5).unwrap_or(ALL)),
                        _ => (0, ALL),
                    };
                    held.push(Held {
                        register,
                        of: from.of,
                        and: from.and & and,
                        xor: from.xor & and ^ xor,
                    });
                }
            }
            "cmp" | "range" => used.extend(in_register(&held, number(1)).and_then(read)),
            "lookup" => used.extend(in_register(&held, number(2)).and_then(read)),
            "immediate" | "payload" | "numgen" | "hash" => {
                if let Some(register) = number(1) {
                    held.push(Held {
                        register,
                        of: None,
                        and: ALL,
                        xor: 0,
                    });
                }
            }
            "match" | "target" => {
                let extension = find(data, 1).map(text).unwrap_or_default();
                let info = find(data, 3).unwrap_or_default();
                let revision = number(2).unwrap_or_default();
                used.extend(of_extension(&name, &extension, revision, info));
            }
            _ => {}
        }
    }
    used
}

fn read(held: Held) -> Option<Use> {
    Some(Use::read(held.of?, held.and))
}

/// What an extension of iptables does (`struct xt_mark_mtinfo1`, `xt_mark_tginfo2`, `xt_connmark_mtinfo1`,
/// `xt_connmark_tginfo1` and `2`).
fn of_extension(kind: &str, name: &str, revision: u32, info: &[u8]) -> Vec<Use> {
    let word = |at: usize| {
        let bytes = info
            .get(4 * at..)
            .and_then(|rest| rest.first_chunk().copied());
        bytes.map_or(0, u32::from_ne_bytes)
    };
    match (kind, name) {
        ("match", "mark") => vec![Use::read(Mark::Packet, word(1))],
        ("match", "connmark") => vec![Use::read(Mark::Connection, word(1))],
        ("target", "MARK") => vec![Use::written(Mark::Packet, word(0) | word(1))],
        // The second can shift: the direction and by how many bits stand in front of what it does.
        ("target", "CONNMARK") => match info.get(if revision < 2 { 12 } else { 14 }) {
            Some(0) => vec![Use::written(Mark::Connection, word(0) | word(1))],
            Some(1) => vec![
                Use::read(Mark::Packet, word(2)),
                Use::written(Mark::Connection, word(1)),
            ],
            Some(2) => vec![
                Use::read(Mark::Connection, word(1)),
                Use::written(Mark::Packet, word(2)),
            ],
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

/// What the rules in the text of `iptables-save` do.
pub(super) fn of_saved(tool: &str, saved: &str) -> Vec<User> {
    let mut table = "";
    let mut users = Vec::new();
    for line in saved.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
        }
        let Some(rule) = line.strip_prefix("-A ") else {
            continue;
        };
        let words: Vec<&str> = rule.split_whitespace().collect();
        let place = format!("{tool} table {table}");
        users.extend(of_words(&words).into_iter().map(|used| User {
            place: place.clone(),
            chain: words[0].to_owned(),
            used,
        }));
    }
    users
}

fn of_words(words: &[&str]) -> Vec<Use> {
    let after = |word: &str| {
        let at = words.iter().position(|it| *it == word)?;
        words.get(at + 1).copied()
    };
    let bits = |text: Option<&str>| text.and_then(parse_bits).unwrap_or(ALL);
    let mut used = Vec::new();
    let mut kind = "";
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1).copied();
        match *word {
            "-m" | "-j" => kind = next.unwrap_or_default(),
            "--mark" => {
                let (_, mask) = valued(next);
                let mark = match kind {
                    "connmark" => Mark::Connection,
                    _ => Mark::Packet,
                };
                used.push(Use::read(mark, mask));
            }
            "--set-xmark" | "--set-mark" => {
                let (value, mask) = valued(next);
                let mark = match kind {
                    "CONNMARK" => Mark::Connection,
                    _ => Mark::Packet,
                };
                used.push(Use::written(mark, value | mask));
            }
            "--save-mark" => {
                used.push(Use::read(Mark::Packet, bits(after("--nfmask"))));
                used.push(Use::written(Mark::Connection, bits(after("--ctmask"))));
            }
            "--restore-mark" => {
                used.push(Use::read(Mark::Connection, bits(after("--ctmask"))));
                used.push(Use::written(Mark::Packet, bits(after("--nfmask"))));
            }
            _ => {}
        }
    }
    used
}

/// `value/mask`; without a mask it is all bits.
fn valued(text: Option<&str>) -> (u32, u32) {
    let text = text.unwrap_or_default();
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    (
        parse_bits(value).unwrap_or(ALL),
        parse_bits(mask).unwrap_or(ALL),
    )
}

/// A number as tools print marks: decimal, or hexadecimal after `0x`.
pub(super) fn parse_bits(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(hexadecimal) => u32::from_str_radix(hexadecimal, 16).ok(),
        None => text.parse().ok(),
    }
}

/// All users of marks in the calling thread's network namespace, but for routing rules; and what could not be read.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub(super) fn users() -> io::Result<Vec<User>> {
    let mut users = Vec::new();
    crate::node_rules::each_rule(|rule| {
        users.extend(
            of_expressions(rule.expressions)
                .into_iter()
                .map(|used| User {
                    place: format!("table {} {}", rule.family, rule.table),
                    chain: rule.chain.clone(),
                    used,
                }),
        );
    })?;
    Ok(users)
}

/// The lowest pair of neighbouring bits that nobody uses, above those that kube-proxy and this node's answers have.
pub(super) fn free_pair(taken: u32) -> Option<u32> {
    (16..31)
        .map(|at| 0b11 << at)
        .find(|pair: &u32| pair & taken == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_legacy_iptables_saves_is_read() {
        let saved = "\
*mangle
:PREROUTING ACCEPT [0:0]
:cali-PREROUTING - [0:0]
-A cali-PREROUTING -m mark --mark 0x10000/0x10000 -j ACCEPT
-A cali-PREROUTING -j MARK --set-xmark 0x0/0xe0000
-A OUTPUT -m connmark --mark 0x80/0x80 -j CONNMARK --restore-mark --nfmask 0x80 --ctmask 0x40
-A OUTPUT -j CONNMARK --save-mark
COMMIT
*nat
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A POSTROUTING -m mark --mark 7 -j MASQUERADE
COMMIT
";
        let found = of_saved("iptables (legacy)", saved);
        let of = |user: &User| {
            let used = user.used;
            let owner = user.owner().unwrap_or("?");
            format!(
                "{} {} {:?} {:#x} {}",
                user.chain, owner, used.mark, used.bits, used.writes
            )
        };
        let found: Vec<String> = found.iter().map(of).collect();
        let expected = [
            "cali-PREROUTING Calico Packet 0x10000 false",
            "cali-PREROUTING Calico Packet 0xe0000 true",
            "OUTPUT ? Connection 0x80 false",
            "OUTPUT ? Connection 0x40 false",
            "OUTPUT ? Packet 0x80 true",
            "OUTPUT ? Packet 0xffffffff false",
            "OUTPUT ? Connection 0xffffffff true",
            "KUBE-MARK-MASQ kube-proxy or the kubelet Packet 0x4000 true",
            "POSTROUTING ? Packet 0xffffffff false",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_free_pair_is_found_if_there_is_one() {
        assert_eq!(free_pair(0), Some(0x3_0000));
        assert_eq!(free_pair(0x0005_0000), Some(0x0018_0000));
        assert_eq!(free_pair(0x5555_0000), None);
    }

    /// Whatever is in a rule, nothing panics.
    #[test]
    fn odd_expressions_are_passed_over() {
        for length in 0..64 {
            let bytes: Vec<u8> = (0..length).map(|at: u8| at.wrapping_mul(37)).collect();
            let _ = of_expressions(&bytes);
            let _ = of_extension("target", "CONNMARK", 2, &bytes);
        }
    }
}
