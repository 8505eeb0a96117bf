//! What clients see of a fault.
//!
//! Each probe runs on threads of its own in a client's namespace, from its start to its `stop`:
//! - [`datagrams`]: one UDP datagram every 2 ms, open loop: the outage, and what was lost;
//! - [`stream`]: an established request/response TCP flow: its longest stall;
//! - [`connects`]: new connections: the worst `connect()`;
//! - [`requests`]: a new connection for each request: who answered, and which failed;
//! - [`census`]: many established flows: how many are alive, reset or stalled afterwards;
//! - [`neighbours`]: who answers ARP or ND for an address.

pub mod census;
pub mod connects;
pub mod datagrams;
pub mod neighbours;
pub mod requests;
pub mod stream;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::netns::Netns;

/// A thread in a namespace that works until it is told to stop, and then yields what it found.
#[derive(Debug)]
pub(crate) struct Worker<T> {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<T>>,
}

/// Tells a worker whether to stop.
#[derive(Clone, Debug)]
pub(crate) struct Stop(Arc<AtomicBool>);

impl Stop {
    pub(crate) fn asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl<T: Send + 'static> Worker<T> {
    /// Starts `work` inside `netns`.
    pub(crate) fn start(
        netns: &Netns,
        name: &str,
        work: impl FnOnce(&Stop) -> T + Send + 'static,
    ) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Stop(Arc::clone(&stop));
        let thread = netns.spawn(name, move || work(&stopped));
        Self {
            stop,
            thread: Some(thread),
        }
    }

    /// Starts async work inside `netns`, on a single-threaded runtime.
    pub(crate) fn start_async<F: Future<Output = T>>(
        netns: &Netns,
        name: &str,
        work: impl FnOnce(Stop) -> F + Send + 'static,
    ) -> Self {
        Self::start(netns, name, move |stop| {
            tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime needs but a few descriptors")
                .block_on(work(stop.clone()))
        })
    }

    /// Asks it to stop; what it found.
    pub(crate) fn stop(mut self) -> T {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().expect("a worker is stopped once");
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
