//! A cgroup of a test's own, which ends with the test.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::id;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::child::Limit;

pub struct Cgroup {
    path: PathBuf,
    members: File,
}

impl Cgroup {
    pub fn create_in(parent: &Path) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let path = parent.join(format!(
            "criu-image-streamer-test-{}-{}",
            id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        ));
        fs::create_dir(&path)?;
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
