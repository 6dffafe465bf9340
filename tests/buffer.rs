//! `capture --buffer`: the application is needed only until its memory is copied, however slow the
//! shards are; memory is bounded, and the image is the same.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::common::child::Limit;
use crate::common::criu::Criu;
use crate::common::dump;
use crate::common::image::{self, Files};
use crate::common::random;
use crate::common::runs::{self, assert_same_files};
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::{BUFFER, Launch, Streamer};
use crate::common::{HANG_TIMEOUT, PAGE};

const MIB: usize = 1 << 20;

/// Long enough for a line to come that must not.
const LONG: Duration = Duration::from_millis(300);

const COPIED: &str = "memory-copied";

fn capture(buffer: &str) -> Launch {
    Streamer::capture().args(["--buffer", buffer])
}

/// A whole dump with this much memory.
pub fn dump_of(mib: usize) -> Files {
    let mut files = dump::whole();
    let pages = (mib * MIB / PAGE) as u64;
    let pagemap = dump::pagemap(901, &[(dump::PRESENT, pages)]);
    files.insert("pagemap-71.img".into(), pagemap);
    files.insert("pages-901.img".into(), random::bytes(901, mib * MIB));
    files
}

/// Sends a whole dump, and goes away.
fn send(streamer: &Streamer, files: &Files) {
    let criu = streamer.criu();
    criu.write_files(files);
}

/// A capture that has copied a dump of which its shards have taken nothing.
fn copied(launch: Launch, files: &Files, shard_count: usize) -> (Streamer, Vec<OwnedFd>) {
    let (readers, writers) = shards::pipes(shard_count, None);
    let streamer = launch.shards(writers).start();
    send(&streamer, files);
    streamer.wait_for_line(COPIED);
    (streamer, readers)
}

#[test]
fn criu_waits_for_no_shard_and_the_image_is_whole() {
    let mut files = runs::small_files(1000, 3 * PAGE, 5);
    files.extend(dump_of(20));
    for shard_count in [1, 3] {
        let (mut streamer, readers) = copied(capture("50%"), &files, shard_count);
        let lines = ["socket-init", "checkpoint-start", COPIED];
        assert_eq!(streamer.progress_lines(), lines);
        let collector = Collector::start(readers);
        let exit = streamer.expect_success();
        assert_eq!(exit.progress[..3], lines);
        assert!(exit.progress[3].starts_with('{'), "{:?}", exit.progress);
        assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
    }
}

/// Each file that is complete is a descriptor less, although no shard has it.
#[test]
fn criu_waits_for_no_shard_where_descriptors_are_few() {
    let mut files = runs::small_files(500, PAGE, 6);
    files.extend(dump_of(1));
    let launch = capture("64M").limit(Limit::OpenFiles(64));
    let (mut streamer, readers) = copied(launch, &files, 2);
    let collector = Collector::start(readers);
    streamer.expect_success();
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
}

fn is_told(streamer: &Streamer) -> bool {
    streamer.progress_lines().iter().any(|line| line == COPIED)
}

#[test]
fn the_line_comes_when_the_dump_is_whole_and_not_before() {
    let (readers, writers) = shards::pipes(1, None);
    let (tar_reader, tar_writer) = pipe();
    let mut streamer = capture("64M")
        .shards(writers)
        .ext_file("fs.tar", tar_reader)
        .start();
    let collector = Collector::start(readers);
    let criu = streamer.criu();
    let mut pages = criu.create_file("pages-2.img");
    criu.write_files(&dump::whole());
    let mut tar = File::from(tar_writer);
    pages.write_all(&[1; PAGE]).unwrap();
    tar.write_all(&[2; PAGE]).unwrap();
    let not_yet = |what: &str| {
        assert!(streamer.outlasts(LONG));
        assert!(!is_told(&streamer), "{what}");
    };
    not_yet("all is open");
    drop(criu);
    not_yet("two files are open");
    drop(pages);
    not_yet("the external file is open");
    drop(tar);
    streamer.wait_for_line(COPIED);
    streamer.expect_success();
    assert_eq!(
        image::decode(&collector.finish()).unwrap()["fs.tar"],
        [2; PAGE]
    );
}

#[test]
fn a_dump_that_falls_short_is_refused_before_any_shard_has_it() {
    let mut files = dump_of(4);
    files.remove("pstree.img");
    let (_readers, writers) = shards::pipes(1, None);
    let mut streamer = capture("64M").shards(writers).start();
    send(&streamer, &files);
    streamer.expect_failure(&["pstree.img"]);
    assert!(!is_told(&streamer));
}

#[test]
fn a_shard_that_fails_after_the_line_is_an_error_and_the_image_is_none() {
    let files = dump_of(20);
    let (mut streamer, mut readers) = copied(capture("64M"), &files, 2);
    drop(readers.pop());
    let collector = Collector::start(readers);
    let exit = streamer.expect_failure(&["shard", "its reader is gone"]);
    assert_eq!(exit.progress.last().unwrap(), COPIED);
    assert!(image::decode(&collector.finish()).is_err());

    let (mut streamer, readers) = copied(capture("64M"), &files, 2);
    streamer.signal(Signal::SIGTERM);
    assert_eq!(streamer.wait().status.code(), Some(143));
    assert!(image::decode(&Collector::start(readers).finish()).is_err());
}

/// CRIU is never left to wait with a file that it has replaced, however much it sends of others.
#[test]
fn a_replaced_file_is_drained_while_another_comes() {
    let (mut streamer, collector) = runs::collect(capture("1G"), 1);
    let criu = streamer.criu();
    let mut replaced = criu.create_file("seccomp.img");
    replaced.write_all(b"first").unwrap();
    criu.write_file("seccomp.img", b"second");
    let mut other = criu.create_file("other.img");
    let is_drained = AtomicUsize::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            replaced.write_all(&[1; MIB]).unwrap();
            drop(replaced);
            is_drained.store(1, Ordering::SeqCst);
        });
        let deadline = Instant::now() + HANG_TIMEOUT;
        while is_drained.load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < deadline, "the replaced file waits");
            other.write_all(b"more").unwrap();
            thread::sleep(Duration::from_millis(1));
        }
    });
    drop(other);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    streamer.expect_success();
    let decoded = image::decode(&collector.finish()).unwrap();
    assert_eq!(decoded["seccomp.img"], b"second");
}

/// What of a file was written while the shards took nothing, after a while in which nothing moved.
fn stalls_after(written: &AtomicUsize) -> usize {
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        let before = written.load(Ordering::SeqCst);
        thread::sleep(LONG);
        if before > 0 && written.load(Ordering::SeqCst) == before {
            return before;
        }
        assert!(Instant::now() < deadline, "the writer is never stopped");
    }
}

/// Sends a dump from a thread, a part at a time, and tells how much of its pages was taken.
fn send_slowly(criu: Criu, files: &Files, written: &AtomicUsize) {
    for (name, content) in runs::inventory_last(files) {
        let mut file = criu.create_file(name);
        for piece in content.chunks(16 * PAGE) {
            file.write_all(piece).unwrap();
            if name == "pages-901.img" {
                written.fetch_add(piece.len(), Ordering::SeqCst);
            }
        }
    }
}

#[test]
fn a_buffer_smaller_than_the_image_fills_and_then_criu_waits() {
    let files = dump_of(40);
    for (buffer, bytes) in [("4M", 4 * MIB), ("100000", 100_000)] {
        let (readers, writers) = shards::pipes(2, None);
        let mut streamer = capture(buffer).shards(writers).start();
        let criu = streamer.criu();
        let before = streamer.memory_kib("VmHWM") as usize;
        let written = AtomicUsize::new(0);
        let (collector, after) = thread::scope(|scope| {
            scope.spawn(|| send_slowly(criu, &files, &written));
            // Besides the buffer there are the pipes of the shards and that of the file.
            let taken = stalls_after(&written);
            assert!((bytes..bytes + 16 * MIB).contains(&taken), "{taken}");
            assert!(!is_told(&streamer));
            let after = streamer.memory_kib("VmHWM") as usize;
            (Collector::start(readers), after)
        });
        streamer.wait_for_line(COPIED);
        let more = (after - before) << 10;
        assert!(more < bytes + 8 * MIB, "{more} bytes for {buffer}");
        streamer.expect_success();
        assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
    }
}

#[test]
fn memory_is_given_back_as_the_shards_take_it() {
    let files = dump_of(64);
    let (mut streamer, mut readers) = copied(capture("128M"), &files, 1);
    let full = streamer.memory_kib("VmRSS") as usize >> 10;
    assert!((60..80).contains(&full), "{full} MiB");
    let mut reader = File::from(readers.remove(0));
    let mut shard = vec![0; 40 * MIB];
    reader.read_exact(&mut shard).unwrap();
    let deadline = Instant::now() + HANG_TIMEOUT;
    while streamer.memory_kib("VmRSS") as usize >> 10 > full - 36 {
        assert!(Instant::now() < deadline, "memory stays where it is");
        thread::yield_now();
    }
    reader.read_to_end(&mut shard).unwrap();
    streamer.expect_success();
    assert_same_files(&image::decode(&[shard]).unwrap(), &files);
}

#[test]
fn without_any_addresses_it_is_told_why() {
    let (_readers, writers) = shards::pipes(1, None);
    let launch = capture("1G").limit(Limit::AddressSpace(48 * MIB as u64));
    let mut streamer = launch.shards(writers).start();
    let criu = streamer.criu();
    let mut pages = criu.create_file("pages-1.img");
    let error = pages.write_all(&vec![1; 8 * MIB]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    streamer.expect_failure(&["--buffer", "memory"]);
}

/// The tests of captures, once more, in a process of their own, each with a buffer that is always
/// full.
#[test]
fn the_tests_of_captures_pass_with_a_buffer() {
    if std::env::var_os(BUFFER).is_some() {
        return;
    }
    let tests = Command::new(std::env::current_exe().unwrap())
        .args(["capture::", "round_trip::", "--skip", "real_criu"])
        // With small chunks, `serve` copies everything.
        .args(["--skip", "pages_of_a_capture", "--skip", "no_more_is_held"])
        // Files are cut where the buffer is full.
        .args(["--skip", "images_of_the_same_memory"])
        .env(BUFFER, "10000")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&tests.stdout);
    assert!(tests.status.success(), "{output}");
    assert!(!output.contains(" 0 passed"), "{output}");
}
