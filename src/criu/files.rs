//! What is known of CRIU's image files by their names.

/// CRIU reads this file first, and restores nothing without it. It sends it last, and only when the
/// dump succeeded.
pub(crate) const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the
/// application.
pub(crate) const CPUINFO: &str = "cpuinfo.img";
