//! `capture`: from `criu dump --stream` to the shards.

use anyhow::Result;

use super::Transfer;
use crate::capture::{Capture, External, HasIndex};
use crate::cli::{BufferSize, FileEnd, Plan, Shards};
use crate::criu::{Listener, Role};
use crate::supervision::Failure;

pub(super) fn run(mut plan: Plan, mut transfer: Transfer) -> Result<(), Failure> {
    let interrupts = &mut transfer.interrupts;
    let buffer = plan.buffer.map(BufferSize::bytes).transpose()?;
    let listener = Listener::bind(&plan.images_dir, Role::Capture, plan.way())?;
    let external_files = plan
        .external_files
        .into_iter()
        .map(|(name, end)| {
            let source = match end {
                FileEnd::Descriptor(fd) => External::Pipe(interrupts.source(fd, name.as_str())?),
                FileEnd::Command(command) => External::Command(command),
            };
            Ok((name, source))
        })
        .collect::<Result<_>>()?;
    let shards = match plan.shards {
        Shards::Descriptors(fds) => {
            let pipe = |(fd, label): (_, String)| Ok((interrupts.sink(fd, &label)?, label));
            fds.into_iter().map(pipe).collect::<Result<_>>()?
        }
        Shards::Commands(commands) => interrupts.start_readers(commands)?,
    };
    let captured = Capture {
        images_dir: &plan.images_dir,
        listener,
        shards,
        has_index: if plan.has_index {
            HasIndex::Yes
        } else {
            HasIndex::No
        },
        buffer,
        goes_on_when_copied: plan.goes_on_when_copied,
        external_files,
        progress: &mut plan.progress,
        criu: plan.criu.as_ref(),
        criu_clients: plan.criu_clients,
        counters: transfer.counters.clone(),
    }
    .run(interrupts);
    let stats = interrupts.conclude(captured)?;
    transfer.report(&mut plan.progress, &stats);
    Ok(())
}
