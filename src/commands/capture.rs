//! `capture`: from `criu dump --stream` to the shards.

use anyhow::Result;

use super::{Session, create_images_dir};
use crate::capture::{Capture, ExternalSource, HasIndex};
use crate::cli::{BufferSize, FileEnd, Plan, Shards};
use crate::criu::hook_caller::Caller;
use crate::criu::{Listener, Role};
use crate::supervision::{Failure, Pumped, ShellCommand};

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    create_images_dir(&plan.images_dir)?;
    let supervisor = &mut session.supervisor;
    let buffer = plan.buffer.map(BufferSize::bytes).transpose()?;
    plan.check_socket(Role::Capture)?;
    let listener = Listener::bind(&plan.images_dir, Role::Capture)?;
    let external_files = plan
        .external_files
        .into_iter()
        .map(|(name, end)| {
            let source = match end {
                FileEnd::Descriptor(fd) => ExternalSource::Pipe(supervisor.source(
                    fd,
                    name.as_str(),
                    Pumped::ExternalFile,
                )?),
                FileEnd::Command(command) => ExternalSource::Command(command),
            };
            Ok((name, source))
        })
        .collect::<Result<_>>()?;
    let shards = match plan.shards {
        Shards::Descriptors(fds) => {
            let pipe =
                |(fd, label): (_, String)| Ok((supervisor.sink(fd, &label, Pumped::Shard)?, label));
            fds.into_iter().map(pipe).collect::<Result<_>>()?
        }
        Shards::Commands(commands) => {
            let pipe = |command: ShellCommand| {
                let label = command.label();
                Ok((supervisor.start_reader(command)?, label))
            };
            commands.into_iter().map(pipe).collect::<Result<_>>()?
        }
    };
    let captured = Capture {
        images_dir: &plan.images_dir,
        listener,
        shards,
        has_index: match plan.has_index {
            true => HasIndex::Yes,
            false => HasIndex::No,
        },
        buffer,
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
