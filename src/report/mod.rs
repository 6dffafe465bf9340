//! What is counted ([`meter`]), and what is told to programs ([`progress`]), to people (`bar`,
//! `notice`), and to those who come later ([`outcome`]).

pub(crate) mod bar;
pub mod meter;
pub(crate) mod notice;
pub(crate) mod outcome;
pub(crate) mod progress;

pub(crate) use notice::{error, error_to, usage, warn, write_patiently};
