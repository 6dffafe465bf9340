//! What `capture` promises to CRIU and to those who store the shards: every file arrives byte for
//! byte, and a shard that is slow or stands still stops neither CRIU nor the other shards.

use std::fs::File;
use std::io::{ErrorKind, IoSlice, Write};
use std::thread;
use std::time::Duration;

use crate::common::PAGE;
use crate::common::criu::Criu;
use crate::common::image::{self, Body, Entry, Files, files};
use crate::common::indexed;
use crate::common::random::{self, Random};
use crate::common::runs::{self, PAGES, assert_same_bytes, assert_same_files};
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::{BUFFER, Launch, Streamer};
use nix::fcntl::{SpliceFFlags, vmsplice};
use tempfile::TempDir;

/// Runs a capture of what `criu` does, and returns the shards.
fn capture(shard_count: usize, criu: impl FnOnce(&Criu)) -> Vec<Vec<u8>> {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), shard_count);
    let connection = streamer.criu();
    criu(&connection);
    drop(connection);
    streamer.expect_success();
    collector.finish()
}

#[test]
fn the_image_is_made_of_the_specified_markers_and_nothing_else() {
    let shards = capture(1, |criu| criu.write_file("inventory.img", b"inventory"));
    let expected = image::Shard::new()
        .filename(0, "inventory.img")
        .data(1, b"inventory")
        .file_eof(2)
        .image_eof(3);
    let [shard] = &shards[..] else { panic!() };
    // The first marker also names the process that captured the image: field 101, a message.
    let (length, rest) = shard.split_first_chunk().unwrap();
    let (first, others) = rest.split_at(u32::from_le_bytes(*length) as usize);
    let (length, rest) = expected.bytes.split_first_chunk().unwrap();
    let (expected_first, expected_others) = rest.split_at(u32::from_le_bytes(*length) as usize);
    let origin = first.strip_prefix(expected_first).unwrap();
    assert!(origin.starts_with(&[0xaa, 0x06, origin.len() as u8 - 3]));
    assert_eq!(others, expected_others);
}

#[test]
fn several_files_are_written_at_once() {
    let names: Vec<_> = (0..8).map(|i| format!("pages-{i}.img")).collect();
    let content = |i: usize| random::bytes(i as u64, PAGES / 4 + i * 1000);
    let shards = capture(4, |criu| {
        thread::scope(|scope| {
            for (i, name) in names.iter().enumerate() {
                scope.spawn(move || {
                    let mut file = criu.create_file(name);
                    let mut random = Random::new(i as u64);
                    let content = content(i);
                    let mut rest = content.as_slice();
                    while !rest.is_empty() {
                        let size = rest.len().min(1 + random.below(3 * PAGE));
                        let (piece, after) = rest.split_at(size);
                        file.write_all(piece).unwrap();
                        rest = after;
                    }
                });
            }
        });
        criu.write_file("inventory.img", b"inventory");
    });
    let mut expected = files([("inventory.img", b"inventory".to_vec())]);
    expected.extend(
        (0..)
            .map(content)
            .zip(names)
            .map(|(content, name)| (name, content)),
    );
    assert_same_files(&image::decode(&shards).unwrap(), &expected);
}

#[test]
fn files_go_on_after_criu_has_closed_its_connection() {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
    let criu = streamer.criu();
    let mut pages = criu.create_file("pages-1.img");
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    let content = random::bytes(7, PAGES);
    pages.write_all(&content).unwrap();
    drop(pages);
    streamer.expect_success();
    let expected = files([
        ("inventory.img", b"inventory".to_vec()),
        ("pages-1.img", content),
    ]);
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &expected);
}

#[test]
fn of_a_file_sent_twice_the_last_one_counts() {
    let shards = capture(2, |criu| {
        criu.write_file("seccomp.img", &[1; 3 * PAGE]);
        criu.write_file("other.img", b"other");
        criu.write_file("seccomp.img", &[2; PAGE]);
        criu.write_file("inventory.img", b"inventory");
    });
    assert_same_bytes(
        "seccomp.img",
        &image::decode(&shards).unwrap()["seccomp.img"],
        &[2; PAGE],
    );
}

#[test]
fn two_files_of_one_name_open_at_once_do_not_mix() {
    for first_closed_first in [true, false] {
        let shards = capture(2, |criu| {
            let mut first = criu.create_file("fdinfo.img");
            first.write_all(&[1; PAGE]).unwrap();
            let mut last = criu.create_file("fdinfo.img");
            for _ in 0..20 {
                last.write_all(&[2; 10]).unwrap();
                // The first version is not needed any more: the streamer may have closed its pipe.
                if let Err(error) = first.write_all(&[1; 10]) {
                    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
                }
            }
            if first_closed_first {
                drop(first);
                last.write_all(&[2; 10]).unwrap();
            } else {
                drop(last);
                drop(first);
            }
            criu.write_file("inventory.img", b"inventory");
        });
        let expected = if first_closed_first { 21 * 10 } else { 20 * 10 };
        assert_same_bytes(
            "fdinfo.img",
            &image::decode(&shards).unwrap()["fdinfo.img"],
            &vec![2; expected],
        );
    }
}

#[test]
fn external_files_are_woven_in_and_may_end_long_after_criu() {
    let (readers, writers) = shards::pipes(3, None);
    let (tar_reader, tar_writer) = pipe();
    let (empty_reader, empty_writer) = pipe();
    let mut streamer = Streamer::capture()
        .shards(writers)
        .ext_file("fs.tar", tar_reader)
        .ext_file("empty.tar", empty_reader)
        .start();
    let collector = Collector::start(readers);
    let content = random::bytes(3, PAGES);
    let (while_it_dumps, afterwards) = content.split_at(PAGES / 2);
    let criu = streamer.criu();
    let mut tar = File::from(tar_writer);
    thread::scope(|scope| {
        scope.spawn(|| tar.write_all(while_it_dumps).unwrap());
        drop(empty_writer);
        criu.write_file("pages-1.img", &content[1..]);
        criu.write_file("inventory.img", b"inventory");
    });
    drop(criu);
    tar.write_all(afterwards).unwrap();
    assert!(
        streamer.is_running(),
        "the external file is not complete yet"
    );
    drop(tar);
    streamer.expect_success();
    let expected = files([
        ("empty.tar", vec![]),
        ("fs.tar", content.clone()),
        ("inventory.img", b"inventory".to_vec()),
        ("pages-1.img", content[1..].to_vec()),
    ]);
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &expected);
}

#[test]
fn a_fifo_whose_writer_is_gone_already_ends_where_that_ended() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let fifo = thread::scope(|scope| {
        scope.spawn(|| std::fs::write(&path, b"fs").unwrap());
        File::open(&path).unwrap()
    });
    let (readers, writers) = shards::pipes(1, None);
    let launch = Streamer::capture().shards(writers);
    let mut streamer = launch.ext_file("fs.tar", fifo.into()).start();
    let collector = Collector::start(readers);
    streamer.criu().write_file("inventory.img", b"inventory");
    streamer.expect_success();
    let captured = image::decode(&collector.finish()).unwrap();
    assert_eq!(captured["fs.tar"], b"fs");
}

/// The image of a capture one of whose shards is read only when CRIU is done.
fn stalled_capture(launch: Launch, criu: impl FnOnce(&Criu)) -> Files {
    let (mut readers, writers) = shards::pipes(2, None);
    let mut streamer = launch.shards(writers).start();
    let stalled = readers.remove(1);
    let flowing = Collector::start(readers);
    let connection = streamer.criu();
    criu(&connection);
    connection.write_file("inventory.img", b"inventory");
    drop(connection);
    let stalled = Collector::start(vec![stalled]);
    streamer.expect_success();
    let shards = [flowing.finish(), stalled.finish()].concat();
    image::decode(&shards).unwrap()
}

/// A page of which only a part is used takes a slot of its own, so bytes do not tell whether data
/// fits into a shard. If a chunk were begun in the stalled shard and did not fit, its file would
/// wait for ever.
#[test]
fn a_stalled_shard_does_not_stop_criu_whatever_pages_hold() {
    for pipe_size in [None, Some(256 * PAGE)] {
        for piece in [10, 1000, PAGE + 1] {
            let content = random::bytes(piece as u64, (1000 * piece).min(PAGES));
            let decoded = stalled_capture(Streamer::capture(), |criu| {
                for round in 0..5 {
                    let name = format!("pages-{round}.img");
                    let file = criu.create_file_in_pipe(&name, pipe_size);
                    // Each piece is a reference to part of a page, as with memory that CRIU hands
                    // over.
                    for mut rest in content.chunks(piece) {
                        while !rest.is_empty() {
                            let slice = [IoSlice::new(rest)];
                            let moved = vmsplice(&file, &slice, SpliceFFlags::empty());
                            rest = &rest[moved.expect("fill CRIU's pipe")..];
                        }
                    }
                }
            });
            assert_eq!(decoded.len(), 6);
            for round in 0..5 {
                let name = format!("pages-{round}.img");
                assert_same_bytes(&name, &decoded[&name], &content);
            }
        }
    }
}

/// All but one of the shards are read only when CRIU has gone. For a second they could begin.
#[test]
fn shards_that_begin_too_late_do_not_stop_criu_and_the_wait_for_them_is_told() {
    let (mut readers, writers) = shards::pipes(4, None);
    let mut streamer = Streamer::capture().shards(writers).start();
    let late = readers.split_off(1);
    let flowing = Collector::start(readers);
    let content = random::bytes(5, 4 * PAGES);
    let criu = streamer.criu();
    criu.write_file("pages-1.img", &content);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    // With a buffer, CRIU has gone before any shard is fed.
    if std::env::var_os(BUFFER).is_some() {
        thread::sleep(Duration::from_secs(3));
    }
    let late = Collector::start(late);
    let exit = streamer.expect_success();
    assert!(
        exit.stderr.contains("readers began late"),
        "{}",
        exit.stderr
    );
    let shards = [flowing.finish(), late.finish()].concat();
    assert_same_bytes(
        "pages-1.img",
        &image::decode(&shards).unwrap()["pages-1.img"],
        &content,
    );
}

#[test]
fn every_shard_says_whose_it_is_even_if_it_gets_nothing_else() {
    let inventory = image::files([("inventory.img", "inventory")]);
    for shards in [
        runs::capture(&inventory, 5, None),
        indexed::capture(&inventory, 5).all(),
    ] {
        assert!(
            shards.iter().all(|shard| shard.len() > 36),
            "an origin is longer"
        );
        assert_same_files(&image::decode(&shards).unwrap(), &inventory);
    }
}

/// The markers of a capture to one shard, while `pause` passes between two pieces of what CRIU
/// sends.
fn markers_of(launch: Launch, pause: Duration) -> Vec<Entry> {
    let (mut streamer, collector) = runs::collect(launch, 1);
    let criu = streamer.criu();
    let pages = random::bytes(1, PAGES / PAGE * PAGE);
    let mut files: Vec<_> = ["pages-1.img", "pagemap-71.img", "files.img"]
        .map(|name| criu.create_file(name))
        .into();
    for (i, piece) in pages.chunks(3 * PAGE).enumerate() {
        files[0].write_all(piece).unwrap();
        if i % 16 == 0 {
            files[1].write_all(&[i as u8; 1000]).unwrap();
            files[2].write_all(&[i as u8; PAGE]).unwrap();
            thread::sleep(pause);
        }
    }
    drop(files);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    streamer.expect_success();
    let shards = collector.finish();
    assert_eq!(image::decode(&shards).unwrap()["pages-1.img"], pages);
    image::markers(&shards).unwrap()
}

/// What a store that keeps equal blocks once needs. Where a file's chunks lie between those of
/// others is left to chance.
#[test]
fn images_of_the_same_memory_look_the_same_whatever_came_when() {
    let content = |markers: &[Entry]| {
        let (_image_end, markers) = markers.split_last().unwrap();
        let named = markers.iter().scan(String::new(), |current, entry| {
            if let Body::Filename(name) = &entry.body {
                current.clone_from(name);
            }
            Some((current.clone(), entry.body.clone(), entry.data.clone()))
        });
        let mut named: Vec<_> = named.collect();
        named.sort_by(|(a, ..), (b, ..)| a.cmp(b));
        named
    };
    for options in [&[] as &[_], &["--buffer", "64M"]] {
        let images = [0, 1, 10].map(|millis| {
            let launch = Streamer::capture().args(options);
            markers_of(launch, Duration::from_millis(millis))
        });
        for markers in &images {
            let first = &images[0];
            assert!(content(markers) == content(first), "{first:?}\n{markers:?}");
            for two in markers.windows(2) {
                let begin = two[1].offset - two[0].data.len();
                let is_large = two[0].data.len() > 16 * PAGE;
                assert!(!is_large || begin.is_multiple_of(PAGE), "{two:?}");
            }
        }
    }
}

#[test]
fn a_shard_whose_reader_is_gone_ends_the_capture_and_criu_learns_it() {
    for lost in [0, 1] {
        let (mut readers, writers) = shards::pipes(2, None);
        let mut streamer = Streamer::capture().shards(writers).start();
        let criu = streamer.criu();
        let mut pages = criu.create_file("pages-1.img");
        drop(readers.remove(lost));
        let collector = Collector::start(readers);
        let error = pages
            .write_all(&vec![0; 4 * PAGES])
            .expect_err("the pipe must break");
        assert_eq!(error.kind(), ErrorKind::BrokenPipe);
        streamer.expect_failure(&["shard"]);
        assert_no_image_end(&collector.finish());
    }
}

fn assert_no_image_end(shards: &[Vec<u8>]) {
    let entries: Vec<_> = shards
        .iter()
        .enumerate()
        .flat_map(|(i, bytes)| image::split_complete(i, bytes).0)
        .collect();
    assert!(
        !entries.iter().any(|entry| entry.body == Body::ImageEof),
        "{entries:?}"
    );
}
