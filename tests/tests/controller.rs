//! The controller, as a process with its own `ServiceAccount`, against a real API server.
//!
//! One control plane serves all scenarios, one after the other; each begins without Services and pools and with
//! a controller of its own.

#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

#[path = "controller/env.rs"]
mod env;
#[path = "controller/lifecycle.rs"]
mod lifecycle;
#[path = "controller/plane.rs"]
mod plane;
#[path = "controller/rules.rs"]
mod rules;

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
fn controller() {
    let scenarios: Vec<Scenario> = scenarios![
        rules::families,
        rules::prefer_dual_stack_goes_up_and_down,
        rules::sharing,
        rules::explicit_requests,
        rules::tenancy,
        rules::priorities,
        rules::classes,
        rules::foreign_ingress,
        rules::pool_edits,
        rules::retained,
        rules::overlaps,
        rules::malformed,
        rules::unreadable,
        lifecycle::quarantine,
        lifecycle::type_change,
        lifecycle::killed_in_a_burst,
        lifecycle::two_replicas,
        lifecycle::announced_is_mirrored,
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
