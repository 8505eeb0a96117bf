//! A real mail server outside: Postfix, in a network namespace and a directory of its own.

use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use std::{fs, io};

use anyhow::{Context as _, ensure};
use landfall_lab::Netns;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, User};
use tempfile::TempDir;

use crate::PATIENCE;

/// Where it listens.
pub const SMTP_PORT: u16 = 25;

/// Its services: what takes mail in and throws it away.
const SERVICES: &str = "\
smtp     inet       n - n -     - smtpd
postlog  unix-dgram n - n -     1 postlogd
cleanup  unix       n - n -     0 cleanup
qmgr     unix       n - n 300   1 qmgr
rewrite  unix       - - n -     - trivial-rewrite
bounce   unix       - - n -     0 bounce
defer    unix       - - n -     0 bounce
trace    unix       - - n -     0 bounce
flush    unix       n - n 1000? 0 flush
proxymap unix       - - n -     - proxymap
anvil    unix       - - n -     1 anvil
discard  unix       - - n -     - discard
error    unix       - - n -     - error
retry    unix       - - n -     - error
";

/// A running Postfix. Dropping it ends it.
#[derive(Debug)]
pub struct Mta {
    directory: TempDir,
    master: Child,
}

impl Mta {
    /// Starts one that takes so long to say that it has taken a message; when this returns it listens.
    pub fn start(netns: &Netns, thinks: Duration) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let root = directory.path();
        let own = |name: &str| -> io::Result<PathBuf> {
            let path = root.join(name);
            fs::create_dir(&path)?;
            Ok(path)
        };
        let (config, queue, data) = (own("config")?, own("queue")?, own("data")?);
        let user = User::from_name("postfix")?
            .context("there is no user postfix: is Debian's postfix installed?")?;
        chown(&data, Some(user.uid.as_raw()), None)?;
        // Its processes are not root's.
        fs::set_permissions(root, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        fs::write(
            config.join("main.cf"),
            settings(root, &queue, &data, thinks),
        )?;
        fs::write(config.join("master.cf"), SERVICES)?;
        let master = netns
            .command("postfix")
            .arg("-c")
            .arg(&config)
            .arg("start-fg")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("starting postfix")?;
        let mta = Self { directory, master };
        let begun = Instant::now();
        let here = SocketAddr::from(([127, 0, 0, 1], SMTP_PORT));
        while netns.run(|| std::net::TcpStream::connect(here)).is_err() {
            ensure!(
                begun.elapsed() < PATIENCE,
                "postfix does not listen: {}",
                mta.log()
            );
            thread::sleep(Duration::from_millis(100));
        }
        Ok(mta)
    }

    /// What it has said so far.
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.path().join("log")).unwrap_or_default()
    }
}

impl Drop for Mta {
    fn drop(&mut self) {
        let group = Pid::from_raw(
            i32::try_from(self.master.id()).expect("process numbers are positive i32"),
        );
        // The master ends its processes.
        let _ = killpg(group, Signal::SIGTERM);
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            if matches!(self.master.try_wait(), Ok(Some(_))) {
                return;
            }
            thread::sleep(Duration::from_millis(50));
        }
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.master.wait();
    }
}

fn settings(root: &Path, queue: &Path, data: &Path, thinks: Duration) -> String {
    let [root, queue, data] = [root, queue, data].map(|path| path.display().to_string());
    let thinks = thinks.as_secs();
    format!(
        "compatibility_level = 3.7\n\
         queue_directory = {queue}\n\
         data_directory = {data}\n\
         maillog_file = {root}/log\n\
         maillog_file_prefixes = {root}\n\
         myhostname = mx.example.net\n\
         mydestination =\n\
         relay_domains = example.net\n\
         default_transport = discard:\n\
         relay_transport = discard:\n\
         local_transport = discard:\n\
         local_recipient_maps =\n\
         alias_maps =\n\
         alias_database =\n\
         inet_interfaces = all\n\
         inet_protocols = all\n\
         mynetworks = 0.0.0.0/0, [::]/0\n\
         smtpd_relay_restrictions = permit_mynetworks, reject\n\
         smtpd_recipient_restrictions = permit_mynetworks, reject_unauth_destination\n\
         smtpd_end_of_data_restrictions = sleep {thinks}\n\
         smtpd_peername_lookup = no\n\
         smtpd_client_connection_count_limit = 0\n\
         smtpd_client_connection_rate_limit = 0\n\
         smtpd_timeout = 300s\n\
         default_process_limit = 3000\n"
    )
}
