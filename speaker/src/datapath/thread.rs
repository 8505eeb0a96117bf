//! The data path's threads.

use std::thread::{Builder, JoinHandle};

use nix::sys::signal::SigSet;

/// Starts one. It is never the one that a signal of this process interrupts: the kernel's verifier gives up with
/// `EAGAIN` on a thread where one is pending (Linux c3494801cd17), and that of an ended child comes often and anywhere.
pub(super) fn start(name: &str, work: impl FnOnce() + Send + 'static) -> JoinHandle<()> {
    Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            SigSet::all()
                .thread_block()
                .expect("the set is one that the kernel knows");
            work();
        })
        .expect("the system has a thread to spare")
}

#[cfg(test)]
mod tests {
    use std::os::unix::thread::JoinHandleExt;
    use std::time::{Duration, Instant};

    use landfall_ebpf_common::{GATEWAY_EGRESS, GATEWAY_INGRESS};
    use nix::sys::pthread::pthread_kill;
    use nix::sys::signal::Signal;
    use tokio::signal::unix::{SignalKind, signal};

    use super::*;
    use crate::datapath::uplink::{classifier, object};

    #[test]
    fn signals_do_not_keep_a_program_from_its_load() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let _entered = runtime.enter();
        // Handled: one that is ignored is never pending.
        let _handled = signal(SignalKind::user_defined1()).unwrap();
        let begun = Instant::now();
        let loading = start("loading", || {
            let mut ebpf = object(None).expect("these tests load eBPF programs and need root");
            for name in [GATEWAY_INGRESS, GATEWAY_EGRESS] {
                let program = classifier(&mut ebpf, name).unwrap();
                program.load().expect("the verifier is not interrupted");
            }
        });
        let mut sent = 0;
        while !loading.is_finished() && begun.elapsed() < Duration::from_secs(60) {
            pthread_kill(loading.as_pthread_t(), Signal::SIGUSR1).unwrap();
            sent += 1;
            std::thread::sleep(Duration::from_millis(1));
        }
        loading.join().expect("it loads");
        assert!(sent > 10, "{sent}: it was over too soon to be interrupted");
    }
}
