//! An encrypted and authenticated connection between two speakers: TCP, and Noise (`NNpsk0`, revision 34) on it.
//!
//! ```text
//!  length 2 B, big endian | Noise message
//! ```
//! Who does not know a gossip key gets no further than the first message. The keys of a connection are drawn anew for
//! it: what was recorded cannot be read by who learns the gossip key later.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use landfall_core::replication::{MAX_MESSAGE, Message, MessageError};
use sha2::{Digest, Sha256};
use snow::{Builder, HandshakeState, StatelessTransportState};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::timeout;

use crate::keys::{Key, Keys};

const PATTERN: &str = "Noise_NNpsk0_25519_AESGCM_SHA256";
/// Keeps keys and messages for this purpose from meaning anything elsewhere.
const CONTEXT: &[u8] = b"landfall replication 1";
/// What a Noise message is longer than what it carries.
const TAG: usize = 16;
/// How long a handshake may take.
const HANDSHAKE: Duration = Duration::from_secs(3);

/// Why there is no connection, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection itself.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The other side knows none of the keys in force here, or somebody has meddled.
    #[error("the peer knows no gossip key that is in force here, or is no speaker")]
    Key,
    /// It says nothing.
    #[error("the peer was silent for {} s", HANDSHAKE.as_secs())]
    Silent,
    /// What it says cannot be read.
    #[error(transparent)]
    Message(#[from] MessageError),
}

/// What is sent.
#[derive(Debug)]
pub struct Sender {
    stream: OwnedWriteHalf,
    state: Arc<StatelessTransportState>,
    nonce: u64,
}

/// What is received.
#[derive(Debug)]
pub struct Receiver {
    stream: OwnedReadHalf,
    state: Arc<StatelessTransportState>,
    nonce: u64,
}

/// Begins a connection, as the side that called.
pub async fn call(stream: TcpStream, keys: &Keys) -> Result<(Sender, Receiver), ChannelError> {
    within(async {
        let mut stream = stream;
        let psk = derived(keys.primary());
        let mut noise = builder(&psk)
            .build_initiator()
            .map_err(|_| ChannelError::Key)?;
        write(&mut stream, &said(&mut noise)?).await?;
        let answer = read(&mut stream).await?;
        heard(&mut noise, &answer)?;
        transport(stream, noise)
    })
    .await
}

/// Begins a connection, as the side that was called.
pub async fn answer(stream: TcpStream, keys: &Keys) -> Result<(Sender, Receiver), ChannelError> {
    within(async {
        let mut stream = stream;
        let first = read(&mut stream).await?;
        let mut noise = keys
            .all()
            .iter()
            .find_map(|key| {
                let psk = derived(key);
                let mut noise = builder(&psk).build_responder().ok()?;
                heard(&mut noise, &first).ok()?;
                Some(noise)
            })
            .ok_or(ChannelError::Key)?;
        write(&mut stream, &said(&mut noise)?).await?;
        transport(stream, noise)
    })
    .await
}

async fn within<T>(
    handshake: impl Future<Output = Result<T, ChannelError>>,
) -> Result<T, ChannelError> {
    timeout(HANDSHAKE, handshake)
        .await
        .map_err(|_| ChannelError::Silent)?
}

fn derived(key: &Key) -> [u8; 32] {
    Sha256::new()
        .chain_update(CONTEXT)
        .chain_update(key.0)
        .finalize()
        .into()
}

fn builder(psk: &[u8; 32]) -> Builder<'_> {
    Builder::new(PATTERN.parse().expect("the pattern is a known one"))
        .prologue(CONTEXT)
        .and_then(|builder| builder.psk(0, psk))
        .expect("each is given once")
}

fn said(noise: &mut HandshakeState) -> Result<Vec<u8>, ChannelError> {
    let mut message = vec![0; 128];
    let length = noise
        .write_message(&[], &mut message)
        .map_err(|_| ChannelError::Key)?;
    message.truncate(length);
    Ok(message)
}

fn heard(noise: &mut HandshakeState, message: &[u8]) -> Result<(), ChannelError> {
    let mut payload = vec![0; message.len()];
    noise
        .read_message(message, &mut payload)
        .map(drop)
        .map_err(|_| ChannelError::Key)
}

fn transport(stream: TcpStream, noise: HandshakeState) -> Result<(Sender, Receiver), ChannelError> {
    let state = noise
        .into_stateless_transport_mode()
        .map_err(|_| ChannelError::Key)?;
    let state = Arc::new(state);
    let (read, write) = stream.into_split();
    let sender = Sender {
        stream: write,
        state: state.clone(),
        nonce: 0,
    };
    let receiver = Receiver {
        stream: read,
        state,
        nonce: 0,
    };
    Ok((sender, receiver))
}

async fn write(stream: &mut (impl AsyncWriteExt + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).expect("Noise messages are at most this long");
    let mut bytes = Vec::with_capacity(2 + message.len());
    bytes.extend(length.to_be_bytes());
    bytes.extend(message);
    stream.write_all(&bytes).await
}

async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut bytes = vec![0; usize::from(length)];
    stream.read_exact(&mut bytes).await?;
    Ok(bytes)
}

impl Sender {
    /// Sends a message; how many bytes that were.
    pub async fn send(&mut self, message: &Message) -> Result<usize, ChannelError> {
        let plain = message.encode();
        if plain.len() > MAX_MESSAGE {
            return Err(MessageError::Malformed.into());
        }
        let mut sealed = vec![0; plain.len() + TAG];
        let length = self
            .state
            .write_message(self.nonce, &plain, &mut sealed)
            .map_err(|_| ChannelError::Key)?;
        self.nonce += 1;
        write(&mut self.stream, &sealed[..length]).await?;
        Ok(2 + length)
    }
}

impl Receiver {
    /// The next message. An error is the connection's end.
    pub async fn receive(&mut self) -> Result<Message, ChannelError> {
        let sealed = read(&mut self.stream).await?;
        let mut plain = vec![0; sealed.len()];
        let length = self
            .state
            .read_message(self.nonce, &sealed, &mut plain)
            .map_err(|_| ChannelError::Key)?;
        self.nonce += 1;
        Ok(Message::decode(&plain[..length])?)
    }

    /// The next message, from one who has not yet shown that it knows a key.
    pub async fn first(&mut self) -> Result<Message, ChannelError> {
        within(self.receive()).await
    }
}
