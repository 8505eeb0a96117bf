//! Frames as a test has made them, onto a link.

use std::io::{self, IoSlice};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{MsgFlags, MultiHeaders, sendmmsg};

use crate::sys;

/// Sends a frame, as it is, out of an interface of the calling thread's namespace: call it inside
/// [`Netns::run`](crate::Netns::run).
pub fn send_frame(interface: u32, frame: &[u8]) -> io::Result<()> {
    send_frames(interface, [frame])
}

/// The same for several, one after the other. It is quicker: to close a packet socket takes the kernel milliseconds.
pub fn send_frames<F: AsRef<[u8]>>(
    interface: u32,
    frames: impl IntoIterator<Item = F>,
) -> io::Result<()> {
    let socket = sys::packet_socket(interface, 0)?;
    for frame in frames {
        socket.send(frame.as_ref())?;
    }
    Ok(())
}

/// How many frames one call sends.
const BATCH: usize = 64;

/// Sends frames as fast as this thread can, `count` in all and each in turn, past the queues. Returns how long it took;
/// on a veth the other end's work is done in the sender's time, and in that.
pub fn flood(interface: u32, frames: &[Vec<u8>], count: usize) -> io::Result<Duration> {
    let socket = sys::packet_socket(interface, 0)?;
    sys::bypass_queues(&socket)?;
    let slices: Vec<[IoSlice<'_>; 1]> = frames
        .iter()
        .cycle()
        .take(BATCH.max(frames.len().next_multiple_of(BATCH)))
        .map(|frame| [IoSlice::new(frame)])
        .collect();
    let nobody = [None::<()>; BATCH];
    let mut headers = MultiHeaders::preallocate(BATCH, None);
    let mut sent = 0;
    let begun = Instant::now();
    for batch in slices.chunks(BATCH).cycle() {
        if sent >= count {
            break;
        }
        let mut from = 0;
        while from < batch.len() {
            let done = sendmmsg(
                socket.as_raw_fd(),
                &mut headers,
                &batch[from..],
                &nobody[from..],
                [],
                MsgFlags::empty(),
            )?
            .count();
            from += done;
        }
        sent += batch.len();
    }
    Ok(begun.elapsed() * u32::try_from(count).unwrap_or(u32::MAX)
        / u32::try_from(sent).unwrap_or(u32::MAX).max(1))
}
