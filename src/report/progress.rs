//! The lines that supervisors wait for, and the statistics of an image.
//!
//! Supervisors parse these lines exactly, and close their end when they have seen enough. So the
//! transfer goes on when a progress descriptor is closed or full (docs/protocol.md, section 3).

use std::fs::File;
use std::os::fd::OwnedFd;

use serde::Serialize;

use super::notice::write_text;
use super::outcome::Hook;
use super::times::Times;

/// The traffic of each shard, in the order of `--shard-fds`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    pub shards: Vec<ShardStats>,
    /// Supervisors parse the line, which is the original's and has no more.
    #[serde(skip)]
    pub times: Times,
}

/// The traffic of one shard.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ShardStats {
    /// Bytes, markers and data.
    pub size: u64,
    /// Milliseconds from the start of the image's transfer to this shard's last byte.
    pub transfer_duration_millis: u64,
}

/// The descriptor that gets progress lines, and CRIU's hook.
#[derive(Debug)]
pub(crate) struct Progress {
    file: Option<File>,
    /// CRIU's hook, which gets milestones only.
    hook: Option<Hook>,
}

impl Progress {
    /// Reports to `fd`, if there is one, and to CRIU's hook, if one has started us.
    pub(crate) fn new(fd: Option<OwnedFd>, hook: Option<Hook>) -> Self {
        let file = fd.map(File::from);
        Self { file, hook }
    }

    /// CRIU's hook connects.
    pub(crate) fn hook_connects(&self, connection: OwnedFd) {
        if let Some(hook) = &self.hook {
            hook.0.replace(connection.into());
        }
    }

    /// Reports a milestone, to CRIU's hook too.
    pub(crate) fn reached(&mut self, milestone: &str) {
        self.line(milestone);
        if let Some(hook) = &self.hook {
            hook.tell(milestone);
        }
    }

    /// Reports the statistics, as one line of JSON.
    pub(crate) fn stats(&mut self, stats: &Stats) {
        self.line(&serde_json::to_string(stats).expect("plain numbers make JSON"));
    }

    /// Reports a line, but not to the hook.
    pub(crate) fn line(&mut self, line: &str) {
        self.file
            .take_if(|file| write_text(file, &format!("{line}\n")).is_err());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::milestone;
    use std::io::Read;

    #[test]
    fn lines_are_exactly_what_supervisors_parse() {
        let (mut read, write) = std::io::pipe().unwrap();
        let mut progress = Progress::new(Some(write.into()), None);
        progress.reached(milestone::SOCKET_INIT);
        progress.reached(milestone::CHECKPOINT_START);
        progress.reached(milestone::MEMORY_COPIED);
        progress.stats(&Stats {
            shards: vec![
                ShardStats {
                    size: 12,
                    transfer_duration_millis: 3,
                },
                ShardStats::default(),
            ],
            times: Times::default(),
        });
        drop(progress);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(
            text,
            "socket-init\ncheckpoint-start\nmemory-copied\n{\"shards\":[{\"size\":12,\"transfer_duration_millis\":3},{\"size\":0,\"transfer_duration_millis\":0}]}\n"
        );
    }

    #[test]
    fn a_supervisor_that_closes_its_end_early_is_ignored() {
        let (read, write) = std::io::pipe().unwrap();
        let mut progress = Progress::new(Some(write.into()), None);
        drop(read);
        progress.reached(milestone::SOCKET_INIT);
        progress.reached(milestone::CHECKPOINT_START);
    }
}
