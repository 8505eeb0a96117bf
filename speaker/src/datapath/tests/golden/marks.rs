//! The packet mark by which the packet filter knows what was given to an endpoint.

use super::native::{mk_program, mk_sound, mk_transport};
use super::*;

/// What `__sk_buff` is to the kernel, and where its mark lies.
const CONTEXT: usize = 256;
const MARK: std::ops::Range<usize> = 8..12;

impl Program {
    /// The mark that a frame bears when it is handed up.
    fn marked(&mut self, frame: &[u8], before: u32) -> u32 {
        let mut context = [0; CONTEXT];
        context[MARK].copy_from_slice(&before.to_ne_bytes());
        let mut left = [0; CONTEXT];
        let result = classifier(&mut self.ebpf, UPLINK_INGRESS)
            .expect("the object holds it")
            .test_run(TestRunOptions {
                data_in: Some(frame),
                ctx_in: Some(&context),
                ctx_out: Some(&mut left),
                repeat: 1,
                ..Default::default()
            })
            .expect("the kernel runs it");
        assert_eq!(result.return_value, u32::MAX, "it is handed up");
        u32::from_ne_bytes(left[MARK].try_into().expect("four bytes"))
    }
}

#[test]
fn only_what_is_translated_is_marked_and_other_bits_stay() {
    let mut program = mk_program();
    for vip in VIPS {
        for number in [6, 17, 132] {
            let ours = mk_sound(vip, number, &mk_transport(number, 4000, 80));
            let unknown = mk_sound(vip, number, &mk_transport(number, 4000, 81));
            program.change(&Change::Mark(0));
            assert_eq!(program.marked(&ours, 0x11), 0x11, "not wanted");
            program.change(&Change::Mark(0x1000));
            assert_eq!(program.marked(&ours, 0x11), 0x1011, "{vip} {number}");
            assert_eq!(program.marked(&ours, 0), 0x1000, "{vip} {number}");
            assert_eq!(program.marked(&unknown, 0x11), 0x11, "{vip} {number}");
        }
    }
}
