//! What a process has used of the machine, from `/proc`.

use std::fs;

use anyhow::Context as _;

/// What one process has used so far.
#[derive(Clone, Copy, Debug)]
pub struct Usage {
    /// Seconds of CPU time, in user and kernel mode.
    pub cpu: f64,
    /// Resident memory in MiB.
    pub rss: f64,
    /// The most it ever was.
    pub peak_rss: f64,
}

impl Usage {
    /// Of the process with this id.
    pub fn of(pid: i32) -> anyhow::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // Behind the name in parentheses: state is field 3, utime 14, stime 15, in ticks of 10 ms.
        let fields: Vec<&str> = stat
            .rsplit(") ")
            .next()
            .unwrap_or_default()
            .split(' ')
            .collect();
        let ticks = |index: usize| {
            fields
                .get(index)
                .and_then(|text| text.parse::<f64>().ok())
                .with_context(|| format!("/proc/{pid}/stat has too few fields"))
        };
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        Ok(Self {
            cpu: (ticks(11)? + ticks(12)?) / 100.0,
            rss: value(&status, "VmRSS:").unwrap_or(0.0) / 1024.0,
            peak_rss: value(&status, "VmHWM:").unwrap_or(0.0) / 1024.0,
        })
    }
}

/// The first number behind `name` at the beginning of a line, as in `/proc/*/status` and in metrics.
pub fn value(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| {
        line.strip_prefix(name)?
            .split_whitespace()
            .next()?
            .parse()
            .ok()
    })
}
