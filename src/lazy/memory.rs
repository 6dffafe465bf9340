//! The memory of one process that is being filled.
//!
//! **Order.** The process changes its memory (`mremap`, `munmap`, `madvise`, `fork`), and then
//! waits until the event is read. From before the change until then the kernel refuses to fill
//! pages (`EAGAIN`). So events are read and applied with the memory locked for writing, and pages
//! are filled with it locked for reading: nothing is ever copied to an address that has changed.
//!
//! The kernel queues an event after it has unlocked the process's memory. Another thread's change,
//! although later, may then be read earlier. So events are read until the kernel agrees, at an
//! instant when no change is under way, that memory is where it has arrived, and is no longer where
//! it has arrived and left. If it does not, the order is lost, and the application is killed. Pages
//! that are only dropped (`MADV_DONTNEED`) stay where they are, and need no such check: that a fork
//! is read on the wrong side of it means that neither call had returned when the other began, so
//! that the child may find either what was there or zeros.
//!
//! **The end.** The descriptor is closed when nothing is missing any more, or the process has
//! ended: pages that are missing when the last descriptor is closed read as zero.

use std::mem;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use super::parts::{Part, Parts};
use super::userfaultfd::{self, Event};
use crate::os::memory::page_size;

/// The pause before the kernel is asked again that wanted an event to be read first.
const EVENT_PAUSE: Duration = Duration::from_micros(20);

/// The memories of a process and of all that it has forked since, which lack the same pages.
#[derive(Debug, Default)]
pub(super) struct Family(Mutex<Vec<Arc<Memory>>>);

/// The memory of a process.
#[derive(Debug)]
pub(super) struct Memory {
    /// The PID in the image: that of the process, or of the one that it was forked from.
    pub(super) pid: i32,
    /// The PID here of that process.
    pub(super) real_pid: u32,
    family: Arc<Family>,
    state: RwLock<State>,
}

/// An address whose page a process waits for.
pub(super) type Fault = (Arc<Memory>, u64);

/// The news of a process, and of those that it has just forked.
#[derive(Debug, Default)]
pub(super) struct News {
    pub(super) faults: Vec<Fault>,
    pub(super) forked: Vec<Arc<Memory>>,
}

#[derive(Debug)]
struct State {
    /// `None` when nothing is missing any more, or the process has ended.
    uffd: Option<OwnedFd>,
    /// Pages are filled, and taken out, by several threads that lock the state for reading.
    missing: Mutex<Parts>,
    /// Places in the pages file that forked children do not get, wherever they have moved.
    unforked: Vec<Range<u64>>,
    /// None but while events are read.
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

/// Never left in disorder: a panic ends the program.
pub(super) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Family {
    /// Acts on all memories, and on those that are added until then. A child is added while its
    /// parent's memory is locked, and lacks the same pages. So what was done to all, none will ever
    /// need again.
    pub(super) fn each(&self, act: impl Fn(&Memory) -> Result<()>) -> Result<()> {
        let memory = |number: usize| locked(&self.0).get(number).cloned();
        (0..).map_while(memory).try_for_each(|memory| act(&memory))
    }
}

impl Memory {
    /// The memory of a process that CRIU restores.
    pub(super) fn restored(
        pid: i32,
        real_pid: u32,
        uffd: OwnedFd,
        missing: Parts,
        family: &Arc<Family>,
    ) -> Arc<Self> {
        let memory = Arc::new(Self {
            pid,
            real_pid,
            family: Arc::clone(family),
            state: RwLock::new(State::new(uffd, missing)),
        });
        locked(&family.0).push(Arc::clone(&memory));
        memory
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends the descriptor, unless it is closed.
    pub(super) fn with_uffd<T>(&self, look: impl FnOnce(BorrowedFd) -> T) -> Option<T> {
        self.write().uffd.as_ref().map(|uffd| look(uffd.as_fd()))
    }

    /// Keeps the missing pages at these addresses from forked children.
    pub(super) fn keep_from_children(&self, addresses: &[Range<u64>]) {
        let mut state = self.write();
        let mut missing = locked(&state.missing).clone();
        let unforked = addresses.iter().flat_map(|range| missing.take(range));
        state.unforked = unforked.map(|part| part.places()).collect();
    }

    /// Closes the descriptor.
    ///
    /// # Errors
    /// When a page is missing after all.
    pub(super) fn close(&self) -> Result<()> {
        let mut state = self.write();
        ensure!(
            locked(&state.missing).is_empty(),
            "process {} lacks pages that the image does not have",
            self.pid
        );
        state.forget();
        Ok(())
    }

    /// Fills the missing ones of these pages, which begin at `offset` in the pages file.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let places = offset..offset + bytes.len() as u64;
        let page = page_size() as u64;
        let mut most = u64::MAX;
        while self.attempt(|missing, uffd| {
            let Some(part) = locked(missing).first_of(&places) else {
                return Ok(false);
            };
            let len = part.len.min(most);
            let bytes = &bytes[(part.offset - offset) as usize..][..len as usize];
            match userfaultfd::copy(uffd, part.address, bytes) {
                // One call fills within one mapping (VMA) only.
                Err(Errno::ENOENT) if len > page => most = (len / 2).next_multiple_of(page),
                copied => {
                    let filled = part.offset..part.offset + copied?;
                    locked(missing).take_places(&filled);
                    most = u64::MAX;
                }
            }
            Ok(true)
        })? {}
        Ok(())
    }

    /// Returns the place in the pages file that a fault needs, or has the page be zero where the
    /// image has none.
    pub(super) fn answer(&self, address: u64) -> Result<Option<u64>> {
        let address = address - address % page_size() as u64;
        self.attempt(|missing, uffd| {
            let place = locked(missing).offset_of(address);
            match place {
                None => userfaultfd::zero(uffd, address).map(|()| None),
                place => Ok(place),
            }
        })
    }

    /// Fills in something as soon as the kernel allows it, unless the descriptor is closed, as that
    /// of a process is that has ended.
    fn attempt<T: Default>(
        &self,
        mut fill: impl FnMut(&Mutex<Parts>, BorrowedFd) -> nix::Result<T>,
    ) -> Result<T> {
        loop {
            let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
            let Some(uffd) = &state.uffd else {
                return Ok(T::default());
            };
            let filled = fill(&state.missing, uffd.as_fd());
            drop(state);
            match filled {
                Ok(filled) => return Ok(filled),
                Err(Errno::EAGAIN) => thread::sleep(EVENT_PAUSE),
                Err(Errno::ESRCH) => self.write().forget(),
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("filling the memory of process {}", self.pid));
                }
            }
        }
    }

    /// Applies the changes that the process has made, and returns its news.
    pub(super) fn read_events(self: &Arc<Self>) -> Result<News> {
        let mut news = News::default();
        self.settle(self.write(), &mut news)
            .with_context(|| format!("following what process {} does", self.pid))?;
        Ok(news)
    }

    /// Reads events until the kernel agrees to all changes.
    ///
    /// # Errors
    /// When it does not agree. Nothing is filled, and no descriptor closed, any more: what is known
    /// of the memory is wrong, and the process is to be killed first.
    fn settle(self: &Arc<Self>, mut state: RwLockWriteGuard<State>, news: &mut News) -> Result<()> {
        let settled = self.try_settle(&mut state, news);
        if settled.is_err() {
            mem::forget(state);
        }
        settled
    }

    fn try_settle(self: &Arc<Self>, state: &mut State, news: &mut News) -> Result<()> {
        while let Some(uffd) = &state.uffd {
            let mut events = userfaultfd::read(uffd.as_fd())?.into_iter();
            let applied = events.try_for_each(|event| self.apply(event, state, news));
            if applied.is_err() {
                // A forked child's descriptor may be among the rest.
                mem::forget(events);
                return applied;
            }
            let Some(uffd) = state.uffd.as_ref().filter(|_| !state.changes.are_none()) else {
                break;
            };
            match state.changes.agree(uffd.as_fd()) {
                Ok(true) => {
                    state.changes = Changes::default();
                    break;
                }
                Ok(false) => bail!(
                    "threads of it changed the same memory at the same time, and it is not known \
                     in which order"
                ),
                Err(Errno::EAGAIN) => thread::sleep(EVENT_PAUSE),
                Err(Errno::ESRCH) => state.forget(),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn apply(self: &Arc<Self>, event: Event, state: &mut State, news: &mut News) -> Result<()> {
        match event {
            Event::Fault(address) => news.faults.push((Arc::clone(self), address)),
            Event::Fork(uffd) => self.fork(uffd, state, news)?,
            Event::Remove(addresses) => drop(state.missing().take(&addresses)),
            Event::Unmap(addresses) => state.unmap(&addresses),
            Event::Remap { from, to } => state.remap(&from, &to)?,
        }
        Ok(())
    }

    /// Adds the memory of a child to the family, before the parent's is filled further.
    fn fork(&self, uffd: OwnedFd, parent: &mut State, news: &mut News) -> Result<()> {
        let mut missing = parent.missing().clone();
        for places in &parent.unforked {
            missing.take_places(places);
        }
        // It has forked after the changes that were read, and before all others.
        let mut changes = Changes::default();
        for part in missing.iter() {
            changes.arrived.insert(Part::at(&part.addresses()));
        }
        changes.in_doubt = parent.changes.left.clone();
        let state = State {
            unforked: parent.unforked.clone(),
            changes,
            ..State::new(uffd, missing)
        };
        let child = Arc::new(Self {
            family: Arc::clone(&self.family),
            state: RwLock::new(state),
            ..*self
        });
        let state = child.write();
        locked(&self.family.0).push(Arc::clone(&child));
        child.settle(state, news)?;
        news.forked.push(Arc::clone(&child));
        Ok(())
    }
}

impl State {
    fn new(uffd: OwnedFd, missing: Parts) -> Self {
        Self {
            uffd: Some(uffd),
            missing: Mutex::new(missing),
            unforked: Vec::new(),
            changes: Changes::default(),
        }
    }

    fn missing(&mut self) -> &mut Parts {
        let missing = self.missing.get_mut();
        missing.unwrap_or_else(PoisonError::into_inner)
    }

    fn forget(&mut self) {
        self.uffd = None;
        *self.missing() = Parts::default();
    }

    /// Applies an `munmap`. The second event of an `mremap` changes nothing: another thread may
    /// have moved other memory there by then.
    fn unmap(&mut self, addresses: &Range<u64>) {
        let moved = &mut self.changes.to_be_unmapped;
        match moved.iter().position(|moved| moved == addresses) {
            Some(index) => drop(moved.swap_remove(index)),
            None => {
                self.missing().take(addresses);
                self.changes.leave(addresses);
            }
        }
    }

    fn remap(&mut self, from: &Range<u64>, to: &Range<u64>) -> Result<()> {
        let moved = self.missing().take(from);
        self.changes.leave(from);
        self.changes.to_be_unmapped.push(from.clone());
        // If something was there, its `munmap` was read before, unless two threads were at it.
        ensure!(
            self.missing().take(to).is_empty() && self.changes.arrive(to),
            "two threads moved memory to {:#x} at the same time, and nothing tells which was first",
            to.start
        );
        for part in moved {
            let address = part.address - from.start + to.start;
            self.missing().insert(Part { address, ..part });
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
    use super::super::userfaultfd::tests::{byte, map, new, remap, unmap};
    use super::*;

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
        let mut missing = Parts::default();
        missing.insert(Part {
            address: places.missing,
            offset: 0,
            len: page_size() as u64,
        });
        let memory = Memory::restored(1, 1, uffd, missing, &Arc::default());
        let events = changes.iter();
        let mut events: Vec<_> = events
            .map(|change| events_of(&memory, || change(&places)))
            .collect();
        if !in_order {
            events.rotate_left(1);
        }
        let mut news = News::default();
        let mut events = events.into_iter().flatten();
        let filled = events
            .try_for_each(|event| memory.apply(event, &mut memory.write(), &mut news))
            .and_then(|()| memory.read_events())
            .and_then(|_| memory.fill(0, &vec![7; page_size()]));
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
