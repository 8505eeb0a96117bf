//! Landfall's controller.
#![forbid(unsafe_code)]

use clap::Parser as _;
use landfall_controller::args::Args;

// One thread: the work is waiting for the API server, and the index has one owner anyway.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.log.init()?;
    landfall_controller::run::run(args).await
}
