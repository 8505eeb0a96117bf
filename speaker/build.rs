//! Compiles the eBPF programs and hands the object's path to the crate as `LANDFALL_UPLINK_OBJECT`.
//!
//! The programs are a workspace of their own with their own target and toolchain. In this order:
//! `LANDFALL_EBPF_OBJECT=FILE` takes an object built elsewhere; Debian's rustc linked as the rustup toolchain
//! `debian`, with its library sources and a bpf-linker for its LLVM; the toolchain `nightly` with the component
//! rust-src and a released bpf-linker. `hack/setup.sh lab` installs what the second needs.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, exit};

const TARGET: &str = "bpfel-unknown-none";
const OBJECT: &str = "landfall-uplink";
const FLAGS: &str = "-C linker=bpf-linker -C link-arg=--btf -C debuginfo=2";

/// Where a standard library's sources lie below a toolchain's root.
const SOURCES: &str = "lib/rustlib/src/rust/library/core/Cargo.toml";

fn main() {
    println!("cargo::rerun-if-env-changed=LANDFALL_EBPF_OBJECT");
    let object = match env::var_os("LANDFALL_EBPF_OBJECT") {
        Some(prebuilt) => taken(&PathBuf::from(prebuilt)),
        None => built(),
    };
    println!(
        "cargo::rustc-env=LANDFALL_UPLINK_OBJECT={}",
        object.display()
    );
}

/// An object that was built elsewhere.
fn taken(prebuilt: &Path) -> PathBuf {
    println!("cargo::rerun-if-changed={}", prebuilt.display());
    let Ok(path) = fs::canonicalize(prebuilt) else {
        fail(&format!(
            "LANDFALL_EBPF_OBJECT names {}, which is not there",
            prebuilt.display()
        ));
    };
    path
}

/// The object, compiled now if its sources changed.
fn built() -> PathBuf {
    let manifest = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    let ebpf = manifest
        .parent()
        .expect("the crate lies in the workspace")
        .join("ebpf");
    for path in [
        "common/src",
        "common/Cargo.toml",
        "programs/src",
        "programs/Cargo.toml",
        "programs/Cargo.lock",
    ] {
        println!("cargo::rerun-if-changed={}", ebpf.join(path).display());
    }
    println!("cargo::rerun-if-env-changed=PATH");

    let target_dir = PathBuf::from(variable("OUT_DIR")).join("ebpf");
    let mut cargo = toolchain();
    cargo
        .current_dir(ebpf.join("programs"))
        .args(["build", "--release", "--locked", "-Zbuild-std=core"])
        .args(["--target", TARGET, "--target-dir"])
        .arg(&target_dir)
        .env("RUSTFLAGS", FLAGS);
    match cargo.status() {
        Ok(status) if status.success() => {}
        Ok(status) => fail(&format!("compiling the eBPF programs failed: {status}")),
        Err(error) => fail(&format!(
            "compiling the eBPF programs: cannot start cargo: {error}"
        )),
    }
    target_dir.join(TARGET).join("release").join(OBJECT)
}

/// A cargo whose compiler can build for the BPF target, with a clean environment: what the outer cargo has set
/// (flags, wrappers, the toolchain) is meant for the host.
fn toolchain() -> Command {
    if !on_path("bpf-linker") {
        fail("bpf-linker is not on the PATH: run `hack/setup.sh lab`");
    }
    let name = if Path::new("/usr/bin/rustc").exists()
        && Path::new("/usr").join(SOURCES).exists()
        && toolchain_root("debian").is_some()
    {
        "debian"
    } else if toolchain_root("nightly").is_some_and(|root| root.join(SOURCES).exists()) {
        "nightly"
    } else {
        fail(
            "no toolchain for the BPF target: on Debian run `hack/setup.sh lab`; elsewhere \
             `rustup toolchain install nightly --component rust-src` and `cargo install bpf-linker`; or set \
             LANDFALL_EBPF_OBJECT to an object that was built elsewhere",
        );
    };
    let mut command = scrubbed("rustup");
    command.args(["run", name, "cargo"]);
    if name == "debian" {
        // A stable compiler that Debian builds from the LLVM which bpf-linker uses too; `-Zbuild-std` and the
        // target are unstable.
        command.env("RUSTC_BOOTSTRAP", "1");
    }
    command
}

/// Where a rustup toolchain lives, if it is installed.
fn toolchain_root(name: &str) -> Option<PathBuf> {
    let output = scrubbed("rustup")
        .args(["run", name, "rustc", "--print", "sysroot"])
        .output()
        .ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    output
        .status
        .success()
        .then(|| PathBuf::from(text.trim().to_owned()))
}

/// A command without what cargo, rustup and clippy have put into the environment.
fn scrubbed(program: &str) -> Command {
    let mut command = Command::new(program);
    for (key, _) in env::vars_os() {
        let name = key.to_string_lossy();
        let keep = ["CARGO_HOME", "CARGO_NET_OFFLINE", "RUSTUP_HOME"].contains(&name.as_ref())
            || name.starts_with("CARGO_HTTP_");
        let drop = name.starts_with("CARGO")
            || name.starts_with("RUST")
            || name.starts_with("CLIPPY")
            || ["__CARGO_FIX_PLZ", "TARGET", "HOST", "PROFILE", "OPT_LEVEL"]
                .contains(&name.as_ref());
        if drop && !keep {
            command.env_remove(&key);
        }
    }
    command
}

fn on_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| {
        env::split_paths(&path).any(|directory| directory.join(program).is_file())
    })
}

fn variable(name: &str) -> String {
    env::var(name).expect("cargo sets it for build scripts")
}

fn fail(message: &str) -> ! {
    println!("cargo::error={message}");
    exit(1)
}
