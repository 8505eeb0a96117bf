//! Landfall's speaker.
#![deny(unsafe_code)]

use clap::Parser as _;
use landfall_speaker::args::{Args, Command};
use landfall_speaker::{runtime, uninstall};

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.log.init()?;
    match &args.command {
        None => runtime::run(args).await,
        Some(Command::Uninstall(pins)) => {
            println!("{}", uninstall::uninstall(&pins.bpf_pin_dir).await?);
            Ok(())
        }
    }
}
