//! Serving like a file system: any number of files open at once, read, left and asked for again in any order.

mod common;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use common::PAGE;
use common::criu::{Criu, Role};
use common::image::{self, Files};
use common::random::{self, Random};
use common::runs::{self, assert_same_bytes};
use common::streamer::Streamer;

const MIB: usize = 1 << 20;

/// Files up to this size, unless they hold pages, can be asked for as often as CRIU likes; others are given away as they are sent.
const KEPT: usize = MIB;

/// A file that a reader has open, and how far it is.
struct Reading {
    name: String,
    file: File,
    offset: usize,
}

impl Reading {
    /// Reads up to `len` bytes, all of which must be right. True: that was the end.
    fn go_on(&mut self, len: usize, files: &Files) -> bool {
        let mut bytes = vec![0; len];
        let got = self.file.read(&mut bytes).expect("read a file");
        let expected = &files[&self.name][self.offset..];
        assert!(
            got <= expected.len(),
            "{}: {got} bytes at {}",
            self.name,
            self.offset
        );
        assert_same_bytes(&self.name, &bytes[..got], &expected[..got]);
        self.offset += got;
        assert!(
            got > 0 || self.offset == files[&self.name].len(),
            "{} ended at {}",
            self.name,
            self.offset
        );
        got == 0
    }
}

fn image_for_readers(random: &mut Random) -> Files {
    let mut files = Files::new();
    for i in 0..12 {
        let bound = *random.pick(&[1, 100, PAGE + 1, 100_000]);
        let size = random.below(bound);
        files.insert(format!("file-{i}.img"), random.bytes(size));
    }
    for i in 0..3 {
        let size = KEPT + 1 + random.below(KEPT);
        files.insert(format!("pages-{i}.img"), random.bytes(size));
    }
    files
}

/// Everything that readers can do, in an order that depends on `seed` alone.
fn read_at_random(seed: u64) {
    let mut random = Random::new(seed);
    let files = image_for_readers(&mut random);
    let shard_count = 1 + random.below(4);
    let (mut streamer, _feeder) = runs::feed(
        Streamer::serve(),
        &image::encode_files(&files, shard_count, 200_000),
    );
    let mut connections = vec![streamer.criu()];
    for _ in 0..random.below(3) {
        connections.push(Criu::connect(streamer.images_dir(), Role::Serve));
    }

    let names: Vec<_> = files.keys().cloned().collect();
    let mut unasked: BTreeMap<_, _> = files
        .iter()
        .filter(|(_, content)| content.len() > KEPT)
        .collect();
    let mut open: Vec<Reading> = Vec::new();
    for _ in 0..150 {
        match random.below(10) {
            0..4 => {
                let name = random.pick(&names);
                if files[name].len() > KEPT && unasked.remove(name).is_none() {
                    continue;
                }
                let file = random.pick(&connections).open_file(name).expect(name);
                open.push(Reading {
                    name: name.clone(),
                    file,
                    offset: 0,
                });
            }
            4 => assert!(random.pick(&connections).open_file("nothing.img").is_none()),
            5 if !open.is_empty() => drop(open.swap_remove(random.below(open.len()))),
            _ if !open.is_empty() => {
                let turn = random.below(open.len());
                let len = 1 + random.below(300_000);
                if open[turn].go_on(len, &files) {
                    open.swap_remove(turn);
                }
            }
            _ => {}
        }
    }
    drop(connections);
    random.shuffle(&mut open);
    for mut reading in open {
        while !random.one_in(20) && !reading.go_on(200_000, &files) {}
    }
    streamer.expect_success();
}

/// A failing seed is printed; run it alone with `SERVING_FIRST_SEED=<seed> SERVING_SEEDS=1`.
#[test]
fn readers_that_open_read_and_leave_at_random_get_right_bytes_and_an_end() {
    let number =
        |name: &str, default| std::env::var(name).map_or(default, |value| value.parse().unwrap());
    let (first, count): (u64, u64) = (
        number("SERVING_FIRST_SEED", 0),
        number("SERVING_SEEDS", 2000),
    );
    let run = |seeds: std::ops::Range<u64>| {
        for seed in seeds {
            let on_failure = Shout(seed);
            read_at_random(seed);
            std::mem::forget(on_failure);
        }
    };
    thread::scope(|scope| {
        scope.spawn(|| run(first..first + count / 2));
        run(first + count / 2..first + count);
    });
}

/// Names the seed when the test panics.
struct Shout(u64);

impl Drop for Shout {
    fn drop(&mut self) {
        eprintln!("failed with seed {}", self.0);
    }
}

#[test]
fn processes_of_one_criu_read_at_the_same_time() {
    let files = image_for_readers(&mut Random::new(1));
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 2, 200_000));
    let criu = streamer.criu();
    thread::scope(|scope| {
        for reader in 0..8 {
            let (criu, files) = (&criu, &files);
            scope.spawn(move || {
                let mut random = Random::new(reader);
                let kept: Vec<_> = files
                    .iter()
                    .filter(|(_, content)| content.len() <= KEPT)
                    .collect();
                for _ in 0..100 {
                    let (name, content) = random.pick(&kept);
                    assert_same_bytes(name, &criu.read_file(name).expect(name), content);
                }
            });
        }
        for i in 0..3 {
            let (criu, name) = (&criu, format!("pages-{i}.img"));
            let content = &files[&name];
            scope.spawn(move || {
                assert_same_bytes(&name, &criu.read_file(&name).expect(&name), content)
            });
        }
    });
    drop(criu);
    streamer.expect_success();
}

#[test]
fn ten_thousand_requests_leave_the_streamer_as_it_was() {
    let mut random = Random::new(1);
    let files: Files = (0..20)
        .map(|i| (format!("file-{i}.img"), random.bytes(i * 1000)))
        .collect();
    let names: Vec<_> = files.keys().collect();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 2, 10_000));
    let criu = streamer.criu();
    let ask = |random: &mut Random, times| {
        for _ in 0..times {
            let name = *random.pick(&names);
            match random.below(4) {
                0 => assert!(criu.open_file("nothing.img").is_none()),
                1 => drop(criu.open_file(name).expect(name)),
                _ => assert_same_bytes(name, &criu.read_file(name).expect(name), &files[name]),
            }
        }
    };
    ask(&mut random, 100);
    let (fds, threads) = (settled(&streamer, |s| s.open_fds()), streamer.threads());
    let memory = streamer.memory_kib("VmRSS");
    ask(&mut random, 10_000);
    assert_eq!(settled(&streamer, |s| s.open_fds()), fds);
    assert_eq!(streamer.threads(), threads);
    let grown = streamer.memory_kib("VmRSS").saturating_sub(memory);
    assert!(grown < 256, "{grown} KiB more than before");
    drop(criu);
    streamer.expect_success();
}

/// A pipe that CRIU just closed is noticed a moment later: the least of what is seen until it stays the same for long.
fn settled(streamer: &Streamer, look: impl Fn(&Streamer) -> usize) -> usize {
    let mut least = look(streamer);
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(200) {
        let now = look(streamer);
        if now < least {
            (least, since) = (now, Instant::now());
        }
        thread::sleep(Duration::from_millis(5));
    }
    least
}

#[test]
fn thousands_of_files_are_open_at_once() {
    let files: Files = (0..2000)
        .map(|i| (format!("file-{i}.img"), random::bytes(i, 5000)))
        .collect();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 1, 10_000));
    let criu = streamer.criu();
    let open: Vec<_> = files
        .keys()
        .map(|name| (name, criu.open_file(name).expect(name)))
        .collect();
    for (name, mut file) in open.into_iter().rev() {
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_same_bytes(name, &content, &files[name]);
    }
    drop(criu);
    streamer.expect_success();
}

/// The scheduling policy, field 41 of `/proc/PID/stat`: 0 is the usual one, 1 is `SCHED_FIFO`.
fn policy(streamer: &Streamer) -> u32 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", streamer.pid())).unwrap();
    let (_, after_name) = stat.rsplit_once(") ").unwrap();
    let field = after_name.split(' ').nth(41 - 3).unwrap();
    field.parse().unwrap()
}

fn wait_for_policy(streamer: &Streamer, expected: u32, when: &str) {
    let end = Instant::now() + common::HANG_TIMEOUT;
    while policy(streamer) != expected {
        assert!(
            Instant::now() < end,
            "the policy is {} {when}",
            policy(streamer)
        );
        thread::sleep(Duration::from_millis(1));
    }
}

/// A small file, one that fills any pipe, and the last.
fn small_and_large() -> Files {
    let mut random = Random::new(9);
    let sizes = [
        ("core-1.img", 1000),
        ("pages-1.img", 8 * MIB),
        ("inventory.img", 100),
    ];
    let sized = sizes.map(|(name, size)| (name.to_owned(), random.bytes(size)));
    sized.into_iter().collect()
}

#[test]
fn small_files_are_served_at_real_time_priority_and_large_ones_are_not() {
    if !nix::unistd::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "this test needs root");
        eprintln!("skipped: real-time priority needs root");
        return;
    }
    let files = small_and_large();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 2, MIB));
    let criu = streamer.criu();
    assert_eq!(
        criu.read_file("core-1.img").unwrap(),
        files["core-1.img"],
        "core-1.img"
    );
    wait_for_policy(&streamer, 1, "after a small file");
    let mut large = criu.open_file("pages-1.img").unwrap();
    wait_for_policy(&streamer, 0, "while a large file waits for its reader");
    let mut content = Vec::new();
    large.read_to_end(&mut content).unwrap();
    assert_same_bytes("pages-1.img", &content, &files["pages-1.img"]);
    wait_for_policy(&streamer, 1, "after the large file");
    drop(criu);
    streamer.expect_success();
}

#[test]
fn a_priority_that_was_chosen_by_the_starter_is_kept() {
    // Of this thread, and so of what it starts.
    let own = nix::unistd::gettid().to_string();
    let reniced = Command::new("renice")
        .args(["-n", "5", "-p", &own])
        .output();
    assert!(reniced.unwrap().status.success());
    let files = small_and_large();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 2, MIB));
    let criu = streamer.criu();
    for name in files.keys() {
        assert_same_bytes(name, &criu.read_file(name).unwrap(), &files[name]);
        assert_eq!(policy(&streamer), 0, "after {name}");
    }
    drop(criu);
    streamer.expect_success();
}

/// Pages go to CRIU and are freed, so that the machine does not need the memory twice: there is no second time.
#[test]
fn a_page_file_asked_for_again_is_an_error_that_names_it() {
    let pages = random::bytes(1, 4 * MIB);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        1,
        MIB,
    );
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let criu = streamer.criu();
    assert_same_bytes(
        "pages-1.img",
        &criu.read_file("pages-1.img").unwrap(),
        &pages,
    );
    if let Ok(Some(mut again)) = criu.try_open_file("pages-1.img", None) {
        let mut content = Vec::new();
        match again.read_to_end(&mut content) {
            Ok(_) => assert!(content.is_empty(), "bytes of a file that was given away"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::BrokenPipe),
        }
    }
    drop(criu);
    streamer.expect_failure(&["pages-1.img"]);
}

#[test]
fn every_other_file_up_to_a_bound_may_be_asked_for_again() {
    let content = random::bytes(1, KEPT);
    let image = image::encode([("pagemap-1.img", &content[..])], 1, MIB);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let criu = streamer.criu();
    for _ in 0..3 {
        assert_same_bytes(
            "pagemap-1.img",
            &criu.read_file("pagemap-1.img").unwrap(),
            &content,
        );
    }
    drop(criu);
    streamer.expect_success();
}

#[test]
fn connections_after_the_first_are_served_and_the_last_one_ends_it() {
    let image = image::encode([("inventory.img", &b"inventory"[..])], 1, 100);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let restore = streamer.criu();
    restore.read_file("inventory.img").unwrap();
    let lazy_pages = Criu::connect(streamer.images_dir(), Role::Serve);
    assert_eq!(
        lazy_pages.read_file("inventory.img").as_deref(),
        Some(&b"inventory"[..])
    );
    drop(restore);
    for _ in 0..100 {
        assert_eq!(
            lazy_pages.read_file("inventory.img").as_deref(),
            Some(&b"inventory"[..])
        );
    }
    drop(lazy_pages);
    streamer.expect_success();
}

#[test]
fn criu_clients_are_waited_for() {
    let image = image::encode([("inventory.img", &b"inventory"[..])], 1, 100);
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve().args(["--criu-clients", "3"]), &image);
    for _ in 0..3 {
        assert!(streamer.is_running());
        let criu = streamer.criu();
        assert_eq!(
            criu.read_file("inventory.img").as_deref(),
            Some(&b"inventory"[..])
        );
    }
    streamer.expect_success();
}

#[test]
fn a_capture_takes_files_from_several_connections() {
    let (readers, writers) = common::shards::pipes(2, None);
    let mut streamer = Streamer::capture()
        .shards(writers)
        .args(["--criu-clients", "2"])
        .start();
    let collector = common::shards::Collector::start(readers);
    let first = streamer.criu();
    first.write_file("a.img", b"first");
    drop(first);
    let second = streamer.criu();
    second.write_file("b.img", b"second");
    second.write_file("inventory.img", b"inventory");
    drop(second);
    streamer.expect_success();
    assert_eq!(image::decode(&collector.finish()).unwrap().len(), 3);
}
