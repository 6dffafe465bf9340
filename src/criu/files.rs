//! What is known of CRIU's image files by their names.

/// CRIU reads this file first, and restores nothing without it.
pub(crate) const INVENTORY: &str = "inventory.img";

/// Whether a file holds memory of the application: large, and read once, front to back.
pub(crate) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}
