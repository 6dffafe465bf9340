//! The image format, without any I/O: the markers on the shards, and the names of image files.
//!
//! Everything here may come from a hostile or damaged stream, so each defect has an error of its
//! own; the caller adds the shard and the offset.

pub mod marker;
mod name;

pub use marker::{Body, Marker, pad, proto};
pub use name::ImageName;
