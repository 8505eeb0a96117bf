//! README tells of every flag, metric and reason there is, and of none that there is not.
#![allow(clippy::unwrap_used, reason = "helpers of tests stop the test")]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn readme() -> String {
    fs::read_to_string(root().join("README.md")).unwrap()
}

/// Every Rust file below `directory`.
fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The string literal that `text` begins with, blanks and line breaks passed over.
fn literal(text: &str) -> Option<&str> {
    let rest = text.trim_start().strip_prefix('"')?;
    rest.split_once('"').map(|(literal, _)| literal)
}

/// What is registered as a metric: `register("name", …)`, `encode_descriptor("name", …)`, or a row `"name", field, "help";` of a table of them.
fn metrics() -> BTreeSet<String> {
    let mut files = Vec::new();
    for package in ["controller", "runtime", "speaker"] {
        sources(&root().join(package).join("src"), &mut files);
    }
    let mut names = BTreeSet::new();
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        for call in ["register(", "encode_descriptor("] {
            for (at, _) in text.match_indices(call) {
                names.extend(literal(&text[at + call.len()..]).map(str::to_owned));
            }
        }
        if let Some((_, table)) = text.split_once("register! {") {
            for row in table.lines().take_while(|line| line.trim() != "}") {
                names.extend(
                    literal(row)
                        .filter(|name| !name.contains(' '))
                        .map(str::to_owned),
                );
            }
        }
    }
    names
}

#[test]
fn every_metric_is_in_the_table_and_no_other() {
    let registered = metrics();
    assert!(
        registered.len() > 30,
        "the sources are not read right: {registered:?}"
    );
    let documented: BTreeSet<String> = readme()
        .lines()
        .filter_map(|line| line.strip_prefix("| `landfall_")?.split_once('`'))
        .map(|(name, _)| name.to_owned())
        .collect();
    assert_eq!(documented, registered);
}

#[test]
fn every_flag_is_in_the_table_and_no_other() {
    let mut offered = BTreeSet::new();
    for daemon in ["landfall-controller", "landfall-speaker"] {
        let binary = landfall_lab::Program::landfall(daemon).unwrap().path;
        let output = Command::new(binary).arg("--help").output().unwrap();
        let help = String::from_utf8(output.stdout).unwrap();
        for line in help.lines() {
            // `  --flag <VALUE>` or `  -h, --help`, set off by blanks; examples stand at the end, behind a command.
            let line = line.trim_start();
            let line = line
                .strip_prefix("-h, ")
                .or(line.strip_prefix("-V, "))
                .unwrap_or(line);
            if let Some(flag) = line.strip_prefix("--") {
                let name = flag.split([' ', '=', '<', '[']).next().unwrap_or_default();
                offered.insert(format!("--{name}"));
            }
        }
    }
    offered.retain(|flag| !["--help", "--version"].contains(&flag.as_str()));
    assert!(
        offered.len() > 15,
        "the help is not read right: {offered:?}"
    );
    let readme = readme();
    let (_, table) = readme.split_once("## Flags").unwrap();
    let (table, _) = table.split_once("## ").unwrap();
    let mut documented = BTreeSet::new();
    for row in table.lines().filter(|line| line.starts_with("| `--")) {
        let cell = row.split('|').nth(1).unwrap();
        documented.extend(
            cell.split('`')
                .filter(|word| word.starts_with("--"))
                .map(str::to_owned),
        );
    }
    assert_eq!(documented, offered);
}

#[test]
fn every_condition_and_its_reasons_are_in_the_table() {
    let readme = readme();
    let (_, table) = readme.split_once("### Conditions").unwrap();
    let (table, _) = table.split_once("###").unwrap();
    let text = fs::read_to_string(root().join("api/src/conditions.rs")).unwrap();
    let words: Vec<&str> = text
        .lines()
        .filter_map(|line| literal(line.split_once("&str =")?.1))
        .collect();
    assert!(
        words.len() > 10,
        "the sources are not read right: {words:?}"
    );
    for word in words {
        assert!(
            table.contains(&format!("`{word}`")),
            "{word} is not in README"
        );
    }
}

#[test]
fn every_reason_of_a_refusal_is_in_the_table() {
    let readme = readme();
    let text = ["refusal.rs", "policy_refusal.rs"]
        .map(|file| fs::read_to_string(root().join("core/src/ipam").join(file)).unwrap())
        .concat();
    let reasons: Vec<&str> = text
        .lines()
        .filter_map(|line| literal(line.split_once("=> ")?.1))
        .filter(|word| !word.contains([' ', '{']))
        .collect();
    assert!(
        reasons.len() > 20,
        "the sources are not read right: {reasons:?}"
    );
    for reason in reasons {
        assert!(
            readme.contains(&format!("`{reason}`")),
            "{reason} is not in README"
        );
    }
}
