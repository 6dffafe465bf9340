//! `extract`: from the shards to files, for a plain `criu restore`.

use super::{Session, create_images_dir};
use crate::cli::Plan;
use crate::store::disk::DiskStore;
use crate::supervision::Failure;

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    let origin = create_images_dir(&plan.images_dir)?;
    let store = DiskStore::new(&plan.images_dir, origin)?;
    let (store, stats) = session.receive(&mut plan, store)?;
    session.check_whole(store.names())?;
    store.commit(&session.supervisor)?;
    session.report(&mut plan.progress, &stats);
    Ok(())
}
