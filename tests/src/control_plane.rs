//! etcd, kube-apiserver and kube-controller-manager on a host of the lab's management network, and kube-proxy on
//! its nodes.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use landfall_lab::{Lab, Netns, Network};

use crate::binaries::{Binaries, workspace};
use crate::forward::Forward;
use crate::pki::{self, Authority, Proof};

/// The host that the control plane runs on, and its number on the management network.
pub const HOST: &str = "control";
const HOST_NUMBER: u8 = 250;
const PORT: u16 = 6443;

/// The cluster's Service addresses.
const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:96::/112";
/// The nodes' pod addresses together.
const POD_CIDRS: &str = "10.244.0.0/16,fd00:244::/32";

/// What the controller manager does: no cloud, no node lifecycle (tests say how nodes are), no scheduler.
const CONTROLLERS: &str = "endpointslice-controller,endpointslice-mirroring-controller,\
    garbage-collector-controller,namespace-controller,serviceaccount-controller";

/// How long a component may take to be ready.
const START: Duration = Duration::from_secs(60);

/// How kube-proxy makes its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyMode {
    /// By nftables.
    Nftables,
    /// By iptables, whichever of its backends is installed.
    Iptables,
}

impl ProxyMode {
    fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// A running control plane. Its processes are the lab's and end with it.
pub struct ControlPlane {
    lab: Arc<Lab>,
    netns: Arc<Netns>,
    directory: PathBuf,
    authority: Authority,
    binaries: Binaries,
    forward: Forward,
}

impl ControlPlane {
    /// Starts it and waits until it is ready. Not to be called from async code.
    pub fn start(lab: &Arc<Lab>) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let binaries = Binaries::find()?;
        let netns = lab.management_host(HOST, HOST_NUMBER)?;
        let directory = lab.directory().join("control-plane");
        fs::create_dir_all(&directory)?;
        let forward = Forward::start(&netns, Self::address())?;
        let plane = Self {
            lab: Arc::clone(lab),
            netns,
            directory,
            authority: Authority::new()?,
            binaries,
            forward,
        };
        plane.write_credentials(Self::address().ip())?;
        plane.start_etcd()?;
        plane.start_api_server()?;
        plane.block_on(plane.ready())?;
        plane.start_controller_manager()?;
        println!(
            "control plane ready after {:.1} s",
            begun.elapsed().as_secs_f64()
        );
        Ok(plane)
    }

    /// The lab it runs in.
    pub fn lab(&self) -> &Arc<Lab> {
        &self.lab
    }

    /// The namespace it runs in, on the management network.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// A kubeconfig of an admin, for clients outside the lab.
    pub fn kubeconfig(&self) -> PathBuf {
        self.directory.join("admin.kubeconfig")
    }

    /// An admin's client, usable on any runtime.
    pub async fn client(&self) -> anyhow::Result<Client> {
        client(&self.kubeconfig()).await
    }

    /// `kubectl` as an admin.
    pub fn kubectl(&self) -> std::process::Command {
        let mut command = self.binaries.command("kubectl");
        command
            .arg("--kubeconfig")
            .arg(self.kubeconfig())
            // Its discovery cache would otherwise go to the home directory.
            .arg("--cache-dir")
            .arg(self.directory.join("kubectl-cache"));
        command
    }

    pub(crate) fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Writes a kubeconfig with a token, for processes inside the lab.
    pub(crate) fn write_token_kubeconfig(
        &self,
        name: &str,
        token: &str,
    ) -> anyhow::Result<PathBuf> {
        let path = self.directory.join(format!("{name}.kubeconfig"));
        pki::write_kubeconfig(
            &path,
            &Self::server(),
            self.authority.certificate(),
            &Proof::Token(token),
        )?;
        Ok(path)
    }

    /// Kills the API server and etcd: nobody reaches the API until [`ControlPlane::start_api`].
    pub fn stop_api(&self) {
        self.lab.stop(HOST, "kube-apiserver");
        self.lab.stop(HOST, "etcd");
    }

    /// Starts them again, with all they knew, and waits until they are ready. Not to be called from async code.
    pub fn start_api(&self) -> anyhow::Result<()> {
        self.start_etcd()?;
        self.start_api_server()?;
        self.block_on(self.ready())
    }

    /// Starts kube-proxy on a node; one that runs there is killed, and what another mode has left is cleaned up.
    pub fn start_kube_proxy(&self, node: &str, mode: ProxyMode) -> anyhow::Result<()> {
        let program = self
            .binaries
            .component("kube-proxy")
            .option("--kubeconfig", self.path("kube-proxy.kubeconfig"))
            .option("--hostname-override", node)
            .option("--proxy-mode", mode.name())
            .option("--cluster-cidr", POD_CIDRS)
            .option("--bind-address", "0.0.0.0")
            .option("--healthz-bind-address", "127.0.0.1:10256")
            .option("--metrics-bind-address", "127.0.0.1:10249")
            // These parameters are the machine's, and not to be touched by tests.
            .option("--conntrack-max-per-core", 0)
            .option("--conntrack-tcp-timeout-established", "0s")
            .option("--conntrack-tcp-timeout-close-wait", "0s");
        Ok(self.lab.start(node, "kube-proxy", &program)?)
    }

    fn path(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    /// Where the API server listens inside the lab.
    pub fn address() -> SocketAddr {
        (Network::Management.v4(HOST_NUMBER), PORT).into()
    }

    /// The API server's URL inside the lab.
    fn server() -> String {
        format!("https://{}", Self::address())
    }

    fn write_credentials(&self, address: IpAddr) -> anyhow::Result<()> {
        let loopback = IpAddr::from(Ipv4Addr::LOCALHOST);
        let service = IpAddr::from(Ipv4Addr::new(10, 96, 0, 1));
        let server = self.authority.server(
            &["localhost", "kubernetes", "kubernetes.default.svc"],
            &[address, loopback, service],
        )?;
        let (signing_key, public_key) = pki::signing_key()?;
        for (file, text) in [
            ("ca.pem", self.authority.certificate()),
            ("server.pem", &server.certificate),
            ("server.key", &server.key),
            ("service-accounts.key", &signing_key),
            ("service-accounts.pub", &public_key),
        ] {
            fs::write(self.path(file), text)?;
        }
        let admin = self.authority.user("admin", Some("system:masters"))?;
        let proxy = self.authority.user("system:kube-proxy", None)?;
        let outside = format!("https://{}", self.forward.address());
        for (file, server, identity) in [
            ("admin.kubeconfig", &outside, &admin),
            ("manager.kubeconfig", &Self::server(), &admin),
            ("kube-proxy.kubeconfig", &Self::server(), &proxy),
        ] {
            pki::write_kubeconfig(
                Path::new(&self.path(file)),
                server,
                self.authority.certificate(),
                &Proof::Certificate(identity),
            )?;
        }
        Ok(())
    }

    fn start_etcd(&self) -> anyhow::Result<()> {
        let program = self
            .binaries
            .component("etcd")
            .option("--data-dir", self.path("etcd"))
            // Its data need not survive the machine.
            .arg("--unsafe-no-fsync=true")
            .option("--listen-client-urls", "http://127.0.0.1:2379")
            .option("--advertise-client-urls", "http://127.0.0.1:2379")
            .option("--listen-peer-urls", "http://127.0.0.1:2380")
            .option("--initial-advertise-peer-urls", "http://127.0.0.1:2380")
            .option("--initial-cluster", "default=http://127.0.0.1:2380")
            .option("--log-level", "warn");
        Ok(self.lab.start(HOST, "etcd", &program)?)
    }

    fn start_api_server(&self) -> anyhow::Result<()> {
        let program = self
            .binaries
            .component("kube-apiserver")
            .option("--etcd-servers", "http://127.0.0.1:2379")
            .option("--bind-address", "0.0.0.0")
            .option("--secure-port", PORT)
            .option("--advertise-address", Network::Management.v4(HOST_NUMBER))
            .option("--service-cluster-ip-range", SERVICE_CIDRS)
            .option("--authorization-mode", "RBAC")
            // Pods of tests run as nobody in particular.
            .option("--disable-admission-plugins", "ServiceAccount")
            .option("--tls-cert-file", self.path("server.pem"))
            .option("--tls-private-key-file", self.path("server.key"))
            .option("--client-ca-file", self.path("ca.pem"))
            .option("--service-account-issuer", "https://kubernetes.default.svc")
            .option(
                "--service-account-key-file",
                self.path("service-accounts.pub"),
            )
            .option(
                "--service-account-signing-key-file",
                self.path("service-accounts.key"),
            )
            .option("--cert-dir", self.path("run"))
            .arg("--allow-privileged=true")
            .arg("--profiling=false");
        Ok(self.lab.start(HOST, "kube-apiserver", &program)?)
    }

    fn start_controller_manager(&self) -> anyhow::Result<()> {
        let program = self
            .binaries
            .component("kube-controller-manager")
            .option("--kubeconfig", self.path("manager.kubeconfig"))
            .option("--controllers", CONTROLLERS)
            .arg("--leader-elect=false")
            .option("--bind-address", "127.0.0.1")
            .option("--cert-dir", self.path("run"))
            // The defaults of 20 and 30 would throttle what tests create at once.
            .option("--kube-api-qps", 500)
            .option("--kube-api-burst", 1000)
            .option("--concurrent-service-endpoint-syncs", 20);
        Ok(self.lab.start(HOST, "kube-controller-manager", &program)?)
    }

    /// Waits for the API server.
    async fn ready(&self) -> anyhow::Result<()> {
        let begun = Instant::now();
        loop {
            let client = self.client().await?;
            let request = http_get("/readyz");
            if let Ok(Ok(text)) =
                tokio::time::timeout(Duration::from_secs(2), client.request_text(request)).await
                && text == "ok"
            {
                return Ok(());
            }
            for name in ["etcd", "kube-apiserver"] {
                if !self.lab.runs(HOST, name) {
                    let log = self.lab.log(HOST, name).unwrap_or_default();
                    let tail: Vec<&str> = log.lines().rev().take(10).collect();
                    bail!("{name} has ended: {tail:#?}");
                }
            }
            if begun.elapsed() > START {
                bail!("the API server was not ready within {START:?}");
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Runs async work to its end. Not to be called from async code.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime needs but a few descriptors")
            .block_on(work)
    }
}

impl Drop for ControlPlane {
    /// Keeps what the processes of the lab printed if a test is failing.
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let results = workspace()
            .join("target/e2e-results")
            .join(self.lab.id().as_str());
        let logs = self.lab.directory().join("logs");
        let copied = fs::create_dir_all(&results).and_then(|()| {
            for entry in fs::read_dir(logs)?.flatten() {
                fs::copy(entry.path(), results.join(entry.file_name()))?;
            }
            Ok(())
        });
        match copied {
            Ok(()) => eprintln!("what the processes printed is in {}", results.display()),
            Err(error) => eprintln!("cannot keep what the processes printed: {error}"),
        }
    }
}

/// A client by a kubeconfig.
async fn client(path: &Path) -> anyhow::Result<Client> {
    let kubeconfig = Kubeconfig::read_from(path)?;
    let mut config =
        Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    config.connect_timeout = Some(Duration::from_secs(5));
    Client::try_from(config).context("making a client")
}

fn http_get(path: &str) -> http::Request<Vec<u8>> {
    http::Request::get(path)
        .body(Vec::new())
        .expect("the path is a literal")
}
