//! `extract`: from the shards to files, for a plain `criu restore`.

use super::{ExternalFiles, Transfer, check_whole};
use crate::cli::Plan;
use crate::store::disk::{DiskStore, Origin};
use crate::supervision::Failure;

pub(super) fn run(mut plan: Plan, mut transfer: Transfer, origin: Origin) -> Result<(), Failure> {
    let external = ExternalFiles::of(&plan);
    let store = DiskStore::new(&plan.images_dir, origin)?;
    let (store, stats) = transfer.receive(plan.shards, plan.external_files, store)?;
    check_whole(store.names(), external)?;
    store.commit(&transfer.interrupts)?;
    transfer.report(&mut plan.progress, &stats);
    Ok(())
}
