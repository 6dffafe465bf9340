//! `serve`: from the shards into memory, and from there to `criu restore --stream`.

use anyhow::{Context, Result};

use super::Transfer;
use crate::cli::Plan;
use crate::criu::{Listener, Role};
use crate::format::ImageName;
use crate::listen_ports::{self, Remap};
use crate::report;
use crate::report::progress::Milestone;
use crate::serve;
use crate::store::Arena;
use crate::store::catalog::Catalog;

pub(super) fn run(mut plan: Plan, mut transfer: Transfer) -> Result<()> {
    Listener::check(&plan.images_dir, Role::Serve)?;
    let mut arena = Arena::new();
    let (mut files, stats) =
        transfer.receive(plan.shards, plan.external_files, Catalog::new(), &mut arena)?;
    if !plan.remaps.is_empty() {
        remap_ports(&mut files, &mut arena, &plan.remaps).context("--tcp-listen-remap")?;
    }
    transfer.report(&mut plan.progress, &stats);
    let listener = Listener::bind(&plan.images_dir, Role::Serve)?;
    plan.progress.reached(Milestone::SocketInit);
    if plan.progress_bar {
        report::warn("the image is in memory: run `criu restore --stream`");
    }
    serve::serve(
        listener,
        files,
        arena,
        plan.criu_clients,
        &transfer.interrupts,
    )
}

fn remap_ports(files: &mut Catalog, arena: &mut Arena, remaps: &[Remap]) -> Result<()> {
    let name = ImageName::new(listen_ports::FILE)?;
    let before = files
        .read(&name, arena)
        .context("keeping it in memory")?
        .with_context(|| format!("the image has no {name}"))?;
    let after = listen_ports::remap(&before, remaps).with_context(|| format!("changing {name}"))?;
    files
        .write(name, &after, arena)
        .context("keeping the changed file in memory")
}
