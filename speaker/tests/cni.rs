//! The CNI plugin with real speakers: CNI's own plugins run by libcni (`cnitool`), pods that send at once, and a tap at the
//! switch that sees each frame of their node.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

mod cni {
    mod closed;
    mod cluster;
    #[path = "../egress/flow.rs"]
    #[allow(dead_code, reason = "the scenarios of the node use the rest")]
    mod flow;
    mod gates;
    #[path = "../egress/cni.rs"]
    #[allow(dead_code, reason = "the scenarios of the node use the rest")]
    mod masquerade;
    mod moved;
    mod pods;
    mod reused;
    mod soon;
    #[path = "../egress/wire.rs"]
    #[allow(dead_code, reason = "the scenarios of the node use the rest")]
    mod wire;
}
