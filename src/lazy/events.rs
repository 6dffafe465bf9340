//! The thread that hears CRIU, and from the restored processes the changes of their memory and the
//! faults.

use std::fs;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use crossbeam_channel::Sender;

use super::filling::Filling;
use super::memory::{Fault, Memory};
use super::socket::{self, Connection};
use crate::os::poller::{Interest, Poller, Wait, Watched};
use crate::os::process;

/// The sources of all events, and the processes that are known.
pub(super) struct Events<'a> {
    filling: &'a Arc<Filling>,
    poller: Poller,
    connection: Connection,
    faults: Sender<Fault>,
    memories: Vec<Arc<Memory>>,
    is_finished: bool,
}

impl<'a> Events<'a> {
    /// Acts on all events, for as long as this program runs.
    pub(super) fn hear(
        filling: &'a Arc<Filling>,
        criu: OwnedFd,
        connection: Connection,
    ) -> Result<()> {
        let (faults, to_answer) = crossbeam_channel::unbounded();
        filling.spawn("faults", move |filling| filling.answer(&to_answer))?;
        let mut events = Self {
            filling,
            poller: Poller::new()?,
            connection,
            faults,
            memories: Vec::new(),
            is_finished: false,
        };
        events.watch(&events.connection.0, Watched::Client, 0)?;
        events.watch(&filling.guardian.process, Watched::Interrupt, 0)?;
        events.watch(&criu, Watched::Caller, 0)?;
        let mut found = Vec::new();
        loop {
            let waited = events.poller.wait(Wait::Forever, &mut found);
            waited.context("waiting for events")?;
            for event in &found {
                match event.kind {
                    Watched::Interrupt => bail!("the guardian of the application was killed"),
                    Watched::Memory => events.hear_memory(event.id as usize)?,
                    Watched::Caller if events.is_finished => events.poller.remove(&criu),
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
            Some((socket::FINISHED, _)) => self.finish(),
            Some((..=0, _)) => Ok(()),
            Some((pid, real_pid)) => {
                let process = process::open(real_pid)
                    .with_context(|| format!("watching process {pid}, which CRIU restores"))?;
                // Known to the guardian before its userfaultfd is in the table.
                self.filling.guardian.add(process)?;
                let uffd = self.connection.receive_userfaultfd()?;
                let file = self.filling.files.get(&pid);
                let file = file.with_context(|| format!("process {pid} has no pagemap"))?;
                self.add(file.memory(pid, real_pid as u32, uffd))
            }
            None => {
                ensure!(
                    self.is_finished,
                    "CRIU ended its connection before all was restored: see CRIU's log"
                );
                self.poller.remove(&self.connection.0);
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
        for pid in self.filling.files.keys() {
            ensure!(
                self.memories.iter().any(|memory| memory.pid == *pid),
                "CRIU has restored no process {pid}, which the image has"
            );
        }
        for memory in &self.memories {
            self.filling.guardian.add_layout(memory.real_pid)?;
            memory.keep_from_children(&unforked(memory.real_pid));
        }
        self.is_finished = true;
        self.filling.start()
    }

    fn hear_memory(&mut self, index: usize) -> Result<()> {
        let news = self.memories[index].read_events()?;
        for fault in news.faults {
            // The thread that answers them ends with this one.
            let _ = self.faults.send(fault);
        }
        news.forked
            .into_iter()
            .try_for_each(|child| self.add(child))
    }
}

/// The memory that children of a process get without its contents, or not at all:
/// `MADV_WIPEONFORK`, `MADV_DONTFORK`.
fn unforked(pid: u32) -> Vec<Range<u64>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap_or_default();
    let address = |text| u64::from_str_radix(text, 16).ok();
    let mut addresses = 0..0;
    let unforked = maps.lines().filter_map(|line| {
        let (first, rest) = line.split_once(' ')?;
        if let Some((start, end)) = first.split_once('-') {
            addresses = address(start)?..address(end)?;
        }
        let is_unforked = || rest.split(' ').any(|flag| ["dc", "wf"].contains(&flag));
        (first == "VmFlags:" && is_unforked()).then(|| addresses.clone())
    });
    unforked.collect()
}
