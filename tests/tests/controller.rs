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
use plane::{Scenario, scenarios};

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
    Env::play(scenarios, &Env::clear);
}
