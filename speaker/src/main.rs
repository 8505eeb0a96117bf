//! Landfall's speaker.
#![deny(unsafe_code)]

use std::io::{self, Write as _};

use clap::Parser as _;
use landfall_speaker::args::{Args, Command};
use landfall_speaker::{runtime, uninstall};

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.log.init()?;
    match &args.command {
        None => runtime::run(args).await,
        Some(Command::Uninstall(args)) => {
            let removed = uninstall::uninstall(args).await?;
            // It is done, also if nobody reads of it (`| head`): println! would panic.
            match writeln!(io::stdout(), "{removed}") {
                Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
                _ => Ok(()),
            }
        }
    }
}
