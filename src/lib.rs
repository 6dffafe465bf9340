//! Streams CRIU checkpoint images between CRIU and ordinary UNIX pipes.
//!
//! The modules in the order of the data. Each uses only those below it:
//!
//! * `commands`: capture, extract, serve, list and hook; each wires its parts, and reports
//! * `cli`: the command line, as typed and as checked
//! * `capture`: from CRIU's pipes to the shards, or first to a buffer
//! * `receive`: from the shards to a store
//! * `serve`: from memory to CRIU's pipes
//! * `lazy`: from memory into the processes that CRIU has restored
//! * `store`: where received files go: memory, disk, external files, or nowhere
//! * `listen_ports`: changes the ports that the application listens on
//! * `criu`: the socket over which CRIU asks for files and passes pipes
//! * `supervision`: all that can end a transfer: signals, pumps, commands
//! * `report`: progress lines, the bar and notices, and the outcome file
//! * `format`: the image format: markers, names of files, and the process that captured an image
//! * `pace`: when to look again, and why
//! * `os`: pipes, epoll, descriptors
//! * [`fuzzing`]: what the fuzz targets call
//!
//! docs/protocol.md is the specification of CRIU's side and of the format.

mod capture;
mod cli;
mod commands;
mod criu;
mod format;
pub mod fuzzing;
mod lazy;
mod listen_ports;
mod os;
mod pace;
mod receive;
mod report;
mod serve;
mod store;
mod supervision;

pub use cli::Args;
use cli::Plan;
pub use commands::exit_status;
pub use supervision::Failure;

/// Does what the command line says.
///
/// # Errors
/// When not all of it worked.
pub fn run() -> Result<(), Failure> {
    match cli::parse()? {
        Some(args) => commands::run(Plan::new(args)?),
        None => commands::run_hook(),
    }
}
