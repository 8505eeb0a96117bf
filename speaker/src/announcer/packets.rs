//! The packet sockets of one interface, and the tasks that read them.

use std::io;
use std::sync::Arc;

use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;

use super::MacAddr;
use super::frame::{self, Heard};
use super::metrics::Metrics;
use crate::sys::{PacketSocket, jump, statement};

const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
/// Longer than any ARP or ND frame with a few options; a hello may be as long as the MTU.
const BUFFER: usize = 9216;

const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const LOAD_HALF: u32 = libc::BPF_LD | libc::BPF_H | libc::BPF_ABS;
const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Neighbour solicitations and advertisements alone: the interface carries all the cluster's other IPv6 too.
const ONLY_ND: [libc::sock_filter; 9] = [
    statement(LOAD_HALF, 12),
    jump(IF_EQUAL, ETH_P_IPV6 as u32, 0, 6),
    statement(LOAD_BYTE, 20), // next header
    jump(IF_EQUAL, 58, 0, 4),
    statement(LOAD_BYTE, 54), // type
    jump(IF_EQUAL, 135, 1, 0),
    jump(IF_EQUAL, 136, 0, 1),
    statement(RETURN, u32::MAX),
    statement(RETURN, 0),
];

/// What the sockets of an interface tell the task.
#[derive(Debug)]
pub(super) enum Inbound {
    /// ARP or ND.
    Heard(u32, Heard),
    /// A hello.
    Hello(u32, MacAddr, Vec<u8>),
    /// A socket of the interface broke: open them anew. The number tells these sockets from later ones.
    Broken(u32, u64),
}

/// The open sockets of an interface. Dropping it closes them.
#[derive(Debug)]
pub(super) struct Sockets {
    /// Which opening this is.
    pub(super) opening: u64,
    out: Arc<AsyncFd<PacketSocket>>,
    _readers: [AbortOnDropHandle<()>; 3],
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    Arp,
    Nd,
    Hello,
}

impl Sockets {
    /// Opens the sockets of an interface and reads them.
    pub(super) fn open(
        interface: u32,
        opening: u64,
        to: &mpsc::Sender<Inbound>,
        metrics: &Metrics,
    ) -> io::Result<Self> {
        let arp = PacketSocket::open(interface, ETH_P_ARP, None, None)?;
        let nd = PacketSocket::open(interface, ETH_P_IPV6, Some(&ONLY_ND), None)?;
        let group = Some(frame::HELLO_GROUP.0);
        let hello = PacketSocket::open(interface, frame::HELLO, None, group)?;
        let [arp, nd, hello] = [
            Arc::new(arp.watch()?),
            Arc::new(nd.watch()?),
            Arc::new(hello.watch()?),
        ];
        let read = |socket: &Arc<AsyncFd<PacketSocket>>, kind| {
            let reader = Reader {
                socket: Arc::clone(socket),
                kind,
                interface,
                opening,
                to: to.clone(),
                metrics: metrics.clone(),
            };
            AbortOnDropHandle::new(tokio::spawn(reader.run()))
        };
        Ok(Self {
            opening,
            _readers: [
                read(&arp, Kind::Arp),
                read(&nd, Kind::Nd),
                read(&hello, Kind::Hello),
            ],
            out: arp,
        })
    }

    /// Sends a whole frame, now or not at all.
    pub(super) fn send(&self, frame: &[u8]) -> io::Result<()> {
        self.out.get_ref().send(frame)
    }
}

struct Reader {
    socket: Arc<AsyncFd<PacketSocket>>,
    kind: Kind,
    interface: u32,
    opening: u64,
    to: mpsc::Sender<Inbound>,
    metrics: Metrics,
}

impl Reader {
    async fn run(self) {
        let mut buffer = vec![0; BUFFER];
        loop {
            match self.receive(&mut buffer).await {
                Ok(Some(inbound)) => {
                    if self.to.send(inbound).await.is_err() {
                        return;
                    }
                }
                Ok(None) => {}
                // The link went down: the socket lives and hears again once it is up.
                Err(error) if error.raw_os_error() == Some(libc::ENETDOWN) => {}
                Err(error) => {
                    self.metrics.failed("receive");
                    tracing::warn!(interface = self.interface, %error, "a packet socket broke");
                    // The task may have ended meanwhile: then nobody wants to know.
                    let _ = self
                        .to
                        .send(Inbound::Broken(self.interface, self.opening))
                        .await;
                    return;
                }
            }
        }
    }

    /// The next frame, if it says something.
    async fn receive(&self, buffer: &mut [u8]) -> io::Result<Option<Inbound>> {
        let received = loop {
            let mut ready = self.socket.readable().await?;
            if let Ok(received) = ready.try_io(|socket| socket.get_ref().receive(buffer)) {
                break received?;
            }
        };
        if !received.for_us || received.tagged {
            return Ok(None);
        }
        let frame = &buffer[..received.length];
        let heard = |heard| Inbound::Heard(self.interface, heard);
        Ok(match self.kind {
            Kind::Arp => frame::parse_arp(frame).map(heard),
            Kind::Nd => frame::parse_nd(frame).map(heard),
            Kind::Hello => frame::parse_hello(frame)
                .map(|(from, payload)| Inbound::Hello(self.interface, from, payload.to_vec())),
        })
    }
}
