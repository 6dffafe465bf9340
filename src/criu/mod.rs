//! CRIU's side of the streamer: a UNIX socket over which CRIU names files and passes the pipes that
//! carry them.
//!
//! ```text
//! capture                                   serve
//! CRIU                      streamer        CRIU                       streamer
//!  | length, request(name) ------>|          | length, request(name) ------->|
//!  | 1 byte + pipe's read end --->|          |<------ length, reply(exists)  |
//!  | (writes the file into it)    |          | 1 byte + pipe's write end --->|  only if it exists
//!                                            | (reads the file from it)      |
//! ```
//!
//! All processes of one `criu` share one connection, and a mutex of theirs orders the requests. The
//! end of the connection means that no further file will be asked for; the pipes that are open then
//! go on.
//!
//! [`Listener`] lets peers in, [`Connection`] speaks to one of them. [`hook_caller`] is a CRIU that
//! has started this program, and [`CommandLine`] shows what a CRIU is at. [`files`] knows image
//! files by name, [`framing`] by their bytes, and [`messages`] takes them apart.

mod clients;
mod command_line;
mod connection;
pub(crate) mod files;
pub(crate) mod framing;
pub(crate) mod hook_caller;
mod listener;
pub(crate) mod messages;

pub(crate) use clients::Clients;
pub(crate) use command_line::CommandLine;
pub use connection::{Connection, Message, proto};
pub use listener::{Listener, Role};
