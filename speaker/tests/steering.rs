//! Steering on real nodes: established flows stay with their pods while everything around them changes.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

mod steering {
    mod ages;
    mod bystanders;
    mod bytes;
    mod clients;
    mod cluster;
    mod datagrams;
    mod direct;
    mod flood;
    mod flow;
    mod fragments;
    mod hops;
    mod own_clients;
    mod path_mtu;
    mod pod_links;
    mod policy;
    mod rollout;
    mod source_ranges;
    mod strays;
    mod survival;
    mod tunnel;
    mod weights;
}
