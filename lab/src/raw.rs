//! Frames as a test has made them, onto a link.

use std::io;

use crate::sys;

/// Sends a frame, as it is, out of an interface of the calling thread's namespace: call it inside
/// [`Netns::run`](crate::Netns::run).
pub fn send_frame(interface: u32, frame: &[u8]) -> io::Result<()> {
    sys::packet_socket(interface, 0)?.send(frame).map(drop)
}
