//! CPU time and memory of all processes that take part in a run.
//!
//! The contents of pipes belong to no process, so no process's own figures have them. A cgroup's
//! do: the kernel charges a page to the cgroup of the process that first touches it, or that writes
//! it into a pipe.

use crate::common::cgroup::{Cgroup, MemoryCgroup};
use anyhow::{Context, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// Cgroups that count. Where none can be made, their figures are left out: that takes root, and a
/// kernel that keeps the peak. By default none is made.
#[derive(Default)]
pub struct Meter {
    memory: Option<MemoryCgroup>,
    /// With version 1, CPU time has a hierarchy of its own.
    cpu: Option<Cgroup>,
}

impl Meter {
    pub fn start() -> Self {
        let memory = MemoryCgroup::create(None).ok();
        Self {
            memory: memory.filter(|cgroup| cgroup.peak().is_ok()),
            cpu: Cgroup::create_in(Path::new("/sys/fs/cgroup/cpuacct")).ok(),
        }
    }

    /// The files to which a process that is to be counted writes its number.
    pub fn members(&self) -> String {
        let memory = self.memory.iter().map(MemoryCgroup::members);
        let cpu = self.cpu.iter().map(|cpu| cpu.path().join("cgroup.procs"));
        let members: Vec<_> = memory.chain(cpu).collect();
        members
            .iter()
            .map(|path| format!("{} ", path.display()))
            .collect()
    }

    /// The file with the CPU time so far.
    fn usage(&self) -> Option<PathBuf> {
        match (&self.cpu, &self.memory) {
            (Some(cpu), _) => Some(cpu.path().join("cpuacct.usage")),
            (None, Some(memory)) => Some(memory.members().with_file_name("cpu.stat")),
            (None, None) => None,
        }
    }

    pub fn cpu_s(&self) -> Result<Option<f64>> {
        let Some(path) = self.usage() else {
            return Ok(None);
        };
        let text = fs::read_to_string(path)?;
        let (number, unit) = match text.strip_prefix("usage_usec ") {
            Some(rest) => (rest.lines().next().unwrap_or_default(), 1e6),
            None => (text.trim(), 1e9),
        };
        let used: u64 = number.parse().context("Malformed CPU time of a cgroup")?;
        Ok(Some(used as f64 / unit))
    }

    pub fn peak_bytes(&self) -> Result<Option<u64>> {
        let peak = self.memory.as_ref().map(MemoryCgroup::peak).transpose();
        peak.context("Failed to read the peak of a memory cgroup")
    }
}
