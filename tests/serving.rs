//! Serving like a file system: any number of files open at once, read, left and asked for again in
//! any order.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child;
use crate::common::criu::{Criu, Role};
use crate::common::dump;
use crate::common::image::{self, Files, Shard};
use crate::common::keeping::Keeping;
use crate::common::random::{self, Random, for_each_seed};
use crate::common::runs::{self, assert_same_bytes};
use crate::common::shards::pipe;
use crate::common::streamer::Streamer;
use crate::common::{PAGE, setting, skip};

const MIB: usize = 1 << 20;

/// Files up to this size, unless they hold pages, can be asked for as often as CRIU likes; others
/// are given away as they are sent.
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
        Keeping::in_turn(seed as usize).serve(),
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
    let first = setting("SERVING_FIRST_SEED", 0);
    let end = first + setting("SERVING_SEEDS", 100);
    let middle = first.midpoint(end);
    thread::scope(|scope| {
        scope.spawn(|| for_each_seed(first..middle, read_at_random));
        for_each_seed(middle..end, read_at_random);
    });
}

/// What the other tests of this module, and of others, count on.
#[test]
fn an_image_is_kept_where_limits_say() {
    if !may_hold_in_pipes() {
        return skip("without CAP_SYS_ADMIN or CAP_SYS_RESOURCE, nothing is held in pipes");
    }
    const SIZE: usize = 32 * MIB;
    let pages = random::bytes(1, SIZE);
    let files = [("pages-1.img".to_owned(), pages.clone())].into();
    let image = image::encode_files(&files, 2, MIB);
    let size_kib = (SIZE >> 10) as u64;
    for keeping in Keeping::ALL {
        let (mut streamer, _feeder) = runs::feed(keeping.serve(), &image);
        let criu = streamer.criu();
        let held = streamer.image_kib() - streamer.memory_kib("VmRSS");
        let expected = match keeping {
            // The few bytes by which a chunk exceeds a pipe are read, with what follows them.
            Keeping::Pipes => size_kib / 8 * 7..size_kib,
            Keeping::Memory => 0..1,
            Keeping::Both => 32..Keeping::FEW_PIPES * 1024 + 1,
        };
        assert!(expected.contains(&held), "{keeping:?}: {held} KiB in pipes");
        criu.expect_file("pages-1.img", &pages);
        drop(criu);
        streamer.expect_success();
    }
}

/// The last pipe that limits allow is half full when nothing more comes for a while.
#[test]
fn a_chunk_that_comes_in_parts_is_kept_whole() {
    let pages = random::bytes(1, 3 * MIB);
    let begin = Shard::new()
        .filename(0, "pages-1.img")
        .data(1, &pages[..5 * MIB / 2])
        .bytes;
    let mut parts = Shard::new().filename(0, "pages-1.img");
    parts = parts.data(1, &pages).file_eof(2).inventory_and_end(3);
    let (first, rest) = parts.bytes.split_at(begin.len());
    for keeping in Keeping::ALL {
        let (reader, writer) = pipe();
        let mut streamer = keeping.serve().shards([reader]).start();
        let mut writer = File::from(writer);
        writer.write_all(first).unwrap();
        while child::queued(&writer) > 0 {
            thread::sleep(Duration::from_millis(1));
        }
        writer.write_all(rest).unwrap();
        drop(writer);
        let criu = streamer.criu();
        criu.expect_file("pages-1.img", &pages);
        drop(criu);
        streamer.expect_success();
    }
}

fn may_hold_in_pipes() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    effective & (SYS_ADMIN | SYS_RESOURCE) != 0
}

/// Descriptors are for the files that CRIU has open.
#[test]
fn chunks_of_a_file_share_the_pipes_that_hold_them() {
    if !may_hold_in_pipes() {
        return;
    }
    let files = Files::from([("pages-1.img".into(), vec![7; 37 << 20])]);
    let files = files.into_iter().chain(dump::whole()).collect();
    for chunk in [64 << 10, 252 << 10] {
        let shards = image::encode_files(&files, 2, chunk);
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &shards);
        streamer.wait_for_line("socket-init");
        let open = streamer.open_fds();
        assert!(open < 80, "{open} descriptors");
        runs::assert_served(&mut streamer, &files);
    }
}

#[test]
fn processes_of_one_criu_read_at_the_same_time() {
    let files = image_for_readers(&mut Random::new(1));
    let image = image::encode_files(&files, 2, 200_000);
    for keeping in Keeping::ALL {
        let (streamer, _feeder) = runs::feed(keeping.serve(), &image);
        read_by_processes(&files, streamer);
    }
}

fn read_by_processes(files: &Files, mut streamer: Streamer) {
    let criu = streamer.criu();
    thread::scope(|scope| {
        for reader in 0..8 {
            let criu = &criu;
            scope.spawn(move || {
                let mut random = Random::new(reader);
                let kept: Vec<_> = files
                    .iter()
                    .filter(|(_, content)| content.len() <= KEPT)
                    .collect();
                for _ in 0..100 {
                    let (name, content) = random.pick(&kept);
                    criu.expect_file(name, content);
                }
            });
        }
        for i in 0..3 {
            let (criu, name) = (&criu, format!("pages-{i}.img"));
            let content = &files[&name];
            scope.spawn(move || criu.expect_file(&name, content));
        }
    });
    drop(criu);
    streamer.expect_success();
}

#[test]
fn thousands_of_requests_leave_the_streamer_as_it_was() {
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
    ask(&mut random, 2_000);
    assert_eq!(settled(&streamer, |s| s.open_fds()), fds);
    assert_eq!(streamer.threads(), threads);
    let grown = streamer.memory_kib("VmRSS").saturating_sub(memory);
    assert!(grown < 256, "{grown} KiB more than before");
    drop(criu);
    streamer.expect_success();
}

/// A pipe that CRIU just closed is noticed a moment later: the least of what is seen until it stays
/// the same for long.
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

/// Pages go to CRIU and are freed, so that the machine does not need the memory twice: there is no
/// second time.
#[test]
fn a_page_file_asked_for_again_is_an_error_that_names_it() {
    let pages = random::bytes(1, 4 * MIB);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        1,
        MIB,
    );
    for keeping in Keeping::ALL {
        let (streamer, _feeder) = runs::feed(keeping.serve(), &image);
        ask_again_for_pages(&pages, streamer);
    }
}

fn ask_again_for_pages(pages: &[u8], mut streamer: Streamer) {
    let criu = streamer.criu();
    criu.expect_file("pages-1.img", pages);
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
    let files = [("pagemap-1.img".to_owned(), content.clone())].into();
    let image = image::encode_files(&files, 1, MIB);
    for keeping in Keeping::ALL {
        let (mut streamer, _feeder) = runs::feed(keeping.serve(), &image);
        let criu = streamer.criu();
        for _ in 0..3 {
            criu.expect_file("pagemap-1.img", &content);
        }
        drop(criu);
        streamer.expect_success();
    }
}
