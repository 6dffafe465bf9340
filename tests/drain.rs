//! A capture ends when its readers have taken everything, and not before: what is still in a pipe
//! refers to the application's own pages.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use nix::fcntl::{SpliceFFlags, splice};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::signal::Signal;

use crate::common::child::queued;
use crate::common::dump;
use crate::common::image;
use crate::common::shards::{self, Collector};
use crate::common::streamer::Streamer;
use crate::common::{PAGE, wait_until};

/// Longer than a capture takes here that does not wait for its readers.
const LONG: Duration = Duration::from_secs(1);

/// The pages of the application that are in the image.
const PAGES: usize = 32;

/// Memory of an application: pages that a pipe refers to when they are spliced into it, and that
/// can be written to afterwards. The tests' own heap will not do: where another test starts a
/// process at the wrong moment, a write makes a copy.
fn memory() -> File {
    let memory = memfd_create("memory", MFdFlags::MFD_CLOEXEC).expect("make memory");
    let memory = File::from(memory);
    memory.write_all_at(&[7; PAGES * PAGE], 0).unwrap();
    memory
}

/// A capture whose only shard holds a whole image that has not been read, with references to
/// `memory`.
fn unread(memory: &File) -> (Streamer, OwnedFd) {
    let mut files = dump::whole();
    let pagemap = dump::pagemap(901, &[(dump::PRESENT, PAGES as u64)]);
    files.insert("pagemap-71.img".into(), pagemap);
    files.remove("pages-901.img");

    let (mut readers, writers) = shards::pipes(1, Some(4 * PAGES * PAGE));
    let streamer = Streamer::capture().shards(writers).start();
    let criu = streamer.criu();
    let pages = criu.create_file_in_pipe("pages-901.img", Some(PAGES * PAGE));
    let mut offset = 0;
    while offset < (PAGES * PAGE) as i64 {
        let left = PAGES * PAGE - offset as usize;
        let flags = SpliceFFlags::empty();
        splice(memory, Some(&mut offset), &pages, None, left, flags).expect("fill CRIU's pipe");
    }
    drop(pages);
    criu.write_files(&files);
    drop(criu);

    let reader = readers.remove(0);
    wait_until("the memory", || queued(&reader) >= PAGES * PAGE);
    (streamer, reader)
}

#[test]
fn success_means_that_no_shard_refers_to_the_applications_pages_any_more() {
    let memory = memory();
    let (mut streamer, reader) = unread(&memory);
    // Whoever reads the exit status lets the application go on, which writes to its memory.
    if !streamer.outlasts(LONG) {
        memory.write_all_at(&[9; PAGES * PAGE], 0).unwrap();
    }
    let collector = Collector::start(vec![reader]);
    streamer.expect_success();
    let found = image::decode(&collector.finish()).unwrap();
    let torn = found["pages-901.img"].iter().filter(|byte| **byte != 7);
    assert_eq!(torn.count(), 0, "bytes of later");
    assert_eq!(found["pages-901.img"].len(), PAGES * PAGE);
}

#[test]
fn a_reader_that_leaves_before_it_has_taken_everything_is_an_error_however_late_it_leaves() {
    let memory = memory();
    let (mut streamer, reader) = unread(&memory);
    assert!(streamer.outlasts(LONG));
    let mut half = vec![0; PAGES * PAGE / 2];
    let mut reader = File::from(reader);
    reader.read_exact(&mut half).unwrap();
    drop(reader);
    streamer.expect_failure(&["shard", "its reader is gone"]);
}

#[test]
fn a_signal_ends_the_wait_for_a_reader_that_takes_nothing() {
    let memory = memory();
    let (mut streamer, _reader) = unread(&memory);
    assert!(streamer.outlasts(LONG));
    streamer.signal(Signal::SIGTERM);
    assert_eq!(streamer.wait().status.code(), Some(143));
}

#[test]
fn a_reader_that_has_everything_may_wait_for_the_end() {
    let memory = memory();
    let (mut streamer, reader) = unread(&memory);
    let mut reader = File::from(reader);
    let mut shard = Vec::new();
    wait_until("the end of the image", || {
        let mut piece = vec![0; queued(&reader)];
        reader.read_exact(&mut piece).unwrap();
        shard.extend(piece);
        image::decode(std::slice::from_ref(&shard)).is_ok()
    });
    streamer.expect_success();
    assert_eq!(reader.read(&mut [0]).unwrap(), 0);
}
