//! `capture`: from `criu dump --stream` to the shards.

use anyhow::Result;

use super::{Session, create_images_dir, writer};
use crate::capture::{Capture, ExternalSource, HasIndex};
use crate::cli::{Endpoint, Plan};
use crate::criu::hook_caller::Caller;
use crate::criu::{Listener, Role};
use crate::supervision::{Failure, Pumped};

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    create_images_dir(&plan.images_dir)?;
    let supervisor = &mut session.supervisor;
    plan.check_socket(Role::Capture)?;
    let listener = Listener::bind(&plan.images_dir, Role::Capture)?;
    let mut external_files = Vec::new();
    for (name, end) in plan.external_files {
        let kind = Pumped::ExternalFile;
        let source = match end {
            Endpoint::Descriptor(fd) => {
                ExternalSource::Pipe(supervisor.source(fd, name.as_str(), kind)?)
            }
            Endpoint::Command(command) => ExternalSource::Command(command),
        };
        external_files.push((name, source));
    }
    let shards = plan.shards.into_iter().map(|(end, label)| {
        let pipe = writer(supervisor, end, &label, Pumped::Shard)?;
        Ok((pipe, label))
    });
    let shards = shards.collect::<Result<_>>()?;
    let captured = Capture {
        images_dir: &plan.images_dir,
        listener,
        shards,
        has_index: match plan.has_index {
            true => HasIndex::Yes,
            false => HasIndex::No,
        },
        buffer: plan.buffer,
        goes_on_when_copied: plan.goes_on_when_copied,
        caller: plan.caller.as_ref().map(Caller::identity),
        leaves_inventory: plan.caller.as_ref().is_some_and(Caller::is_driven),
        external_files,
        progress: &mut plan.progress,
        criu: plan.criu.as_ref(),
        counters: session.counters.clone(),
    }
    .run(supervisor);
    let (stats, _socket) = supervisor.conclude(captured)?;
    session.report(&mut plan.progress, &stats);
    Ok(())
}
