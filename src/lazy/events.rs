//! The thread that hears CRIU and the restored processes: what they do with their memory, and what
//! they wait for.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use crossbeam_channel::Sender;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::fillers::Fault;
use super::guardian::{Layout, process};
use super::memory::Memory;
use super::pages::PagesFile;
use super::socket::{Connection, Message};
use super::{Shared, spawn};

/// The numbers of what is watched; those of memories follow.
const CONNECTION: u64 = 0;
const GUARDIAN: u64 = 1;
const CRIU: u64 = 2;
const MEMORIES: u64 = 3;

/// Events taken at a time.
const BATCH: usize = 64;

/// What is watched, and which processes are known.
pub(super) struct Events {
    shared: Arc<Shared>,
    epoll: Epoll,
    criu: OwnedFd,
    connection: Connection,
    faults: Sender<Fault>,
    /// Each process that is restored, by its number in the image, with that here.
    restored: BTreeMap<i32, u32>,
    memories: Vec<Arc<Memory>>,
    is_finished: bool,
}

impl Events {
    /// Hears all, for as long as this program runs.
    pub(super) fn hear(
        shared: Arc<Shared>,
        criu: OwnedFd,
        connection: Connection,
        faults: Sender<Fault>,
    ) -> Result<()> {
        let mut events = Self {
            shared,
            epoll: Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?,
            criu,
            connection,
            faults,
            restored: BTreeMap::new(),
            memories: Vec::new(),
            is_finished: false,
        };
        events.watch(&events.connection, CONNECTION)?;
        events.watch(&events.shared.guardian, GUARDIAN)?;
        events.watch(&events.criu, CRIU)?;
        let mut buffer = [EpollEvent::empty(); BATCH];
        loop {
            let count = match events.epoll.wait(&mut buffer, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                count => count.context("waiting for events")?,
            };
            for event in &buffer[..count] {
                events.act(event.data())?;
            }
        }
    }

    fn watch(&self, fd: impl AsFd, number: u64) -> Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number);
        let watched = self.epoll.add(fd, event);
        watched.context("preparing to wait for events")
    }

    fn act(&mut self, number: u64) -> Result<()> {
        match number {
            CONNECTION => self.hear_criu(),
            GUARDIAN => bail!("the guardian of the application was killed"),
            CRIU if self.is_finished => Ok(self.epoll.delete(&self.criu)?),
            // What it has said is heard first.
            CRIU if self.connection.has_more()? => self.hear_criu(),
            CRIU => bail!("CRIU ended before all was restored"),
            number => self.hear_memory((number - MEMORIES) as usize),
        }
    }

    /// CRIU has said something, or its connection has ended, as it does when CRIU and all that it
    /// restores end.
    fn hear_criu(&mut self) -> Result<()> {
        match self.connection.receive()? {
            Message::Process {
                pid,
                real_pid,
                uffd,
            } => {
                let process = process(real_pid)
                    .with_context(|| format!("watching process {pid}, which CRIU restores"))?;
                self.shared.guardian.record().add(process)?;
                self.restored.insert(pid, real_pid as u32);
                // One that has no lazy pages may still touch memory that is not in the image.
                let pages = self.shared.files.get(&pid).cloned();
                let pages = pages.unwrap_or_else(|| Arc::new(PagesFile::default()));
                self.add(Memory::restored(pid, uffd, &pages))
            }
            Message::Zombie => Ok(()),
            Message::Finished => self.finish(),
            Message::Closed => {
                ensure!(
                    self.is_finished,
                    "CRIU ended its connection before all was restored: see CRIU's log"
                );
                Ok(self.epoll.delete(&self.connection)?)
            }
        }
    }

    fn add(&mut self, memory: Arc<Memory>) -> Result<()> {
        if self.is_finished && memory.close_if_filled() {
            return Ok(());
        }
        let number = MEMORIES + self.memories.len() as u64;
        let watched = memory.with_uffd(|uffd| self.watch(uffd, number));
        self.memories.push(memory);
        watched.unwrap_or(Ok(()))
    }

    /// All processes are restored, and go on. None can have forked before the next event is read.
    fn finish(&mut self) -> Result<()> {
        for pid in self.shared.files.keys() {
            ensure!(
                self.restored.contains_key(pid),
                "CRIU has restored no process {pid}, which the image has"
            );
        }
        for memory in &self.memories {
            let pid = self.restored[&memory.pid];
            if let Some(layout) = Layout::of(pid) {
                self.shared.guardian.record().add_layout(&layout)?;
            }
            memory.keep_from_children(unforked(pid));
            memory.close_if_filled();
        }
        self.is_finished = true;
        for _ in 0..super::fillers() {
            spawn("filler", &self.shared, |shared| {
                shared.work.fill_in_order(|| shared.all_filled())
            })?;
        }
        if self.shared.work.is_last() {
            self.shared.all_filled();
        }
        Ok(())
    }

    fn hear_memory(&mut self, index: usize) -> Result<()> {
        let memory = Arc::clone(&self.memories[index]);
        let (faults, forked) = memory.read_events()?;
        forked.into_iter().try_for_each(|child| self.add(child))?;
        for address in faults {
            // The thread that answers them ends with this one.
            let _ = self.faults.send((Arc::clone(&memory), address));
        }
        Ok(())
    }
}

/// Memory that a process does not hand on to its children as it is: `MADV_DONTFORK`,
/// `MADV_WIPEONFORK`.
fn unforked(pid: u32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let (mut unforked, mut addresses) = (Vec::new(), 0..0);
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split(' ').any(|flag| ["dc", "wf"].contains(&flag)) {
                unforked.push(addresses.clone());
            }
        } else if let Some((start, rest)) = line.split_once('-')
            && let Some((end, _)) = rest.split_once(' ')
            && let Ok(start) = u64::from_str_radix(start, 16)
            && let Ok(end) = u64::from_str_radix(end, 16)
        {
            addresses = start..end;
        }
    }
    unforked
}
