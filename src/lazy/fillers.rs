//! What fills memory: a thread for what processes wait for, and others for all the rest, file by
//! file, once all processes are restored.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Result;
use crossbeam_channel::Receiver;

use super::memory::Memory;
use super::pages::{PagesFile, Unit};
use crate::report::meter::Counter;

/// A page that a process waits for.
pub(super) type Fault = (Arc<Memory>, u64);

/// What is to be filled.
#[derive(Debug)]
pub(super) struct Work {
    /// All units, in the order in which they are filled.
    units: Vec<(Arc<PagesFile>, usize)>,
    /// The next of them.
    next: AtomicUsize,
    /// How many are not filled yet, and one more until all processes are restored.
    left: AtomicUsize,
    /// Bytes that are in place.
    filled: Counter,
}

impl Work {
    pub(super) fn new<'a>(
        files: impl Iterator<Item = &'a Arc<PagesFile>>,
        filled: Counter,
    ) -> Self {
        let units_of =
            |file: &'a Arc<PagesFile>| (0..file.units()).map(move |unit| (Arc::clone(file), unit));
        let units: Vec<_> = files.flat_map(units_of).collect();
        Self {
            next: AtomicUsize::new(0),
            left: AtomicUsize::new(units.len() + 1),
            units,
            filled,
        }
    }

    /// Notes that a unit is filled, or that all processes are restored; true if that was the last.
    pub(super) fn is_last(&self) -> bool {
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Fills what processes wait for, for as long as faults can come.
    pub(super) fn answer(&self, faults: &Receiver<Fault>, all_filled: impl Fn()) -> Result<()> {
        let mut buffer = Vec::new();
        for (memory, address) in faults {
            // One that somebody has taken is on its way.
            if let Some(offset) = memory.answer(address)?
                && let Some(unit) = memory.pages.take_at(offset)
            {
                self.fill(&memory.pages, unit, &mut buffer, &all_filled)?;
            }
        }
        Ok(())
    }

    /// Fills all.
    pub(super) fn fill_in_order(&self, all_filled: impl Fn()) -> Result<()> {
        let mut buffer = Vec::new();
        while let Some((file, number)) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            if let Some(unit) = file.take(*number) {
                self.fill(file, unit, &mut buffer, &all_filled)?;
            }
        }
        Ok(())
    }

    fn fill(
        &self,
        file: &PagesFile,
        unit: Unit,
        buffer: &mut Vec<u8>,
        all_filled: &impl Fn(),
    ) -> Result<()> {
        let bytes = unit.len;
        file.fill(unit, buffer)?;
        self.filled.add(bytes as u64);
        if self.is_last() {
            all_filled();
        }
        Ok(())
    }
}
