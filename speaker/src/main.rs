//! Landfall's speaker.
#![deny(unsafe_code)]

use clap::Parser as _;
use landfall_speaker::args::Args;

#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    args.log.init()?;
    landfall_speaker::runtime::run(args).await
}
