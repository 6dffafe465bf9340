//! Decides whether the files that CRIU has delivered are a whole dump.
//!
//! CRIU's end of the connection does not tell whether the dump succeeded, and inventory.img does
//! not come last (docs/protocol.md, section 1). Where we run CRIU, or its hook runs us, its exit
//! status or its call at `post-dump` proves it. Everywhere else the names of the files and their
//! framing have to: the files that every dump has must be there, and none be empty or cut.
//!
//! Nothing more is asked for: a newer CRIU may pack its files in another way, or leave some out. An
//! inventory that does not begin with CRIU's magic comes from a program of which nothing is known,
//! and then no other file is asked for either.

use std::collections::BTreeMap;

use anyhow::{Result, bail, ensure};

use super::source::Source;
use crate::criu::files::{CPUINFO, INVENTORY, OPEN_FILES, TREE};
use crate::criu::framing::Framing;

/// The end of each error, behind the part that is missing.
const INCOMPLETE: &str =
    "the image is incomplete: discard it; see CRIU's log for what became of the application";

/// The files of CRIU's that have ended.
#[derive(Debug, Default)]
pub(super) struct DumpCheck {
    /// By their names, with a defect of their framing.
    files: BTreeMap<String, Option<&'static str>>,
    /// The inventory is not of the CRIU that is known.
    is_foreign: bool,
    /// The contents of inventory.img.
    pub(super) inventory: Vec<u8>,
    /// CRIU was asked for cpuinfo.img alone.
    pub(super) is_of_cpuinfo: bool,
}

impl DumpCheck {
    /// Records a file of CRIU's that has ended.
    pub(super) fn record(&mut self, source: &Source) {
        let name = source.name.as_str();
        let framing = source.framing.as_ref();
        if let Some(framing) = framing
            && name == INVENTORY
        {
            self.is_foreign = framing.is_foreign();
            self.inventory = framing.kept.clone();
        }
        let defect = framing.and_then(Framing::defect);
        self.files.insert(name.to_owned(), defect);
    }

    /// Fails unless the files are a whole image.
    pub(super) fn check(&self) -> Result<()> {
        let is_here = |name: &str| self.files.get(name) == Some(&None);
        if self.is_of_cpuinfo && is_here(CPUINFO) && self.files.len() == 1 {
            return Ok(());
        }
        ensure!(
            is_here(INVENTORY),
            "capturing the image: CRIU went away without sending {INVENTORY}, so the checkpoint failed (see CRIU's log) and the application, if it lives, goes on; the image is incomplete: discard it"
        );
        if self.is_foreign {
            return Ok(());
        }
        for (name, defect) in &self.files {
            if let Some(defect) = defect {
                bail!(
                    "capturing the image: {name} {defect}, so CRIU was killed or failed before it had written all of its files; {INCOMPLETE}"
                );
            }
        }
        ensure!(
            is_here(TREE),
            "capturing the image: CRIU sent no {TREE}, the process tree: it was `criu pre-dump`, from which nothing can be restored, or CRIU failed; {INCOMPLETE}"
        );
        ensure!(
            is_here(OPEN_FILES),
            "capturing the image: CRIU sent no {OPEN_FILES}, the open files; {INCOMPLETE}"
        );
        let names = self.files.keys();
        for process in names.filter_map(|name| name.strip_prefix("mm-")) {
            ensure!(
                is_here(&format!("pagemap-{process}")),
                "capturing the image: CRIU sent no pagemap-{process}, and so none of the memory that mm-{process} describes: it went elsewhere (--page-server), or CRIU failed; {INCOMPLETE}"
            );
        }
        Ok(())
    }
}
