//! `landfall lab`: one fail-over, from nothing to the report.

use std::process::ExitCode;

use landfall_lab::Fault;
use landfall_lab::failover::Scene;

use super::Size;
use super::output::{Ticker, counts, run_table};
use crate::print;

pub(super) fn run(size: Size) -> anyhow::Result<ExitCode> {
    anyhow::ensure!(
        size.nodes > 1,
        "a fail-over needs a second node: use --nodes 2 or more"
    );
    let ticker = Ticker::new();
    let notify = |progress| ticker.notify(progress);
    let scene = Scene::start(size.topology(), size.policy(), &notify)?;
    ticker.line(&format!(
        "{} nodes, {} pods, one Service at {}",
        size.nodes,
        scene.lab().pods().count(),
        scene.vips().map(|vip| vip.to_string()).join(" and ")
    ));
    for vip in scene.vips() {
        ticker.line(&format!(
            "who answers for {vip}: {}",
            counts(&scene.leaders(vip)?)
        ));
    }
    let run = scene.fail_over(Fault::PowerOff, scene.vips()[0], &notify)?;
    ticker.step("removing the lab");
    drop(scene);
    drop(ticker);
    print::result(format_args!(
        "The leader's node lost its power. What the clients saw:\n{}",
        run_table(&run)
    ))?;
    Ok(ExitCode::SUCCESS)
}
