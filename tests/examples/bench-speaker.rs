//! What a speaker costs when nothing happens: `make bench-speaker`.
//!
//! Three nodes share 1 000 VIPs of 1 000 Services from manifests; once all are announced, CPU and memory of each
//! speaker are read from `/proc` over an idle half minute. Prints a table and one JSON object on the last line.

use std::fmt::Write as _;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use landfall_lab::manifests::Manifests;
use landfall_lab::{Lab, Topology};
use landfall_tests::usage::{Usage, value};
use serde_json::json;

const VIPS: u32 = 1000;
const IDLE: Duration = Duration::from_secs(30);

fn main() -> anyhow::Result<()> {
    let lab = Lab::build(Topology::default())?;
    let manifests = Manifests::new(lab.manifests_dir());
    manifests.write_nodes(&lab)?;
    std::fs::write(lab.manifests_dir().join("services.yaml"), services()?)?;
    eprintln!("starting three speakers with {VIPS} VIPs …");
    let began = Instant::now();
    lab.start_speakers()?;
    let mut led = Vec::new();
    loop {
        led.clear();
        for node in lab.nodes() {
            let metrics = lab.speaker_metrics(&node.name).unwrap_or_default();
            led.push(value(&metrics, "landfall_led_groups ").unwrap_or(0.0));
        }
        if led.iter().sum::<f64>() >= f64::from(VIPS) {
            break;
        }
        ensure!(
            began.elapsed() < Duration::from_secs(120),
            "after two minutes the speakers lead {led:?} of {VIPS} VIPs"
        );
        thread::sleep(Duration::from_millis(200));
    }
    let all_led = began.elapsed();
    eprintln!(
        "all led after {:.1} s; letting the first announcements pass …",
        all_led.as_secs_f64()
    );
    thread::sleep(Duration::from_secs(15));
    let before = usage(&lab)?;
    eprintln!("measuring {} idle seconds …", IDLE.as_secs());
    thread::sleep(IDLE);
    let after = usage(&lab)?;

    println!(
        "{:<8} {:>6} {:>14} {:>9} {:>14}",
        "node", "VIPs", "CPU s per 30 s", "RSS MiB", "peak RSS MiB"
    );
    let mut rows = Vec::new();
    for (index, node) in lab.nodes().iter().enumerate() {
        let cpu = after[index].cpu - before[index].cpu;
        let (rss, peak) = (after[index].rss, after[index].peak_rss);
        println!(
            "{:<8} {:>6} {cpu:>14.2} {rss:>9.1} {peak:>14.1}",
            node.name, led[index]
        );
        rows.push(json!({"node": node.name, "vips": led[index], "cpu_seconds_per_30s": cpu, "rss_mib": rss, "peak_rss_mib": peak}));
    }
    println!(
        "{}",
        json!({"vips": VIPS, "all_led_after_s": all_led.as_secs_f64(), "speakers": rows})
    );
    Ok(())
}

fn usage(lab: &Lab) -> anyhow::Result<Vec<Usage>> {
    lab.nodes()
        .iter()
        .map(|node| Usage::of(lab.pid(&node.name, "speaker").context("the speaker runs")?))
        .collect()
}

fn services() -> anyhow::Result<String> {
    let mut text = String::from(
        "apiVersion: landfall.dev/v1alpha1\nkind: IPAddressPool\nmetadata: {name: many}\n\
         spec: {addresses: [10.88.4.0/22]}\n",
    );
    for number in 0..VIPS {
        write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{number}, namespace: default}}\n\
             spec: {{type: LoadBalancer, ipFamilies: [IPv4], ports: [{{port: 80, protocol: TCP}}]}}\n"
        )?;
    }
    Ok(text)
}
