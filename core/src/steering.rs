//! Which node a flow belongs to: tables from buckets to nodes, equal on all nodes from equal inputs.
//!
//! A flow's hash names a bucket; a [`Table`] names the bucket's first and second node. Both are chosen by weighted
//! rendezvous hashing: each node draws a number for the bucket, scaled by its weight (its servable endpoints), and
//! the lowest wins. So the loss of a node moves its buckets only, each to the node that was second there; a new node
//! takes about its share and disturbs nothing else; and a node's death can be looked past without a new table.
//!
//! A table belongs to a distribution of endpoints over nodes, not to a Service: [`Tables`] shares one between all
//! Services whose endpoints are spread alike.

mod draw;
mod shared;
mod table;
#[cfg(test)]
mod tests;

pub use shared::{TableId, Tables};
pub use table::{BUCKETS, Pair, Table};

/// What the choices are made of. Nodes whose versions differ use the highest that all understand.
///
/// Version 1: [`BUCKETS`] buckets; a node's draw for a bucket is xxh64 of the bucket's number (four bytes, big
/// endian) with the xxh64 of the node's name (seed 0) as seed; the draw `h` costs `-log2((h | 1) / 2^64)` in 32.32
/// fixed point, divided by the node's weight; of equal costs the name that sorts first wins.
pub const ALGORITHM: u16 = 1;
