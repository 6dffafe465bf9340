//! What is counted ([`meter`]), and what is told to programs ([`progress`]) and to people (`bar`,
//! `notice`).

pub(crate) mod bar;
pub mod meter;
pub(crate) mod notice;
pub(crate) mod progress;

pub(crate) use notice::{error, usage, warn, write_patiently};
