//! The thread that hears CRIU and the restored processes: what they are, what they do with their
//! memory, and what they wait for.

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::Shared;
use super::guardian::Layout;
use super::memory::Memory;
use super::pages::PagesFile;
use super::socket::{Connection, Message};

/// The numbers of what is watched; those of memories follow.
const CONNECTION: u64 = 0;
const GUARDIAN: u64 = 1;
const CRIU: u64 = 2;
const END: u64 = 3;
const MEMORIES: u64 = 4;

/// Events taken at a time.
const BATCH: usize = 64;

/// What is watched, and who is known.
pub(super) struct Ear<'a> {
    shared: &'a Shared,
    epoll: Epoll,
    criu: OwnedFd,
    connection: Option<Connection>,
    /// Each process that is restored, by its number in the image, with that here.
    restored: HashMap<i32, u32>,
    memories: Vec<Arc<Memory>>,
    is_finished: bool,
}

impl<'a> Ear<'a> {
    pub(super) fn new(shared: &'a Shared, criu: OwnedFd) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let ear = Self {
            shared,
            epoll,
            criu,
            connection: None,
            restored: HashMap::new(),
            memories: Vec::new(),
            is_finished: false,
        };
        ear.watch(&shared.socket, CONNECTION)?;
        ear.watch(&shared.guardian, GUARDIAN)?;
        ear.watch(&ear.criu, CRIU)?;
        ear.watch(&shared.end, END)?;
        Ok(ear)
    }

    fn watch(&self, fd: impl AsFd, number: u64) -> Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN, number);
        self.epoll
            .add(fd, event)
            .context("preparing to wait for events")
    }

    /// Hears all until the end.
    pub(super) fn hear(mut self) -> Result<()> {
        let mut events = [EpollEvent::empty(); BATCH];
        loop {
            let count = match self.epoll.wait(&mut events, EpollTimeout::NONE) {
                Err(Errno::EINTR) => continue,
                count => count.context("waiting for events")?,
            };
            for event in &events[..count] {
                match event.data() {
                    CONNECTION => self.hear_criu()?,
                    GUARDIAN => bail!("the guardian of the application was killed"),
                    CRIU if self.is_finished => self.epoll.delete(&self.criu)?,
                    CRIU => {
                        self.hear_criu()?;
                        ensure!(self.is_finished, "CRIU ended before all was restored");
                    }
                    END => return Ok(()),
                    number => self.hear_memory((number - MEMORIES) as usize)?,
                }
            }
        }
    }

    fn hear_criu(&mut self) -> Result<()> {
        if self.connection.is_none() {
            self.connection = self.shared.accept()?;
            if let Some(connection) = &self.connection {
                self.watch(connection, CONNECTION)?;
            }
        }
        while let Some(connection) = &mut self.connection
            && let Some(message) = connection.receive()?
        {
            match message {
                Message::Process {
                    pid,
                    real_pid,
                    process,
                    uffd,
                } => {
                    self.shared.guardian.record().add(process)?;
                    self.restored.insert(pid, real_pid);
                    let pages = self.shared.files.get(&pid).cloned();
                    // One that has no lazy pages may still touch memory that is not in the image.
                    let pages = pages.unwrap_or_else(|| Arc::new(PagesFile::default()));
                    self.add(Memory::restored(pid, uffd, pages))?;
                }
                Message::Finished => self.finish()?,
                Message::Closed => {
                    ensure!(
                        self.is_finished,
                        "CRIU closed its connection before all was restored: see CRIU's log"
                    );
                    self.connection = None;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, memory: Arc<Memory>) -> Result<()> {
        if self.is_finished && memory.close_if_filled() {
            return Ok(());
        }
        let number = MEMORIES + self.memories.len() as u64;
        memory
            .with_uffd(|uffd| self.watch(uffd, number))
            .transpose()?;
        self.memories.push(memory);
        Ok(())
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
        self.shared.work.fill_all();
        if self.shared.work.is_done() {
            self.shared.all_filled();
        }
        Ok(())
    }

    fn hear_memory(&mut self, index: usize) -> Result<()> {
        let memory = Arc::clone(&self.memories[index]);
        let needs = memory.read_events()?;
        for child in needs.forked {
            self.add(child)?;
        }
        for address in needs.faults {
            self.shared.work.add_fault(&memory, address);
        }
        Ok(())
    }
}

/// Memory that a process does not hand on to its children as it is: `MADV_DONTFORK`,
/// `MADV_WIPEONFORK`.
fn unforked(pid: u32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let mut unforked = Vec::new();
    let mut addresses = 0..0;
    for line in maps.lines() {
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if flags.split(' ').any(|flag| ["dc", "wf"].contains(&flag)) {
                unforked.push(addresses.clone());
            }
        } else if let Some((range, _)) = line.split_once(' ')
            && let Some((start, end)) = range.split_once('-')
            && let (Ok(start), Ok(end)) =
                (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            addresses = start..end;
        }
    }
    unforked
}
