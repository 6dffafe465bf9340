//! The memory of one process that is being filled.
//!
//! **Order.** What the process does with its memory (`mremap`, `munmap`, `madvise`, `fork`) it does
//! first, and waits until the event is read. Until then the kernel lets nobody fill pages
//! (`EAGAIN`). So events are read and applied with the memory locked for writing, and pages are
//! filled with it locked for reading: nothing is ever copied to an address that has changed.
//!
//! **The end.** The descriptor is closed when nothing is missing any more, or the process is gone:
//! what is missing when the last descriptor is closed reads as zero.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;

use super::missing::{Missing, Part};
use super::pages::PagesFile;
use super::userfaultfd::{self, Event};
use crate::os::memory::page_size;

/// Bytes filled at a time: events are read in between.
const CHUNK: u64 = 256 << 10;

/// Until the kernel is asked again that wanted an event to be read first.
const EVENT_PAUSE: Duration = Duration::from_micros(20);

/// The memory of a process.
#[derive(Debug)]
pub(super) struct Memory {
    /// The process's number, or that of the one it has come from by forking, as the image has it.
    pub(super) pid: i32,
    /// Memory that its parent keeps to itself (`MADV_DONTFORK`) it has not.
    is_forked: bool,
    /// Where its pages are.
    pub(super) pages: Arc<PagesFile>,
    state: RwLock<State>,
}

#[derive(Debug)]
struct State {
    /// `None` when nothing is missing any more, or the process is gone.
    uffd: Option<OwnedFd>,
    missing: Missing,
    /// What forked children do not get.
    unforked: Vec<Range<u64>>,
    /// Where memory was that has moved.
    vacated: Vec<Range<u64>>,
}

impl Memory {
    /// The memory of a process that CRIU restores.
    pub(super) fn restored(pid: i32, uffd: OwnedFd, pages: &Arc<PagesFile>) -> Arc<Self> {
        let state = State {
            uffd: Some(uffd),
            missing: pages.missing(),
            unforked: Vec::new(),
            vacated: Vec::new(),
        };
        Self::new(pid, false, pages, state)
    }

    fn new(pid: i32, is_forked: bool, pages: &Arc<PagesFile>, state: State) -> Arc<Self> {
        let memory = Arc::new(Self {
            pid,
            is_forked,
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

    /// Has a look at the descriptor, if the memory is still to be filled.
    pub(super) fn with_uffd<T>(&self, look: impl FnOnce(BorrowedFd) -> T) -> Option<T> {
        self.read().uffd.as_ref().map(|uffd| look(uffd.as_fd()))
    }

    /// What is not given to forked children from now on.
    pub(super) fn keep_from_children(&self, unforked: Vec<Range<u64>>) {
        self.write().unforked = unforked;
    }

    /// Closes the descriptor if nothing is missing; returns whether it is closed.
    pub(super) fn close_if_filled(&self) -> bool {
        let mut state = self.write();
        if state.missing.is_empty() {
            state.uffd = None;
        }
        state.uffd.is_none()
    }

    /// Fills what is missing of these bytes, which begin at `offset` in the pages file.
    pub(super) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let places = offset..offset + bytes.len() as u64;
        let mut most = CHUNK;
        loop {
            let state = self.read();
            let (Some(uffd), Some(part)) = (&state.uffd, state.missing.first_of(&places)) else {
                return Ok(());
            };
            let len = part.len.min(most);
            let from = (part.offset - offset) as usize;
            let bytes = &bytes[from..from + len as usize];
            let copied = userfaultfd::copy(uffd.as_fd(), part.address, bytes);
            drop(state);
            let page = page_size() as u64;
            let copied = match copied {
                Ok(copied) => copied,
                Err(Errno::EEXIST) => page,
                // One call fills within one mapping (VMA) only.
                Err(Errno::ENOENT) if len > page => {
                    most = (len / 2).next_multiple_of(page);
                    continue;
                }
                // It has no such memory, and can lose none of it.
                Err(Errno::ENOENT) if self.is_forked => page,
                Err(error) => {
                    self.handle(error).with_context(|| {
                        format!("filling the memory of process {} at {part:x?}", self.pid)
                    })?;
                    continue;
                }
            };
            most = CHUNK;
            let filled = part.offset..part.offset + copied;
            self.write().missing.filled(&filled);
        }
    }

    /// The place that a fault needs. Where nothing of the image is missing, the page is zero.
    pub(super) fn answer(&self, address: u64) -> Result<Option<u64>> {
        let page = page_size() as u64;
        let address = address / page * page;
        loop {
            let state = self.read();
            let Some(uffd) = &state.uffd else {
                return Ok(None);
            };
            if let Some(offset) = state.missing.offset_of(address) {
                return Ok(Some(offset));
            }
            match userfaultfd::zero(uffd.as_fd(), address) {
                Ok(()) => return Ok(None),
                // It is there, or the address is gone: the thread finds out.
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

    /// # Errors
    /// When there is no other way than to fail.
    fn handle(&self, error: Errno) -> Result<()> {
        match error {
            Errno::EAGAIN => thread::sleep(EVENT_PAUSE),
            Errno::ESRCH | Errno::ENOSPC if self.with_uffd(userfaultfd::is_gone) != Some(false) => {
                let mut state = self.write();
                state.uffd = None;
                state.missing = Missing::default();
            }
            Errno::ENOENT => bail!("CRIU has not registered it (ENOENT)"),
            error => return Err(error.into()),
        }
        Ok(())
    }

    /// Reads what the process has done, and returns the addresses of the pages that it waits for,
    /// and the children that it has forked.
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
                Event::Remap { from, to, len } => state.remap(from, to, len)?,
            }
        }
        Ok((faults, forked))
    }
}

impl State {
    /// The memory of a child. It is known to the pages before the parent's is filled any further.
    fn fork(&self, parent: &Memory, uffd: OwnedFd) -> Arc<Memory> {
        let mut missing = self.missing.clone();
        for addresses in &self.unforked {
            missing.take(addresses);
        }
        let state = State {
            uffd: Some(uffd),
            missing,
            unforked: self.unforked.clone(),
            vacated: self.vacated.clone(),
        };
        Memory::new(parent.pid, true, &parent.pages, state)
    }

    /// Of memory that has moved, the kernel says later that it is unmapped. Another thread may have
    /// moved other memory there by then.
    fn unmap(&mut self, addresses: &Range<u64>) {
        match self.vacated.iter().position(|vacated| vacated == addresses) {
            Some(index) => drop(self.vacated.swap_remove(index)),
            None => drop(self.missing.take(addresses)),
        }
    }

    fn remap(&mut self, from: u64, to: u64, len: u64) -> Result<()> {
        let moved = self.missing.take(&(from..from + len));
        self.vacated.push(from..from + len);
        // What was there is unmapped, and that was read before, unless two threads were at it.
        ensure!(
            self.missing.take(&(to..to + len)).is_empty(),
            "two threads moved memory to {to:#x} at the same time, and nothing tells which was first"
        );
        for part in moved {
            let address = part.address - from + to;
            self.missing.insert(Part { address, ..part });
        }
        Ok(())
    }
}
