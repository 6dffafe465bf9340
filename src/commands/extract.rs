//! `extract`: from the shards to files, for a plain `criu restore`.

use super::{ExternalFiles, Session, check_whole};
use crate::cli::Plan;
use crate::store::disk::{DirOrigin, DiskStore};
use crate::supervision::Failure;

pub(super) fn run(mut plan: Plan, mut session: Session, origin: DirOrigin) -> Result<(), Failure> {
    let external = ExternalFiles::of(&plan);
    let store = DiskStore::new(&plan.images_dir, origin)?;
    let (store, stats) = session.receive(plan.shards, plan.external_files, store)?;
    check_whole(store.names(), external)?;
    store.commit(&session.supervisor)?;
    session.report(&mut plan.progress, &stats);
    Ok(())
}
