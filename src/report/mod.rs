//! What is told to programs ([`progress`]) and to people ([`bar`], [`notice`]).

pub mod bar;
pub mod notice;
pub mod progress;
