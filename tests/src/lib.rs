//! What the end-to-end tests stand on: a real control plane and Landfall's real binaries, in a lab's namespaces.
//!
//! ```text
//!  test (any runtime) ──127.0.0.1:port──┐ forwarder
//!                                       ▼
//!  management network 10.99.0.250  [etcd, kube-apiserver, kube-controller-manager, landfall-controller]
//!                 │
//!                 ├── node1  [kube-proxy, landfall-speaker]  pods
//!                 └── node2  …
//! ```
//!
//! - [`ControlPlane`]: etcd, API server and controller manager as processes; clients and kubeconfigs for it.
//! - [`chart`]: the CRDs and the RBAC that Helm renders, and kubeconfigs for its `ServiceAccount`s.
//! - [`objects`]: Nodes and Pods as a kubelet would report them, and the tests' Services.
//! - [`Cluster`]: all of it with the real speakers and controller.
//! - [`slices`]: `EndpointSlice`s by the test's own hand.
//! - [`client`]: asks VIPs as a client does.
//! - [`flows`]: established flows that are asked again and again.
//! - [`tables`]: what the speakers have told their data paths, and what those did.
//! - [`mta`]: a mail server outside.
//! - [`tenants`]: pods that leave by addresses of their own.
//! - [`usage`]: what a process costs.
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use landfall_lab::{Lab, Program, Topology};
//! use landfall_tests::{CONTROL_HOST, ControlPlane, chart};
//!
//! # fn main() -> anyhow::Result<()> {
//! // A control plane alone, for tests of the controller:
//! let lab = Arc::new(Lab::build(Topology { nodes: 1, pods_per_node: 0, ..Topology::default() })?);
//! let plane = ControlPlane::start(&lab)?;
//! chart::install(&plane, &[])?;
//! let kubeconfig = chart::kubeconfig(&plane, "controller")?;
//! let controller = Program::landfall("landfall-controller")?.option("--kubeconfig", kubeconfig.display());
//! lab.start(CONTROL_HOST, "controller", &controller)?;
//! plane.block_on(async { plane.client().await?.apiserver_version().await.map_err(anyhow::Error::from) })?;
//! # Ok(())
//! # }
//! ```
//!
//! Everything lives in the lab and goes with it. What the processes printed is kept under
//! `target/e2e-results` when a test panics.

mod binaries;
pub mod chart;
pub mod client;
mod cluster;
mod control_plane;
pub mod flows;
mod forward;
pub mod mta;
pub mod objects;
mod pki;
pub mod slices;
pub mod tables;
pub mod tenants;
pub mod usage;

pub use cluster::Cluster;
pub use control_plane::{ControlPlane, HOST as CONTROL_HOST, ProxyMode};

use std::fmt::Debug;
use std::future::Future;
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take on a busy machine before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Looks every 50 ms until there is something to see, or panics after [`PATIENCE`] with what was awaited and what there is
/// instead. The twin of [`eventually`] for blocking code.
pub fn until<T, E: Debug>(what: &str, look: impl FnMut() -> Result<T, E>) -> T {
    until_within(PATIENCE, what, look)
}

/// The same of what is there or not.
pub fn until_some<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    until(what, || look().ok_or("nothing yet"))
}

/// The same, with more patience, or less.
pub fn until_within<T, E: Debug>(
    patience: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<T, E>,
) -> T {
    let begun = Instant::now();
    loop {
        let instead = match look() {
            Ok(seen) => return seen,
            Err(instead) => instead,
        };
        assert!(
            begun.elapsed() < patience,
            "still waiting for {what} after {patience:?}: {instead:?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}

/// Looks every 20 ms until there is something to see, or panics after [`PATIENCE`] with what was awaited.
pub async fn eventually<T, F: Future<Output = Option<T>>>(
    what: &str,
    mut look: impl FnMut() -> F,
) -> T {
    let begun = Instant::now();
    loop {
        if let Some(seen) = look().await {
            return seen;
        }
        assert!(
            begun.elapsed() < PATIENCE,
            "still waiting for {what} after {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
