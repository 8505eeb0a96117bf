//! The program by `BPF_PROG_TEST_RUN`, and the whole data path in network namespaces. They need root.

#[cfg(feature = "bench")]
mod cost;
mod driver;
mod gateway;
mod golden;
mod guard;
mod lifecycle;
mod others;
mod packets;
mod qdisc;
