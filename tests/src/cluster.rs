//! A lab with a control plane, kube-proxies, the chart's CRDs and RBAC, and Landfall's real binaries.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use kube::{Api, Client};
use landfall_api::VirtualIP;
use landfall_core::ip::virtual_ip_name;
use landfall_lab::{Lab, Program, Topology, fault::SPEAKER};

use crate::{ControlPlane, ProxyMode, chart, control_plane, objects};

/// The cluster. Dropping it ends all of it.
pub struct Cluster {
    plane: ControlPlane,
    kubeconfigs: Kubeconfigs,
    gossip_key: PathBuf,
}

struct Kubeconfigs {
    controller: PathBuf,
    speaker: PathBuf,
}

impl Cluster {
    /// Builds the lab, starts the control plane, installs the chart, reports nodes and pods, starts kube-proxy on
    /// each node, in nftables mode. Landfall's own processes do not run yet. Not to be called from async code.
    pub fn build(topology: Topology) -> anyhow::Result<Self> {
        let cluster = Self::build_without_kube_proxy(topology)?;
        cluster.start_kube_proxies(ProxyMode::Nftables)?;
        Ok(cluster)
    }

    /// Starts kube-proxy on each node in a mode, in place of one that runs.
    pub fn start_kube_proxies(&self, mode: ProxyMode) -> anyhow::Result<()> {
        let mut nodes = self.lab().nodes().iter();
        nodes.try_for_each(|node| self.plane.start_kube_proxy(&node.name, mode))
    }

    /// The same, but VIPs are not delivered.
    pub fn build_without_kube_proxy(topology: Topology) -> anyhow::Result<Self> {
        let lab = Arc::new(Lab::build(topology)?);
        lab.serve_pods()?;
        let plane = ControlPlane::start(&lab)?;
        chart::install(&plane, &[])?;
        let kubeconfigs = Kubeconfigs {
            controller: chart::kubeconfig(&plane, "controller")?,
            speaker: chart::kubeconfig(&plane, "speaker")?,
        };
        plane.block_on(async {
            let client = plane.client().await?;
            objects::create_nodes(&client, &lab).await?;
            objects::create_pods(&client, &lab).await?;
            anyhow::Ok(())
        })?;
        let gossip_key = lab.directory().join("gossip.key");
        let cluster = Self {
            plane,
            kubeconfigs,
            gossip_key,
        };
        cluster.write_gossip_keys(&[1])?;
        Ok(cluster)
    }

    /// Builds a cluster and does something with it; panics if that fails, while the cluster is still there, so
    /// that its logs are kept.
    pub fn run(topology: Topology, work: impl FnOnce(&Self) -> anyhow::Result<()>) {
        let cluster = match Self::build(topology) {
            Ok(cluster) => cluster,
            Err(error) => panic!("building the cluster: {error:#}"),
        };
        if let Err(error) = work(&cluster) {
            panic!("{error:#}");
        }
    }

    /// Starts the controller and all speakers.
    pub fn start_landfall(&self) -> anyhow::Result<()> {
        self.start_controller("controller", &[])?;
        for node in self.lab().nodes() {
            self.start_speaker(&node.name, &[])?;
        }
        Ok(())
    }

    /// The lab.
    pub fn lab(&self) -> &Arc<Lab> {
        self.plane.lab()
    }

    /// The control plane.
    pub fn plane(&self) -> &ControlPlane {
        &self.plane
    }

    /// Runs async work to its end. Not to be called from async code.
    pub fn block_on<T>(&self, work: impl Future<Output = T>) -> T {
        self.plane.block_on(work)
    }

    /// An admin's client.
    pub async fn client(&self) -> anyhow::Result<Client> {
        self.plane.client().await
    }

    /// The `VirtualIP` of an address, if there is one.
    ///
    /// # Panics
    /// If the API server does not say.
    pub fn virtual_ip(&self, address: IpAddr) -> Option<VirtualIP> {
        let asked = self.block_on(async {
            let all: Api<VirtualIP> = Api::all(self.client().await?);
            anyhow::Ok(all.get_opt(&virtual_ip_name(address)).await?)
        });
        asked.expect("the API server is there")
    }

    /// Starts a controller beside the control plane, under a name (also its identity).
    pub fn start_controller(&self, name: &str, args: &[&str]) -> anyhow::Result<()> {
        let mut program = Program::landfall("landfall-controller")?
            .option("--kubeconfig", self.kubeconfigs.controller.display())
            .option("--namespace", chart::NAMESPACE)
            .option("--identity", name)
            .option("--admin-address", "127.0.0.1:0");
        for arg in args {
            program = program.arg(*arg);
        }
        Ok(self.lab().start(control_plane::HOST, name, &program)?)
    }

    /// The kubeconfig of speakers, with their rights.
    pub fn speaker_kubeconfig(&self) -> &Path {
        &self.kubeconfigs.speaker
    }

    /// Starts a node's speaker.
    pub fn start_speaker(&self, node: &str, args: &[&str]) -> anyhow::Result<()> {
        let mut program = Program::landfall("landfall-speaker")?
            .option("--kubeconfig", self.kubeconfigs.speaker.display())
            .option("--node-name", node)
            .option("--namespace", chart::NAMESPACE)
            .option("--gossip-key-file", self.gossip_key.display())
            .option(
                "--control-socket",
                self.lab().control_socket(node).display(),
            )
            .option(
                "--bpf-pin-dir",
                self.lab().mount_pins()?.join(node).display(),
            );
        for arg in args {
            program = program.arg(*arg);
        }
        Ok(self.lab().start(node, SPEAKER, &program)?)
    }

    /// Writes the gossip key file that all speakers read: keys made of these bytes, the first is used to send.
    pub fn write_gossip_keys(&self, keys: &[u8]) -> anyhow::Result<()> {
        let text: String = keys
            .iter()
            .map(|byte| STANDARD.encode([*byte; 32]) + "\n")
            .collect();
        // Replaced in one step: a speaker must never read half of it.
        let new = self.gossip_key.with_extension("new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.gossip_key).context("replacing the gossip key")
    }
}
