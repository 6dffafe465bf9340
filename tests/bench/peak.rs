//! The most memory that a run takes at a time.
//!
//! What pipes hold belongs to no process, so no process's own figures tell it. A cgroup's do: the
//! kernel charges a page to the cgroup of the process that first touches it, or that writes it into
//! a pipe. The machine's free memory does not: between a run's start and its end it moved by up to
//! 1 GiB, in both directions, with nothing else at work.

use crate::common::cgroup::MemoryCgroup;
use crate::common::child::inherit;
use anyhow::{Context, Result};
use std::{fs, path::PathBuf, process::Command};

/// Counts the memory of processes that enter, from then on. Where no cgroup can be made it counts
/// nothing, and the figure is left out: that takes root, and a kernel that keeps the peak.
pub struct PeakWatch(Option<MemoryCgroup>);

impl PeakWatch {
    pub fn start() -> Self {
        let cgroup = MemoryCgroup::create(None).ok();
        Self(cgroup.filter(|cgroup| cgroup.peak().is_ok()))
    }

    /// Where a process that is to be counted writes its number, if anywhere.
    pub fn members(&self) -> Option<PathBuf> {
        self.0.as_ref().map(MemoryCgroup::members)
    }

    /// Has a command's process count from its start.
    pub fn count(&self, command: &mut Command) {
        let limits = self.0.iter().map(MemoryCgroup::limit).collect();
        inherit(command, vec![], limits);
    }

    /// Has a process count that is running already.
    pub fn add(&self, pid: u32) -> Result<()> {
        let Some(members) = self.members() else {
            return Ok(());
        };
        fs::write(&members, pid.to_string())
            .with_context(|| format!("Failed to put process {pid} into {}", members.display()))
    }

    /// Bytes so far.
    pub fn peak(&self) -> Result<Option<u64>> {
        let peak = self.0.as_ref().map(MemoryCgroup::peak).transpose();
        peak.context("Failed to read the peak of a memory cgroup")
    }
}
