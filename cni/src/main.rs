//! The chained CNI plugin. See the library's documentation.

use std::io::{self, Read, Write};
use std::process::ExitCode;

use landfall_cni::config::Environment;
use landfall_cni::plugin::answer;

fn main() -> ExitCode {
    let environment = Environment(std::env::vars().collect());
    if environment
        .0
        .get("CNI_COMMAND")
        .is_none_or(String::is_empty)
    {
        eprintln!(
            "landfall-cni {}: a chained CNI plugin, run by the container runtime; see Landfall's README",
            env!("CARGO_PKG_VERSION")
        );
        return ExitCode::from(2);
    }
    let mut input = String::new();
    if let Err(error) = io::stdin().read_to_string(&mut input) {
        eprintln!("landfall-cni: the standard input cannot be read: {error}");
    }
    let outcome = answer(&environment, &input, |word| {
        eprintln!("landfall-cni: {word}");
    });
    let (code, text) = match outcome {
        Ok(None) => return ExitCode::SUCCESS,
        Ok(Some(result)) => (ExitCode::SUCCESS, result),
        Err(error) => (ExitCode::FAILURE, error),
    };
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}
