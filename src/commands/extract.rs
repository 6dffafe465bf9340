//! `extract`: from the shards to files, for a plain `criu restore`.

use anyhow::Result;

use super::Transfer;
use crate::cli::Plan;
use crate::store::Arena;
use crate::store::disk::DiskStore;

pub(super) fn run(mut plan: Plan, mut transfer: Transfer) -> Result<()> {
    let store = DiskStore::new(&plan.images_dir)?;
    let (store, stats) =
        transfer.receive(plan.shards, plan.external_files, store, &mut Arena::new())?;
    store.commit(&transfer.interrupts)?;
    transfer.report(&mut plan.progress, &stats);
    Ok(())
}
