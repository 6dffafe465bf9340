//! What every integration test and the benchmark stand on: the parties around the streamer,
//! simulated.
//!
//! * [`cgroup`]: a cgroup that ends with the test;
//! * [`criu`]: CRIU's side of the image socket;
//! * [`dump`]: what CRIU's image files hold;
//! * [`gate`]: a command that goes on when a test says so;
//! * [`streamer`]: the built binary as a child process, with its descriptors, progress lines and
//!   resource usage;
//! * [`shards`]: pipes that are collected into or fed from memory;
//! * [`image`]: the image format, written down a second time. It shares no code with the program,
//!   so that an error in the program's encoder cannot hide behind the same error in its decoder;
//! * [`indexed`]: the same for images with an index;
//! * [`keeping`]: where a restore keeps an image: in pipes, in memory or in both;
//! * [`random`]: reproducible bytes and decisions;
//! * [`runs`]: whole captures and restores in one call.
//!
//! Nothing here waits for time to pass: everything waits for an event, and a streamer that hangs is
//! killed by its watchdog, which turns the hang into a broken pipe and the broken pipe into a
//! failed test.

pub mod cgroup;
pub mod child;
pub mod criu;
pub mod dump;
pub mod gate;
pub mod image;
pub mod indexed;
pub mod keeping;
pub mod lines;
pub mod random;
pub mod runs;
pub mod shards;
pub mod streamer;

use std::fmt::Display;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

/// How long anything may take before it counts as hanging. Generous: it is reached only by a bug.
pub const HANG_TIMEOUT: Duration = Duration::from_secs(60);

/// Waits for something that comes unless there is a bug.
#[track_caller]
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + HANG_TIMEOUT;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Says why a test is not done, which is a failure where `CI` is `true`.
pub fn skip(why: &str) {
    let test = thread::current().name().unwrap_or("a test").to_owned();
    assert_ne!(
        std::env::var("CI").as_deref(),
        Ok("true"),
        "{test} cannot be done: {why}"
    );
    // Past the test harness, which shows what a test printed only if it failed.
    writeln!(std::io::stderr(), "SKIPPED {test}: {why}").expect("write to standard error");
}

/// Whether root runs the test; if not, it is skipped.
pub fn root_or_skip() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        skip("needs root, to become another user");
    }
    is_root
}

/// A number that an environment variable may set.
pub fn setting(variable: &str, default: u64) -> u64 {
    std::env::var(variable).map_or(default, |value| {
        value
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is no number: {value}"))
    })
}

/// Tells what a campaign counted, also where the output of tests that pass is not shown.
pub fn report(counts: impl Display) {
    std::io::stdout()
        .write_all(format!("{counts}\n").as_bytes())
        .expect("write to standard output");
}

/// The size of a page, and of a pipe's slot.
pub const PAGE: usize = 4096;
