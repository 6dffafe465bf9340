//! The threads that fill memory: one for what processes wait for, and the others for all the rest,
//! file by file, as soon as all processes are restored.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use anyhow::Result;

use super::memory::{Answer, Memory};
use super::pages::{PagesFile, Taken};
use crate::report::meter::Counter;

/// What the threads have to do.
#[derive(Debug, Default)]
pub(super) struct Work {
    queue: Mutex<Queue>,
    changed: Condvar,
    /// All units, in the order in which they are filled.
    units: Vec<(Arc<PagesFile>, usize)>,
    /// The next of them.
    next: AtomicUsize,
    /// How many are not filled yet.
    left: AtomicUsize,
    has_ended: AtomicBool,
    /// Bytes that are in place.
    filled: Counter,
}

#[derive(Debug, Default)]
struct Queue {
    faults: VecDeque<(Arc<Memory>, u64)>,
    /// All processes are restored.
    may_fill_all: bool,
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
            left: AtomicUsize::new(units.len()),
            units,
            filled,
            ..Self::default()
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process waits for the page of this address.
    pub(super) fn add_fault(&self, memory: &Arc<Memory>, address: u64) {
        self.queue().faults.push_back((Arc::clone(memory), address));
        self.changed.notify_all();
    }

    /// All processes are restored.
    pub(super) fn fill_all(&self) {
        self.queue().may_fill_all = true;
        self.changed.notify_all();
    }

    /// Has the threads end.
    pub(super) fn end(&self) {
        let _queue = self.queue();
        self.has_ended.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Whether every unit is filled.
    pub(super) fn is_done(&self) -> bool {
        self.left.load(Ordering::Acquire) == 0
    }

    /// Waits until something is there that `take` takes; `None` at the end.
    fn wait_for<T>(&self, mut take: impl FnMut(&mut Queue) -> Option<T>) -> Option<T> {
        let mut queue = self.queue();
        loop {
            if self.has_ended() {
                return None;
            }
            if let Some(taken) = take(&mut queue) {
                return Some(taken);
            }
            queue = self
                .changed
                .wait(queue)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Fills what processes wait for, until the end. `all_filled` is called when that was the last.
    pub(super) fn answer_faults(&self, mut all_filled: impl FnMut()) -> Result<()> {
        let mut buffer = Vec::new();
        while let Some((memory, address)) = self.wait_for(|queue| queue.faults.pop_front()) {
            // One that somebody has taken is on its way.
            if let Answer::Fill(offset) = memory.answer(address)?
                && let Some(taken) = memory.pages.take_at(offset)
            {
                self.fill(&memory.pages, taken, &mut buffer, &mut all_filled)?;
            }
        }
        Ok(())
    }

    /// Fills all.
    pub(super) fn fill_in_order(&self, mut all_filled: impl FnMut()) -> Result<()> {
        let mut buffer = Vec::new();
        let may_fill_all = |queue: &mut Queue| queue.may_fill_all.then_some(());
        if self.wait_for(may_fill_all).is_none() {
            return Ok(());
        }
        while !self.has_ended()
            && let Some((file, unit)) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed))
        {
            if let Some(taken) = file.take(*unit) {
                self.fill(file, taken, &mut buffer, &mut all_filled)?;
            }
        }
        Ok(())
    }

    fn fill(
        &self,
        file: &PagesFile,
        taken: Taken,
        buffer: &mut Vec<u8>,
        all_filled: &mut impl FnMut(),
    ) -> Result<()> {
        let bytes = file.fill(taken, buffer)?;
        self.filled.add(bytes as u64);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 && self.queue().may_fill_all {
            all_filled();
        }
        Ok(())
    }
}
