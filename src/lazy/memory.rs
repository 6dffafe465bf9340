//! The memory of one process that is being filled.
//!
//! **Order.** The process changes its memory (`mremap`, `munmap`, `madvise`, `fork`), and then
//! waits until the event is read. From before the change until then the kernel refuses to fill
//! pages (`EAGAIN`). So events are read and applied with the memory locked for writing, and pages
//! are filled with it locked for reading: nothing is ever copied to an address that has changed.
//!
//! The kernel queues an event after it has unlocked the process's memory. Another thread's change,
//! although later, may then be read earlier. So before anything is filled after a change, the
//! kernel has to agree, at an instant when no change is under way, that memory is where it has
//! arrived, and is no longer where it has arrived and left. If it does not, the order is lost, and
//! the application is killed.
//!
//! **The end.** The descriptor is closed when nothing is missing any more, or the process has
//! ended: pages that are missing when the last descriptor is closed read as zero.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use super::pages::PagesFile;
use super::parts::{Part, Parts};
use super::userfaultfd::{self, Event};
use crate::os::memory::page_size;

/// Bytes filled at a time: events are read in between.
const CHUNK: u64 = 256 << 10;

/// The pause before the kernel is asked again that wanted an event to be read first.
const EVENT_PAUSE: Duration = Duration::from_micros(20);

/// The memory of a process.
#[derive(Debug)]
pub(super) struct Memory {
    /// The PID in the image: that of the process, or of the one that it was forked from.
    pub(super) pid: i32,
    /// The source of its pages.
    pub(super) pages: Arc<PagesFile>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    /// `None` when nothing is missing any more, or the process has ended.
    uffd: Option<OwnedFd>,
    missing: Parts,
    /// Places in the pages file that forked children do not get, wherever they have moved.
    unforked: Vec<Range<u64>>,
    changes: Changes,
}

/// The changes since the kernel last agreed to where memory is.
#[derive(Debug, Default)]
struct Changes {
    /// Places where memory has arrived.
    arrived: Parts,
    /// Places that it has left, or where it was unmapped.
    left: Parts,
    /// Those of them where it had arrived: nothing is there, unless events were out of order.
    in_doubt: Parts,
    /// Places that memory has moved from: an event that they are unmapped comes next.
    to_be_unmapped: Vec<Range<u64>>,
}

impl Memory {
    /// The memory of a process that CRIU restores.
    pub(super) fn restored(pid: i32, uffd: OwnedFd, pages: &Arc<PagesFile>) -> Arc<Self> {
        let state = State {
            uffd: Some(uffd),
            missing: pages.missing.clone(),
            unforked: Vec::new(),
            changes: Changes::default(),
        };
        Self::new(pid, pages, state)
    }

    fn new(pid: i32, pages: &Arc<PagesFile>, state: State) -> Arc<Self> {
        let memory = Arc::new(Self {
            pid,
            pages: Arc::clone(pages),
            state: RwLock::new(state),
        });
        pages.add(Arc::clone(&memory));
        memory
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends the descriptor, unless it is closed.
    pub(super) fn with_uffd<T>(&self, look: impl FnOnce(BorrowedFd) -> T) -> Option<T> {
        self.read().uffd.as_ref().map(|uffd| look(uffd.as_fd()))
    }

    /// Keeps the missing pages at these addresses from forked children.
    pub(super) fn keep_from_children(&self, addresses: &[Range<u64>]) {
        let mut state = self.write();
        let mut missing = state.missing.clone();
        let unforked = addresses.iter().flat_map(|range| missing.take(range));
        state.unforked = unforked.map(|part| part.places()).collect();
    }

    /// Waits until the kernel agrees to all changes that were read, and returns the state.
    ///
    /// # Errors
    /// When the kernel does not agree.
    fn settled(&self) -> Result<RwLockReadGuard<'_, State>> {
        loop {
            let state = self.read();
            if state.uffd.is_none() || state.changes.are_none() {
                return Ok(state);
            }
            drop(state);
            let mut state = self.write();
            let Some(uffd) = &state.uffd else { continue };
            match state.changes.agree(uffd.as_fd()) {
                Ok(agree) => {
                    ensure!(
                        agree,
                        "threads of process {} changed the same memory at the same time, and it is \
                         not known in which order",
                        self.pid
                    );
                    state.changes = Changes::default();
                }
                Err(error) => {
                    drop(state);
                    self.handle(error)?;
                }
            }
        }
    }

    /// Closes the descriptor.
    ///
    /// # Errors
    /// When a page is missing after all.
    pub(super) fn close(&self) -> Result<()> {
        loop {
            let is_missing = !self.settled()?.missing.is_empty();
            ensure!(
                !is_missing,
                "process {} lacks pages that the image does not have",
                self.pid
            );
            let mut state = self.write();
            if state.changes.in_doubt.is_empty() {
                state.forget();
                return Ok(());
            }
        }
    }

    /// Fills the missing ones of these pages, which begin at `offset` in the pages file.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let places = offset..offset + bytes.len() as u64;
        let page = page_size() as u64;
        let mut most = CHUNK;
        loop {
            let state = self.settled()?;
            let (Some(uffd), Some(part)) = (&state.uffd, state.missing.first_of(&places)) else {
                return Ok(());
            };
            let uffd = uffd.as_fd();
            let len = part.len.min(most);
            let from = (part.offset - offset) as usize;
            let copied = match userfaultfd::copy(uffd, part.address, &bytes[from..][..len as usize])
            {
                Ok(copied) => copied,
                Err(Errno::EEXIST) => page,
                // One call fills within one mapping (VMA) only.
                Err(Errno::ENOENT) if len > page => {
                    most = (len / 2).next_multiple_of(page);
                    continue;
                }
                // The memory may have been about to change.
                Err(Errno::ENOENT)
                    if is_there(uffd, &(part.address..part.address + len)) != Ok(false) =>
                {
                    continue;
                }
                Err(error) => {
                    drop(state);
                    self.handle(error).with_context(|| {
                        format!("filling the memory of process {} at {part:x?}", self.pid)
                    })?;
                    continue;
                }
            };
            drop(state);
            most = CHUNK;
            let filled = part.offset..part.offset + copied;
            self.write().missing.take_places(&filled);
        }
    }

    /// Returns the place in the pages file that a fault needs, or has the page be zero where the
    /// image has none.
    pub(super) fn answer(&self, address: u64) -> Result<Option<u64>> {
        let page = page_size() as u64;
        let address = address / page * page;
        loop {
            let state = self.settled()?;
            let Some(uffd) = &state.uffd else {
                return Ok(None);
            };
            if let Some(offset) = state.missing.offset_of(address) {
                return Ok(Some(offset));
            }
            match userfaultfd::zero(uffd.as_fd(), address) {
                Ok(()) => return Ok(None),
                // It is there, or the address is gone, as the thread will find.
                Err(Errno::EEXIST | Errno::ENOENT) => {
                    userfaultfd::wake(uffd.as_fd(), address);
                    return Ok(None);
                }
                Err(error) => {
                    drop(state);
                    self.handle(error).with_context(|| {
                        format!("giving process {} a page at {address:#x}", self.pid)
                    })?;
                }
            }
        }
    }

    /// Waits where the kernel wants it, and closes the descriptor of a process that has ended.
    ///
    /// # Errors
    /// Any other error.
    fn handle(&self, error: Errno) -> Result<()> {
        match error {
            Errno::EAGAIN => thread::sleep(EVENT_PAUSE),
            Errno::ESRCH | Errno::ENOSPC if self.with_uffd(userfaultfd::is_gone) != Some(false) => {
                self.write().forget();
            }
            Errno::ENOENT => bail!("CRIU has not registered it (ENOENT)"),
            error => return Err(error.into()),
        }
        Ok(())
    }

    /// Applies the changes that the process has made, and returns the addresses that it waits for,
    /// and its forked children.
    pub(super) fn read_events(&self) -> Result<(Vec<u64>, Vec<Arc<Memory>>)> {
        let (mut faults, mut forked) = (Vec::new(), Vec::new());
        let mut state = self.write();
        let Some(uffd) = &state.uffd else {
            return Ok((faults, forked));
        };
        let events = userfaultfd::read(uffd.as_fd())
            .with_context(|| format!("reading what process {} does", self.pid))?;
        for event in events {
            match event {
                Event::Fault(address) => faults.push(address),
                Event::Fork(uffd) => forked.push(state.fork(self, uffd)),
                Event::Remove(addresses) => drop(state.missing.take(&addresses)),
                Event::Unmap(addresses) => state.unmap(&addresses),
                Event::Remap { from, to, len } => {
                    state.remap(&(from..from + len), &(to..to + len))?
                }
            }
        }
        Ok((faults, forked))
    }
}

impl State {
    fn forget(&mut self) {
        self.uffd = None;
        self.missing = Parts::default();
        self.changes = Changes::default();
    }

    /// The memory of a child, which is known to the pages before the parent's is filled further.
    fn fork(&self, parent: &Memory, uffd: OwnedFd) -> Arc<Memory> {
        let mut missing = self.missing.clone();
        for places in &self.unforked {
            missing.take_places(places);
        }
        // It has forked after the changes that were read, and before all others.
        let mut changes = Changes::default();
        for part in missing.iter() {
            changes.arrived.insert(Part::at(&part.addresses()));
        }
        changes.in_doubt = self.changes.left.clone();
        let state = State {
            uffd: Some(uffd),
            missing,
            unforked: self.unforked.clone(),
            changes,
        };
        Memory::new(parent.pid, &parent.pages, state)
    }

    /// Applies an `munmap`. The second event of an `mremap` changes nothing: another thread may
    /// have moved other memory there by then.
    fn unmap(&mut self, addresses: &Range<u64>) {
        let moved = &mut self.changes.to_be_unmapped;
        match moved.iter().position(|moved| moved == addresses) {
            Some(index) => drop(moved.swap_remove(index)),
            None => {
                self.missing.take(addresses);
                self.changes.leave(addresses);
            }
        }
    }

    fn remap(&mut self, from: &Range<u64>, to: &Range<u64>) -> Result<()> {
        let moved = self.missing.take(from);
        self.changes.leave(from);
        self.changes.to_be_unmapped.push(from.clone());
        // If something was there, its `munmap` was read before, unless two threads were at it.
        ensure!(
            self.missing.take(to).is_empty() && self.changes.arrive(to),
            "two threads moved memory to {:#x} at the same time, and nothing tells which was first",
            to.start
        );
        for part in moved {
            let address = part.address - from.start + to.start;
            self.missing.insert(Part { address, ..part });
        }
        Ok(())
    }
}

impl Changes {
    fn are_none(&self) -> bool {
        self.arrived.is_empty() && self.left.is_empty() && self.in_doubt.is_empty()
    }

    /// Returns false if something else had arrived there.
    fn arrive(&mut self, to: &Range<u64>) -> bool {
        self.left.take(to);
        self.in_doubt.take(to);
        let is_free = self.arrived.take(to).is_empty();
        self.arrived.insert(Part::at(to));
        is_free
    }

    fn leave(&mut self, from: &Range<u64>) {
        for part in self.arrived.take(from) {
            self.in_doubt.insert(part);
        }
        self.left.take(from);
        self.left.insert(Part::at(from));
    }

    /// Returns true if the kernel agrees.
    ///
    /// # Errors
    /// `EAGAIN`, for as long as changes are under way; and `ESRCH`.
    fn agree(&self, uffd: BorrowedFd) -> nix::Result<bool> {
        let mut agree = true;
        for part in self.arrived.iter() {
            agree = agree && is_there(uffd, &part.addresses())?;
        }
        for part in self.in_doubt.iter() {
            for page in part.addresses().step_by(page_size()) {
                agree = agree && !is_there(uffd, &(page..page + page_size() as u64))?;
            }
        }
        // An error if anything has changed since.
        userfaultfd::check_settled(uffd)?;
        Ok(agree)
    }
}

/// Returns true if all of this memory is registered, maybe in several mappings.
fn is_there(uffd: BorrowedFd, addresses: &Range<u64>) -> nix::Result<bool> {
    let page = page_size() as u64;
    let Range { start, end } = *addresses;
    let half = start + ((end - start) / 2).next_multiple_of(page);
    Ok(userfaultfd::is_registered(uffd, addresses)?
        || end - start > page && is_there(uffd, &(start..half))? && is_there(uffd, &(half..end))?)
}

#[cfg(test)]
mod tests {
    use super::super::pagemap::Stretch;
    use super::super::userfaultfd::tests::{byte, map, new, remap, unmap};
    use super::*;
    use crate::store::{Arena, FileData, Piece};

    /// Places for a page of this process: where it is missing, where it is there, and two where
    /// nothing is registered.
    struct Places {
        missing: u64,
        there: u64,
        free: [u64; 2],
    }

    /// A change that a thread makes.
    type Change = fn(&Places);

    /// The events of a change.
    fn events_of(memory: &Memory, change: impl FnOnce() + Send) -> Vec<Event> {
        let mut events = Vec::new();
        thread::scope(|scope| {
            let thread = scope.spawn(change);
            while !thread.is_finished() {
                let read = memory.with_uffd(|uffd| userfaultfd::read(uffd).unwrap());
                events.extend(read.unwrap());
            }
        });
        events
    }

    /// Makes changes, and fills in what is missing. The events of the first change are read first
    /// or last. `None` where the kernel has no userfaultfd for us.
    fn fill_after(changes: &[Change], in_order: bool) -> Option<Result<Places>> {
        let uffd = new()?;
        let places = Places {
            missing: map(Some(uffd.as_fd())),
            there: map(Some(uffd.as_fd())),
            free: [map(None), map(None)],
        };
        let stretch = Stretch {
            part: Part {
                address: places.missing,
                offset: 0,
                len: page_size() as u64,
            },
            is_lazy: true,
        };
        let mut data = FileData::default();
        data.push(Piece::in_memory(&vec![7; page_size()])).unwrap();
        let file = PagesFile::divide(&[stretch], data, &mut Arena::new());
        let file = Arc::new(file.unwrap().0);
        let memory = Memory::restored(1, uffd, &file);
        let events = changes.iter();
        let mut events: Vec<_> = events
            .map(|change| events_of(&memory, || change(&places)))
            .collect();
        if !in_order {
            events.rotate_left(1);
        }
        let filled = (events.into_iter().flatten())
            .try_for_each(|event| match event {
                Event::Remap { from, to, len } => {
                    (memory.write()).remap(&(from..from + len), &(to..to + len))
                }
                Event::Unmap(addresses) => {
                    memory.write().unmap(&addresses);
                    Ok(())
                }
                event => panic!("{event:?}"),
            })
            .and_then(|()| {
                let mut units = 0..file.units();
                units.try_for_each(|unit| file.fill(unit, &mut Vec::new()).map(drop))
            });
        Some(filled.map(|()| places))
    }

    /// The kernel queues an event after it has unlocked the memory: another's may come first.
    #[test]
    fn events_out_of_order_are_found_out() {
        let unmap_there: Change = |at| unmap(at.there);
        let unmap_free: Change = |at| unmap(at.free[0]);
        let there_to_free: Change = |at| remap(at.there, at.free[0]);
        let missing_to_there: Change = |at| remap(at.missing, at.there);
        let missing_to_free: Change = |at| remap(at.missing, at.free[0]);
        let free_to_free: Change = |at| remap(at.free[0], at.free[1]);
        let there: fn(Places) -> u64 = |at| at.there;
        for (number, (changes, found)) in [
            ([unmap_there, missing_to_there], Some(there)),
            ([there_to_free, missing_to_there], Some(there)),
            ([missing_to_free, free_to_free], Some(|at| at.free[1])),
            ([missing_to_free, unmap_free], None),
        ]
        .into_iter()
        .enumerate()
        {
            let Some(places) = fill_after(&changes, true) else {
                return;
            };
            let places = places.unwrap();
            if let Some(found) = found {
                assert_eq!(byte(found(places)), 7, "{number}");
            }
            let out_of_order = fill_after(&changes, false).unwrap();
            assert!(out_of_order.is_err(), "{number}");
        }
    }

    /// One thread moves memory, and moves it back or unmaps it, before anything is filled.
    #[test]
    fn what_one_thread_does_is_in_order() {
        let back: [Change; 2] = [
            |at| remap(at.missing, at.free[0]),
            |at| remap(at.free[0], at.missing),
        ];
        let away: [Change; 3] = [
            |at| remap(at.missing, at.free[0]),
            |at| unmap(at.free[0]),
            |at| remap(at.there, at.free[0]),
        ];
        let Some(places) = fill_after(&back, true) else {
            return;
        };
        assert_eq!(byte(places.unwrap().missing), 7);
        fill_after(&away, true).unwrap().unwrap();
    }
}
