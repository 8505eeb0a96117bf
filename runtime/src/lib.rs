//! What Landfall's daemons share: sources of objects, admin endpoints, the control socket, logging, signals and flags.
#![forbid(unsafe_code)]

pub mod admin;
pub mod args;
pub mod control;
pub mod project;
pub mod shutdown;
pub mod source;
pub mod telemetry;
