//! All integration tests, as one program: each module names the promise that it tests.
//!
//! `cargo test splice` and `cargo test campaign` run a module alone. The tests run side by side as
//! threads of this process, so none may change what belongs to the process: its directory,
//! environment, umask or limits. Descriptors stay close-on-exec, as the child of another test may
//! be started at any moment.

/// The parties around the streamer, simulated: CRIU, shards, images. The benchmark uses them too.
mod common;
/// A machine with a real CRIU for each test that wants one.
mod criu;
/// What the program promises of any input whatever, as functions of the input.
mod fuzzing;

/// A kernel whose splice loses or mixes up data is found out: `cargo test splice`.
mod splice;

/// Shards and external files are whatever a shell can redirect.
mod any_descriptor;
/// `capture --buffer`: nobody waits for the shards, and the application least of all.
mod buffer;
/// `capture`: every byte of CRIU's files comes to the shards, whatever a shard does.
mod capture;
/// The command line: what is accepted, and how the rest is refused.
mod cli;
/// A capture ends when its readers have taken everything.
mod drain;
/// A dump that falls short is refused, and named.
mod dumps;
/// External files by commands: started in time, waited for, and their failures are ours.
mod external_command;
/// `extract`: a whole image comes to the disk, or nothing.
mod extract;
/// Images of the original program are read, and ours look like them.
mod fixtures;
/// `serve --lazy-pages`: CRIU gets what cannot wait, and nothing of a pagemap that is none.
mod lazy;
/// Ordinary users and exhausted limits: slower or a clear error.
mod limits;
/// `list`: what is in a whole image, and nothing of a broken one.
mod list;
/// An image that does not fit is refused before the machine suffers.
mod memory_cgroup;
/// The streamer starts CRIU: one exit status tells of both.
mod one_command;
/// Progress lines: what supervisors read.
mod progress;
/// The progress bar: what people see.
mod progress_bar;
/// Listening TCP ports change, and nothing else.
mod remap;
/// What was captured is what is restored.
mod round_trip;
/// `serve`: the whole image is there for CRIU, like a file system, and only a whole one.
mod serve;
/// Shard commands: success means that every command has succeeded.
mod shard_cmd;
/// The socket lets CRIU in, and no stranger does harm there.
mod socket;
/// What a transfer waited for, told at its end.
mod statistics;

/// Faults at random moments, hundreds of times.
mod campaign;
/// One fault at a time: killed, stopped, half done, replaced.
mod faults;
/// The fuzz targets on inputs that are the same each time.
mod fuzz_inputs;
/// Broken and hostile images are refused, with the place of the defect.
mod hostile;

/// The same at any pace, with every fault, thousands of times.
mod arriving;
/// An image with an index is served while it arrives, and never if it is damaged.
mod index;

/// Containers, with runc.
mod containers;
/// What streams cannot restore comes back from memory, which is given back meanwhile.
mod from_memory;
/// CRIU starts the streamer through its hook, and waits for it while nothing runs.
mod hook;
/// `make install` and `make deb`.
mod installation;
/// Live migration between two hosts.
mod migration;
/// The README's commands and recipes, as they stand there, with a real CRIU.
mod readme;
/// What CRIU can restore alone, it can restore through the streamer.
mod real_criu;
/// An application goes on when its memory is copied, and neither it nor its image minds.
mod real_criu_buffer;
/// A real CRIU's dumps and restores that fail leave the application unharmed.
mod real_criu_failures;
/// A damaged image with an index leaves nothing running.
mod real_criu_index;
/// A real CRIU's restore that runs at once, and is never wrong.
mod real_criu_lazy;
/// A real CRIU that the streamer starts: interrupted and failed checkpoints harm no one.
mod real_criu_one_command;
/// A real CRIU that delivers less than a dump is found out.
mod real_criu_partial;
/// The object store recipe, with the real AWS command line.
mod s3;
/// A supervisor's whole cycle, and the example script that stands in for one.
mod supervisors;
