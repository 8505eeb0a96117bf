//! `landfall egress disarm`, and `arm`.

use landfall_runtime::control::{self, Armed, path};

use crate::ask::SpeakerArgs;
use crate::{exec, print};

const DISARMED: &str = "\
EGRESS IS DISARMED ON THIS NODE.
  - Its pods leave as if there were no egress policies: as a rule with the node's own address, NOT THEIR TENANT'S.
    Receivers see that address; SPF, PTR and allow lists of the policies' addresses do not hold for it.
  - What its pods had open through their policies has been cut.
  - The node is no policy's gateway until it is armed again.
It stays so until `landfall egress arm`, or until the speaker restarts. In-cluster traffic is untouched.";

// Without line breaks: clap breaks lines where the terminal does.
const MEANING: &str = "\
For when Landfall itself is what keeps a node's pods from the outside. Until `landfall egress arm`, or until the \
speaker restarts, the node's pods leave as if there were no egress policies: as a rule with the node's own address, \
not their tenant's. Their open flows are cut.

What the node is the gateway of, another node takes over first; if none can, nothing is done, unless --force says so: \
then packets of other nodes' pods may leave by this node's own address, too.";

#[derive(Debug, clap::Args)]
#[command(after_help = MEANING)]
pub(super) struct DisarmArgs {
    /// Also if no other node can take over what this node is the gateway of.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    speaker: SpeakerArgs,
}

#[derive(Debug, clap::Args)]
pub(super) struct ArmArgs {
    #[command(flatten)]
    speaker: SpeakerArgs,
}

/// Disarms, and says loudly what that means.
pub(super) async fn disarm(args: DisarmArgs) -> anyhow::Result<bool> {
    if let Some(node) = &args.speaker.node {
        let force = args.force.then(|| "--force".to_owned());
        let words: Vec<String> = ["egress", "disarm"]
            .map(str::to_owned)
            .into_iter()
            .chain(force)
            .collect();
        return exec::at(node, &args.speaker, &words).await;
    }
    let path = format!("{}?force={}", path::DISARM, args.force);
    let armed: Armed = control::post(&args.speaker.socket, &path).await?;
    print::note(DISARMED);
    if !armed.handed_over.is_empty() {
        let list = armed.handed_over.join(", ");
        print::note(format_args!("Another node is the gateway now of: {list}"));
    }
    if !armed.abandoned.is_empty() {
        let list = armed.abandoned.join(", ");
        print::note(format_args!("NO NODE IS THE GATEWAY NOW OF: {list}"));
    }
    print::result(format_args!("{}: disarmed", armed.node))?;
    Ok(true)
}

/// Arms again.
pub(super) async fn arm(args: ArmArgs) -> anyhow::Result<bool> {
    if let Some(node) = &args.speaker.node {
        return exec::at(node, &args.speaker, &["egress", "arm"].map(str::to_owned)).await;
    }
    let armed: Armed = control::post(&args.speaker.socket, path::ARM).await?;
    print::result(format_args!("{}: armed", armed.node))?;
    Ok(true)
}
