//! Processes of this machine, told apart from those of others and from later ones of the same
//! number.

use std::fs;
use std::os::unix::fs::MetadataExt;

/// Which process something comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Origin {
    /// The kernel's name for the time since this machine was started.
    pub boot: String,
    /// The inode of the PID namespace that `pid` counts in.
    pub pid_namespace: u64,
    pub pid: u32,
    /// When the process was started, in clock ticks since the machine was.
    pub start: u64,
}

impl Origin {
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

    /// Whether the process may be running on this machine. One in another PID namespace is out of
    /// sight, and may be.
    pub(crate) fn may_be_running(&self) -> bool {
        Self::own().is_none_or(|own| {
            own.boot == self.boot
                && (own.pid_namespace != self.pid_namespace
                    || start_of(self.pid) == Some(self.start))
        })
    }
}

/// Field 22 of /proc/PID/stat. The fields behind the name, which ends with the last parenthesis,
/// start with the third (proc(5)).
fn start_of(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_running_until_it_has_ended() {
        let own = Origin::own().unwrap();
        assert!(own.may_be_running());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let other = Origin {
            pid: child.id(),
            start: start_of(child.id()).unwrap(),
            ..own.clone()
        };
        assert!(other.may_be_running());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(!other.may_be_running());
        let earlier = Origin {
            start: own.start - 1,
            ..own.clone()
        };
        assert!(!earlier.may_be_running());
        let elsewhere = Origin {
            boot: "another".into(),
            ..own.clone()
        };
        assert!(!elsewhere.may_be_running());
        let hidden = Origin {
            pid_namespace: 1,
            ..own
        };
        assert!(hidden.may_be_running());
    }
}
