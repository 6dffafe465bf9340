//! Whatever stands on a shard: an error that says where, or a right image. Never a panic, a hang, a
//! file elsewhere or a broken image that looks whole.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::common::child;
use crate::common::image::{self, Files, Shard};
use crate::common::keeping::Keeping;
use crate::common::random::{Random, for_each_seed};
use crate::common::runs;
use crate::common::shards;
use crate::common::streamer::{Exit, Launch, Streamer};
use crate::common::{report, setting};

/// All that receive an image, wherever they keep it.
const LAUNCHES: [fn() -> Launch; 4] = [
    Streamer::extract,
    || Keeping::Pipes.serve(),
    || Keeping::Memory.serve(),
    || Keeping::Both.serve(),
];

/// Refused by `extract` and by `serve`: exit status 1, an error with all of `words` that names the
/// shard and a place between `from` and the shard's end, no file, and no progress line tells of an
/// image.
#[track_caller]
fn assert_refused_from(from: usize, what: &str, shards: &[Vec<u8>], words: &[&str]) {
    for launch in LAUNCHES {
        let (mut streamer, _feeder) = runs::feed(launch(), shards);
        let exit = streamer.wait();
        assert_eq!(
            exit.status.code(),
            Some(1),
            "{what}: {}\n{}",
            exit.status,
            exit.stderr
        );
        assert!(!exit.stderr.contains("panicked"), "{what}: {}", exit.stderr);
        let error = exit.error();
        for word in words.iter().chain(&["shard"]) {
            assert!(
                error.contains(word),
                "{what}: nothing about {word:?} in: {error}"
            );
        }
        let longest = shards.iter().map(Vec::len).max().unwrap();
        let place = place(error).unwrap_or_else(|| panic!("{what}: no place in: {error}"));
        assert!(
            (from..=longest).contains(&place),
            "{what}: the wrong place ({from} is right): {error}"
        );
        assert!(
            exit.stderr.chars().all(|c| c == '\n' || !c.is_control()),
            "{what}: {:?}",
            exit.stderr
        );
        assert_eq!(exit.progress, [""; 0], "{what}");
        assert_eq!(
            runs::read_dir(streamer.images_dir()),
            Files::new(),
            "{what}"
        );
    }
}

#[track_caller]
fn assert_refused(what: &str, shards: &[Vec<u8>], words: &[&str]) {
    assert_refused_from(0, what, shards, words);
}

/// The offset that an error names.
fn place(error: &str) -> Option<usize> {
    let (_, after) = error.split_once(" byte ")?;
    after
        .split(|c: char| !c.is_ascii_digit())
        .next()?
        .parse()
        .ok()
}

/// A defect in one shard behind a good beginning.
#[track_caller]
fn assert_defect(what: &str, defect: impl FnOnce(Shard) -> Shard, words: &[&str]) {
    let good = Shard::new()
        .filename(0, "a.img")
        .data(1, b"data")
        .file_eof(2);
    let from = good.bytes.len();
    assert_refused_from(from, what, &[defect(good).bytes], words);
}

/// Not one path component, or the name of something that is trusted beside an image.
#[test]
fn names_that_no_file_of_an_image_has() {
    let too_long = "x".repeat(256);
    for name in [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "../a.img",
        "/tmp/a.img",
        "a\0b",
        "a.img/",
        &too_long,
        "streamer-serve.options",
        "streamer-capture.outcome",
        "streamer-capture.sock",
        "parent",
        "stats-dump",
        "dump.log",
    ] {
        assert_defect(
            &format!("name {name:?}"),
            |shard| shard.filename(3, name).file_eof(4).image_eof(5),
            &["name"],
        );
    }
    assert_defect(
        "a name that is no text",
        |shard| {
            shard
                .filename_bytes(3, b"\xff\xfe")
                .file_eof(4)
                .image_eof(5)
        },
        &[],
    );
}

#[test]
fn criu_is_refused_names_that_no_file_of_an_image_has() {
    for name in ["streamer-serve.options", "parent", "dump.log"] {
        let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
        let criu = streamer.criu();
        criu.write_file("pstree.img", b"tree");
        drop(criu.try_create_file(name, None));
        streamer.expect_failure(&[name]);
        let shard = collector.finish().remove(0);
        assert!(
            !shard
                .windows(name.len())
                .any(|part| part == name.as_bytes())
        );
    }
}

#[test]
fn names_with_control_characters_do_not_reach_the_terminal() {
    assert_defect(
        "an escape sequence",
        |shard| {
            shard
                .filename(3, "\x1b]0;owned\x07/")
                .file_eof(4)
                .image_eof(5)
        },
        &["name"],
    );
}

#[test]
fn frames_that_are_no_markers() {
    assert_defect(
        "10 KiB and a byte",
        |shard| shard.raw(&10_241_u32.to_le_bytes()).raw(&[0; 10_241]),
        &["10241"],
    );
    assert_defect(
        "4 GiB",
        |shard| shard.raw(&[0xff; 4]).raw(&[0; 1000]),
        &["4294967295"],
    );
    assert_defect(
        "4 GiB and nothing behind it",
        |shard| shard.raw(&[0xff; 4]),
        &["4294967295"],
    );
    assert_defect(
        "no protobuf",
        |shard| shard.raw(&crate::common::criu::frame(&[0xff; 30])),
        &[],
    );
    assert_defect(
        "an empty marker",
        |shard| shard.raw(&crate::common::criu::frame(&[])),
        &[],
    );
    assert_defect(
        "a marker that says nothing",
        |shard| shard.marker(3, &[]),
        &[],
    );
    assert_defect(
        "a file_eof that is not true",
        |shard| shard.marker(3, &[4 << 3, 0]).image_eof(4),
        &["file_eof"],
    );
    assert_defect(
        "an image_eof that is not true",
        |shard| shard.marker(3, &[5 << 3, 0]),
        &["image_eof"],
    );
}

#[test]
fn data_and_ends_of_no_file() {
    let nothing_before = Shard::new().data(0, b"data").image_eof(1);
    assert_refused("data before any name", &[nothing_before.bytes], &[]);
    assert_defect(
        "data after a file's end",
        |shard| shard.data(3, b"data").image_eof(4),
        &[],
    );
    assert_defect(
        "a file's end twice",
        |shard| shard.file_eof(3).image_eof(4),
        &[],
    );
}

#[test]
fn ends_that_are_not_the_end() {
    assert_defect(
        "a marker after the end",
        |shard| shard.image_eof(3).filename(4, "b.img").file_eof(5),
        &["end"],
    );
    assert_defect(
        "the end twice",
        |shard| shard.image_eof(3).image_eof(4),
        &["end"],
    );
    assert_defect(
        "bytes after the end",
        |shard| shard.image_eof(3).raw(&[0; 100]),
        &["end"],
    );
    assert_defect(
        "the end in the middle of a file",
        |shard| shard.filename(3, "b.img").image_eof(4),
        &["b.img"],
    );
    let (one, other) = (
        Shard::new().filename(0, "a.img").image_eof(2),
        Shard::new().file_eof(1).file_eof(3),
    );
    assert_refused(
        "a marker after the end in another shard",
        &[one.bytes, other.bytes],
        &["shard", "end"],
    );
}

#[test]
fn numbers_with_gaps_and_repeats_and_no_room_for_more() {
    for seq in [4, 5, 1 << 32, 1 << 63, u64::MAX] {
        assert_defect(
            &format!("a gap before {seq}"),
            |shard| shard.image_eof(seq),
            &["3"],
        );
    }
    for seq in [0, 1, 2] {
        assert_defect(
            &format!("{seq} again"),
            |shard| shard.image_eof(seq),
            &[&seq.to_string()],
        );
    }
    let twice = |seq| Shard::new().filename(seq, "a.img").bytes;
    assert_refused(
        "the same number in two shards",
        &[twice(0), twice(0)],
        &["shard"],
    );
    assert_refused(
        "only ever larger numbers",
        &[twice(u64::MAX), twice(u64::MAX - 1)],
        &["shard"],
    );
}

#[test]
fn data_that_is_not_there() {
    for size in [5, 1 << 20, u32::MAX] {
        let what = format!("{size} bytes announced, 4 there");
        let shard = Shard::new()
            .filename(0, "a.img")
            .data_marker(1, size)
            .raw(b"data");
        assert_refused(&what, &[shard.bytes], &[]);
    }
}

/// What is cut off in a marker, in the data behind it or between the two, behind data that is large
/// enough to be held in pipes.
#[test]
fn cuts_behind_data_that_stays_in_its_pages() {
    let large = vec![7; 100_000];
    let shard = Shard::new().filename(0, "pages-1.img").data(1, &large);
    let whole = shard.bytes.len();
    let more = shard.data(2, &large);
    let data = more.bytes.len() - large.len();
    let cuts = [whole, whole + 1, whole + 5, data - 1, data, data + 1];
    for cut in cuts.into_iter().chain([more.bytes.len() - 1]) {
        let what = format!("cut at byte {cut}, the second chunk's data being at {data}");
        assert_refused(&what, &[more.bytes[..cut].to_vec()], &["shard"]);
    }
}

/// Returns when the streamer has taken all, or has ended.
fn write_until_taken(writer: &mut File, shard: &Shard, streamer: &Streamer) {
    writer.write_all(&shard.bytes).unwrap();
    while child::queued(&*writer) > 0 && streamer.is_running() {
        thread::sleep(Duration::from_millis(1));
    }
}

/// A chunk behind the image's end, some of whose data is in a pipe that holds it already, or none.
#[test]
fn a_chunk_that_was_begun_behind_the_end_is_refused_although_more_may_come() {
    for held in [0, 40_000] {
        for launch in LAUNCHES {
            let begun = Shard::new().data_marker(1_000, 100_000).raw(&vec![7; held]);
            let (readers, writers) = shards::pipes(2, None);
            let mut streamer = launch().shards(readers).start();
            let mut writers: Vec<_> = writers.into_iter().map(File::from).collect();
            write_until_taken(&mut writers[0], &begun, &streamer);
            let image = Shard::new().inventory_and_end(0);
            writers[1].write_all(&image.bytes).unwrap();
            streamer.expect_failure(&["something follows the end of the image"]);
        }
    }
}

/// Two dumps of one application into the same names, of which one upload failed: the markers fit
/// together, and the files are of one dump, their contents of both. The first streamer names no
/// process.
#[test]
fn shards_of_two_images_make_no_image() {
    let image = |captured_by: Option<u8>| {
        let pages = vec![captured_by.unwrap_or(0); 300_000];
        let files = [
            ("pages-1.img", &pages[..]),
            ("inventory.img", image::INVENTORY),
        ];
        let mut shards = image::encode(files, 3, 50_000);
        if let Some(pid) = captured_by {
            image::captured_by(&mut shards, pid);
        }
        shards
    };
    for (one, other) in [(Some(1), Some(2)), (None, Some(1)), (Some(1), None)] {
        let (one, other) = (image(one), image(other));
        for mixture in 1..7 {
            let pick = |shard: usize| match mixture >> shard & 1 {
                0 => one[shard].clone(),
                _ => other[shard].clone(),
            };
            let shards: Vec<_> = (0..3).map(pick).collect();
            for launch in LAUNCHES.into_iter().chain([Streamer::list as fn() -> _]) {
                let (mut streamer, _feeder) = runs::feed(launch(), &shards);
                let exit = streamer.expect_failure(&["shard fd", "of different images"]);
                assert_eq!(exit.progress, [""; 0]);
                assert_eq!(runs::read_dir(streamer.images_dir()), Files::new());
            }
        }
        for whole in [one, other] {
            let (_dir, exit) = runs::extract(&whole);
            assert!(exit.status.success(), "{}", exit.stderr);
        }
    }
}

/// What a stream can make the streamer keep, while more of it may come.
#[track_caller]
fn assert_little_memory(mib: u64, shard: &Shard, words: &[&str]) {
    for launch in LAUNCHES {
        let (readers, mut writers) = shards::pipes(2, None);
        let mut streamer = launch().shards(readers).start();
        let mut writer = File::from(writers.remove(0));
        write_until_taken(&mut writer, shard, &streamer);
        let peak = streamer.memory_kib("VmHWM");
        assert!(peak < mib << 10, "{peak} KiB");
        drop((writer, writers));
        streamer.expect_failure(words);
    }
}

/// 4 GiB announced must not be 4 GiB used.
#[test]
fn announced_bytes_cost_nothing_until_they_are_there() {
    let shard = Shard::new()
        .filename(0, "a.img")
        .data_marker(1, u32::MAX)
        .raw(&[0; 1000]);
    assert_little_memory(16, &shard, &["shard"]);
}

/// Markers that are not next have to wait in memory until it is clear that the next one will not
/// come.
#[test]
fn an_endless_run_of_markers_that_are_never_next_is_refused_in_little_memory() {
    let waiting = (1..300_000).fold(Shard::new(), Shard::file_eof);
    assert_little_memory(64, &waiting, &["shard", "marker 0"]);
}

#[test]
fn a_shard_that_is_not_an_image_at_all() {
    let mut random = Random::new(1);
    for (what, bytes) in [
        ("text", b"HTTP/1.1 404 Not Found\r\n\r\n".repeat(50)),
        ("zeros", vec![0; 100_000]),
        ("noise", random.bytes(100_000)),
        (
            "lz4",
            [&[0x04, 0x22, 0x4d, 0x18][..], &random.bytes(1000)].concat(),
        ),
    ] {
        assert_refused(what, &[bytes], &[]);
    }
}

#[test]
fn an_empty_stream_is_no_image() {
    assert_refused("nothing", &[vec![]], &[]);
    assert_refused(
        "nothing in three shards",
        &[vec![], vec![], vec![]],
        &["shard"],
    );
}

/// A good image with something changed: bits, cuts, pieces put elsewhere. Only what the reference
/// decoder takes may be taken, and then it must be the same image. `HOSTILE_SEEDS` sets how many.
#[test]
fn damaged_images_are_refused_or_read_as_they_stand() {
    let seeds = setting("HOSTILE_SEEDS", 1000);
    let (mut accepted, mut refused) = (0, 0);
    for_each_seed(0..seeds, |seed| {
        let mut random = Random::new(seed);
        let mut shards = start_of_damage(&mut random);
        for _ in 0..1 + random.below(3) {
            damage(&mut shards, &mut random);
        }
        let exit = if random.one_in(2) {
            let (dir, exit) = runs::extract(&shards);
            assert_truth(seed, &shards, &exit, |files| {
                runs::read_dir(dir.path()) == *files
            });
            if !exit.status.success() {
                let left = fs::read_dir(dir.path()).unwrap().count();
                assert_eq!(left, 0, "seed {seed}: files of a refused image");
            }
            exit
        } else {
            serve_damaged(seed, &shards, *random.pick(&Keeping::ALL))
        };
        if exit.status.success() {
            accepted += 1
        } else {
            refused += 1
        }
    });
    report(format_args!(
        "{seeds} damaged images: {refused} refused, {accepted} accepted and right"
    ));
    assert!(
        accepted > 0 && refused > 0,
        "the damage must be neither too little nor too much to tell"
    );
}

/// Serves an image that may be refused, and asks for all its files if it is not.
fn serve_damaged(seed: u64, shards: &[Vec<u8>], keeping: Keeping) -> Exit {
    let (mut streamer, _feeder) = runs::feed(keeping.serve(), shards);
    if streamer.listens() {
        let criu = streamer.criu();
        let files = image::decode(shards)
            .unwrap_or_else(|why| panic!("seed {seed}, {keeping:?}: accepted, although: {why}"));
        for (name, content) in &files {
            criu.expect_file(name, content);
        }
        drop(criu);
        return streamer.expect_success();
    }
    let exit = streamer.wait();
    assert_eq!(exit.progress, [""; 0], "seed {seed}, {keeping:?}");
    assert_truth(seed, shards, &exit, |_| false);
    exit
}

/// Accepted is only what the reference decoder takes, and then `is_there` says that it is the same.
fn assert_truth(seed: u64, shards: &[Vec<u8>], exit: &Exit, is_there: impl Fn(&Files) -> bool) {
    assert!(
        !exit.stderr.contains("panicked"),
        "seed {seed}: {}",
        exit.stderr
    );
    match (exit.status.code(), image::decode(shards)) {
        (Some(0), Ok(files)) => {
            assert!(is_there(&files), "seed {seed}: another image");
            assert!(files.contains_key("inventory.img"), "seed {seed}");
        }
        (Some(0), Err(why)) => panic!("seed {seed}: accepted, although: {why}"),
        (Some(1), _) => drop(exit.error()),
        (_, _) => panic!("seed {seed}: {}\n{}", exit.status, exit.stderr),
    }
}

/// An image of our own, with few bytes that are not markers, or with chunks large enough to be held
/// in pipes, or else the original streamer's.
fn start_of_damage(random: &mut Random) -> Vec<Vec<u8>> {
    match random.below(4) {
        0 => {
            let files = [
                ("a.img", &b"some bytes"[..]),
                ("b.img", b""),
                ("a.img", b"again"),
                ("inventory.img", b"inventory"),
            ];
            return image::encode(files, 1 + random.below(3), 4);
        }
        1 => {
            let (first, second) = (random.bytes(500_000), random.bytes(150_000));
            let files = [
                ("pages-1.img", &first[..]),
                ("pages-2.img", &second[..]),
                ("inventory.img", b"inventory"),
            ];
            return image::encode(files, 1 + random.below(3), 100_000);
        }
        _ => {}
    }
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    match random.one_in(2) {
        true => vec![fs::read(dir.join("one-shard/s0.bin")).unwrap()],
        false => (0..3)
            .map(|i| fs::read(dir.join(format!("three-shards/s{i}.bin"))).unwrap())
            .collect(),
    }
}

fn damage(shards: &mut [Vec<u8>], random: &mut Random) {
    let which = random.below(shards.len());
    let len = shards[which].len();
    if len == 0 {
        return;
    }
    let (from, to) = (random.below(len), random.below(len));
    let (from, to) = (from.min(to), from.max(to));
    match random.below(9) {
        0..3 => shards[which][from] ^= 1 << random.below(8),
        3 => shards[which][from] = *random.pick(&[0, 1, 0x7f, 0x80, 0xff]),
        4 => shards[which].truncate(from),
        5 => drop(shards[which].drain(from..to.min(from + 100))),
        6 => {
            let piece = shards[which][from..to.min(from + 100)].to_vec();
            shards[which].splice(to..to, piece);
        }
        7 => {
            let bytes = random.bytes(1 + from % 40);
            shards[which].splice(from..from, bytes);
        }
        _ => {
            let other = random.below(shards.len());
            shards.swap(which, other);
        }
    }
}
