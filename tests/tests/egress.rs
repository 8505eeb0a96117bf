//! Egress policies: what they are given, whose pods are theirs, who is their gateway. `LANDFALL_SCENARIO` selects.
//!
//! Packets of pods are not looked at here.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "egress/addresses.rs"]
mod addresses;
#[path = "controller/env.rs"]
#[allow(dead_code, reason = "the controller's own scenarios use the rest")]
mod env;
#[path = "egress/gateways.rs"]
mod gateways;
#[path = "egress/objects.rs"]
mod objects;
#[path = "controller/plane.rs"]
#[allow(dead_code, reason = "the controller's own scenarios use the rest")]
mod plane;
#[path = "egress/pods.rs"]
mod pods;
#[path = "egress/reports.rs"]
mod reports;

use env::Env;

/// A scenario by name.
type Scenario = (
    &'static str,
    fn(&Env) -> futures::future::LocalBoxFuture<'_, ()>,
);

macro_rules! scenarios {
    ($($path:path),* $(,)?) => {
        vec![$((stringify!($path), |env: &Env| Box::pin($path(env)))),*]
    };
}

#[test]
fn policies() {
    let scenarios: Vec<Scenario> = scenarios![
        addresses::of_a_pool,
        addresses::by_number,
        addresses::what_pools_are_for,
        addresses::of_a_service,
        addresses::rest,
        reports::of_the_leader,
        pods::counted,
        pods::overlap,
        pods::tenancy,
        pods::of_a_services_namespace,
        pods::churn,
        reports::without_the_kind,
    ];
    let only = std::env::var("LANDFALL_SCENARIO").ok();
    Env::run(move |env| async move {
        let mut failed = Vec::new();
        for (name, scenario) in scenarios {
            if only
                .as_ref()
                .is_some_and(|only| !name.contains(only.as_str()))
            {
                continue;
            }
            env.clear().await;
            env.clear_pods().await;
            let begun = std::time::Instant::now();
            let run = std::panic::AssertUnwindSafe(scenario(&env));
            let result = futures::FutureExt::catch_unwind(run).await;
            let took = begun.elapsed().as_secs_f32();
            println!(
                "{} {name} ({took:.1} s)",
                if result.is_ok() { "ok    " } else { "FAILED" }
            );
            if result.is_err() {
                failed.push(name);
            }
        }
        assert!(failed.is_empty(), "failed: {failed:?}");
    });
}
