//! Pods that leave by addresses of their own, seen from their node: the packet filter, the routes and the guard, with a
//! plain router for a gateway.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

mod egress {
    mod answers;
    mod change;
    mod cilium;
    mod closed;
    mod cni;
    mod disturbed;
    mod flow;
    mod lifecycle;
    mod masquerade;
    mod node;
    mod stand_in;
    mod strict;
    mod two_nics;
    mod wire;
}
