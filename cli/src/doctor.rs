//! `landfall doctor`: asks a node's speaker what it finds on the node.

use std::process::ExitCode;

use landfall_runtime::control::{self, Diagnosis, Verdict, path};

use crate::ask::{Format, SpeakerArgs, wait};
use crate::table::aligned;
use crate::{exec, print};

const EXAMPLES: &str = "\
Examples:
  On a node, through kubectl exec into its speaker's pod:
    landfall doctor --node node2

  On all of them:
    for node in $(kubectl get nodes -o name); do landfall doctor --node \"${node#node/}\"; done

  In the speaker's own pod, for a script:
    landfall doctor -o json

Exit codes:
  0  there is no problem
  1  there is one, or it failed
  2  the arguments were wrong";

/// The arguments of `landfall doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// How to print it.
    #[arg(short, long, default_value = "table")]
    output: Format,
    #[command(flatten)]
    speaker: SpeakerArgs,
}

/// Runs `landfall doctor`.
pub(crate) fn run(args: Args) -> anyhow::Result<ExitCode> {
    wait(ask(args))
}

/// Prints what is found; whether there is no problem.
async fn ask(args: Args) -> anyhow::Result<bool> {
    if let Some(node) = &args.speaker.node {
        let json = (args.output == Format::Json).then_some("--output=json");
        let words = ["doctor"].into_iter().chain(json).map(str::to_owned);
        return exec::at(node, &args.speaker, &words.collect::<Vec<_>>()).await;
    }
    let found: Diagnosis = control::get(&args.speaker.socket, path::DOCTOR).await?;
    match args.output {
        Format::Json => print::result(serde_json::to_string_pretty(&found)?)?,
        Format::Table => print::result(as_text(&found))?,
    }
    let mut verdicts = found.findings.iter().map(|finding| finding.verdict);
    Ok(verdicts.all(|verdict| verdict != Verdict::Problem))
}

fn as_text(found: &Diagnosis) -> String {
    let mut rows = Vec::new();
    for finding in &found.findings {
        let verdict = match finding.verdict {
            Verdict::Ok => "ok",
            Verdict::Note => "note",
            Verdict::Problem => "PROBLEM",
        };
        let row = [verdict, &finding.check, &finding.found];
        rows.push(row.map(str::to_owned).to_vec());
        let advice = finding.advice.iter();
        rows.extend(
            advice.map(|advice| vec![String::new(), String::new(), format!("-> {advice}")]),
        );
    }
    let is_problem = |verdict: Verdict| verdict == Verdict::Problem;
    let problems = found.findings.iter().filter(|it| is_problem(it.verdict));
    let last = match problems.count() {
        0 => "no problem".to_owned(),
        1 => "1 problem".to_owned(),
        more => format!("{more} problems"),
    };
    let table = aligned(&["VERDICT", "CHECK", "FOUND"], &rows);
    format!("{table}\n\n{}: {last}", found.node)
}

#[cfg(test)]
mod tests {
    use landfall_runtime::control::Finding;

    use super::*;

    #[test]
    fn advice_stands_below_what_was_found() {
        let finding = |check: &str, verdict, found: &str, advice: Option<&str>| Finding {
            check: check.into(),
            verdict,
            found: found.into(),
            advice: advice.map(Into::into),
        };
        let found = Diagnosis {
            node: "n1".into(),
            findings: vec![
                finding("kernel", Verdict::Ok, "6.18.5", None),
                finding("nodes", Verdict::Note, "1 of 3 is not heard", None),
                finding(
                    "marks",
                    Verdict::Problem,
                    "Calico has them",
                    Some("move ours"),
                ),
            ],
        };
        let expected = "\
VERDICT   CHECK    FOUND
ok        kernel   6.18.5
note      nodes    1 of 3 is not heard
PROBLEM   marks    Calico has them
                   -> move ours

n1: 1 problem";
        assert_eq!(as_text(&found), expected);
    }
}
