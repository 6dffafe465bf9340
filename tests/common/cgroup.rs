//! A cgroup of a test's own, which ends with the test, and one that limits or counts memory.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use super::child::Limit;

pub struct Cgroup {
    path: PathBuf,
    members: File,
}

impl Cgroup {
    pub fn create_in(parent: &Path) -> io::Result<Self> {
        let path = tempfile::Builder::new()
            .prefix("criu-image-streamer-test-")
            .tempdir_in(parent)?
            .keep();
        let members = File::options().write(true).open(path.join("cgroup.procs"));
        match members {
            Ok(members) => Ok(Self { path, members }),
            Err(why) => {
                let _ = fs::remove_dir(&path);
                Err(why)
            }
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Has a child start in it.
    pub fn limit(&self) -> Limit {
        Limit::Cgroup(self.members.as_raw_fd())
    }

    /// The cgroups that processes in it have made.
    pub fn below(&self) -> Vec<PathBuf> {
        cgroups_in(&self.path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was reaped may be in it for another moment.
        let deadline = Instant::now() + Duration::from_secs(10);
        while remove(&self.path).is_err() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
        }
    }
}

fn remove(cgroup: &Path) -> io::Result<()> {
    for below in cgroups_in(cgroup) {
        remove(&below)?;
    }
    fs::remove_dir(cgroup)
}

fn cgroups_in(cgroup: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cgroup).into_iter().flatten().flatten();
    let is_cgroup = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
    entries
        .filter(is_cgroup)
        .map(|entry| entry.path())
        .collect()
}

/// A memory cgroup of our own, of either version.
pub struct MemoryCgroup {
    group: Cgroup,
    version: Version,
}

#[derive(Clone, Copy)]
enum Version {
    V1,
    V2,
}

impl MemoryCgroup {
    /// With a limit in bytes, if any, which processes in it cannot exceed by swapping.
    pub fn create(limit: Option<u64>) -> io::Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (parent, version) = if v1.join("memory.limit_in_bytes").exists() {
            (v1, Version::V1)
        } else {
            let root = Path::new("/sys/fs/cgroup");
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
            (root, Version::V2)
        };
        let group = Cgroup::create_in(parent)?;
        let (file, swapping) = match version {
            Version::V1 => ("memory.limit_in_bytes", "memory.swappiness"),
            Version::V2 => ("memory.max", "memory.swap.max"),
        };
        if let Some(limit) = limit {
            fs::write(group.path().join(file), limit.to_string())?;
            // Not there where the kernel does not swap.
            let _ = fs::write(group.path().join(swapping), "0");
        }
        Ok(Self { group, version })
    }

    /// Has a child start in it.
    pub fn limit(&self) -> Limit {
        self.group.limit()
    }

    /// Where a process that is to be in it writes its number.
    pub fn members(&self) -> PathBuf {
        self.group.path().join("cgroup.procs")
    }

    /// The most memory that was charged to it at a time, in bytes: that of its processes, and what
    /// they have put into pipes.
    pub fn peak(&self) -> io::Result<u64> {
        let file = match self.version {
            Version::V1 => "memory.max_usage_in_bytes",
            Version::V2 => "memory.peak",
        };
        let text = fs::read_to_string(self.group.path().join(file))?;
        text.trim().parse().map_err(io::Error::other)
    }

    /// How many processes the kernel has killed in it.
    pub fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let events = self.group.path().join(file);
        let text = fs::read_to_string(events).expect("read the cgroup's events");
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.expect("a count of kills").trim().parse().unwrap()
    }
}
