//! A gateway on the wire: pods of another node, and its own, leave by addresses that are not theirs.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

mod gateway {
    mod bandwidth;
    mod budget;
    mod bytes;
    mod cilium;
    mod flows;
    mod lifecycle;
    mod ports;
    mod routers;
    #[path = "../egress/stand_in.rs"]
    #[allow(dead_code, reason = "the scenarios of the node use the rest")]
    mod stand_in;
    mod standby;
    mod takeover;
    mod tunnel;
    mod world;
}
