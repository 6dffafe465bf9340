//! The thread that hears CRIU, and from the restored processes the changes of their memory and the
//! faults.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use crossbeam_channel::Sender;

use super::guardian::process;
use super::memory::Memory;
use super::socket::{Connection, Message};
use super::{Fault, Shared, spawn};
use crate::os::poller::{Interest, Poller, Wait, Watched};

/// The sources of all events, and the processes that are known.
pub(super) struct Events<'a> {
    shared: &'a Arc<Shared>,
    poller: Poller,
    criu: OwnedFd,
    connection: Connection,
    faults: Sender<Fault>,
    /// The PID here of each restored process, by its PID in the image.
    restored: BTreeMap<i32, u32>,
    memories: Vec<Arc<Memory>>,
    is_finished: bool,
}

impl<'a> Events<'a> {
    /// Acts on all events, for as long as this program runs.
    pub(super) fn hear(
        shared: &'a Arc<Shared>,
        criu: OwnedFd,
        connection: Connection,
        faults: Sender<Fault>,
    ) -> Result<()> {
        let mut events = Self {
            shared,
            poller: Poller::new()?,
            criu,
            connection,
            faults,
            restored: BTreeMap::new(),
            memories: Vec::new(),
            is_finished: false,
        };
        events.watch(&events.connection, Watched::Client, 0)?;
        events.watch(&shared.guardian, Watched::Interrupt, 0)?;
        events.watch(&events.criu, Watched::Caller, 0)?;
        let mut found = Vec::new();
        loop {
            let waited = events.poller.wait(Wait::Forever, &mut found);
            waited.context("waiting for events")?;
            for event in &found {
                match event.kind {
                    Watched::Interrupt => bail!("the guardian of the application was killed"),
                    Watched::Memory => events.hear_memory(event.id as usize)?,
                    Watched::Caller if events.is_finished => events.poller.remove(&events.criu),
                    // Its last messages are heard first.
                    Watched::Caller if !events.connection.has_more()? => {
                        bail!("CRIU ended before all was restored")
                    }
                    _ => events.hear_criu()?,
                }
            }
        }
    }

    fn watch(&self, fd: impl AsFd, kind: Watched, number: usize) -> Result<()> {
        let watched = self.poller.add(fd, kind, number as u64, Interest::Readable);
        watched.context("preparing to wait for events")
    }

    /// Acts on a message of CRIU's, or on the end of its connection, which comes when CRIU and all
    /// processes that it restores have ended.
    fn hear_criu(&mut self) -> Result<()> {
        match self.connection.receive()? {
            Message::Process {
                pid,
                real_pid,
                uffd,
            } => {
                let process = process(real_pid)
                    .with_context(|| format!("watching process {pid}, which CRIU restores"))?;
                self.shared.guardian.add(process)?;
                self.restored.insert(pid, real_pid as u32);
                // A process without lazy pages may still touch memory that is not in the image.
                let pages = self.shared.files.get(&pid);
                let pages = pages.unwrap_or(&self.shared.nothing);
                self.add(Memory::restored(pid, uffd, pages))
            }
            Message::Zombie => Ok(()),
            Message::Finished => self.finish(),
            Message::Closed => {
                ensure!(
                    self.is_finished,
                    "CRIU ended its connection before all was restored: see CRIU's log"
                );
                self.poller.remove(&self.connection);
                Ok(())
            }
        }
    }

    fn add(&mut self, memory: Arc<Memory>) -> Result<()> {
        let number = self.memories.len();
        let watched = memory.with_uffd(|uffd| self.watch(uffd, Watched::Memory, number));
        self.memories.push(memory);
        watched.unwrap_or(Ok(()))
    }

    /// Starts to fill: all processes are restored, and go on. None can have forked before the next
    /// event is read.
    fn finish(&mut self) -> Result<()> {
        for pid in self.shared.files.keys() {
            ensure!(
                self.restored.contains_key(pid),
                "CRIU has restored no process {pid}, which the image has"
            );
        }
        for memory in &self.memories {
            let pid = self.restored[&memory.pid];
            self.shared.guardian.add_layout(pid)?;
            memory.keep_from_children(&unforked(pid));
        }
        self.is_finished = true;
        (0..super::fillers())
            .try_for_each(|_| spawn("filler", self.shared, |shared| shared.fill_in_order()))
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

/// The memory that children of a process get without its contents, or not at all:
/// `MADV_WIPEONFORK`, `MADV_DONTFORK`.
fn unforked(pid: u32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let addresses_of = |line: &str| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        let number = |text| u64::from_str_radix(text, 16).ok();
        Some(number(start)?..number(end)?)
    };
    let (mut unforked, mut addresses) = (Vec::new(), 0..0);
    for line in maps.lines() {
        if let Some(mapping) = addresses_of(line) {
            addresses = mapping;
        } else if line.starts_with("VmFlags:") && (line.contains(" dc") || line.contains(" wf")) {
            unforked.push(addresses.clone());
        }
    }
    unforked
}
