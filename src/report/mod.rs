//! What is counted ([`meter`]), and what is told to programs ([`progress`]) and to people ([`bar`],
//! [`notice`]).

pub mod bar;
pub mod meter;
pub mod notice;
pub mod progress;
