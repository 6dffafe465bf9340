//! The process that captured an image, distinguished from processes of other machines and from
//! later ones of the same number.

use std::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;

use super::CapturingProcess;
use crate::os::process::start_of;

impl CapturingProcess {
    /// This process. `None` where /proc does not tell.
    pub(crate) fn own() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let pid = std::process::id();
        Some(Self {
            boot: boot.trim().to_owned(),
            pid_namespace: fs::metadata("/proc/self/ns/pid").ok()?.ino(),
            pid,
            start: start_of(pid)?,
        })
    }

    /// True if the process may be running on this machine. One in another PID namespace is out of
    /// sight, and may be.
    pub(crate) fn may_be_running(&self) -> bool {
        Self::own().is_none_or(|own| {
            own.boot == self.boot
                && (own.pid_namespace != self.pid_namespace
                    || start_of(self.pid) == Some(self.start))
        })
    }
}

impl fmt::Display for CapturingProcess {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let boot = self.boot.get(..8).unwrap_or(&self.boot).escape_debug();
        let (pid, start) = (self.pid, self.start);
        write!(f, "PID {pid}, started {start} ticks after boot {boot}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_running_until_it_has_ended() {
        let own = CapturingProcess::own().unwrap();
        assert!(own.may_be_running());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let other = CapturingProcess {
            pid: child.id(),
            start: start_of(child.id()).unwrap(),
            ..own.clone()
        };
        assert!(other.may_be_running());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!other.may_be_running());
        let earlier = CapturingProcess {
            start: own.start - 1,
            ..own.clone()
        };
        assert!(!earlier.may_be_running());
        let elsewhere = CapturingProcess {
            boot: "another".into(),
            ..own.clone()
        };
        assert!(!elsewhere.may_be_running());
        let hidden = CapturingProcess {
            pid_namespace: 1,
            ..own
        };
        assert!(hidden.may_be_running());
    }
}
