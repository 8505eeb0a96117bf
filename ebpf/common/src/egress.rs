//! Pods that leave by an address of their own: their nodes' guard, and their gateway, where each flow leaves by a binding.

pub mod binding;
pub mod copies;
pub mod gateway;
pub mod guard;
pub mod judge;
pub mod pace;
pub mod ports;
pub mod shadow;
