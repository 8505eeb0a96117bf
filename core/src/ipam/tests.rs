//! Table tests of the rules, against a stand-in for the API server that writes what the index asks for.

mod drains;
mod egress;
mod families;
mod lifecycle;
mod pools;
mod refusals;
pub(super) mod world;
