//! A network namespace that is removed when it goes out of scope.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};

use nix::sched::{CloneFlags, setns};

use crate::error::{IoContext, LabError, Result};
use crate::{ledger, sys, tool};

/// The part of a lab's names that tells it from every other lab of this machine.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct LabId(String);

impl LabId {
    /// An id that no namespace of this machine carries yet.
    pub fn fresh() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        loop {
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let id = Self(format!("{:x}{}", std::process::id(), letters(number)));
            if !id.in_use() {
                return id;
            }
        }
    }

    /// Whether a namespace carries it.
    fn in_use(&self) -> bool {
        let prefix = self.name("");
        fs::read_dir("/run/netns").is_ok_and(|entries| {
            entries
                .flatten()
                .any(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
        })
    }

    /// The full name of what has this role: `lf-<id>-<role>`.
    pub fn name(&self, role: &str) -> String {
        format!("lf-{}-{role}", self.0)
    }

    /// The id itself.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// 0, 1, … as `g`, `h`, …, `z`, `hg`, …: letters that no hexadecimal number ends in.
fn letters(mut number: u32) -> String {
    let mut text = Vec::new();
    loop {
        text.push(char::from(
            b'g' + u8::try_from(number % 20).expect("a remainder below 20"),
        ));
        number /= 20;
        if number == 0 {
            return text.into_iter().rev().collect();
        }
    }
}

/// A network namespace. Dropping it removes it, with all links in it.
#[derive(Debug)]
pub struct Netns {
    name: String,
    file: Arc<File>,
    owned: bool,
}

impl Netns {
    /// A new namespace with a name of its own. See [`Netns::create_in`].
    pub fn create(role: &str) -> Result<Self> {
        Self::create_in(&LabId::fresh(), role)
    }

    /// A new namespace `lf-<id>-<role>`: loopback is up, duplicate address detection and router advertisements
    /// are off for the interfaces to come, so that an IPv6 address works at once.
    pub fn create_in(id: &LabId, role: &str) -> Result<Self> {
        tool::preflight()?;
        let name = id.name(role);
        ledger::enter_namespace(&name)?;
        let netns = tool::ip(&format!("netns add {name}"))
            .and_then(|_| Self::open(name.clone(), true))
            .inspect_err(|_| ledger::strike_namespace(&name))?;
        netns.ip("link set lo up")?;
        for (key, value) in [
            ("net.ipv6.conf.all.accept_dad", "0"),
            ("net.ipv6.conf.default.accept_dad", "0"),
            ("net.ipv6.conf.default.dad_transmits", "0"),
            ("net.ipv6.conf.all.accept_ra", "0"),
            ("net.ipv6.conf.default.accept_ra", "0"),
            ("net.ipv6.conf.all.keep_addr_on_down", "1"),
            ("net.ipv6.conf.default.keep_addr_on_down", "1"),
            ("net.ipv4.conf.all.rp_filter", "0"),
            ("net.ipv4.conf.default.rp_filter", "0"),
        ] {
            netns.sysctl(key, value)?;
        }
        Ok(netns)
    }

    /// A namespace that somebody else made; dropping what this returns leaves it there.
    pub fn existing(name: &str) -> Result<Self> {
        Self::open(name.to_owned(), false)
    }

    fn open(name: String, owned: bool) -> Result<Self> {
        let path = PathBuf::from("/run/netns").join(&name);
        let file = File::open(&path).context(|| format!("opening {}", path.display()))?;
        Ok(Self {
            name,
            file: Arc::new(file),
            owned,
        })
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The same namespace for another thread to use; dropping what this returns removes nothing.
    #[must_use]
    pub fn share(&self) -> Self {
        Self {
            name: self.name.clone(),
            file: Arc::clone(&self.file),
            owned: false,
        }
    }

    /// Runs `work` inside, on a thread of its own, to its end. Sockets it makes stay inside; a panic goes through.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                enter(&self.file);
                work()
            });
            inside
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside. What it may start in turn (runtimes, threads) is inside as well.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let file = Arc::clone(&self.file);
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                enter(&file);
                work()
            })
            .expect("the system has a thread to spare")
    }

    /// Runs async `work` inside, on a thread and a single-threaded tokio runtime of its own, to its end.
    pub fn block_on<T: Send>(&self, work: impl Future<Output = T> + Send) -> T {
        self.run(|| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs but a few descriptors")
                .block_on(work)
        })
    }

    /// A command that will run inside. Its mounts are those of this process.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        sys::enter_before_exec(&mut command, Arc::clone(&self.file));
        command
    }

    /// Runs a command inside to its end; its standard output.
    pub fn exec(&self, line: &str) -> Result<String> {
        let mut words = line.split_whitespace();
        let mut command = self.command(words.next().unwrap_or_default());
        tool::run(command.args(words))
    }

    /// `ip` inside, with the words of `line`; its output.
    pub fn ip(&self, line: &str) -> Result<String> {
        tool::ip(&format!("-n {} {line}", self.name))
    }

    /// Several `ip` commands inside, one a line, in one go.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        let mut command = Command::new("ip");
        command.args(["-n", &self.name, "-batch", "-"]);
        tool::run_with_input(&mut command, lines).map(drop)
    }

    /// Loads an nftables script inside.
    pub fn nft(&self, script: &str) -> Result<()> {
        tool::run_with_input(self.command("nft").args(["-f", "-"]), script).map(drop)
    }

    /// How many packets an nftables counter has seen, by family, table and name: `inet landfall egress-unknown`.
    pub fn counted(&self, counter: &str) -> Result<u64> {
        let listed = self.exec(&format!("nft list counter {counter}"))?;
        let mut words = listed
            .split_whitespace()
            .skip_while(|word| *word != "packets");
        let packets = words.nth(1).and_then(|word| word.parse().ok());
        packets.ok_or_else(|| LabError::Invalid(format!("the counter {counter}: {listed}")))
    }

    /// Writes a kernel parameter of this namespace, `net.ipv4.ip_forward` for example.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = sysctl_path(key);
        self.run(|| fs::write(&path, value))
            .context(|| format!("setting {key}={value} in {}", self.name))
    }

    /// Reads a kernel parameter of this namespace.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let path = sysctl_path(key);
        self.run(|| fs::read_to_string(&path))
            .map(|text| text.trim().to_owned())
            .context(|| format!("reading {key} in {}", self.name))
    }

    /// Lets it forward, IPv4 and IPv6.
    pub fn enable_forwarding(&self) -> Result<()> {
        self.sysctl("net.ipv4.ip_forward", "1")?;
        self.sysctl("net.ipv6.conf.all.forwarding", "1")
    }

    /// A veth pair: `name` here, `peer_name` in `peer`, both up.
    pub fn veth(&self, name: &str, peer: &Self, peer_name: &str) -> Result<()> {
        self.ip_batch(&format!(
            "link add name {name} type veth peer name {peer_name} netns {}\nlink set {name} up\n",
            peer.name
        ))?;
        peer.ip(&format!("link set {peer_name} up")).map(drop)
    }

    /// A bridge, up, without spanning tree; `options` as in `ip link add type bridge …`.
    pub fn bridge(&self, name: &str, options: &str) -> Result<()> {
        self.ip_batch(&format!(
            "link add name {name} type bridge stp_state 0 forward_delay 0 {options}\nlink set {name} up\n"
        ))
    }

    /// The index of an interface inside.
    pub fn interface_index(&self, name: &str) -> Result<u32> {
        self.run(|| nix::net::if_::if_nametoindex(name))
            .context(|| format!("looking up {name} in {}", self.name))
    }
}

/// Binds the calling thread to a network namespace.
fn enter(file: &File) {
    setns(file, CloneFlags::CLONE_NEWNET)
        .expect("a lab runs as root and holds its namespaces open");
}

fn sysctl_path(key: &str) -> PathBuf {
    PathBuf::from("/proc/sys").join(key.replace('.', "/"))
}

impl Drop for Netns {
    fn drop(&mut self) {
        if !self.owned {
            return;
        }
        if ledger::namespace_exists(&self.name)
            && let Err(error) = tool::ip(&format!("netns del {}", self.name))
        {
            tracing::warn!(%error, "a namespace stays behind: remove it with `landfall lab down`");
            return;
        }
        ledger::strike_namespace(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_are_no_prefix_of_each_other() {
        let ids: Vec<LabId> = (0..30).map(|_| LabId::fresh()).collect();
        for (index, id) in ids.iter().enumerate() {
            for other in &ids[index + 1..] {
                assert!(
                    !other.name("x").starts_with(&id.name("")),
                    "{id:?} {other:?}"
                );
            }
        }
    }

    #[test]
    fn letters_count() {
        assert_eq!(letters(0), "g");
        assert_eq!(letters(19), "z");
        assert_eq!(letters(20), "hg");
    }
}
