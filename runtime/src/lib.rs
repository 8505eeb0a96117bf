//! What Landfall's daemons share.
#![forbid(unsafe_code)]

pub mod source;
