//! What the program promises of any input whatever, as functions of that input: the fuzz targets in
//! `fuzz/` and the bounded deterministic runs of `tests/fuzz_inputs.rs` call the same ones.
//!
//! Each compares the program with a reference that is as simple as can be, and panics where they
//! differ. The references share no code with the program but for prost.

pub mod criu_messages;
pub mod files_img;
pub mod marker_stream;

/// A target: what `fuzz/` calls it, and what it does with one input.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: [Target; 3] = [
    ("marker_stream", marker_stream::run),
    ("criu_messages", criu_messages::run),
    ("files_img", files_img::run),
];
