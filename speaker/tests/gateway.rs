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
    mod segments;
    mod standby;
    mod takeover;
    mod tunnel;
    mod world;
}
