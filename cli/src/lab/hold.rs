//! `landfall lab up`, and the process it leaves behind, which holds the lab.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use landfall_lab::Network;
use landfall_lab::failover::Scene;
use landfall_lab::fault::SPEAKER;
use landfall_lab::ledger::STATE_DIR;

use super::Size;
use super::control::{self, NodeStatus, Request, Response, Status};
use super::output::Ticker;
use crate::print;

/// How long a lab may take to come up.
const LIMIT: Duration = Duration::from_secs(180);

/// Starts the process that holds the lab and waits until it is up.
pub(super) fn up(size: Size) -> anyhow::Result<ExitCode> {
    if control::ask(&Request::Status)?.is_some() {
        bail!(
            "a lab is up already: `landfall lab status` shows it, `landfall lab down` removes it"
        );
    }
    fs::create_dir_all(STATE_DIR).with_context(|| format!("creating {STATE_DIR}"))?;
    // A socket nobody listens at is of a lab that was killed.
    let _ = fs::remove_file(control::socket());
    let log = File::create(control::log())
        .with_context(|| format!("creating {}", control::log().display()))?;
    let mut command = Command::new(std::env::current_exe().context("finding this executable")?);
    command
        .args(["lab", "hold"])
        .args(["--nodes", &size.nodes.to_string()])
        .args(["--pods", &size.pods.to_string()])
        .args([
            "--policy",
            match size.policy {
                super::PolicyName::Cluster => "cluster",
                super::PolicyName::Local => "local",
            },
        ])
        .args(size.second_nic.then_some("--second-nic"))
        .args(size.no_management.then_some("--no-management"))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        // Its own group: a Ctrl-C at this terminal is not for it.
        .process_group(0);
    let mut holder = command
        .spawn()
        .context("starting the process that holds the lab")?;
    let ticker = Ticker::new();
    ticker.step("building the lab");
    let begun = Instant::now();
    loop {
        std::thread::sleep(Duration::from_millis(200));
        if control::socket().exists() {
            break;
        }
        if let Some(status) = holder.try_wait()? {
            let said = fs::read_to_string(control::log()).unwrap_or_default();
            let _ = fs::remove_file(control::log());
            let _ = fs::remove_dir(STATE_DIR);
            drop(ticker);
            print::note(said.trim_end());
            // 3 goes through: the machine lacks something.
            let code = status
                .code()
                .and_then(|code| u8::try_from(code).ok())
                .unwrap_or(1);
            return Ok(ExitCode::from(code));
        }
        if begun.elapsed() > LIMIT {
            let _ = holder.kill();
            bail!(
                "the lab did not come up within {LIMIT:?}; see {}",
                control::log().display()
            );
        }
    }
    drop(ticker);
    super::play::status(super::Format::Table)
}

/// Builds the lab and serves requests until it is told to end.
pub(super) fn hold(size: Size) -> anyhow::Result<ExitCode> {
    let ticker = Ticker::new();
    let scene = Scene::start(size.topology(), size.policy(), &|progress| {
        ticker.notify(progress);
    })?;
    let socket = control::socket();
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket)
        .with_context(|| format!("listening on {}", socket.display()))?;
    for stream in listener.incoming() {
        match serve(&scene, &stream?) {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => ticker.line(&format!("a request failed: {error:#}")),
        }
    }
    let _ = fs::remove_file(&socket);
    drop(scene);
    Ok(ExitCode::SUCCESS)
}

/// Serves one request; whether it was the last.
fn serve(scene: &Scene, stream: &UnixStream) -> anyhow::Result<bool> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line)?;
    let last = matches!(request, Request::Down);
    let response = match answer(scene, request) {
        Ok(response) => response,
        Err(error) => Response::Failed(error.to_string()),
    };
    let mut line = serde_json::to_string(&response)?;
    line.push('\n');
    let mut writer = stream;
    writer.write_all(line.as_bytes())?;
    Ok(last)
}

fn answer(scene: &Scene, request: Request) -> landfall_lab::Result<Response> {
    let lab = scene.lab();
    let words = |names: &[String]| {
        names
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(" ")
    };
    match request {
        Request::Status => return status(scene).map(Response::Status),
        Request::Fault { node, fault } => lab.inject(&node, fault)?,
        Request::ManagementNetworkDown => lab.management_network_down()?,
        Request::Partition { first, second } => {
            let (first, second) = (words(&first), words(&second));
            let first: Vec<&str> = first.split_whitespace().collect();
            let second: Vec<&str> = second.split_whitespace().collect();
            lab.partition(&first, &second, true)?;
        }
        Request::Loss { from, to, percent } => lab.lose(&from, &to, percent)?,
        Request::Heal => lab.heal()?,
        Request::Down => {}
    }
    Ok(Response::Done)
}

fn status(scene: &Scene) -> landfall_lab::Result<Status> {
    let lab = scene.lab();
    let texts =
        |addresses: &[std::net::IpAddr]| addresses.iter().map(ToString::to_string).collect();
    let mut vips = std::collections::BTreeMap::new();
    for vip in scene.vips() {
        vips.insert(vip.to_string(), scene.leaders(vip)?);
    }
    Ok(Status {
        id: lab.id().as_str().to_owned(),
        pid: std::process::id(),
        manifests: lab.manifests_dir(),
        logs: lab.directory().join("logs"),
        vips,
        nodes: lab
            .nodes()
            .iter()
            .map(|node| {
                let runs = lab.runs(&node.name, SPEAKER);
                NodeStatus {
                    name: node.name.clone(),
                    addresses: texts(&node.addresses(Network::Lan)),
                    speaker: runs,
                    pid: lab.pid(&node.name, SPEAKER).filter(|_| runs),
                    pods: node
                        .pods
                        .iter()
                        .map(|pod| (pod.name.clone(), texts(&pod.addresses)))
                        .collect(),
                }
            })
            .collect(),
        hosts: lab.host_names(),
    })
}
