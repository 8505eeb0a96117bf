//! A chained CNI plugin (CNI specification 1.1), and what it says to the speaker.
//!
//! ```text
//!  kubelet ─> container runtime ─> the CNI's plugin ─prevResult─> landfall-cni ─> result, unchanged
//!                                                        socket: Request │ ^ Reply
//!                                                                        v │
//!                                                                     speaker
//! ```
//! While a policy exists, a node drops what leaves it from sources that its speaker has not judged. A pod is judged
//! when the API server has told of it: a second, or less. The plugin tells before the pod runs, and waits until it is
//! so, for half a second at most. If no speaker says so, it sees to it that the table which drops the unknown is there, as
//! it is not when the node has just started ([`boot`]). It never fails a pod: whatever goes wrong is said on the standard
//! error, and the result of the plugins before it is handed on as it came.
#![forbid(unsafe_code)]

pub mod boot;
pub mod bridge;
pub mod call;
pub mod chain;
pub mod config;
pub mod error;
pub mod plugin;
