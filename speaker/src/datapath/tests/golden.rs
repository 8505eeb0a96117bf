//! Frames through `BPF_PROG_TEST_RUN`: what is counted, and that the next program always has its turn.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use aya::maps::PerCpuHashMap;
use aya::{Ebpf, TestRun, TestRunOptions};
use landfall_ebpf_common::VIP_COUNTS;

use super::super::VipCount;
use super::super::counts::Counts;
use super::super::uplink::{classifier, object};

const V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 200);
const V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x200);

/// `TCX_NEXT` as the kernel returns it.
const NEXT: u32 = u32::MAX;

struct Program {
    ebpf: Ebpf,
    counts: Counts,
}

impl Program {
    fn load() -> Self {
        let mut ebpf = object(None).expect("these tests load eBPF programs and need root");
        classifier(&mut ebpf)
            .expect("the object holds it")
            .load()
            .expect("the verifier accepts it");
        let map = ebpf.take_map(VIP_COUNTS).expect("the object holds it");
        let counts = Counts::default();
        counts.install(PerCpuHashMap::try_from(map).expect("the map is of this kind"));
        counts
            .keep(&BTreeSet::from([V4.into(), V6.into()]))
            .expect("the map has room");
        Self { ebpf, counts }
    }

    /// Runs a frame; whether it was left alone, and what was counted for the VIPs by it.
    fn run(&mut self, frame: &[u8]) -> (VipCount, VipCount) {
        let before = self.counts.read();
        let mut out = vec![0; frame.len() + 64];
        let result = classifier(&mut self.ebpf)
            .expect("the object holds it")
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                repeat: 1,
                ..Default::default()
            })
            .expect("the kernel runs it");
        assert_eq!(result.return_value, NEXT, "the chain must go on");
        assert_eq!(
            &out[..result.data_size_out as usize],
            frame,
            "the frame must stay as it is"
        );
        let after = self.counts.read();
        let difference = |vip: IpAddr| VipCount {
            packets: after[&vip].packets - before[&vip].packets,
            bytes: after[&vip].bytes - before[&vip].bytes,
        };
        (difference(V4.into()), difference(V6.into()))
    }
}

const NOTHING: VipCount = VipCount {
    packets: 0,
    bytes: 0,
};

fn one(frame: &[u8]) -> VipCount {
    VipCount {
        packets: 1,
        bytes: frame.len() as u64,
    }
}

/// A frame for the test device, whose MAC is all zeroes.
pub(super) fn mk_frame(ethertype: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 1];
    frame.extend(ethertype.to_be_bytes());
    frame.extend(payload);
    frame
}

pub(super) fn mk_v4(destination: Ipv4Addr) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0];
    packet.extend([192, 0, 2, 1]);
    packet.extend(destination.octets());
    packet.extend([0x30, 0x39, 0, 53, 0, 8, 0, 0]);
    packet
}

pub(super) fn mk_v6(destination: Ipv6Addr) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 8, 17, 64];
    packet.extend(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).octets());
    packet.extend(destination.octets());
    packet.extend([0x30, 0x39, 0, 53, 0, 8, 0, 0]);
    packet
}

#[test]
fn packets_to_a_vip_are_counted_in_both_families() {
    let mut program = Program::load();
    let frame = mk_frame(0x0800, &mk_v4(V4));
    assert_eq!(program.run(&frame), (one(&frame), NOTHING));
    let frame = mk_frame(0x86dd, &mk_v6(V6));
    assert_eq!(program.run(&frame), (NOTHING, one(&frame)));
}

#[test]
fn packets_to_others_are_not() {
    let mut program = Program::load();
    for frame in [
        mk_frame(0x0800, &mk_v4(Ipv4Addr::new(192, 0, 2, 201))),
        mk_frame(
            0x86dd,
            &mk_v6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x201)),
        ),
        // ARP that asks for the VIP.
        mk_frame(0x0806, &[0; 28]),
    ] {
        assert_eq!(program.run(&frame), (NOTHING, NOTHING));
    }
}

#[test]
fn a_vip_of_one_family_is_not_its_mapped_form_in_the_other() {
    let mut program = Program::load();
    let frame = mk_frame(0x86dd, &mk_v6(V4.to_ipv6_mapped()));
    assert_eq!(program.run(&frame), (NOTHING, NOTHING));
}

#[test]
fn tagged_frames_are_another_segment() {
    let mut program = Program::load();
    for tag in [0x8100_u16, 0x88a8] {
        let mut payload = vec![0, 100];
        payload.extend(0x0800_u16.to_be_bytes());
        payload.extend(mk_v4(V4));
        assert_eq!(program.run(&mk_frame(tag, &payload)), (NOTHING, NOTHING));
    }
}

#[test]
fn frames_for_other_hosts_are_not_ours() {
    let mut program = Program::load();
    let mut frame = mk_frame(0x0800, &mk_v4(V4));
    frame[..6].copy_from_slice(&[2, 0, 0, 0, 0, 9]);
    assert_eq!(program.run(&frame), (NOTHING, NOTHING));
}
