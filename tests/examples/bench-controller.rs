//! What it takes to give many Services their addresses at once: `make bench-controller`.
//!
//! A real etcd, API server and controller manager, the controller and three speakers with the chart's RBAC; nobody
//! delivers. 1 000 Services (or as many as the first argument says) are created as fast as the API server takes
//! them. Prints a table and one JSON object on the last line. Writes are counted by the API server: everything
//! that Landfall's controller and speakers wrote, Events included.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::events::v1::Event;
use kube::api::{Api, ListParams, PostParams};
use kube::{Client, Resource as _};
use landfall_api::IPAddressPool;
use landfall_lab::Topology;
use landfall_tests::usage::{Usage, value};
use landfall_tests::{CONTROL_HOST, Cluster};
use serde_json::json;

/// Creations in flight at once.
const AT_ONCE: usize = 32;
/// No write for so long means that all is said.
const QUIET: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_mins(15);

fn main() -> anyhow::Result<()> {
    let number: usize = match std::env::args().nth(1) {
        Some(text) => text
            .parse()
            .with_context(|| format!("{text} is not a number of Services"))?,
        None => 1000,
    };
    ensure!(
        (1..=16_000).contains(&number),
        "the pool has room for 1 to 16000 Services, not {number}"
    );
    eprintln!("starting a control plane …");
    let cluster = Cluster::build_without_kube_proxy(Topology::default())?;
    for (index, node) in cluster.lab().nodes().iter().enumerate() {
        // The pool's subnet.
        node.netns
            .ip(&format!("addr add 10.88.63.{}/16 dev eth0", index + 1))?;
    }
    cluster.start_landfall()?;
    cluster.block_on(run(&cluster, number))
}

async fn run(cluster: &Cluster, number: usize) -> anyhow::Result<()> {
    let client = cluster.client().await?;
    let pool: IPAddressPool = serde_json::from_value(json!({
        "apiVersion": "landfall.dev/v1alpha1", "kind": "IPAddressPool", "metadata": {"name": "many"},
        "spec": {"addresses": ["10.88.64.0/18"]},
    }))?;
    Api::all(client.clone())
        .create(&PostParams::default(), &pool)
        .await?;
    tokio::time::sleep(Duration::from_secs(3)).await;

    let pid = |host: &str, name: &str| {
        cluster
            .lab()
            .pid(host, name)
            .with_context(|| format!("{name} on {host} does not run any more"))
    };
    let controller = || Usage::of(pid(CONTROL_HOST, "controller")?);
    let before = controller()?;
    let writes_before = writes(&client).await?;

    eprintln!("creating {number} Services …");
    let began = Instant::now();
    create(&client, number).await?;
    let created = began.elapsed();
    eprintln!("created after {:.1} s", created.as_secs_f64());
    let assigned = until_assigned(&client, number, began).await?;
    let after = controller()?;
    eprintln!(
        "all have an address after {:.1} s; waiting until nothing is written any more …",
        assigned.as_secs_f64()
    );
    let writes = difference(&writes_before, &until_quiet(&client, began).await?);
    let settled = controller()?;
    let mut speakers = 0.0_f64;
    let mut transitions = BTreeMap::new();
    for node in cluster.lab().nodes() {
        speakers = speakers.max(Usage::of(pid(&node.name, "speaker")?)?.peak_rss);
        let metrics = cluster.lab().speaker_metrics(&node.name)?;
        for (what, reason) in [
            ("leaderships taken", "taken"),
            ("leaderships given up", "given-up"),
            ("leaderships contested", "contested"),
        ] {
            let line = format!("landfall_transitions_total{{reason=\"{reason}\"}}");
            *transitions.entry(what).or_default() += value(&metrics, &line).unwrap_or(0.0);
        }
    }
    report(&Outcome {
        number,
        created,
        assigned,
        cpu: after.cpu - before.cpu,
        cpu_settled: settled.cpu - before.cpu,
        peak: settled.peak_rss,
        speaker_peak: speakers,
        transitions,
        writes,
    });
    Ok(())
}

struct Outcome {
    number: usize,
    created: Duration,
    assigned: Duration,
    cpu: f64,
    cpu_settled: f64,
    peak: f64,
    speaker_peak: f64,
    transitions: BTreeMap<&'static str, f64>,
    /// By what was written.
    writes: BTreeMap<String, f64>,
}

fn report(outcome: &Outcome) {
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    let number = outcome.number as f64;
    let seconds = outcome.assigned.as_secs_f64();
    let per_service = outcome.writes.values().sum::<f64>() / number;
    let rows = [
        ("Services", format!("{number}")),
        (
            "created after",
            format!("{:.1} s", outcome.created.as_secs_f64()),
        ),
        ("all have an address after", format!("{seconds:.1} s")),
        ("Services per second", format!("{:.0}", number / seconds)),
        (
            "controller, CPU until then",
            format!("{:.2} s", outcome.cpu),
        ),
        (
            "controller, CPU until quiet",
            format!("{:.2} s", outcome.cpu_settled),
        ),
        ("controller, peak RSS", format!("{:.1} MiB", outcome.peak)),
        (
            "speaker, highest peak RSS",
            format!("{:.1} MiB", outcome.speaker_peak),
        ),
        ("API writes per Service", format!("{per_service:.2}")),
    ];
    for (name, value) in rows {
        println!("{name:<32} {value:>12}");
    }
    for (what, count) in &outcome.writes {
        println!("  {what:<30} {:>12.2}", count / number);
    }
    for (what, count) in &outcome.transitions {
        println!("{what:<32} {count:>12}");
    }
    println!(
        "{}",
        json!({
            "services": outcome.number,
            "created_s": outcome.created.as_secs_f64(),
            "assigned_s": seconds,
            "services_per_s": number / seconds,
            "controller_cpu_s": outcome.cpu,
            "controller_cpu_until_quiet_s": outcome.cpu_settled,
            "controller_peak_rss_mib": outcome.peak,
            "speaker_peak_rss_mib": outcome.speaker_peak,
            "writes_per_service": per_service,
            "writes": outcome.writes,
            "transitions": outcome.transitions,
        })
    );
}

async fn create(client: &Client, number: usize) -> anyhow::Result<()> {
    let api: Api<Service> = Api::namespaced(client.clone(), "default");
    stream::iter(0..number)
        .map(|index| {
            let api = api.clone();
            async move {
                // Node ports would run out; without a selector the controller manager writes nothing.
                let service = serde_json::from_value(json!({
                    "metadata": {"name": format!("s{index}")},
                    "spec": {
                        "type": "LoadBalancer", "allocateLoadBalancerNodePorts": false,
                        "ports": [{"port": 80, "protocol": "TCP"}],
                    },
                }))?;
                api.create(&PostParams::default(), &service).await?;
                anyhow::Ok(())
            }
        })
        .buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

async fn until_assigned(
    client: &Client,
    number: usize,
    began: Instant,
) -> anyhow::Result<Duration> {
    let api: Api<Service> = Api::namespaced(client.clone(), "default");
    loop {
        // From the API server's cache: cheap for it.
        let services = api.list(&ListParams::default().match_any()).await?;
        let assigned = services
            .iter()
            .filter(|service| !landfall_tests::objects::ingress(service).is_empty())
            .count();
        if assigned >= number {
            return Ok(began.elapsed());
        }
        ensure!(
            began.elapsed() < PATIENCE,
            "{assigned} of {number} Services have an address after {PATIENCE:?}"
        );
        tokio::time::sleep(Duration::from_millis(if number > 2000 {
            1000
        } else {
            250
        }))
        .await;
    }
}

async fn until_quiet(client: &Client, began: Instant) -> anyhow::Result<BTreeMap<String, f64>> {
    let mut last = writes(client).await?;
    loop {
        tokio::time::sleep(QUIET).await;
        let now = writes(client).await?;
        if now == last {
            return Ok(now);
        }
        last = now;
        ensure!(
            began.elapsed() < PATIENCE,
            "there still are writes after {PATIENCE:?}: {last:?}"
        );
    }
}

/// What Landfall wrote so far, as the API server counted it: the benchmark itself only creates Services, and the
/// controller manager touches none of these. Events are told apart by who reports them.
async fn writes(client: &Client) -> anyhow::Result<BTreeMap<String, f64>> {
    let text = client
        .request_text(http::Request::get("/metrics").body(Vec::new())?)
        .await?;
    let label = |line: &str, name: &str| {
        let rest = line.split_once(&format!("{name}=\""))?.1;
        Some(rest.split_once('"')?.0.to_owned())
    };
    let mut writes = BTreeMap::new();
    for line in text
        .lines()
        .filter(|line| line.starts_with("apiserver_request_total{"))
    {
        let get = |name| label(line, name).unwrap_or_default();
        let (verb, resource, subresource) = (get("verb"), get("resource"), get("subresource"));
        let is_write = ["POST", "PUT", "PATCH", "APPLY", "DELETE"].contains(&verb.as_str());
        let is_ours = match resource.as_str() {
            "services" => verb != "POST",
            _ => resource == landfall_api::VirtualIP::plural(&()),
        };
        if is_write && is_ours {
            let count: f64 = line
                .rsplit_once(' ')
                .and_then(|(_, count)| count.parse().ok())
                .context("the API server's metrics have an unknown form")?;
            let subresource = if subresource.is_empty() {
                subresource
            } else {
                format!("/{subresource}")
            };
            *writes
                .entry(format!("{verb} {resource}{subresource}"))
                .or_default() += count;
        }
    }
    let events = Api::<Event>::all(client.clone())
        .list(&ListParams::default().match_any())
        .await?;
    let ours = events
        .iter()
        .filter_map(|event| event.reporting_controller.as_deref())
        .filter(|reporter| reporter.starts_with("landfall.dev/"))
        .count();
    #[expect(clippy::cast_precision_loss, reason = "a few thousand")]
    writes.insert("POST events".to_owned(), ours as f64);
    Ok(writes)
}

fn difference(
    before: &BTreeMap<String, f64>,
    after: &BTreeMap<String, f64>,
) -> BTreeMap<String, f64> {
    after
        .iter()
        .map(|(what, count)| {
            (
                what.clone(),
                count - before.get(what).copied().unwrap_or(0.0),
            )
        })
        .filter(|(_, count)| *count > 0.0)
        .collect()
}
