//! Pods that leave by an address of their own.

pub mod guard;
