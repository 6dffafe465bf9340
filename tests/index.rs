//! An image with an index: CRIU connects when the index is here, and gets the rest as it arrives. A
//! damaged image never gives it the last of the pages.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::Duration;

use crate::common::child::Limit;
use crate::common::image::{self, Body, Files};
use crate::common::indexed::{IS_INDEX, capture, serve};
use crate::common::keeping::Keeping;
use crate::common::random;
use crate::common::runs::{self, assert_same_bytes};
use crate::common::shards::Feeder;
use crate::common::streamer::{Launch, Streamer};

const MIB: usize = 1 << 20;

/// An image with two files of pages, a large and a small other file.
fn files() -> Files {
    let mut files = runs::sample_files(5);
    files.insert("pages-1.img".into(), random::bytes(1, 5 * MIB + 77));
    files.insert("pages-2.img".into(), random::bytes(2, 3 * MIB));
    files.insert("ghost-file-1.img".into(), random::bytes(3, 3 * MIB + 1));
    files
}

#[test]
fn data_shards_carry_the_data_of_large_files_and_nothing_else() {
    let files = files();
    let image = capture(&files, 3);
    assert!(image::decode(&image.all()).unwrap() == files);
    let entries = image::markers(&image.all()).unwrap();
    let mut in_index: BTreeMap<String, usize> = BTreeMap::new();
    let mut current = String::new();
    for entry in &entries {
        match &entry.body {
            Body::Filename(name) => current = name.clone(),
            // The first marker of a shard brings no data.
            Body::FileData(0) if entry.seq < 4 => continue,
            Body::FileData(_) if entry.shard < 3 => {
                let is_large = files[&current].len() > MIB;
                assert!(is_large || current.starts_with("pages-"), "{current}");
                continue;
            }
            Body::FileData(size) => {
                *in_index.entry(current.clone()).or_default() += *size as usize;
            }
            Body::FileEof | Body::ImageEof => {}
        }
        assert_eq!(entry.shard, 3, "{entry:?}");
    }
    assert!(!in_index.keys().any(|name| name.starts_with("pages-")));
    assert!((MIB..3 * MIB).contains(&in_index["ghost-file-1.img"]));
    // The first marker says so: field 100, true.
    let length = u32::from_le_bytes(*image.index.first_chunk().unwrap()) as usize;
    let first = &image.index[4..4 + length];
    assert!(first.windows(3).any(|bytes| bytes == IS_INDEX));
}

#[test]
fn criu_reads_pages_while_they_arrive_and_the_last_of_them_when_all_is_here() {
    for launch in [Streamer::serve as fn() -> Launch, || {
        Streamer::serve().limit(Limit::OpenFiles(256))
    }] {
        let files = files();
        let image = capture(&files, 1);
        let (mut streamer, mut shards) = serve(1, launch()).with_index(&image.index);
        let criu = streamer.criu();
        assert_eq!(streamer.progress_lines(), ["socket-init"]);
        // What lies in the index is here.
        criu.expect_file("inventory.img", &files["inventory.img"]);
        assert_eq!(criu.read_file("none.img"), None);
        // The files come in the order of their names. The first half holds the beginnings.
        let (first, second) = image.shards[0].split_at(image.shards[0].len() / 2);
        let mut pages = criu.open_file("pages-1.img").unwrap();
        let mut ghost = criu.open_file("ghost-file-1.img").unwrap();
        let mut shard = File::from(shards.remove(0));
        let rest = second.to_vec();
        let feeder = thread::spawn({
            let first = first.to_vec();
            move || shard.write_all(&first).map(|()| shard)
        });
        let mut content = vec![0; MIB];
        pages.read_exact(&mut content).unwrap();
        assert!(content == files["pages-1.img"][..MIB]);
        let mut shard = feeder.join().unwrap().unwrap();
        let feeder = thread::spawn(move || shard.write_all(&rest).map(drop));
        content.clear();
        ghost.read_to_end(&mut content).unwrap();
        assert_same_bytes("ghost-file-1.img", &content, &files["ghost-file-1.img"]);
        content.clear();
        pages.read_to_end(&mut content).unwrap();
        assert_same_bytes("pages-1.img", &content, &files["pages-1.img"][MIB..]);
        criu.expect_file("pages-2.img", &files["pages-2.img"]);
        feeder.join().unwrap().unwrap();
        // A CRIU that leaves before all is here has failed.
        streamer.wait_for_stats();
        drop(criu);
        let exit = streamer.expect_success();
        assert_eq!(exit.progress[0], "socket-init");
        assert!(exit.progress[1].starts_with('{'), "{:?}", exit.progress);
    }
}

#[test]
fn an_image_without_an_index_is_refused_where_one_is_expected() {
    let shards = runs::capture(&files(), 2, None);
    let (mut streamer, ends) = serve(1, Streamer::serve()).into_parts();
    let _feeder = Feeder::start(ends, &shards);
    streamer.expect_refusal(&["the image has no index"]);
}

#[test]
fn criu_that_goes_before_the_image_is_whole_has_failed() {
    let files = files();
    let image = capture(&files, 1);
    let (mut streamer, _shards) = serve(1, Streamer::serve()).with_index(&image.index);
    streamer.criu().read_file("inventory.img").unwrap();
    streamer.expect_failure(&["CRIU went away"]);
}

#[test]
fn a_signal_closes_everything_at_once() {
    let files = files();
    let image = capture(&files, 1);
    let (mut streamer, _shards) = serve(1, Streamer::serve()).with_index(&image.index);
    let criu = streamer.criu();
    let mut pages = criu.open_file("pages-1.img").unwrap();
    streamer.signal(nix::sys::signal::Signal::SIGTERM);
    let mut content = Vec::new();
    assert!(
        pages
            .read_to_end(&mut content)
            .is_ok_and(|bytes| bytes == 0)
    );
    assert_eq!(streamer.wait().status.code(), Some(143));
    let error = criu.try_open_file("pages-2.img").unwrap_err();
    assert!(
        matches!(
            error.kind(),
            ErrorKind::BrokenPipe | ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
        ),
        "{error}"
    );
}

#[test]
fn what_the_reader_of_an_arriving_file_leaves_is_freed() {
    let mut files = files();
    files.insert("pages-1.img".into(), random::bytes(1, 48 * MIB));
    let image = capture(&files, 1);
    for keeping in Keeping::ALL {
        let (mut streamer, shards) = serve(1, keeping.serve()).with_index(&image.index);
        let criu = streamer.criu();
        drop(criu.open_file("pages-1.img").unwrap());
        let feeder = Feeder::start(shards, &image.shards);
        // It comes last.
        criu.expect_file("pages-2.img", &files["pages-2.img"]);
        streamer.wait_for_stats();
        let held = streamer.image_kib();
        assert!(held < 24 << 10, "{keeping:?}: {held} KiB");
        drop(criu);
        streamer.expect_success();
        feeder.finish();
    }
}

/// The beginning of an index: a whole `inventory.img`.
fn index() -> image::Shard {
    let first = [&[2 << 3 | 2, 13][..], b"inventory.img", &IS_INDEX].concat();
    image::Shard::new()
        .marker(0, &first)
        .data(1, image::INVENTORY)
        .file_eof(2)
}

/// CRIU has all that it needs when it has the last byte, whether or not a chunk without data
/// follows it.
#[test]
fn the_last_byte_of_the_pages_is_kept_back_whatever_chunk_it_is_in() {
    let pages = random::bytes(1, MIB);
    let index = index()
        .filename(3, "pages-1.img")
        .file_eof(7)
        .filename(8, "ghost-file-1.img")
        .file_eof(10)
        .image_eof(11);
    for last in [&pages[..0], &pages[..1]] {
        let shard = image::Shard::new()
            .data(4, &pages[..MIB / 2])
            .data(5, &pages[MIB / 2..])
            .data(6, last);
        let (mut streamer, mut shards) = serve(1, Streamer::serve()).with_index(&index.bytes);
        let criu = streamer.criu();
        let mut file = criu.open_file("pages-1.img").unwrap();
        let mut end = File::from(shards.remove(0));
        end.write_all(&shard.bytes).unwrap();
        let mut content = vec![0; MIB / 2];
        file.read_exact(&mut content).unwrap();
        assert!(content == pages[..MIB / 2]);
        drop(end);
        // Ends where the streamer does.
        let _ended_or_broken = file.read_to_end(&mut content);
        assert!(content.len() < MIB + last.len(), "all of the pages");
        streamer.expect_failure(&["marker 9 is missing"]);
    }
}

/// Nothing would stop a restore without pages.
#[test]
fn an_image_without_pages_is_served_when_it_is_whole() {
    let ghost = random::bytes(1, 100_000);
    let index = index()
        .filename(3, "ghost-file-1.img")
        .file_eof(5)
        .image_eof(6);
    let shard = image::Shard::new().data(4, &ghost);
    for is_whole in [true, false] {
        let (mut streamer, mut shards) = serve(1, Streamer::serve()).with_index(&index.bytes);
        let mut end = File::from(shards.remove(0));
        let (first, last) = shard.bytes.split_at(shard.bytes.len() - 1);
        end.write_all(first).unwrap();
        assert!(streamer.outlasts(Duration::from_millis(300)));
        assert_eq!(streamer.progress_lines(), [""; 0]);
        if is_whole {
            end.write_all(last).unwrap();
            drop(end);
            streamer.criu().expect_file("ghost-file-1.img", &ghost);
            streamer.expect_success();
        } else {
            drop(end);
            streamer.expect_refusal(&["cut off"]);
        }
    }
}

/// There is no signal for the end of such a process.
#[test]
fn the_index_counts_when_all_that_its_command_left_behind_has_ended() {
    let files = files();
    let image = capture(&files, 1);
    let dir = tempfile::TempDir::with_prefix("shards-").unwrap();
    std::fs::write(dir.path().join("1"), &image.shards[0]).unwrap();
    std::fs::write(dir.path().join("index"), &image.index).unwrap();
    for (status, has_failed) in [(0, false), (4, true)] {
        let command = format!(
            "cat '{}'/{{}}; (sleep 0.5; exit {status}) >/dev/null &",
            dir.path().display()
        );
        let mut streamer = Streamer::serve()
            .args(["--index", "--shard-cmd", &command])
            .start();
        if has_failed {
            streamer.expect_refusal(&["in the background", "exit status 4"]);
        } else {
            runs::assert_served(&mut streamer, &files);
        }
    }
}

/// What the dump has left out is known from the index: CRIU never connects.
#[test]
fn an_index_without_inventory_is_refused_before_criu_may_connect() {
    let first = [&[2 << 3 | 2, 10][..], b"core-1.img", &IS_INDEX].concat();
    let index = image::Shard::new()
        .marker(0, &first)
        .data(1, b"core")
        .file_eof(2)
        .image_eof(3);
    let (mut streamer, _shards) = serve(1, Streamer::serve()).with_index(&index.bytes);
    streamer.expect_refusal(&["inventory.img"]);
}
