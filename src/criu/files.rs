//! What is known of CRIU's image files by their names.

/// CRIU reads this file first, and restores nothing without it. A dump writes it when the memory is
/// written; a few files that were opened before are completed after it (docs/protocol.md, section
/// 1).
pub(crate) const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the
/// application.
pub(crate) const CPUINFO: &str = "cpuinfo.img";

/// Whether a file holds memory of the application: large, and read once, front to back.
pub(crate) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}
