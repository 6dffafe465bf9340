//! What goes wrong around the streamer, one thing at a time: a party is half done, killed,
//! stopped or replaced. `campaign.rs` does the same at random moments.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Limit};
use crate::common::criu::{self, Role, read_reply, send_fds};
use crate::common::image::{self, Files};
use crate::common::keeping::Keeping;
use crate::common::random::{Random, for_each_seed};
use crate::common::runs;
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::Streamer;
use crate::common::{HANG_TIMEOUT, PAGE, setting};
use nix::sys::signal::Signal;
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
fn an_empty_inventory_is_that_of_a_criu_that_was_killed() {
    let (mut streamer, collector) = capture();
    let criu = streamer.criu();
    criu.write_file("pstree.img", b"tree");
    drop(criu.create_file("inventory.img"));
    drop(criu);
    streamer.expect_failure(&["inventory.img", "incomplete"]);
    assert_no_image(collector);
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
fn a_stranger_who_leaves_does_not_end_the_wait_for_a_criu_that_is_at_work() {
    let (mut streamer, collector) = capture();
    let criu = streamer.criu();
    let socket = Role::Capture.socket(streamer.images_dir());
    drop(UnixStream::connect(socket).unwrap());
    // With no other client connected, the wait would be over then.
    runs::outlast_grace();
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    streamer.expect_success();
    assert!(image::decode(&collector.finish()).is_ok());
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
        let (streamer, _feeder) = runs::feed(keeping.serve(), &image);
        strangers_leave(streamer, &pages);
    }
}

fn strangers_leave(mut streamer: Streamer, pages: &[u8]) {
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

#[test]
fn a_socket_that_took_the_place_of_ours_stays() {
    let (mut streamer, collector) = capture();
    streamer.wait_for_line("socket-init");
    let socket = Role::Capture.socket(streamer.images_dir());
    let criu = streamer.criu();
    fs::remove_file(&socket).unwrap();
    let _other = UnixListener::bind(&socket).unwrap();
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    streamer.expect_success();
    assert!(socket.exists(), "the socket of another program is removed");
    collector.finish();
}

/// CRIU is faster than a shard that stands still: 300 files wait for 64 descriptors.
#[test]
fn files_wait_for_their_turn_when_descriptors_run_short() {
    let files = runs::small_files(300, 5000, 7);
    let (readers, writers) = shards::pipes(1, Some(PAGE));
    let mut streamer = Streamer::capture()
        .limit(Limit::OpenFiles(64))
        .shards(writers)
        .start();
    let criu = streamer.criu();
    let dump = {
        let files = files.clone();
        thread::spawn(move || {
            for (name, content) in runs::inventory_last(&files) {
                criu.write_file(name, content);
            }
        })
    };
    // Until as many are open as there may be.
    let deadline = Instant::now() + HANG_TIMEOUT;
    while streamer.open_fds() < 30 && !dump.is_finished() {
        assert!(
            Instant::now() < deadline,
            "only {} are open",
            streamer.open_fds()
        );
        thread::yield_now();
    }
    let collector = Collector::start(readers);
    dump.join().unwrap();
    streamer.expect_success();
    let found = image::decode(&collector.finish()).unwrap();
    runs::assert_same_files(&found, &files);
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
    let deadline = Instant::now() + HANG_TIMEOUT;
    while entries(dir.path()).len() < 3 {
        assert!(Instant::now() < deadline, "no private directory");
        thread::yield_now();
    }
    let (mut second, feeder) = runs::feed(Streamer::extract().images_dir(dir.path()), &image);
    second.expect_failure(&["another streamer extracts into"]);
    feeder.finish();
    shard.write_all(&image[0][10..]).unwrap();
    drop(shard);
    first.expect_success();
    assert_eq!(fs::read(dir.path().join("inventory.img")).unwrap(), b"new");
    assert_eq!(entries(dir.path()), ["earlier.img", "inventory.img"]);
}

/// SIGKILL at any time leaves the earlier image or none, and the next run sweeps up and goes
/// through.
#[test]
fn after_a_killed_extract_the_next_one_works_and_leaves_nothing_else() {
    let mut killed = 0;
    // How long the last extract took that was left alone.
    let mut usual = Duration::from_millis(10);
    for_each_seed(0..rounds(), |seed| {
        let mut random = Random::new(seed);
        let dir = image_dir();
        let files = runs::small_files(20, 20_000, seed);
        let shards = image::encode_files(&files, 1 + random.below(3), 5000);
        let (mut first, feeder) = runs::feed(Streamer::extract().images_dir(dir.path()), &shards);
        thread::sleep(usual.mul_f64(random.below(1000) as f64 / 1000.0));
        let _may_have_ended = child::send_signal(&first.pidfd(), Signal::SIGKILL);
        let exit = first.wait();
        feeder.finish();
        killed += u64::from(!exit.status.success());
        if let Ok(inventory) = fs::read(dir.path().join("inventory.img"))
            && inventory != EARLIER
        {
            for (name, content) in &files {
                let found = fs::read(dir.path().join(name)).unwrap();
                assert!(
                    found == *content,
                    "seed {seed}: the inventory is in place before {name}"
                );
            }
        }
        let started = Instant::now();
        let (mut second, feeder) = runs::feed(Streamer::extract().images_dir(dir.path()), &shards);
        second.expect_success();
        usual = started.elapsed();
        feeder.finish();
        let mut after = files;
        after.insert("earlier.img".into(), EARLIER.into());
        runs::assert_same_files(&runs::read_dir(dir.path()), &after);
    });
    crate::common::report(format_args!(
        "killed extracts: {} rounds, {killed} killed before their end",
        rounds()
    ));
    assert!(
        killed > rounds() / 4,
        "too few extracts were killed to tell"
    );
}

/// `FAULT_ROUNDS` sets how many there are of each kind.
fn rounds() -> u64 {
    setting("FAULT_ROUNDS", 50)
}

/// The party that stands still for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Party {
    Streamer,
    Shard,
    Criu,
    External,
}

const PARTIES: [Party; 4] = [Party::Streamer, Party::Shard, Party::Criu, Party::External];

fn stand_still() {
    thread::sleep(Duration::from_millis(30));
}

fn stop_for_a_while(streamer: &Streamer) {
    let pidfd = streamer.pidfd();
    thread::spawn(move || {
        // It may have ended by then.
        let _ended = child::send_signal(&pidfd, Signal::SIGSTOP);
        stand_still();
        let _ended = child::send_signal(&pidfd, Signal::SIGCONT);
    });
}

/// Writes pieces, and stands still before one of them.
fn write_with_pause(mut file: File, content: &[u8], pause: Option<usize>) {
    let at = pause.unwrap_or(usize::MAX).min(content.len());
    file.write_all(&content[..at]).unwrap();
    if pause.is_some() {
        stand_still();
    }
    file.write_all(&content[at..]).unwrap();
}

fn read_with_pause(mut file: File, pause: Option<usize>) -> Vec<u8> {
    let mut content = Vec::new();
    if let Some(at) = pause {
        (&mut file)
            .take(at as u64)
            .read_to_end(&mut content)
            .unwrap();
        stand_still();
    }
    file.read_to_end(&mut content).unwrap();
    content
}

fn files_for_stalls(random: &mut Random) -> (Files, Vec<u8>) {
    let mut files = runs::small_files(10, 5000, random.next());
    let size = 100 * PAGE + random.below(500 * PAGE);
    files.insert("pages-1.img".into(), random.bytes(size));
    let tar_size = random.below(100 * PAGE);
    (files, random.bytes(tar_size))
}

#[test]
fn a_capture_takes_no_harm_when_a_party_stands_still() {
    for seed in 0..rounds() {
        let mut random = Random::new(seed);
        let (mut files, tar) = files_for_stalls(&mut random);
        let party = *random.pick(&PARTIES);
        let moment = random.below(files["pages-1.img"].len());
        let (readers, writers) = shards::pipes(1 + random.below(4), None);
        let (tar_reader, tar_writer) = pipe();
        let mut streamer = Streamer::capture()
            .shards(writers)
            .ext_file("fs.tar", tar_reader)
            .start();
        let pauses = |mut random: Random, only: bool| {
            move |index: usize| (only && index == 0).then(|| random.below(100_000))
        };
        let mut shard_pause = pauses(Random::new(seed + 1), party == Party::Shard);
        let reading: Vec<_> = readers
            .into_iter()
            .enumerate()
            .map(|(index, reader)| {
                let pause = shard_pause(index);
                thread::spawn(move || read_with_pause(File::from(reader), pause))
            })
            .collect();
        let tar_pause = (party == Party::External).then(|| random.below(tar.len() + 1));
        let writing = {
            let tar = tar.clone();
            thread::spawn(move || write_with_pause(File::from(tar_writer), &tar, tar_pause))
        };
        let criu = streamer.criu();
        for (name, content) in runs::inventory_last(&files) {
            let is_large = name == "pages-1.img";
            if is_large && party == Party::Streamer {
                stop_for_a_while(&streamer);
            }
            let pause = (is_large && party == Party::Criu).then_some(moment);
            write_with_pause(criu.create_file(name), content, pause);
        }
        drop(criu);
        writing.join().unwrap();
        streamer.expect_success();
        let shards: Vec<_> = reading.into_iter().map(|t| t.join().unwrap()).collect();
        files.insert("fs.tar".into(), tar);
        let found =
            image::decode(&shards).unwrap_or_else(|e| panic!("seed {seed}, {party:?}: {e}"));
        runs::assert_same_files(&found, &files);
    }
    crate::common::report(format_args!(
        "stalled captures: {} rounds, all images whole",
        rounds()
    ));
}

#[test]
fn a_restore_takes_no_harm_when_a_party_stands_still() {
    for seed in 0..rounds() {
        let mut random = Random::new(seed);
        let (files, tar) = files_for_stalls(&mut random);
        let party = *random.pick(&PARTIES);
        let mut all = files.clone();
        all.insert("fs.tar".into(), tar.clone());
        let chunk = *random.pick(&[20_000, 120_000]);
        let image = image::encode_files(&all, 1 + random.below(4), chunk);
        let (readers, writers) = shards::pipes(image.len(), None);
        let (tar_reader, tar_writer) = pipe();
        let to_disk = random.one_in(2);
        let launch = if to_disk {
            Streamer::extract()
        } else {
            random.pick(&Keeping::ALL).serve()
        };
        let mut streamer = launch
            .shards(readers)
            .ext_file("fs.tar", tar_writer)
            .start();
        let tar_pause = (party == Party::External).then(|| random.below(tar.len() + 1));
        let reading = thread::spawn(move || read_with_pause(File::from(tar_reader), tar_pause));
        if party == Party::Streamer {
            stop_for_a_while(&streamer);
        }
        let stalled = random.below(image.len());
        let feeding: Vec<_> = writers
            .into_iter()
            .zip(image)
            .enumerate()
            .map(|(index, (writer, bytes))| {
                let pause =
                    (party == Party::Shard && index == stalled).then(|| random.below(bytes.len()));
                thread::spawn(move || write_with_pause(File::from(writer), &bytes, pause))
            })
            .collect();
        let found = if to_disk {
            streamer.expect_success();
            runs::read_dir(streamer.images_dir())
        } else {
            let criu = streamer.criu();
            let pause = (party == Party::Criu).then(|| random.below(files["pages-1.img"].len()));
            let read = files.keys().map(|name| {
                let pause = pause.filter(|_| name == "pages-1.img");
                (
                    name.clone(),
                    read_with_pause(criu.open_file(name).unwrap(), pause),
                )
            });
            let found = read.collect();
            drop(criu);
            streamer.expect_success();
            found
        };
        feeding
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        runs::assert_same_files(&found, &files);
        assert!(
            reading.join().unwrap() == tar,
            "seed {seed}, {party:?}: another fs.tar"
        );
    }
    crate::common::report(format_args!(
        "stalled restores: {} rounds, all images whole",
        rounds()
    ));
}
