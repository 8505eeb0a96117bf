//! A pod's connection to a server outside, and what it lives through.

use std::io::{self, BufRead as _, BufReader, Error, ErrorKind, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use landfall_lab::server::{NEWS_INTERVAL, NEWS_PORT, News, TCP_PORT, WHO_AM_I};
use landfall_lab::{Network, Pod};
use landfall_tests::PATIENCE;
use landfall_tests::mta::SMTP_PORT;

/// How long an answer may take: segments that are lost are sent again after 0.2, 0.6, 1.4, 3, 6 s.
const STALLED: Duration = Duration::from_secs(15);

/// Who speaks, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// The pod asks, the server answers.
    Asks,
    /// The server speaks, and the pod only listens.
    Listens,
    /// The pod has sent a message, and waits for the mail server to take it.
    Mails,
    /// Nobody speaks before all is over.
    Idles,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [Self::Asks, Self::Listens, Self::Mails, Self::Idles];

    fn port(self) -> u16 {
        match self {
            Self::Asks | Self::Idles => TCP_PORT,
            Self::Listens => NEWS_PORT,
            Self::Mails => SMTP_PORT,
        }
    }
}

pub(crate) struct Session {
    pub(crate) kind: Kind,
    /// The node of its pod.
    pub(crate) node: String,
    stream: BufReader<TcpStream>,
    /// The address that the server has seen. The mail server's log has what it saw.
    pub(crate) seen: Option<IpAddr>,
    /// What the server has said, and since when.
    heard: u64,
    begun: Instant,
}

impl Session {
    pub(crate) fn open(pod: &Pod, kind: Kind, v6: bool) -> io::Result<Self> {
        let to = SocketAddr::new(Network::Remote.both(100)[usize::from(v6)], kind.port());
        let stream = pod
            .netns
            .run(|| TcpStream::connect_timeout(&to, PATIENCE))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(STALLED))?;
        let mut session = Self {
            kind,
            node: pod.node.clone(),
            stream: BufReader::new(stream),
            seen: None,
            heard: 0,
            begun: Instant::now(),
        };
        match kind {
            Kind::Asks | Kind::Idles => session.seen = Some(session.ask()?),
            Kind::Listens => session.listen(0)?,
            Kind::Mails => session.mail()?,
        }
        Ok(session)
    }

    /// Goes on; an error if it cannot, or as another.
    pub(crate) fn go_on(&mut self) -> io::Result<()> {
        match self.kind {
            Kind::Asks | Kind::Idles => {
                let seen = self.ask()?;
                if self.seen != Some(seen) {
                    return Err(Error::other(format!(
                        "it was {:?}, and is {seen}",
                        self.seen
                    )));
                }
                Ok(())
            }
            Kind::Listens => {
                let by_now = self.begun.elapsed().as_millis() / NEWS_INTERVAL.as_millis();
                self.listen(u64::try_from(by_now).unwrap_or(u64::MAX).saturating_sub(20))
            }
            Kind::Mails => {
                self.stream.get_ref().set_read_timeout(Some(PATIENCE))?;
                self.expect("250 ")
            }
        }
    }

    /// Whether the mail server has not said yet that it has taken the message.
    pub(crate) fn waits(&self) -> bool {
        let stream = self.stream.get_ref();
        stream.set_nonblocking(true).unwrap();
        let peeked = stream.peek(&mut [0]);
        stream.set_nonblocking(false).unwrap();
        self.stream.buffer().is_empty()
            && peeked.is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
    }

    fn ask(&mut self) -> io::Result<IpAddr> {
        writeln!(self.stream.get_mut(), "{WHO_AM_I}")?;
        let line = self.line()?;
        let seen = line.split_whitespace().nth(1);
        seen.and_then(|seen| seen.parse().ok())
            .ok_or_else(|| ErrorKind::InvalidData.into())
    }

    /// Hears all numbers up to this one, none left out.
    fn listen(&mut self, to: u64) -> io::Result<()> {
        while self.heard <= to {
            let news = News::read(&mut self.stream)?;
            if news.number != self.heard {
                let heard = self.heard;
                return Err(Error::other(format!("{news:?} instead of number {heard}")));
            }
            self.seen = Some(news.client);
            self.heard += 1;
        }
        Ok(())
    }

    /// An SMTP dialogue (RFC 5321) up to the end of the message; what the server says then is still to come.
    fn mail(&mut self) -> io::Result<()> {
        self.expect("220 ")?;
        for (says, answer) in [
            ("HELO pod.example.org", "250 "),
            ("MAIL FROM:<tenant@example.org>", "250 "),
            ("RCPT TO:<somebody@example.net>", "250 "),
            ("DATA", "354 "),
        ] {
            self.say(says)?;
            self.expect(answer)?;
        }
        self.say("Subject: still there?\r\n\r\nYes.\r\n.")
    }

    fn say(&mut self, line: &str) -> io::Result<()> {
        self.stream
            .get_mut()
            .write_all(format!("{line}\r\n").as_bytes())
    }

    fn expect(&mut self, code: &str) -> io::Result<()> {
        let line = self.line()?;
        if line.starts_with(code) {
            Ok(())
        } else {
            Err(Error::other(format!("{line:?} instead of {code}")))
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.stream.read_line(&mut line)? == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        Ok(line)
    }
}
