//! Counts and times ([`meter`], [`times`]), lines and files for programs ([`progress`],
//! `statistics`), the bar and notices for people (`bar`, `notice`), and the outcome of a streamer
//! in the background ([`outcome`]).

pub(crate) mod bar;
pub mod meter;
pub(crate) mod milestone;
pub(crate) mod notice;
pub(crate) mod outcome;
pub(crate) mod progress;
pub(crate) mod statistics;
pub mod times;

pub(crate) use notice::{error, tell, warn, write_patiently};
