//! What is counted ([`meter`], [`times`]), and what is told to programs ([`progress`],
//! `statistics`), to people (`bar`,
//! `notice`), and to those who come later ([`outcome`]).

pub(crate) mod bar;
pub mod meter;
pub(crate) mod notice;
pub(crate) mod outcome;
pub(crate) mod progress;
pub(crate) mod statistics;
pub mod times;

pub(crate) use notice::{error, error_to, tell, warn, write_patiently};
