//! `extract`: from the shards to files, for a plain `criu restore`.

use anyhow::Result;

use super::{ExternalFiles, Transfer, check_whole};
use crate::cli::Plan;
use crate::store::disk::{DiskStore, Origin};

pub(super) fn run(mut plan: Plan, mut transfer: Transfer, origin: Origin) -> Result<()> {
    let external = ExternalFiles::of(&plan);
    let store = DiskStore::new(&plan.images_dir, origin)?;
    let (store, stats) = transfer.receive(plan.shards, plan.external_files, store)?;
    check_whole(store.names(), external)?;
    store.commit(&transfer.interrupts)?;
    transfer.report(&mut plan.progress, &stats);
    Ok(())
}
