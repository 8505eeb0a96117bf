//! Calls `ip`, `nft` and the like, and says what failed.

use std::io::Write;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use crate::error::{IoContext, LabError, Result};

/// What the lab is made with, and where Debian has it.
const TOOLS: [(&str, &str); 2] = [
    ("ip", "Debian: apt-get install iproute2"),
    ("nft", "Debian: apt-get install nftables"),
];

/// Whether a lab can be built here: root, the tools, and a kernel with namespaces, bridges and veth.
pub fn preflight() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        return Err(LabError::NotRoot);
    }
    for (tool, advice) in TOOLS {
        if !on_path(tool) {
            return Err(LabError::MissingTool { tool, advice });
        }
    }
    Ok(())
}

/// A program that `hack/setup.sh test` has built, by the variable that `hack/setup.sh paths` prints it as; the environment's
/// variable of that name goes before.
pub fn built(variable: &'static str) -> Result<PathBuf> {
    find(variable, Path::is_file)
}

/// Where CNI's own plugins are, and `cnitool` beside them, likewise.
pub fn cni_plugins() -> Result<PathBuf> {
    find("LANDFALL_CNI_PLUGINS", |path| {
        path.join("cnitool").is_file()
    })
}

/// The script is run once in a process.
fn find(variable: &'static str, is_there: impl Fn(&Path) -> bool) -> Result<PathBuf> {
    static PATHS: OnceLock<String> = OnceLock::new();
    let printed = || {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"))
            .parent()
            .expect("the crate lies in the workspace");
        // If it cannot be run, nothing is there.
        run(Command::new(root.join("hack/setup.sh")).arg("paths")).unwrap_or_default()
    };
    let cached = || {
        let mut lines = PATHS.get_or_init(printed).lines();
        lines.find_map(|line| line.strip_prefix(variable)?.strip_prefix('='))
    };
    std::env::var_os(variable)
        .map(PathBuf::from)
        .or_else(|| cached().map(PathBuf::from))
        .filter(|path| is_there(path))
        .ok_or(LabError::NotBuilt { variable })
}

/// Whether a program is on the PATH.
fn on_path(tool: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|directory| directory.join(tool).is_file())
    })
}

/// Runs a command to its end; its standard output.
pub(crate) fn run(command: &mut Command) -> Result<String> {
    run_with_input(command, "")
}

/// Runs a command to its end, feeding it `input`; its standard output.
pub(crate) fn run_with_input(command: &mut Command, input: &str) -> Result<String> {
    let line = || {
        let mut words = vec![command.get_program().to_string_lossy().into_owned()];
        words.extend(
            command
                .get_args()
                .map(|arg| arg.to_string_lossy().into_owned()),
        );
        words.join(" ")
    };
    let line = line();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // A Ctrl-C at the terminal is for this process, which cleans up.
        .process_group(0)
        .spawn()
        .context(|| format!("starting `{line}`"))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input is free to: its status says whether that was well.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child
        .wait_with_output()
        .context(|| format!("waiting for `{line}`"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let mut command = line;
    if !input.is_empty() {
        command = format!("{command} <<\n{input}");
    }
    Err(LabError::Command {
        command,
        stderr: if said.is_empty() {
            output.status.to_string()
        } else {
            said
        },
    })
}

/// `ip` with the words of `line`.
pub(crate) fn ip(line: &str) -> Result<String> {
    run(Command::new("ip").args(line.split_whitespace()))
}
