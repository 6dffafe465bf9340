//! The image format: the markers on the shards, the names of image files, and the process that
//! captured an image.
//!
//! Everything here may come from a hostile or damaged stream, so each defect has an error of its
//! own; the caller adds the shard and the offset.

pub mod marker;
mod name;
mod origin;

pub use marker::proto::Origin as CapturingProcess;
pub use marker::{Body, Marker, pad, proto};
pub use name::ImageName;
