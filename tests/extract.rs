//! What `extract` promises to those who restore from disk: a whole image, readable by its owner
//! alone, or nothing new in the directory.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::Duration;

use crate::common::PAGE;
use crate::common::child;
use crate::common::image::{self, Files};
use crate::common::random;
use crate::common::runs::{self, PAGES, assert_same_bytes, assert_same_files};
use crate::common::shards::{Collector, pipe, pipes};
use crate::common::streamer::Streamer;
use tempfile::TempDir;

/// An image of three small files in as few bytes as possible, for the tests that try every byte.
fn tiny_image(shard_count: usize) -> Vec<Vec<u8>> {
    let files = [
        ("a.img", &b"first"[..]),
        ("b.img", b"second"),
        ("inventory.img", b"third"),
    ];
    image::encode(files, shard_count, 3)
}

#[test]
fn files_are_written_for_their_owner_alone() {
    let files = runs::sample_files(1);
    let (dir, exit) = runs::extract(&image::encode_files(&files, 2, 100_000));
    assert!(exit.status.success(), "{}", exit.stderr);
    assert_same_files(&runs::read_dir(dir.path()), &files);
    for name in files.keys() {
        let mode = fs::metadata(dir.path().join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o7777, 0o600, "{name}");
    }
}

#[test]
fn statistics_are_all_the_progress_there_is() {
    let shards = tiny_image(3);
    let (_dir, exit) = runs::extract(&shards);
    let [stats] = &exit.progress[..] else {
        panic!("one line expected: {:?}", exit.progress)
    };
    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    let sizes: Vec<_> = stats["shards"]
        .as_array()
        .unwrap()
        .iter()
        .map(|shard| shard["size"].as_u64())
        .collect();
    assert_eq!(
        sizes,
        shards
            .iter()
            .map(|shard| Some(shard.len() as u64))
            .collect::<Vec<_>>()
    );
}

#[test]
fn other_files_in_the_directory_are_left_alone() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("stats-dump"), "statistics").unwrap();
    fs::write(dir.path().join("dump.log"), "log").unwrap();
    let _socket = UnixListener::bind(dir.path().join("streamer-serve.sock")).unwrap();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::extract().images_dir(dir.path()), &tiny_image(1));
    streamer.expect_success();
    assert_eq!(
        fs::read(dir.path().join("stats-dump")).unwrap(),
        b"statistics"
    );
    assert_eq!(fs::read(dir.path().join("dump.log")).unwrap(), b"log");
    assert!(dir.path().join("streamer-serve.sock").exists());
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3 + 3);
}

#[test]
fn an_earlier_image_is_replaced_file_by_file() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("a.img"), "of an earlier image, and longer").unwrap();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::extract().images_dir(dir.path()), &tiny_image(1));
    streamer.expect_success();
    assert_eq!(fs::read(dir.path().join("a.img")).unwrap(), b"first");
}

#[test]
fn of_a_file_that_was_sent_twice_the_last_one_is_written() {
    let shard = image::Shard::new()
        .filename(0, "a.img")
        .data(1, b"the first version, the longer one")
        .file_eof(2)
        .filename(3, "a.img")
        .data(4, b"the last")
        .file_eof(5)
        .image_eof(6);
    let (dir, exit) = runs::extract(&[shard.bytes]);
    assert!(exit.status.success(), "{}", exit.stderr);
    assert_eq!(fs::read(dir.path().join("a.img")).unwrap(), b"the last");
}

#[test]
fn files_may_take_turns() {
    let shard = image::Shard::new()
        .filename(0, "a.img")
        .data(1, b"one ")
        .filename(2, "b.img")
        .data(3, b"eins ")
        .filename(4, "a.img")
        .data(5, b"two")
        .file_eof(6)
        .filename(7, "b.img")
        .data(8, b"zwei")
        .file_eof(9)
        .image_eof(10);
    let (dir, exit) = runs::extract(&[shard.bytes]);
    assert!(exit.status.success(), "{}", exit.stderr);
    let expected = Files::from([
        ("a.img".into(), b"one two".to_vec()),
        ("b.img".into(), b"eins zwei".to_vec()),
    ]);
    assert_same_files(&runs::read_dir(dir.path()), &expected);
}

/// A newer streamer may say more than this one understands.
#[test]
fn unknown_fields_of_a_marker_are_skipped() {
    let with_unknown_fields = [
        &[2 << 3 | 2, 5][..],
        b"a.img",
        &[0xc8, 0x0c, 42],
        &[0xd2, 0x0c, 3, 1, 2, 3],
    ]
    .concat();
    let shard = image::Shard::new()
        .marker(0, &with_unknown_fields)
        .data(1, b"first")
        .file_eof(2)
        .image_eof(3);
    let (dir, exit) = runs::extract(&[shard.bytes]);
    assert!(exit.status.success(), "{}", exit.stderr);
    assert_eq!(fs::read(dir.path().join("a.img")).unwrap(), b"first");
}

#[test]
fn external_files_go_to_their_descriptors_and_not_to_disk() {
    let content = random::bytes(1, PAGES);
    let image = image::encode(
        [("fs.tar", &content[..]), ("inventory.img", b"inventory")],
        2,
        50_000,
    );
    let (reader, writer) = pipe();
    let tar = Collector::start(vec![reader]);
    let (mut streamer, _feeder) =
        runs::feed(Streamer::extract().ext_file("fs.tar", writer), &image);
    streamer.expect_success();
    assert_same_bytes("fs.tar", &tar.finish()[0], &content);
    assert_eq!(
        runs::read_dir(streamer.images_dir())
            .into_keys()
            .collect::<Vec<_>>(),
        ["inventory.img"]
    );
}

#[test]
fn an_external_file_that_the_image_does_not_have_is_an_error() {
    for launch in [Streamer::extract(), Streamer::serve()] {
        let (_reader, writer) = pipe();
        let (mut streamer, _feeder) = runs::feed(launch.ext_file("fs.tar", writer), &tiny_image(1));
        streamer.expect_failure(&["fs.tar"]);
    }
}

#[test]
fn an_external_file_ends_before_the_rest_of_the_image_has_arrived() {
    for launch in [Streamer::extract(), Streamer::serve()] {
        let [image] = &image::encode(
            [("fs.tar", &b"tar"[..]), ("inventory.img", b"inventory")],
            1,
            100,
        )[..] else {
            unreachable!("one shard")
        };
        let entries = image::split(0, image).unwrap();
        let rest_at = entries[3].offset;

        let (tar_reader, tar_writer) = pipe();
        let (mut readers, mut writers) = pipes(1, None);
        let streamer = launch
            .ext_file("fs.tar", tar_writer)
            .shards(readers.pop())
            .start();
        let tar = Collector::start(vec![tar_reader]);
        let mut shard = File::from(writers.pop().unwrap());
        shard.write_all(&image[..rest_at]).unwrap();
        // This returns only when the streamer has closed its end, while the shard is still open.
        assert_eq!(tar.finish(), [b"tar"]);
        assert!(streamer.is_running());
    }
}

/// The external file's pipe is full at the very moment at which the shard ends early: nothing may
/// be waited for that has happened already.
#[test]
fn a_shard_that_is_cut_while_the_external_files_reader_is_busy_is_an_error() {
    for size in (14 * PAGE..18 * PAGE).step_by(PAGE / 4) {
        let cut = image::Shard::new()
            .filename(0, "fs.tar")
            .data_marker(1, 1 << 20)
            .raw(&vec![1; size]);
        let (readers, mut writers) = pipes(1, Some(64 * PAGE));
        File::from(writers.remove(0)).write_all(&cut.bytes).unwrap();
        let shard = readers[0].try_clone().unwrap();
        let (tar_reader, tar_writer) = pipe();
        let mut streamer = Streamer::extract()
            .shards(readers)
            .ext_file("fs.tar", tar_writer)
            .start();
        while child::queued(&shard) > 0 && child::queued(&tar_reader) < 14 * PAGE {
            thread::sleep(Duration::from_millis(1));
        }
        let tar = Collector::start(vec![tar_reader]);
        streamer.expect_failure(&["shard"]);
        assert!(tar.finish()[0].len() <= size);
    }
}

#[test]
fn a_shard_cut_at_any_byte_is_an_error_and_leaves_nothing() {
    let image = tiny_image(3);
    for (cut_shard, bytes) in image.iter().enumerate() {
        for cut in 0..bytes.len() {
            let mut shards = image.clone();
            shards[cut_shard].truncate(cut);
            assert_refused(
                &shards,
                &["shard"],
                &format!("shard {cut_shard} cut at {cut}"),
            );
        }
    }
}

#[test]
fn a_missing_shard_is_an_error_and_leaves_nothing() {
    let image = tiny_image(3);
    for missing in 0..3 {
        let mut shards = image.clone();
        shards.remove(missing);
        assert_refused(&shards, &["shard"], &format!("shard {missing} missing"));
        shards.insert(missing, Vec::new());
        assert_refused(&shards, &["shard"], &format!("shard {missing} empty"));
    }
}

#[test]
fn a_failed_extract_leaves_an_earlier_image_as_it_was() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("a.img"), "of an earlier image").unwrap();
    fs::write(dir.path().join("inventory.img"), "of an earlier image").unwrap();
    let before = runs::read_dir(dir.path());
    let mut image = tiny_image(1);
    let last = image[0].len() - 1;
    image[0].truncate(last);
    let (mut streamer, _feeder) = runs::feed(Streamer::extract().images_dir(dir.path()), &image);
    streamer.expect_failure(&["shard"]);
    assert_same_files(&runs::read_dir(dir.path()), &before);
}

/// A user who can write to the images directory must not make root write elsewhere.
#[test]
fn a_planted_symlink_is_not_followed() {
    let outside = TempDir::new().unwrap();
    let victim = outside.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let dir = TempDir::new().unwrap();
    symlink(&victim, dir.path().join("a.img")).unwrap();
    symlink(outside.path().join("new"), dir.path().join("inventory.img")).unwrap();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::extract().images_dir(dir.path()), &tiny_image(1));
    streamer.wait();
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
}

/// Exit status 1, and an images directory as empty as before.
#[track_caller]
fn assert_refused(shards: &[Vec<u8>], words: &[&str], what: &str) {
    let (dir, exit) = runs::extract(shards);
    assert_eq!(exit.status.code(), Some(1), "{what}: {}", exit.stderr);
    exit.expect_failure(words);
    assert_eq!(runs::read_dir(dir.path()), Files::new(), "{what}");
    assert_eq!(
        exit.progress, [""; 0],
        "{what}: no statistics of an image that is not one"
    );
}
