//! The control plane of the scenarios, and controllers that run beside it.

use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use futures::FutureExt as _;
use futures::future::LocalBoxFuture;
use kube::Client;
use landfall_lab::{Lab, Program, Topology};
use landfall_tests::{CONTROL_HOST, ControlPlane, PATIENCE, chart};
use nix::sys::signal::Signal;

/// A control plane and an admin's client for it.
pub(crate) struct Env {
    pub(crate) client: Client,
    lab: Arc<Lab>,
    kubeconfig: PathBuf,
    started: AtomicUsize,
}

/// A running controller; killed when dropped.
pub(crate) struct Controller {
    lab: Arc<Lab>,
    name: String,
}

impl Controller {
    /// SIGKILL.
    pub(crate) fn kill(self) {
        drop(self);
    }

    /// SIGTERM, and waits until it is gone.
    pub(crate) fn terminate(self) {
        self.lab
            .signal(CONTROL_HOST, &self.name, Signal::SIGTERM)
            .unwrap();
        self.lab.wait(CONTROL_HOST, &self.name, PATIENCE).unwrap();
    }
}

/// A scenario by name.
pub(crate) type Scenario = (&'static str, fn(&Env) -> LocalBoxFuture<'_, ()>);

macro_rules! scenarios {
    ($($path:path),* $(,)?) => {
        vec![$((stringify!($path), |env: &$crate::plane::Env| Box::pin($path(env)))),*]
    };
}
pub(crate) use scenarios;

impl Drop for Controller {
    fn drop(&mut self) {
        self.lab.stop(CONTROL_HOST, &self.name);
    }
}

impl Env {
    /// Starts a control plane with the chart's CRDs and RBAC, and does `work` with it.
    pub(crate) fn run<F: Future<Output = ()>>(work: impl FnOnce(Self) -> F) {
        let topology = Topology {
            nodes: 1,
            pods_per_node: 0,
            ..Topology::default()
        };
        let lab = Arc::new(Lab::build(topology).unwrap());
        let plane = ControlPlane::start(&lab).unwrap();
        chart::install(&plane, &[]).unwrap();
        let kubeconfig = chart::kubeconfig(&plane, "controller").unwrap();
        plane.block_on(async {
            let client = plane.client().await.unwrap();
            work(Self {
                client,
                lab: lab.clone(),
                kubeconfig,
                started: AtomicUsize::new(0),
            })
            .await;
        });
    }

    /// Runs scenarios, one after the other on one control plane; `before` each. `LANDFALL_SCENARIO` selects.
    pub(crate) fn play(scenarios: Vec<Scenario>, before: &impl AsyncFn(&Self)) {
        let only = std::env::var("LANDFALL_SCENARIO").unwrap_or_default();
        Self::run(async |env| {
            let mut failed = Vec::new();
            for (name, scenario) in scenarios {
                if !name.contains(&only) {
                    continue;
                }
                before(&env).await;
                let begun = Instant::now();
                let run = AssertUnwindSafe(scenario(&env));
                let result = run.catch_unwind().await;
                let word = if result.is_ok() { "ok    " } else { "FAILED" };
                println!("{word} {name} ({:.1} s)", begun.elapsed().as_secs_f32());
                if result.is_err() {
                    failed.push(name);
                }
            }
            assert!(failed.is_empty(), "failed: {failed:?}");
        });
    }

    /// Starts a controller with its `ServiceAccount`'s kubeconfig and short Lease times.
    pub(crate) fn controller(&self, args: &[&str]) -> Controller {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let name = format!("controller-{number}");
        let mut program = Program::landfall("landfall-controller")
            .unwrap()
            .option("--kubeconfig", self.kubeconfig.display())
            .option("--namespace", chart::NAMESPACE)
            .option("--admin-address", "127.0.0.1:0")
            .option("--lease-duration", 3)
            .option("--lease-renew-deadline", 2)
            .option("--lease-retry-period", 1);
        for arg in args {
            program = program.arg(*arg);
        }
        self.lab.start(CONTROL_HOST, &name, &program).unwrap();
        Controller {
            lab: self.lab.clone(),
            name,
        }
    }
}
