//! What leaves by an uplink and answers a flow that was translated here gets the VIP for source.

use aya_ebpf::programs::TcContext;
use landfall_ebpf_common::{Endpoint, Verdict};

use crate::context::Context as _;
use crate::packet::{Frame, Kind};
use crate::translate::{SOURCE, landfall_translate};
use crate::{flows, maps};

#[inline(always)]
pub(crate) fn answer(context: &TcContext) -> Option<()> {
    let frame = Frame::of(context)?;
    let packet = maps::packet()?;
    packet.put(&frame);
    if !context.read(packet) {
        return None;
    }
    match packet.kind {
        Kind::Echo => return None,
        Kind::LaterFragment => {
            (packet.flow.client_port, packet.flow.port) = flows::ports_of(&packet.fragment())?;
        }
        Kind::Whole | Kind::Error => {}
    }
    packet.to = flows::answered(packet)?;
    if packet.more && packet.kind == Kind::Whole {
        flows::first_fragment(packet);
    }
    packet.from = Endpoint {
        address: packet.flow.client,
        port: packet.flow.client_port,
        zero: 0,
    };
    if landfall_translate(context.skb.skb, SOURCE) == 0 {
        maps::note(Verdict::Answered);
    }
    Some(())
}
