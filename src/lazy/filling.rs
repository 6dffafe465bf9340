//! The work of all threads: to fill in what the application's processes lack, or to kill them.

use std::collections::BTreeMap;
use std::num::NonZero;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context, Error, Result, bail};
use crossbeam_channel::Receiver;
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::guardian::Guardian;
use super::memory::{Fault, locked};
use super::pages::PagesFile;
use crate::report::meter::Counter;

/// More threads than this fill no faster.
const MOST_FILLERS: usize = 8;

/// Bytes filled at a time. They stay in a core's cache between the two copies, and events are read
/// in between.
const CHUNK: usize = 128 << 10;

/// The memory of an application, and the threads that fill it in.
pub(crate) struct Filling {
    pub(super) guardian: Guardian,
    /// The image's memory, by the number of the process.
    pub(super) files: BTreeMap<i32, PagesFile>,
    /// The number of files that are not in place.
    left: AtomicUsize,
    /// Bytes that are in place.
    filled: Counter,
    /// All is in place, or the reason why it never will be. Locked while the application is killed,
    /// after which nothing is in place any more.
    outcome: Mutex<Option<Result<(), String>>>,
    /// Readable when the outcome is known.
    pub(crate) changed: EventFd,
}

impl Filling {
    /// # Errors
    /// When the kernel refuses an eventfd.
    pub(super) fn new(
        guardian: Guardian,
        files: BTreeMap<i32, PagesFile>,
        filled: Counter,
    ) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            guardian,
            left: AtomicUsize::new(files.len()),
            files,
            filled,
            outcome: Mutex::default(),
            changed: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        }))
    }

    /// Starts a thread, whose failure is the application's end.
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub(super) fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(&Arc<Self>) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let filling = Arc::clone(self);
        let run = move || {
            if let Err(error) = work(&filling) {
                filling.fail(error);
            }
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run);
        thread.map(drop).context("starting a thread")
    }

    /// Answers faults, for as long as any can come.
    pub(super) fn answer(&self, faults: &Receiver<Fault>) -> Result<()> {
        let mut buffer = vec![0; CHUNK];
        for (memory, address) in faults {
            if let Some(place) = memory.answer(address)? {
                let file = &self.files[&memory.pid];
                self.fill(file, file.unit_at(place), &mut buffer)?;
            }
        }
        Ok(())
    }

    /// Starts to fill all units in order.
    ///
    /// # Errors
    /// When the kernel refuses threads.
    pub(super) fn start(self: &Arc<Self>) -> Result<()> {
        let cores = thread::available_parallelism().map_or(1, NonZero::get);
        (0..cores.min(MOST_FILLERS)).try_for_each(|_| {
            self.spawn("filler", |filling| {
                let mut buffer = vec![0; CHUNK];
                filling.files.values().try_for_each(|file| {
                    (0..file.units()).try_for_each(|unit| filling.fill(file, unit, &mut buffer))
                })
            })
        })
    }

    fn fill(&self, file: &PagesFile, unit: usize, buffer: &mut [u8]) -> Result<()> {
        let is_in_place = file.fill(unit, buffer, &self.filled)?;
        if is_in_place && self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.conclude(|| Ok(()));
        }
        Ok(())
    }

    fn conclude(&self, outcome: impl FnOnce() -> Result<(), String>) {
        let mut slot = locked(&self.outcome);
        if slot.is_none() {
            *slot = Some(outcome());
            let _ = self.changed.write(1);
        }
    }

    /// Kills the application, unless it has all of its memory.
    pub(super) fn fail(&self, error: Error) {
        self.conclude(|| {
            self.guardian.kill_all();
            Err(format!(
                "filling the application's memory: {error:#}; it was killed"
            ))
        });
    }

    /// True if all is in place, and nothing depends on us any more.
    ///
    /// # Errors
    /// When filling failed, and the application was killed.
    pub(crate) fn is_in_place(&self) -> Result<bool> {
        // The outcome is looked at below.
        let _ = self.changed.read();
        match &*locked(&self.outcome) {
            Some(Err(why)) => bail!("{why}"),
            outcome => Ok(outcome.is_some()),
        }
    }
}
