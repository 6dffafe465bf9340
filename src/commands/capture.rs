//! `capture`: from `criu dump --stream` to the shards.

use anyhow::Result;

use super::{Session, create_images_dir};
use crate::capture::Capture;
use crate::cli::Plan;
use crate::criu::{Listener, Role};
use crate::supervision::{Failure, Pumped};

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    create_images_dir(&plan.images_dir)?;
    let supervisor = &mut session.supervisor;
    plan.check_socket(Role::Capture)?;
    let listener = Listener::bind(&plan.images_dir, &Role::Capture.socket_name())?;
    let shards = plan.shards.into_iter();
    let shards =
        shards.map(|(end, label)| Ok((supervisor.sink(end, &label, Pumped::Shard)?, label)));
    let shards = shards.collect::<Result<_>>()?;
    let captured = Capture {
        images_dir: &plan.images_dir,
        has_index: plan.args.index,
        buffer: plan.args.buffer,
        goes_on_when_copied: plan.args.go_on_when_copied,
        caller: plan.caller.as_ref().map(|it| it.identity.clone()),
        leaves_inventory: plan.caller.as_ref().is_some_and(|caller| caller.is_driven),
        external_files: plan.external_files,
        progress: &mut plan.progress,
        criu: plan.criu.as_ref(),
        counters: session.counters.clone(),
    }
    .run(listener, shards, supervisor);
    let (stats, _socket) = supervisor.conclude(captured)?;
    session.report(&mut plan.progress, &stats);
    Ok(())
}
