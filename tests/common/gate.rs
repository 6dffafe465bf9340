//! A command that goes on when a test says so, in a directory of its own.

use std::fs;
use std::path::PathBuf;

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use tempfile::TempDir;

use super::wait_until;

pub struct Gate {
    dir: TempDir,
}

impl Gate {
    pub fn new() -> Self {
        let dir = TempDir::new().unwrap();
        mkfifo(&dir.path().join("gate"), Mode::S_IRWXU).unwrap();
        Self { dir }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A script that runs in the directory.
    pub fn inside(&self, script: &str) -> String {
        format!("cd '{}'; {script}", self.dir.path().display())
    }

    /// The same, behind the gate.
    pub fn script(&self, then: &str) -> String {
        self.inside(&format!("read -r _ <gate; {then}"))
    }

    pub fn open(&self) {
        fs::write(self.path("gate"), "go\n").unwrap();
    }

    /// Waits for a file with a whole line, and returns what is in it.
    #[track_caller]
    pub fn wait_for(&self, name: &str) -> String {
        let path = self.path(name);
        let read = || fs::read_to_string(&path).unwrap_or_default();
        wait_until(name, || read().ends_with('\n'));
        read()
    }
}
