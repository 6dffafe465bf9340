//! The moments of a transfer that supervisors wait for: their progress lines.

/// CRIU can connect.
pub(crate) const SOCKET_INIT: &str = "socket-init";

/// The application is frozen: the first file other than `cpuinfo.img` was requested.
pub(crate) const CHECKPOINT_START: &str = "checkpoint-start";

/// All of the dump is in our own memory, and is whole: the application may go on.
pub(crate) const MEMORY_COPIED: &str = "memory-copied";

/// All of the restored application's memory is filled in: it depends on us no more.
pub(crate) const MEMORY_IN_PLACE: &str = "memory-in-place";
