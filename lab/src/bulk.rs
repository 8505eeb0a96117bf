//! Many bytes, in both directions at once, each way with their digest behind them.
//!
//! Both sides call [`exchange`]: each sends its content and then its SHA-256, and compares what it gets with the digest
//! that comes with it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use sha2::{Digest, Sha256};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How much is made, sent and digested at a time.
const CHUNK: usize = 128 * 1024;

/// Whose content: the two directions differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// What the client sends.
    Clients,
    /// What the server sends.
    Servers,
}

impl Content {
    /// Its bytes, chunk after chunk: no two are alike, since each begins with its number.
    fn chunks(self, bytes: u64) -> impl Iterator<Item = Vec<u8>> {
        let mut state: u64 = match self {
            Self::Clients => 0x9e37_79b9_7f4a_7c15,
            Self::Servers => 0xd1b5_4a32_d192_ed03,
        };
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            // Marsaglia's xorshift: compresses to nothing shorter, and is the same each time.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_ne_bytes()
        })
        .take(CHUNK / 8)
        .flatten()
        .collect();
        let chunk = CHUNK as u64;
        (0..bytes.div_ceil(chunk)).map(move |number| {
            let length = (bytes - number * chunk).min(chunk);
            let length = usize::try_from(length).expect("a chunk is small");
            let mut content = noise[..length].to_vec();
            for (byte, stamp) in content.iter_mut().zip(number.to_be_bytes()) {
                *byte = stamp;
            }
            content
        })
    }
}

/// The client's side of it, over a connection whose server was asked for it.
pub fn over(stream: std::net::TcpStream, bytes: u64, received: &AtomicU64) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let (read, write) = tokio::net::TcpStream::from_std(stream)?.into_split();
            exchange(read, write, bytes, Content::Clients, received).await
        })
}

/// Sends `bytes` of `mine` while it receives as many of the other side's; `received` counts them. An error also if they
/// are not what the other side says it has sent.
pub async fn exchange(
    read: impl AsyncRead + Unpin,
    write: impl AsyncWrite + Unpin,
    bytes: u64,
    mine: Content,
    received: &AtomicU64,
) -> io::Result<()> {
    tokio::try_join!(send(write, bytes, mine), receive(read, bytes, received)).map(drop)
}

async fn send(mut write: impl AsyncWrite + Unpin, bytes: u64, mine: Content) -> io::Result<()> {
    let mut digest = Sha256::new();
    for chunk in mine.chunks(bytes) {
        digest.update(&chunk);
        write.write_all(&chunk).await?;
    }
    write.write_all(&digest.finalize()).await?;
    write.flush().await
}

async fn receive(
    mut read: impl AsyncRead + Unpin,
    bytes: u64,
    received: &AtomicU64,
) -> io::Result<()> {
    let mut digest = Sha256::new();
    let mut buffer = vec![0; CHUNK];
    let mut missing = bytes;
    while missing > 0 {
        let room = usize::try_from(missing).map_or(CHUNK, |missing| missing.min(CHUNK));
        let length = read.read(&mut buffer[..room]).await?;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        digest.update(&buffer[..length]);
        missing -= length as u64;
        received.fetch_add(length as u64, Ordering::Relaxed);
    }
    let mut told = [0; 32];
    read.read_exact(&mut told).await?;
    if told == *digest.finalize() {
        Ok(())
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "what came is not what was sent",
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn both_ways(bytes: u64, forged: bool) -> io::Result<()> {
        let (client, server) = tokio::io::duplex(4096);
        let (client_read, client_write) = tokio::io::split(client);
        let (server_read, mut server_write) = tokio::io::split(server);
        let count = AtomicU64::new(0);
        let client = exchange(client_read, client_write, bytes, Content::Clients, &count);
        let other = AtomicU64::new(0);
        let server = async {
            if forged {
                let length = usize::try_from(bytes).unwrap();
                server_write.write_all(&vec![0; length]).await?;
                server_write.write_all(&[0; 32]).await?;
                receive(server_read, bytes, &other).await
            } else {
                exchange(server_read, server_write, bytes, Content::Servers, &other).await
            }
        };
        tokio::try_join!(client, server)?;
        assert_eq!(count.load(Ordering::Relaxed), bytes);
        Ok(())
    }

    #[tokio::test]
    async fn what_was_sent_arrives() {
        for bytes in [0, 1, CHUNK as u64, 3 * CHUNK as u64 + 5] {
            both_ways(bytes, false).await.unwrap();
        }
    }

    #[tokio::test]
    async fn what_was_not_sent_is_noticed() {
        let error = both_ways(1000, true).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
