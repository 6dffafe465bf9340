//! What goes wrong around the streamer, one thing at a time: a party is half done, killed,
//! stopped or replaced. `campaign.rs` does the same at random moments.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::common::criu::{self, Role, read_reply, send_fds};
use crate::common::image;
use crate::common::keeping::Keeping;
use crate::common::runs;
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::Streamer;
use crate::common::{HANG_TIMEOUT, PAGE, wait_until};
use tempfile::TempDir;

/// A capture with a shard that is collected.
fn capture() -> (Streamer, Collector) {
    runs::collect(Streamer::capture(), 1)
}

fn assert_no_image(collector: Collector) {
    let shards = collector.finish();
    assert!(
        image::decode(&shards).is_err(),
        "a broken image looks whole"
    );
}

#[test]
fn a_criu_that_goes_in_the_middle_of_a_request_was_killed() {
    let request = criu::request("core-1.img");
    for sent in [1, 5, request.len()] {
        let (mut streamer, collector) = capture();
        let criu = streamer.criu();
        criu.write_file("inventory.img", b"inventory");
        criu.turn().write_all(&request[..sent]).unwrap();
        drop(criu);
        streamer.expect_failure(&["in the middle of a request"]);
        assert_no_image(collector);
    }
}

#[test]
fn no_client_adds_to_the_image_once_criu_is_gone() {
    let (tar_reader, tar_writer) = pipe();
    let (mut streamer, collector) =
        runs::collect(Streamer::capture().ext_file("fs.tar", tar_reader), 1);
    streamer.wait_for_line("socket-init");
    let socket = Role::Capture.socket(streamer.images_dir());
    let mut stranger = UnixStream::connect(&socket).unwrap();
    let criu = streamer.criu();
    criu.write_file("inventory.img", b"inventory");
    drop(criu);

    stranger.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
    assert_eq!(stranger.read(&mut [0]).unwrap(), 0, "sent away");
    assert!(!socket.exists(), "the socket is not needed any more");
    drop(tar_writer);
    streamer.expect_success();
    let files = image::decode(&collector.finish()).unwrap();
    assert_eq!(files.len(), 2, "{:?}", files.keys());
}

#[test]
fn a_stranger_who_asks_for_a_file_and_leaves_takes_nothing_with_it() {
    let pages = crate::common::random::bytes(1, 3 << 20);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        1,
        100_000,
    );
    for keeping in Keeping::ALL {
        let (mut streamer, _feeder) = runs::feed(keeping.serve(), &image);
        streamer.wait_for_line("socket-init");
        let socket = Role::Serve.socket(streamer.images_dir());
        for sends_file in [false, true] {
            let mut stranger = UnixStream::connect(&socket).unwrap();
            stranger.write_all(&criu::request("pages-1.img")).unwrap();
            assert!(read_reply(&mut stranger).unwrap());
            if sends_file {
                let null = File::open("/dev/null").unwrap().into();
                send_fds(&stranger, &[&null]).unwrap();
            }
        }
        let criu = streamer.criu();
        assert!(criu.read_file("pages-1.img").unwrap() == pages);
        drop(criu);
        streamer.expect_success();
    }
}

#[test]
fn a_standard_error_without_a_reader_changes_nothing() {
    let (readers, writers) = shards::pipes(1, Some(PAGE));
    let mut streamer = Streamer::capture()
        .shards(writers)
        .stderr_reader_gone()
        .start();
    let collector = Collector::start(readers);
    let criu = streamer.criu();
    let socket = Role::Capture.socket(streamer.images_dir());
    // Something to tell: this one breaks the protocol.
    let mut stranger = UnixStream::connect(&socket).unwrap();
    stranger.write_all(&[0xff; 8]).unwrap();
    stranger.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
    let _sent_away = stranger.read(&mut [0]);
    drop(criu.create_file("pstree.img"));
    drop(criu);
    assert_eq!(streamer.wait().status.code(), Some(1));
    assert!(!socket.exists(), "the socket stays behind");
    assert_no_image(collector);
}

const EARLIER: &[u8] = b"of an earlier image";

fn image_dir() -> TempDir {
    let dir = TempDir::with_prefix("images-").unwrap();
    for name in ["inventory.img", "earlier.img"] {
        fs::write(dir.path().join(name), EARLIER).unwrap();
    }
    dir
}

fn entries(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn two_extracts_into_one_directory_do_not_mix() {
    let dir = image_dir();
    let image = image::encode([("inventory.img", &b"new"[..])], 1, 100);
    let (reader, writer) = pipe();
    let mut first = Streamer::extract()
        .images_dir(dir.path())
        .shards([reader])
        .start();
    let mut shard = File::from(writer);
    shard.write_all(&image[0][..10]).unwrap();
    wait_until("a private directory", || entries(dir.path()).len() >= 3);
    let (mut second, feeder) = runs::feed(Streamer::extract().images_dir(dir.path()), &image);
    second.expect_failure(&["another streamer extracts into"]);
    feeder.finish();
    shard.write_all(&image[0][10..]).unwrap();
    drop(shard);
    first.expect_success();
    assert_eq!(fs::read(dir.path().join("inventory.img")).unwrap(), b"new");
    assert_eq!(entries(dir.path()), ["earlier.img", "inventory.img"]);
}
