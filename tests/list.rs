//! `list`: what is in an image, and whether it is whole. Nothing is written to disk, and a broken
//! image is not listed at all.

use std::fs::{self, File};
use std::io::Read;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::common::child::Limit;
use crate::common::image::{self, Files};
use crate::common::runs;
use crate::common::shards::{Collector, pipe};
use crate::common::streamer::{Exit, Launch, Streamer, binary};

/// Lists an image: how that ended, and what came to standard output.
fn list(launch: Launch, shards: &[Vec<u8>]) -> (Exit, String) {
    let (reader, writer) = pipe();
    let (mut streamer, feeder) = runs::feed(launch.stdout(writer), shards);
    let listed = Collector::start(vec![reader]).finish().remove(0);
    let exit = streamer.wait();
    feeder.finish();
    (exit, String::from_utf8(listed).unwrap())
}

/// The lines for these files.
fn lines(files: &Files) -> String {
    let line = |(name, content): (&String, &Vec<u8>)| format!("{}\t{name}\n", content.len());
    files.iter().map(line).collect()
}

/// Files of all sizes, one of them external.
fn files() -> Files {
    let mut files = runs::sample_files(1);
    files.insert("fs.tar".into(), vec![7; 200_000]);
    files
}

/// An image of so many files that their names fill a pipe.
fn many_files() -> Files {
    let name = |i| format!("{i}-{}.img", "x".repeat(100));
    let mut files: Files = (0..2000).map(|i| (name(i), Vec::new())).collect();
    files.insert("inventory.img".into(), image::INVENTORY.into());
    files
}

#[test]
fn every_file_is_listed_with_its_size_and_sorted_by_name() {
    let files = files();
    let copying = Streamer::list().limit(Limit::Refused(libc::SYS_splice));
    for (launch, count, chunk) in [
        (Streamer::list(), 1, 1 << 20),
        (copying, 3, 70_000),
        (Streamer::list(), 5, 999),
    ] {
        let shards = image::encode_files(&files, count, chunk);
        let (exit, listed) = list(launch, &shards);
        exit.expect_success();
        assert_eq!(listed, lines(&files), "{count} shards");
        let stats = &exit.progress[..];
        assert!(stats.len() == 1 && stats[0].contains("shards"), "{stats:?}");
    }
}

#[test]
fn it_needs_no_directory_and_makes_none() {
    let dir = TempDir::new().unwrap();
    let stored = dir.path().join("app.image");
    fs::write(&stored, &image::inventory()[0]).unwrap();
    let list = |args: &[&str]| {
        let output = Command::new(binary())
            .args(args)
            .arg("list")
            .stdin(File::open(&stored).unwrap())
            .current_dir(dir.path())
            .output()
            .unwrap();
        assert!(output.status.success(), "{args:?}: {output:?}");
        assert_eq!(output.stdout, b"9\tinventory.img\n", "{args:?}");
        // Where progress lines belong if nothing else is said.
        assert!(output.stderr.starts_with(b"{\"shards\":"), "{output:?}");
    };
    list(&[]);
    list(&["--images-dir", "images"]);
    list(&["--shard-cmd", "cat app.image"]);
    assert_eq!(runs::read_dir(dir.path()).len(), 1);
}

/// Who only wants the exit status need not take the list: Python opens /dev/null for both reading
/// and writing.
#[test]
fn without_a_standard_output_the_exit_status_is_the_answer() {
    let dir = TempDir::new().unwrap();
    let stored = dir.path().join("app.image");
    fs::write(&stored, &image::inventory()[0]).unwrap();
    for output in [">&-", ">/dev/null", "1<>/dev/null"] {
        for (image, whole) in [("app.image", true), ("/dev/null", false)] {
            let script = format!("'{}' list <{image} {output}", binary().display());
            let mut bash = Command::new("bash");
            let run = bash.args(["-c", &script]).current_dir(dir.path()).output();
            let run = run.unwrap();
            assert_eq!(run.status.success(), whole, "{script}: {run:?}");
        }
    }
}

#[test]
fn a_name_takes_one_line_whatever_is_in_it() {
    let image = image::Shard::new()
        .filename(0, "a\n5\tb\u{1b}[31m é")
        .file_eof(1)
        .inventory_and_end(2);
    let (exit, listed) = list(Streamer::list(), &[image.bytes]);
    exit.expect_success();
    assert_eq!(listed, "0\ta\\n5\\tb\\u{1b}[31m é\n9\tinventory.img\n");
}

#[test]
fn an_image_that_is_not_whole_is_an_error_and_is_not_listed() {
    let not_listed = |shards: &[Vec<u8>], words: &[&str], what: &str| {
        println!("{what}");
        let (exit, listed) = list(Streamer::list(), shards);
        exit.expect_refusal(words);
        assert_eq!(listed, "");
    };
    let files = image::files([("a.img", [1; 30])]);
    let image = image::encode_files(&files, 2, 100);
    let mut shards = image.clone();
    shards[1].pop();
    not_listed(&shards, &["shard"], "a shard is cut");
    not_listed(&image[..1], &["shard"], "a shard is missing");
    let mut longer = image::inventory();
    longer[0].push(0);
    not_listed(&longer, &["follows the end"], "too long");
    let failed = image::encode([("core-1.img", &[1; 9][..])], 1, 100);
    not_listed(&failed, &["inventory.img"], "a dump that failed");
    not_listed(
        &[image::Shard::new().image_eof(0).bytes],
        &["no file"],
        "empty",
    );
}

#[test]
fn an_image_whose_command_fails_in_the_end_is_not_listed() {
    let dir = TempDir::new().unwrap();
    let stored = dir.path().join("app.image");
    fs::write(&stored, &image::inventory()[0]).unwrap();
    let command = format!("cat '{}'; exit 3", stored.display());
    let output = dir.path().join("listed");
    let mut streamer = Streamer::list()
        .args(["--shard-cmd", &command])
        .stdout(File::create(&output).unwrap())
        .start();
    streamer.expect_failure(&["shard command 1", "exit status 3"]);
    assert_eq!(fs::read(&output).unwrap(), b"");
}

/// `list | head` is no failure: the image is whole.
#[test]
fn a_reader_that_has_seen_enough_may_go() {
    let (reader, writer) = pipe();
    let (mut streamer, _feeder) = runs::feed(
        Streamer::list().stdout(writer),
        &image::encode_files(&many_files(), 1, 100),
    );
    let mut reader = File::from(reader);
    reader.read_exact(&mut [0; 10]).unwrap();
    drop(reader);
    streamer.expect_success();
}

#[test]
fn a_list_that_cannot_be_written_is_an_error() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (mut streamer, _feeder) = runs::feed(Streamer::list().stdout(full), &image::inventory());
    streamer.expect_failure(&["writing to standard output", "No space left"]);
}

/// Standard error is given up on after a second; a pager is not.
#[test]
fn a_reader_may_take_its_time_until_a_signal_ends_it() {
    let files = many_files();
    let shards = image::encode_files(&files, 1, 100);
    let start = || {
        let (reader, writer) = pipe();
        let (streamer, _feeder) = runs::feed(Streamer::list().stdout(writer), &shards);
        streamer.wait_for_stats();
        (streamer, reader)
    };
    let (mut streamer, reader) = start();
    assert!(streamer.outlasts(Duration::from_millis(1500)));
    let listed = Collector::start(vec![reader]).finish().remove(0);
    assert!(listed == lines(&files).into_bytes());
    streamer.expect_success();

    let (mut streamer, _reader) = start();
    streamer.signal(Signal::SIGTERM);
    assert_eq!(streamer.wait().status.code(), Some(143));
}

#[test]
fn what_would_get_into_the_lists_way_is_refused() {
    let dir = TempDir::new().unwrap();
    let stored = dir.path().join("app.image");
    fs::write(&stored, &image::inventory()[0]).unwrap();
    let both = || {
        File::options()
            .read(true)
            .append(true)
            .open(&stored)
            .unwrap()
    };
    let exit = Streamer::list().stdin(both()).stdout(both()).run();
    exit.expect_failure(&["standard output", "--shard-fds 0"]);
    let (_reader, writer) = pipe();
    Streamer::list()
        .stdin(both())
        .ext_file("fs.tar", writer)
        .run()
        .expect_failure(&["--ext-file-fds", "extract"]);
    assert_eq!(fs::read(&stored).unwrap(), image::inventory()[0]);
}
