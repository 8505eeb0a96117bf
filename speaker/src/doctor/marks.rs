//! Who else uses bits of the packet mark and of the connection mark: rules of nftables, of iptables in either kind, and
//! routing rules.
//!
//! nftables is asked by netlink: what `iptables-nft` writes its own `nft` cannot show. For the legacy kind there is only
//! the text of `iptables-legacy-save`.

use std::{fmt, io};

use crate::netlink::{find, split, text};

/// Which of the two marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Mark {
    Packet,
    Connection,
}

/// What a rule does with bits of a mark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Deed {
    /// It looks whether the whole mark has a value of its own, whose bits are said. That does not come about with others' bits in
    /// it.
    Knows,
    /// It goes by them.
    Reads,
    /// It changes them.
    Writes,
}

/// Bits that a rule looks at, or changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) mark: Mark,
    pub(super) bits: u32,
    pub(super) deed: Deed,
}

impl Use {
    /// `known` says that it is a comparison with one value, and which.
    pub(super) const fn read(mark: Mark, bits: u32, known: Option<u32>) -> Self {
        let (bits, deed) = match known {
            Some(value) if value != 0 && bits == ALL => (value, Deed::Knows),
            _ => (bits, Deed::Reads),
        };
        Self { mark, bits, deed }
    }

    const fn written(mark: Mark, bits: u32) -> Self {
        Self {
            mark,
            bits,
            deed: Deed::Writes,
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

impl fmt::Display for User {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)?;
        if self.chain.is_empty() {
            return Ok(());
        }
        write!(f, ", chain {}", self.chain)
    }
}

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
    /// Bits of the mark that it depends on.
    seen: u32,
    and: u32,
    xor: u32,
}

impl Held {
    const fn whole(register: u32, of: Option<Mark>) -> Self {
        Self {
            register,
            of,
            seen: ALL,
            and: ALL,
            xor: 0,
        }
    }

    /// What writing it to a mark changes there.
    fn changes(&self, mark: Mark) -> u32 {
        if self.of == Some(mark) {
            !self.and | self.xor
        } else {
            ALL
        }
    }
}

/// The longest key that can be looked for, in registers of 32 bits.
const KEY: u32 = 16;

/// Where a register begins, in units of 32 bits: four have 128 of them (`NFT_REG_1`), and parts that have names of their own
/// (`NFT_REG32_00`).
const fn place(register: u32) -> u32 {
    if register < 8 {
        4 * register
    } else {
        register - 4
    }
}

/// The attribute by which an expression names the register that it writes; nothing if it writes none.
fn written_by(expression: &str) -> Option<u16> {
    match expression {
        "immediate" | "payload" | "exthdr" | "fib" | "rt" | "numgen" | "osf" | "xfrm" => Some(1),
        "byteorder" | "hash" | "socket" | "tunnel" => Some(2),
        _ => None,
    }
}

/// What is in the registers.
#[derive(Default)]
struct Registers(Vec<Held>);

impl Registers {
    fn hold(&mut self, held: Held) {
        self.0
            .retain(|it| place(it.register) != place(held.register));
        self.0.push(held);
    }

    fn find(&self, register: Option<u32>) -> Option<Held> {
        let mut held = self.0.iter();
        held.find(|it| Some(place(it.register)) == register.map(place))
            .copied()
    }

    /// What looking for all that begins in one finds: several values that stand behind each other are looked for as one.
    fn read_all(&self, register: Option<u32>, known: Option<u32>) -> impl Iterator<Item = Use> {
        let from = register.map(place);
        self.0.iter().filter_map(move |held| {
            let behind = place(held.register).checked_sub(from?)?;
            (behind < KEY).then(|| Some(Use::read(held.of?, held.seen, known)))?
        })
    }

    /// What a comparison of one looks at.
    fn read(&self, register: Option<u32>, known: Option<u32>) -> Option<Use> {
        let held = self.find(register)?;
        Some(Use::read(held.of?, held.seen, known))
    }
}

/// What a rule of nftables does with marks, by its expressions (`NFTA_RULE_EXPRESSIONS`).
pub(super) fn of_expressions(expressions: &[u8]) -> Vec<Use> {
    /// `NFT_CMP_EQ`, and `NFT_LOOKUP_F_INV`.
    const EQUAL: u32 = 0;
    const INVERTED: u32 = 1;
    let mut used = Vec::new();
    let mut held = Registers::default();
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
        match &*name {
            "meta" | "ct" => {
                let (mark, source, wanted) = if name == "meta" {
                    (Mark::Packet, 3, META_MARK)
                } else {
                    (Mark::Connection, 4, CT_MARK)
                };
                let is_mark = number(2) == Some(wanted);
                if let Some(register) = number(1) {
                    held.hold(Held::whole(register, is_mark.then_some(mark)));
                } else if is_mark {
                    let from = held.find(number(source));
                    let bits = from.map_or(ALL, |from| from.changes(mark));
                    used.push(Use::written(mark, bits));
                    let other = from.filter(|from| from.of != Some(mark));
                    used.extend(other.and_then(|from| Some(Use::read(from.of?, from.seen, None))));
                }
            }
            "bitwise" => {
                let Some(register) = number(2) else { continue };
                let from = held.find(number(1));
                let of = from.and_then(|from| from.of);
                let from = from.unwrap_or(Held::whole(register, None));
                held.hold(match number(6).unwrap_or_default() {
                    0 => {
                        let (and, xor) = (value(4).unwrap_or(0), value(5).unwrap_or(ALL));
                        Held {
                            register,
                            of,
                            seen: from.seen & and,
                            and: from.and & and,
                            xor: from.xor & and ^ xor,
                        }
                    }
                    // Shifts and others' operations: any bit may come of any.
                    _ => Held {
                        register,
                        of,
                        and: 0,
                        xor: ALL,
                        ..from
                    },
                });
            }
            "cmp" => {
                let known = value(3).filter(|_| number(2) == Some(EQUAL));
                used.extend(held.read(number(1), known));
            }
            "range" => used.extend(held.read(number(1), None)),
            "lookup" => {
                // Some of a set's values; which is not looked at.
                let known = number(5).unwrap_or_default() & INVERTED == 0;
                used.extend(held.read_all(number(2), known.then_some(ALL)));
                if let Some(register) = number(3) {
                    held.hold(Held::whole(register, None));
                }
            }
            "match" | "target" => {
                let extension = find(data, 1).map(text).unwrap_or_default();
                let revision = number(2).unwrap_or_default();
                let info = find(data, 3).unwrap_or_default();
                used.extend(of_extension(&name, &extension, revision, info));
            }
            _ => {
                if let Some(register) = written_by(&name).and_then(number) {
                    held.hold(Held::whole(register, None));
                }
            }
        }
    }
    used
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
    let compared = |mark| {
        let is_equal = info.get(8) == Some(&0);
        vec![Use::read(mark, word(1), is_equal.then(|| word(0)))]
    };
    match (kind, name) {
        ("match", "mark") => compared(Mark::Packet),
        ("match", "connmark") => compared(Mark::Connection),
        ("target", "MARK") => vec![Use::written(Mark::Packet, word(0) | word(1))],
        ("target", "CONNMARK") => {
            // The second revision can shift: which way and by how many bits stand in front of what it does.
            let (deed, shifts) = if revision < 2 {
                (info.get(12), false)
            } else {
                (info.get(14), info.get(13).is_some_and(|bits| *bits != 0))
            };
            let masks = Masks {
                connection: word(1),
                packet: word(2),
                shifts,
            };
            match deed {
                Some(0) => vec![Use::written(Mark::Connection, word(0) | word(1))],
                Some(1) => masks.save().to_vec(),
                Some(2) => masks.restore().to_vec(),
                _ => Vec::new(),
            }
        }
        _ => Vec::new(),
    }
}

/// Of `CONNMARK`, when it takes one mark to the other.
struct Masks {
    connection: u32,
    packet: u32,
    shifts: bool,
}

impl Masks {
    /// The kernel takes what is in one mask away and puts what is in the other mask in.
    fn changed(&self) -> u32 {
        if self.shifts {
            ALL
        } else {
            self.connection | self.packet
        }
    }

    fn save(&self) -> [Use; 2] {
        [
            Use::read(Mark::Packet, self.packet, None),
            Use::written(Mark::Connection, self.changed()),
        ]
    }

    fn restore(&self) -> [Use; 2] {
        [
            Use::read(Mark::Connection, self.connection, None),
            Use::written(Mark::Packet, self.changed()),
        ]
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
    let bits = |word: &str| after(word).and_then(parse_bits).unwrap_or(ALL);
    let masks = || Masks {
        connection: bits("--ctmask"),
        packet: bits("--nfmask"),
        shifts: words.iter().any(|word| word.ends_with("-shift-mark")),
    };
    let mut used = Vec::new();
    let mut kind = "";
    for (at, word) in words.iter().enumerate() {
        let next = words.get(at + 1).copied();
        match *word {
            "-m" | "-j" => kind = next.unwrap_or_default(),
            "--mark" => {
                let (value, mask) = valued(next);
                let mark = match kind {
                    "connmark" => Mark::Connection,
                    _ => Mark::Packet,
                };
                let is_equal = at == 0 || words[at - 1] != "!";
                used.push(Use::read(mark, mask, is_equal.then_some(value)));
            }
            "--set-xmark" | "--set-mark" | "--tproxy-mark" => {
                let (value, mask) = valued(next);
                let mark = match kind {
                    "CONNMARK" => Mark::Connection,
                    _ => Mark::Packet,
                };
                used.push(Use::written(mark, value | mask));
            }
            "--save-mark" => used.extend(masks().save()),
            "--restore-mark" => used.extend(masks().restore()),
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

/// The rules of nftables that use marks, but for Landfall's own, in the calling thread's network namespace.
///
/// # Errors
/// `EPERM` without `CAP_NET_ADMIN`.
pub(super) fn of_nftables() -> io::Result<Vec<User>> {
    let rules = crate::node_rules::rules()?;
    let others = rules.into_iter().filter(|rule| rule.table != "landfall");
    let users = others.flat_map(|rule| {
        let used = of_expressions(&rule.expressions);
        let place = format!("table {} {}", rule.family, rule.table);
        used.into_iter().map(move |used| User {
            place: place.clone(),
            chain: rule.chain.clone(),
            used,
        })
    });
    Ok(users.collect())
}

/// The highest pair of neighbouring bits that is not taken. CNIs begin with the lowest.
pub(super) fn free_pair(taken: u32) -> Option<u32> {
    (16..31)
        .rev()
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
-A POSTROUTING -m mark ! --mark 0 -j MASQUERADE
COMMIT
";
        let found = of_saved("iptables (legacy)", saved);
        let of = |user: &User| {
            let used = user.used;
            let owner = user.owner().unwrap_or("?");
            format!(
                "{} {owner} {:?} {:#x} {:?}",
                user.chain, used.mark, used.bits, used.deed
            )
        };
        let found: Vec<String> = found.iter().map(of).collect();
        let expected = [
            "cali-PREROUTING Calico Packet 0x10000 Reads",
            "cali-PREROUTING Calico Packet 0xe0000 Writes",
            "OUTPUT ? Connection 0x80 Reads",
            "OUTPUT ? Connection 0x40 Reads",
            "OUTPUT ? Packet 0xc0 Writes",
            "OUTPUT ? Packet 0xffffffff Reads",
            "OUTPUT ? Connection 0xffffffff Writes",
            "KUBE-MARK-MASQ kube-proxy or the kubelet Packet 0x4000 Writes",
            "POSTROUTING ? Packet 0x7 Knows",
            "POSTROUTING ? Packet 0xffffffff Reads",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_free_pair_is_found_if_there_is_one() {
        assert_eq!(free_pair(0), Some(0xc000_0000));
        assert_eq!(free_pair(0xa000_0000), Some(0x1800_0000));
        assert_eq!(free_pair(0x5555_0000), None);
    }

    /// An attribute.
    fn mk(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        crate::netlink::put(&mut bytes, kind, value);
        bytes
    }

    fn expression(name: &str, data: &[&[u8]]) -> Vec<u8> {
        let name = mk(1, &[name.as_bytes(), &[0]].concat());
        mk(1, &[name, mk(2, &data.concat())].concat())
    }

    /// Whatever is in a rule, nothing panics.
    #[test]
    fn odd_expressions_are_passed_over() {
        let names = [
            "meta", "ct", "bitwise", "cmp", "range", "lookup", "match", "target", "hash",
        ];
        for name in names {
            for length in 0..40 {
                let value: Vec<u8> = (0..length).map(|at: u8| at.wrapping_mul(37)).collect();
                let data: Vec<Vec<u8>> = (1..8).map(|kind| mk(kind, &value)).collect();
                let data: Vec<&[u8]> = data.iter().map(Vec::as_slice).collect();
                let whole = expression(name, &data);
                for end in 0..=whole.len() {
                    let _ = of_expressions(&whole[..end]);
                }
                let _ = of_extension("target", "CONNMARK", 2, &value);
                let _ = of_extension("match", "mark", 1, &value);
            }
        }
    }

    /// A register that something else was put into holds no mark any more; what was shifted came of all bits.
    #[test]
    fn registers_hold_what_was_put_into_them_last() {
        let number = |kind, value: u32| mk(kind, &value.to_be_bytes());
        let load = expression("meta", &[&number(2, META_MARK), &number(1, 1)]);
        let store = expression("meta", &[&number(2, META_MARK), &number(3, 1)]);
        let hash = expression("hash", &[&number(1, 1), &number(2, 1)]);
        let shift = expression("bitwise", &[&number(1, 1), &number(2, 1), &number(6, 2)]);
        let compare = expression("cmp", &[&number(1, 1), &number(2, 1)]);
        let all = |parts: &[&Vec<u8>]| {
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
            of_expressions(&bytes)
        };
        let written = Use::written(Mark::Packet, ALL);
        assert_eq!(all(&[&load, &store]), [Use::written(Mark::Packet, 0)]);
        assert_eq!(all(&[&load, &hash, &store]), [written]);
        let read = Use::read(Mark::Packet, ALL, None);
        assert_eq!(all(&[&load, &shift, &compare]), [read]);
        assert_eq!(all(&[&load, &shift, &store]), [written]);
    }
}
