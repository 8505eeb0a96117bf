//! Landfall's speaker: elects by gossip who announces each virtual IP, and announces it.
//!
//! ```text
//!  runtime::source ──events──> core::groups ──┐
//!  membership (gossip) ──peers, claims────────┼──> core::election ──> desired state ─┬─> announcer  (ARP, ND)
//!  announcer (netlink, hellos) ──facts────────┘                                      ├─> node_rules (nftables, routes)
//!                                                                                    ├─> datapath   (eBPF)
//!                                                                                    └─> status     (VirtualIP, Events)
//! ```
//!
//! The seams are [`announcer::Announcer`], [`node_rules::NodeRules`], [`datapath::DataPath`] and
//! `membership::Membership`; each has an in-memory twin for the tests of the loop.
#![deny(unsafe_code)]

pub mod announcer;
pub mod args;
pub mod cni;
mod conntrack;
mod control;
pub mod datapath;
mod doctor;
pub mod egress;
pub mod elector;
pub mod hello;
pub mod keys;
pub mod manifests;
pub mod membership;
pub mod metrics;
mod netlink;
pub mod node_rules;
pub mod replication;
pub mod runtime;
pub mod status;
mod sys;
pub mod uninstall;
