//! The moments of a transfer that have a progress line.

/// A moment that supervisors wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Milestone {
    /// CRIU can connect.
    SocketInit,
    /// The application is frozen: the first file other than `cpuinfo.img` was requested.
    CheckpointStart,
    /// All of the dump is in our own memory, and is whole: the application may go on.
    MemoryCopied,
    /// All of the restored application's memory is filled in: it depends on us no more.
    MemoryInPlace,
}

impl Milestone {
    /// Its line.
    pub(crate) fn line(self) -> &'static str {
        match self {
            Milestone::SocketInit => "socket-init",
            Milestone::CheckpointStart => "checkpoint-start",
            Milestone::MemoryCopied => "memory-copied",
            Milestone::MemoryInPlace => "memory-in-place",
        }
    }
}
