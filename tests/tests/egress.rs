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
use plane::{Scenario, scenarios};

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
    Env::play(scenarios, &async |env: &Env| {
        env.clear().await;
        env.clear_pods().await;
    });
}
