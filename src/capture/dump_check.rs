//! What CRIU has delivered, and whether that is a whole dump.
//!
//! CRIU's end of the connection does not tell whether the dump succeeded, and inventory.img does
//! not come last (docs/protocol.md, section 1). So the files themselves must show it: a process
//! tree; for each process the files that every dump has of it; for each pagemap its pages; for each
//! descriptor its open file; and no file that its writer did not get to flush.
//!
//! An inventory that does not begin with CRIU's magic comes from a program that is not the CRIU we
//! know. What else it should have sent is not known either, and nothing more is asked for.
//!
//! **The end of a dump.** CRIU asks for inventory.img after all other files (`cr_dump_tasks` in
//! CRIU 3.15 to 4.2), and requests come in their order. So when inventory.img and every file that
//! is open have ended, and are whole, nothing follows, although CRIU is still connected.

use std::collections::{BTreeMap, HashMap, HashSet};

use anyhow::{Result, bail, ensure};

use super::source::Source;
use crate::criu::contents::{Contents, Defect, Pagemap, Process};
use crate::criu::files::{self, CPUINFO, INVENTORY, Layout, MAGIC, OPEN_FILES, TREE};

/// Each process that has not ended has one of these, besides its core.
const OF_A_PROCESS: [&str; 4] = ["ids", "mm", "fs", "pagemap"];

/// Why a dump with that option can never be captured.
pub(super) const LAZY_PAGES: &str = "the memory stays with CRIU, to be fetched from it later (--lazy-pages): the image can never be whole; dump without that option";

/// What ends each error: which part is missing stands before it.
const INCOMPLETE: &str =
    "the image is incomplete: discard it; see CRIU's log for what became of the application";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inventory {
    /// Not of the CRIU that is known.
    Foreign,
    OfDump,
    OfPreDump,
}

/// What came whole.
#[derive(Debug, Default)]
pub(super) struct DumpCheck {
    inventory: Option<Inventory>,
    /// Came whole, from a CRIU that was not asked for a dump.
    cpuinfo: bool,
    /// Files other than these two.
    others: bool,
    /// Files that cannot be whole.
    defects: BTreeMap<String, Defect>,
    tree: Option<Vec<Process>>,
    /// Processes and threads, with whether they have ended.
    cores: HashMap<u32, bool>,
    /// The names of those files of which each process has one.
    of_processes: HashSet<String>,
    pagemaps: BTreeMap<String, Pagemap>,
    /// The numbers of the open files.
    open_files: HashSet<u32>,
    /// The numbers of the open files that each file refers to.
    references: BTreeMap<String, Vec<u32>>,
    /// The sizes of pages files, by their numbers.
    pages: HashMap<u32, u64>,
}

impl DumpCheck {
    /// Records a file of CRIU's that has ended.
    ///
    /// # Errors
    /// When this file shows that the image can never be whole.
    pub(super) fn record(&mut self, source: &mut Source) -> Result<()> {
        let name = source.name.as_str().to_owned();
        let bytes = source.bytes();
        let contents = source.contents();
        match name.as_str() {
            CPUINFO => self.cpuinfo = bytes > 0 && !source.is_of_dump,
            INVENTORY => self.inventory = (bytes > 0).then_some(Inventory::Foreign),
            _ => self.others = true,
        }
        self.defects.remove(&name);
        if let Some(id) = files::number(&name, "pages") {
            self.pages.insert(id, bytes as u64);
        }
        if files::layout(&name) == Some(Layout::Mixed) && bytes < MAGIC {
            let defect = if bytes == 0 {
                Defect::Empty
            } else {
                Defect::Cut
            };
            self.defects.insert(name.clone(), defect);
        }
        match contents {
            None => {}
            Some(Ok(contents)) => self.record_contents(name, contents)?,
            // Only a dump of this CRIU is judged by its files, and it has another inventory.
            Some(Err(Defect::Foreign)) if name == INVENTORY => {}
            Some(Err(defect)) => {
                if name == INVENTORY {
                    self.inventory = None;
                }
                self.defects.insert(name, defect);
            }
        }
        Ok(())
    }

    fn record_contents(&mut self, name: String, contents: Contents) -> Result<()> {
        if OF_A_PROCESS
            .iter()
            .any(|kind| files::number(&name, kind).is_some())
        {
            self.of_processes.insert(name.clone());
        }
        match contents {
            Contents::Inventory { of_pre_dump } => {
                self.inventory = Some(if of_pre_dump {
                    Inventory::OfPreDump
                } else {
                    Inventory::OfDump
                });
            }
            Contents::Tree(processes) => self.tree = Some(processes),
            Contents::Core { is_dead } => {
                if let Some(id) = files::number(&name, "core") {
                    self.cores.insert(id, is_dead);
                }
            }
            Contents::Pagemap(pagemap) => {
                ensure!(
                    pagemap.lazy == 0,
                    "capturing {name}: of {} pages, {LAZY_PAGES}",
                    pagemap.lazy
                );
                ensure!(
                    pagemap.in_parent == 0,
                    "capturing {name}: {} pages of the application's memory are in an earlier image (--prev-images-dir): the image can never be whole; dump without that option",
                    pagemap.in_parent
                );
                self.pagemaps.insert(name, pagemap);
            }
            Contents::OpenFiles(ids) => self.open_files = ids,
            Contents::References(ids) => {
                self.references.insert(name, ids);
            }
            Contents::Other => {}
        }
        Ok(())
    }

    /// Whether a whole dump of the CRIU that is known has come. An image that only its sender's end
    /// can show to be whole, such as cpuinfo.img alone, is none.
    pub(super) fn is_whole_dump(&self) -> bool {
        self.inventory == Some(Inventory::OfDump) && self.check().is_ok()
    }

    /// Fails unless all that came is a whole image.
    pub(super) fn check(&self) -> Result<()> {
        match self.inventory {
            None if self.cpuinfo && !self.others => return Ok(()),
            None => bail!(
                "capturing the image: CRIU went away without sending {INVENTORY}, so the checkpoint failed (see CRIU's log) and the application, if it lives, goes on; the image is incomplete: discard it"
            ),
            Some(Inventory::OfPreDump) => bail!(
                "capturing the image: it is that of `criu pre-dump`, which holds memory at most, and no process: nothing can be restored from it, so discard it; a stream takes only whole dumps"
            ),
            Some(Inventory::Foreign) => return Ok(()),
            Some(Inventory::OfDump) => {}
        }
        if let Some((name, defect)) = self.defects.iter().next() {
            bail!(
                "capturing the image: {name} {defect}, so CRIU was killed or failed before it had written all of its files; {INCOMPLETE}"
            );
        }
        let Some(tree) = &self.tree else {
            bail!("capturing the image: CRIU sent no {TREE}, the process tree; {INCOMPLETE}");
        };
        ensure!(
            !tree.is_empty(),
            "capturing the image: {TREE} lists no process; {INCOMPLETE}"
        );
        tree.iter()
            .try_for_each(|process| self.check_process(process))?;
        self.pagemaps
            .iter()
            .try_for_each(|(name, pagemap)| self.check_pages(name, pagemap))?;
        self.check_open_files()
    }

    /// What CRIU had not flushed yet may end between two messages.
    fn check_open_files(&self) -> Result<()> {
        for (name, ids) in &self.references {
            // A file's number is never 0.
            let is_missing = |id: &&u32| **id != 0 && !self.open_files.contains(*id);
            if let Some(id) = ids.iter().find(is_missing) {
                bail!(
                    "capturing the image: {OPEN_FILES} lacks the open file number {id}, which {name} refers to, so CRIU was killed or failed before it had written all of its files; {INCOMPLETE}"
                );
            }
        }
        Ok(())
    }

    fn check_process(&self, Process { pid, threads }: &Process) -> Result<()> {
        let is_missing = |kind: &str, id: &u32, whose: &str| -> Result<()> {
            bail!(
                "capturing the image: CRIU sent no {kind}-{id}.img, which {whose} {id} must have; {INCOMPLETE}"
            )
        };
        match self.cores.get(pid) {
            None => return is_missing("core", pid, "process"),
            Some(true) => return Ok(()),
            Some(false) => {}
        }
        if let Some(thread) = threads.iter().find(|id| !self.cores.contains_key(id)) {
            return is_missing("core", thread, "thread");
        }
        let missing = OF_A_PROCESS
            .iter()
            .find(|kind| !self.of_processes.contains(&format!("{kind}-{pid}.img")));
        match missing {
            None => Ok(()),
            Some(&"pagemap") => bail!(
                "capturing the image: CRIU sent no pagemap-{pid}.img, and none of the memory of process {pid}: it went elsewhere (--page-server), or CRIU failed; {INCOMPLETE}"
            ),
            Some(kind) => is_missing(kind, pid, "process"),
        }
    }

    fn check_pages(&self, name: &str, pagemap: &Pagemap) -> Result<()> {
        let Some(id) = pagemap.pages_id else {
            bail!("capturing the image: {name} does not say where its pages are; {INCOMPLETE}");
        };
        let bytes = self.pages.get(&id).copied();
        let Some(bytes) = bytes else {
            bail!(
                "capturing the image: CRIU sent no pages-{id}.img, which holds the pages of {name}; {INCOMPLETE}"
            );
        };
        let listed = pagemap
            .present
            .saturating_mul(rustix::param::page_size() as u64);
        ensure!(
            bytes >= listed,
            "capturing the image: pages-{id}.img has {bytes} bytes, and {name} lists {listed}; {INCOMPLETE}"
        );
        Ok(())
    }
}
