//! Logging to standard error.

use clap::{Args, ValueEnum};
use tracing_subscriber::EnvFilter;

/// How to log.
#[derive(Clone, Debug, Args)]
pub struct LogArgs {
    /// What to log: a level, or directives such as `info,landfall_speaker=debug`.
    #[arg(
        long,
        env = "LANDFALL_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,

    /// The form of log lines.
    #[arg(long, env = "LANDFALL_LOG_FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// The form of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl LogArgs {
    /// Starts logging. Once a process.
    pub fn init(&self) -> anyhow::Result<()> {
        let filter = EnvFilter::try_new(&self.log)
            .map_err(|problem| anyhow::anyhow!("--log {:?}: {problem}", self.log))?;
        let builder = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr);
        match self.log_format {
            LogFormat::Text => builder.with_ansi(false).try_init(),
            LogFormat::Json => builder.json().try_init(),
        }
        .map_err(|problem| anyhow::anyhow!("cannot start logging: {problem}"))
    }
}
