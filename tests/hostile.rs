//! Whatever stands on a shard: an error that says where, or a right image. Never a panic, a hang, a
//! file elsewhere or a broken image that looks whole.

use std::fs::File;
use std::io::{Read, Write};

use crate::common::PAGE;
use crate::common::child;
use crate::common::criu::{Criu, Role, frame};
use crate::common::image::{self, Files, Shard};
use crate::common::indexed;
use crate::common::keeping::Keeping;
use crate::common::random::{self, Random, for_each_seed};
use crate::common::runs;
use crate::common::shards;
use crate::common::streamer::{Launch, Streamer};
use crate::common::{report, setting, wait_until};

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
        println!("{what}");
        let exit = streamer.wait();
        exit.expect_refusal(words);
        assert!(!exit.stderr.contains("panicked"), "{}", exit.stderr);
        let error = exit.error();
        assert!(error.contains("shard"), "{error}");
        let longest = shards.iter().map(Vec::len).max().unwrap();
        let place = place(error).unwrap_or_else(|| panic!("no place in: {error}"));
        let found = (from..=longest).contains(&place);
        assert!(found, "the wrong place ({from} is right): {error}");
        let shown = |letter: char| letter == '\n' || !letter.is_control();
        assert!(exit.stderr.chars().all(shown), "{:?}", exit.stderr);
        assert_eq!(runs::read_dir(streamer.images_dir()), Files::new());
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

/// Not one path component, or the name of something that is trusted beside an image. An error shows
/// no control characters to the terminal.
#[test]
fn names_that_no_file_of_an_image_has() {
    let too_long = "x".repeat(256);
    for name in [
        &b""[..],
        b"..",
        b"a/b",
        b"/tmp/a.img",
        b"a\0b",
        b"\x1b]0;owned\x07/",
        b"\xff\xfe",
        too_long.as_bytes(),
        b"streamer-serve.options",
        b"parent",
        b"dump.log",
    ] {
        let what = format!("name {:?}", String::from_utf8_lossy(name));
        let named = |shard: Shard| shard.filename_bytes(3, name).file_eof(4).image_eof(5);
        assert_defect(&what, named, &[]);
    }
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

type Defect = (&'static str, fn(Shard) -> Shard, &'static str);

/// Behind three markers of a file that is whole: frames that are none, and markers that make no
/// sense there. The last column is in the error.
const DEFECTS: &[Defect] = &[
    (
        "10 KiB and a byte",
        |shard| shard.raw(&10_241_u32.to_le_bytes()).raw(&[0; 10_241]),
        "10241",
    ),
    ("4 GiB", |shard| shard.raw(&[0xff; 4]), "4294967295"),
    (
        "no protobuf",
        |shard| shard.raw(&frame(&[0xff; 30])),
        "marker",
    ),
    (
        "data after a file's end",
        |shard| shard.data(3, b"data").image_eof(4),
        "name",
    ),
    (
        "a file's end twice",
        |shard| shard.file_eof(3).image_eof(4),
        "ends before",
    ),
    (
        "bytes after the end",
        |shard| shard.image_eof(3).raw(&[0; 100]),
        "end",
    ),
    (
        "the end within a file",
        |shard| shard.filename(3, "b.img").image_eof(4),
        "b.img",
    ),
    ("a small gap", |shard| shard.image_eof(4), "3"),
    ("the largest gap", |shard| shard.image_eof(u64::MAX), "3"),
    ("the first number again", |shard| shard.image_eof(0), "0"),
];

#[test]
fn what_makes_no_sense_is_refused_where_it_stands() {
    for &(what, defect, word) in DEFECTS {
        assert_defect(what, defect, &[word]);
    }
    let first = Shard::new().filename(0, "a.img").bytes;
    assert_refused(
        "the same number in two shards",
        &[first.clone(), first],
        &[],
    );
    let mut random = Random::new(1);
    for (what, bytes) in [
        ("text", b"HTTP/1.1 404 Not Found\r\n\r\n".repeat(50)),
        ("zeros", vec![0; 100_000]),
        ("noise", random.bytes(100_000)),
        ("nothing", vec![]),
    ] {
        assert_refused(what, &[bytes, vec![]], &[]);
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
    wait_until("it is taken", || {
        child::queued(&*writer) == 0 || !streamer.is_running()
    });
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
        for mixture in [1, 6] {
            let pick = |shard: usize| match mixture >> shard & 1 {
                0 => one[shard].clone(),
                _ => other[shard].clone(),
            };
            let shards: Vec<_> = (0..3).map(pick).collect();
            for launch in LAUNCHES.into_iter().chain([Streamer::list as fn() -> _]) {
                let (mut streamer, _feeder) = runs::feed(launch(), &shards);
                streamer.expect_refusal(&["shard fd", "of different images"]);
                assert_eq!(runs::read_dir(streamer.images_dir()), Files::new());
            }
        }
        for whole in [one, other] {
            let (_dir, exit) = runs::extract(&whole);
            exit.expect_success();
        }
    }
}

/// An application that is dumped again and again: its memory has the same size, and hardly differs.
fn dump(number: u64, small: bool) -> Files {
    let mut files = crate::common::dump::whole();
    let pages = match small {
        true => 2 * PAGE,
        false => 700_000,
    };
    let mut content = random::bytes(1, pages);
    content[..8].copy_from_slice(&number.to_le_bytes());
    files.insert("pages-1.img".into(), content);
    files
}

/// Shards of several images: captured one after another by this program, with an index and without,
/// and by the first streamer; and each mixture whole or with a shard that is cut. `MIXTURE_SEEDS`
/// sets how many.
#[test]
fn mixtures_of_several_images_are_refused() {
    let first = setting("MIXTURE_FIRST_SEED", 0);
    let seeds = setting("MIXTURE_SEEDS", 40);
    let families = [(false, false), (false, true), (true, false), (true, true)];
    let families = families.map(|(has_index, small)| {
        let capture = |number| {
            let files = dump(number, small);
            let shards = match has_index {
                true => indexed::capture(&files, 2).all(),
                false => runs::capture(&files, 3, None),
            };
            (files, shards)
        };
        let ours = (0..4).map(capture);
        let without_name = image::encode_files(&dump(9, small), 3, 100_000);
        let first_streamers = (dump(9, small), without_name);
        (has_index, ours.chain([first_streamers]).collect::<Vec<_>>())
    });
    let (mut accepted, mut refused) = (0, 0);
    for_each_seed(first..first + seeds, |seed| {
        let mut random = Random::new(seed);
        let (has_index, images) = random.pick(&families);
        let of: Vec<_> = (0..3).map(|_| random.below(images.len())).collect();
        let of = match random.one_in(4) {
            true => vec![of[0]; 3],
            false => of,
        };
        let pick = |(shard, &image): (usize, &usize)| images[image].1[shard].clone();
        let mut shards: Vec<_> = of.iter().enumerate().map(pick).collect();
        let cut = random.below(3);
        if random.one_in(3) {
            let left = random.below(shards[cut].len() + 1);
            shards[cut].truncate(left);
        }
        // What stands on the shards that are not empty is of one image, and all of it.
        let whole = images.iter().find(|(_, image)| {
            let mut pairs = image.iter().zip(&shards);
            pairs.all(|(theirs, shard)| theirs == shard)
        });
        // An image of the first streamer has no index.
        let is_first_streamers = of == [4; 3];
        let served = match random.below(3) {
            0 => {
                let (mut streamer, _feeder) = runs::feed(Streamer::extract(), &shards);
                let exit = streamer.wait();
                let found = runs::read_dir(streamer.images_dir());
                exit.status.success().then_some(found)
            }
            1 if *has_index && !is_first_streamers => {
                let (streamer, ends) = indexed::serve(2, Streamer::serve()).into_parts();
                serve_mixture((streamer, shards::Feeder::start(ends, &shards)))
            }
            _ => serve_mixture(runs::feed(random.pick(&Keeping::ALL).serve(), &shards)),
        };
        match (served, whole) {
            (Some(found), Some((files, _))) => {
                assert!(found == *files, "seed {seed}: another image");
                accepted += 1;
            }
            (Some(_), None) => panic!("seed {seed}: {of:?} makes an image"),
            (None, Some(_)) => panic!("seed {seed}: {of:?} is refused"),
            (None, None) => refused += 1,
        }
    });
    report(format_args!(
        "{seeds} mixtures of shards: {refused} refused, {accepted} accepted and whole, 0 wrongly"
    ));
}

/// The files that CRIU gets, if it gets all.
fn serve_mixture((mut streamer, feeder): (Streamer, shards::Feeder)) -> Option<Files> {
    let mut found = Files::new();
    if streamer.listens() {
        let criu = Criu::try_connect(streamer.images_dir(), Role::Serve).ok();
        for name in dump(0, true).keys() {
            let mut content = Vec::new();
            let file = criu.as_ref().map(|criu| criu.try_open_file(name));
            if let Some(Ok(Some(mut file))) = file {
                let _ = file.read_to_end(&mut content);
            }
            found.insert(name.clone(), content);
        }
    }
    let exit = streamer.wait();
    feeder.finish();
    exit.status.success().then_some(found)
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
