//! Whole runs in one call, for the tests whose subject is what comes out.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use tempfile::TempDir;

use super::PAGE;
use super::criu::{Criu, Role};
use super::dump;
use super::image::Files;
use super::random::{self, Random};
use super::shards::{self, Collector, Feeder};
use super::streamer::{Exit, Launch, Streamer};

/// CRIU's page files come in this size here: enough to fill every pipe several times.
pub const PAGES: usize = 3 * 1024 * 1024 + 123;

/// A whole dump, and files of every size at which something can go wrong.
pub fn sample_files(seed: u64) -> Files {
    let sizes = [
        ("empty.img", 0),
        ("byte.img", 1),
        ("almost-page.img", PAGE - 1),
        ("page.img", PAGE),
        ("page-and-a-byte.img", PAGE + 1),
        ("pipe.img", 16 * PAGE),
        ("pipe-and-a-byte.img", 16 * PAGE + 1),
        ("pages-1.img", PAGES),
    ];
    let mut files = dump::whole();
    for (seed, (name, size)) in (seed.wrapping_mul(1000)..).zip(sizes) {
        files.insert(name.to_owned(), random::bytes(seed, size));
    }
    files
}

/// `count` files of random sizes up to `max_size`, and a whole dump.
pub fn small_files(count: usize, max_size: usize, seed: u64) -> Files {
    let mut random = Random::new(seed);
    let mut files: Files = (0..count)
        .map(|i| {
            let size = random.below(max_size + 1);
            (format!("file-{i}.img"), random.bytes(size))
        })
        .collect();
    files.extend(dump::whole());
    files
}

/// The order in which CRIU sends files: `inventory.img` is the last.
pub fn inventory_last(files: &Files) -> impl Iterator<Item = (&str, &[u8])> {
    let is_inventory = |name: &str| name == "inventory.img";
    let others = files.iter().filter(move |(name, _)| !is_inventory(name));
    let inventory = files.iter().filter(move |(name, _)| is_inventory(name));
    others
        .chain(inventory)
        .map(|(name, content)| (name.as_str(), content.as_slice()))
}

/// The shards of an image of `files`, written one after another.
pub fn capture(files: &Files, shard_count: usize, pipe_size: Option<usize>) -> Vec<Vec<u8>> {
    let (readers, writers) = shards::pipes(shard_count, pipe_size);
    let mut streamer = Streamer::capture().shards(writers).start();
    let collector = Collector::start(readers);
    send(&streamer, files);
    streamer.expect_success();
    collector.finish()
}

/// Sends a whole image as CRIU does. A streamer that gives up meanwhile is no failure of this: its
/// exit status tells.
pub fn send(streamer: &Streamer, files: &Files) {
    streamer.wait_for_line("socket-init");
    let Ok(criu) = Criu::try_connect(streamer.images_dir(), Role::Capture) else {
        return;
    };
    let _gone = inventory_last(files).try_for_each(|(name, content)| {
        let mut file = criu.try_create_file(name, None)?;
        file.write_all(content)
    });
}

/// Asks for every file as CRIU does, each of which must be as here, and for a success at the end.
#[track_caller]
pub fn assert_served(streamer: &mut Streamer, files: &Files) {
    streamer.criu().expect_files(files);
    streamer.expect_success();
}

/// Waits until the grace that a client without a request leaves behind is over, wherever one left
/// before.
pub fn outlast_grace() {
    let (mut deserted, _collector) = collect(Streamer::capture(), 1);
    drop(deserted.criu());
    deserted.expect_failure(&["waiting for CRIU"]);
}

/// Starts a streamer whose shards are collected.
pub fn collect(launch: Launch, shard_count: usize) -> (Streamer, Collector) {
    let (readers, writers) = shards::pipes(shard_count, None);
    let streamer = launch.shards(writers).start();
    (streamer, Collector::start(readers))
}

/// Starts a streamer that is fed these shards, all at once.
pub fn feed(launch: Launch, shards: &[Vec<u8>]) -> (Streamer, Feeder) {
    let (readers, writers) = shards::pipes(shards.len(), None);
    let streamer = launch.shards(readers).start();
    (streamer, Feeder::start(writers, shards))
}

/// Extracts into a new directory.
pub fn extract(shards: &[Vec<u8>]) -> (TempDir, Exit) {
    let dir = TempDir::with_prefix("images-").unwrap();
    let exit = extract_into(dir.path(), shards);
    (dir, exit)
}

pub fn extract_into(dir: &Path, shards: &[Vec<u8>]) -> Exit {
    let (mut streamer, feeder) = feed(Streamer::extract().images_dir(dir), shards);
    let exit = streamer.wait();
    feeder.finish();
    exit
}

/// All that is in a directory. Anything but a regular file has no business there.
pub fn read_dir(dir: &Path) -> Files {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        assert!(
            entry.file_type().unwrap().is_file(),
            "{name} is not a regular file"
        );
        files.insert(name, fs::read(entry.path()).unwrap());
    }
    files
}

/// Compares without printing megabytes.
#[track_caller]
pub fn assert_same_files(found: &Files, expected: &Files) {
    let names = |files: &Files| files.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(found), names(expected));
    for (name, content) in expected {
        assert_same_bytes(name, &found[name], content);
    }
}

#[track_caller]
pub fn assert_same_bytes(name: &str, found: &[u8], expected: &[u8]) {
    if found != expected {
        let first_difference = found.iter().zip(expected).position(|(a, b)| a != b);
        assert_eq!(
            first_difference, None,
            "{name}: offset of the first wrong byte"
        );
        assert_eq!(found.len(), expected.len(), "{name}: length");
    }
}
