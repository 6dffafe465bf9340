//! The fuzz targets on inputs that are the same each time: the seeds in `fuzz/seeds/`, what ends
//! too early of each, and mutations of them. `make fuzz` goes on from the same seeds.
//!
//! `FUZZ_MUTATIONS` sets how many mutations of each target are tried. A failing one is written to a
//! file whose name is printed, for `cargo +nightly fuzz run <target> <file>`. `FUZZ_WRITE_SEEDS=1`
//! writes the seeds anew.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use crate::common::image::{self, Body, Files, Shard};
use crate::common::random::Random;
use crate::common::{PAGE, criu, setting};
use crate::fuzzing::{TARGETS, Target, criu_messages, files_img, marker_stream};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

type Seeds = Vec<(String, Vec<u8>)>;

/// The small files of the fixtures: what CRIU really wrote.
fn small_files() -> Files {
    let mut files = fixture("one-shard");
    files.retain(|_, content| content.len() <= 600);
    files
}

fn fixture(name: &str) -> Files {
    let shards: Vec<_> = (0..)
        .map_while(|i| {
            fs::read(
                root()
                    .join("tests/fixtures")
                    .join(name)
                    .join(format!("s{i}.bin")),
            )
            .ok()
        })
        .collect();
    image::decode(&shards).expect("a whole image")
}

/// The first markers of a shard that the original program wrote, with an end of their own.
fn start_of_original() -> Vec<u8> {
    let shard = fs::read(root().join("tests/fixtures/one-shard/s0.bin")).unwrap();
    let entries = image::split(0, &shard).unwrap();
    let small = entries.iter().take_while(|entry| entry.offset < 3000);
    let last_end = small
        .filter(|entry| entry.body == Body::FileEof)
        .last()
        .expect("a file that ends early in the shard");
    let next = entries
        .iter()
        .find(|entry| entry.seq == last_end.seq + 1)
        .unwrap();
    let start = Shard::new().raw(&shard[..next.offset]);
    start.image_eof(next.seq).bytes
}

fn marker_streams() -> Seeds {
    let files = small_files();
    let mut seeds = Seeds::new();
    for count in 1..=4 {
        let shards = image::encode_files(&files, count, 100);
        seeds.push((
            format!("small-files-{count}"),
            marker_stream::input(&shards, count % 2 == 0),
        ));
    }
    let versions = Shard::new()
        .filename(0, "a.img")
        .data(1, b"first")
        .filename(2, "b.img")
        .data(3, &[7; PAGE])
        .file_eof(4)
        .filename(5, "a.img")
        .file_eof(6)
        .filename(7, "a.img")
        .data(8, b"second")
        .data_marker(9, 0)
        .file_eof(10)
        .image_eof(11);
    seeds.push((
        "versions".into(),
        marker_stream::input(&[versions.bytes], true),
    ));
    let ahead = [
        Shard::new().data(1, &[1; 20_000]).data(2, b"x").file_eof(3),
        Shard::new().filename(0, "pages-1.img").image_eof(4),
    ];
    seeds.push((
        "ahead".into(),
        marker_stream::input(&ahead.map(|shard| shard.bytes), true),
    ));
    seeds.extend(large_chunks());
    seeds.push((
        "original".into(),
        marker_stream::input(&[start_of_original()], true),
    ));
    let unknown = Shard::new()
        .marker(
            0,
            &[&[2 << 3 | 2, 1, b'a'][..], &[0x9a, 6, 2, 1, 2]].concat(),
        )
        .file_eof(1)
        .image_eof(2);
    seeds.push((
        "unknown-fields".into(),
        marker_stream::input(&[unknown.bytes], false),
    ));
    seeds
}

/// Chunks that are held in pipes, in their order and ahead of it, and files that take turns.
fn large_chunks() -> Seeds {
    let content = |len: usize| (0..len).map(|i| (i / 7) as u8).collect::<Vec<_>>();
    let (pages, more) = (content(150_000), content(70_001));
    let files = [
        ("pages-1.img", &pages[..]),
        ("pages-2.img", &more[..]),
        ("inventory.img", b"inventory"),
    ];
    let turns = Shard::new()
        .filename(0, "pages-1.img")
        .data(1, &pages[..80_000])
        .filename(2, "pages-2.img")
        .data(3, &more[..40_000])
        .filename(4, "pages-1.img")
        .data(5, &pages[80_000..115_000])
        .data(6, b"a few bytes")
        .data(7, &pages[115_000..])
        .file_eof(8)
        .filename(9, "pages-2.img")
        .file_eof(10)
        .image_eof(11);
    let ahead = [
        Shard::new()
            .data(1, &pages[..90_000])
            .data(2, &pages[90_000..])
            .file_eof(3),
        Shard::new()
            .filename(0, "pages-1.img")
            .filename(4, "pages-2.img")
            .data(5, &more)
            .file_eof(6)
            .image_eof(7),
    ];
    let input = |name: &str, shards: &[Vec<u8>], on_disk| {
        (name.to_owned(), marker_stream::input(shards, on_disk))
    };
    vec![
        input("large-chunks-1", &image::encode(files, 1, 75_000), false),
        input("large-chunks-3", &image::encode(files, 3, 75_000), true),
        input("large-chunks-in-turns", &[turns.bytes], false),
        input("large-chunks-ahead", &ahead.map(|shard| shard.bytes), true),
    ]
}

fn criu_messages() -> Seeds {
    let inventory = criu::request("inventory.img");
    let glued = [&inventory[..], &[0]].concat();
    let names: Vec<_> = small_files()
        .keys()
        .map(|name| criu::request(name))
        .collect();
    let capture: Vec<_> = names
        .iter()
        .flat_map(|name| [(&name[..], 0), (&[0][..], 1)])
        .collect();
    // In `serve` a file exists if the length of its name is even.
    let asked = ["pstree.img", "files.img", "mm-1.img", "core-10.img"].map(criu::request);
    let serve: Vec<_> = asked
        .iter()
        .zip([true, false, true, false])
        .flat_map(|(name, exists)| [(&name[..], 0), (if exists { &[0][..] } else { &[] }, 1)])
        .collect();
    let half = &inventory[..7];
    [
        ("capture", criu_messages::input(false, &capture)),
        ("serve", criu_messages::input(true, &serve)),
        (
            "in-one-message",
            criu_messages::input(false, &[(&glued, 1), (&inventory, 0)]),
        ),
        (
            "in-pieces",
            criu_messages::input(false, &[(half, 0), (&inventory[7..], 0), (&[0], 1)]),
        ),
        (
            "without-pipe",
            criu_messages::input(false, &[(&inventory, 0), (&[0], 0)]),
        ),
        (
            "many-pipes",
            criu_messages::input(false, &[(&inventory, 0), (&[0], 7)]),
        ),
        (
            "pipe-first",
            criu_messages::input(true, &[(&inventory[..1], 1), (&inventory[1..], 2)]),
        ),
        (
            "too-long",
            criu_messages::input(false, &[(&[0xff; 200], 0)]),
        ),
    ]
    .map(|(name, input)| (name.to_owned(), input))
    .into()
}

/// A listening socket's `inet_sk_entry`, with fields that no CRIU has, in a `file_entry`.
fn listening(port: u16, protocol: u8, state: u8) -> Vec<u8> {
    let mut socket = vec![1 << 3, 1, 5 << 3, protocol, 6 << 3, state, 7 << 3];
    image::put_varint(&mut socket, u64::from(port));
    socket.extend_from_slice(&[8 << 3, 0, 0xea, 4, 3, b'x', b'y', b'z']);
    let mut entry = vec![1 << 3, 9, 2 << 3, 3, 4 << 3 | 2, socket.len() as u8];
    entry.extend_from_slice(&socket);
    entry.extend_from_slice(&[0x9d, 6, 1, 2, 3, 4]);
    criu::frame(&entry)
}

fn files_imgs() -> Seeds {
    let real = fixture("one-shard").remove("files.img").unwrap();
    let magics = &real[..8];
    let others = [
        listening(443, 6, 10),
        listening(80, 6, 1),
        listening(80, 17, 10),
    ]
    .concat();
    // Found by the fuzzer: what bears the port's number and is none stays as it is.
    let no_number = [7 << 3, 80, 5 << 3, 6, 6 << 3, 10, 7 << 3 | 2, 2, b'h', b'i'];
    let no_port = criu::frame(&[&[4 << 3 | 2, no_number.len() as u8][..], &no_number].concat());
    let with = [&real[..], &listening(80, 6, 10), &others].concat();
    [
        ("fixture", files_img::input(80, 8080, &real)),
        ("listening", files_img::input(80, 8080, &with)),
        (
            "alone",
            files_img::input(80, 1, &[magics, &listening(80, 6, 10)].concat()),
        ),
        (
            "twice",
            files_img::input(
                65535,
                65535,
                &[magics, &listening(65535, 6, 10), &listening(65535, 6, 10)].concat(),
            ),
        ),
        // Found by the fuzzer: the new port is taken.
        (
            "taken",
            files_img::input(
                65535,
                443,
                &[magics, &listening(65535, 6, 10), &listening(443, 6, 10)].concat(),
            ),
        ),
        (
            "none",
            files_img::input(22, 80, &[magics, &others].concat()),
        ),
        (
            "no-number",
            files_img::input(80, 81, &[magics, &no_port].concat()),
        ),
        ("empty", files_img::input(0, 0, magics)),
    ]
    .map(|(name, input)| (name.to_owned(), input))
    .into()
}

fn seeds((target, _): Target) -> Seeds {
    match target {
        "marker_stream" => marker_streams(),
        "criu_messages" => criu_messages(),
        "files_img" => files_imgs(),
        other => panic!("no seeds for {other}"),
    }
}

#[test]
fn the_seeds_are_what_this_makes_of_the_fixtures() {
    for target in TARGETS {
        let dir = root().join("fuzz/seeds").join(target.0);
        for (name, input) in seeds(target) {
            let path = dir.join(&name);
            if std::env::var_os("FUZZ_WRITE_SEEDS").is_some() {
                fs::create_dir_all(&dir).unwrap();
                fs::write(&path, &input).unwrap();
            }
            let committed = fs::read(&path).unwrap_or_default();
            assert!(
                committed == input,
                "{}: run with FUZZ_WRITE_SEEDS=1",
                path.display()
            );
        }
    }
}

/// Runs one input, and keeps it if it fails.
fn try_input((target, run): Target, input: &[u8], what: &str) {
    if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| run(input))) {
        let kept: PathBuf = root().join("fuzz/artifacts").join(target);
        fs::create_dir_all(&kept).unwrap();
        let kept = kept.join("deterministic");
        fs::write(&kept, input).unwrap();
        eprintln!("{target}, {what}: the input is in {}", kept.display());
        panic::resume_unwind(panic);
    }
}

fn run_target(target: Target) {
    let seeds = seeds(target);
    let mut runs = 0;
    for (name, input) in &seeds {
        try_input(target, input, name);
        // Each end of a short seed, and some of a long one.
        let step = input.len().div_ceil(200).max(1);
        for end in (0..input.len()).step_by(step) {
            try_input(target, &input[..end], &format!("{name} cut at {end}"));
            runs += 1;
        }
    }
    for seed in 0..setting("FUZZ_MUTATIONS", 3000) {
        let mut random = Random::new(seed);
        let (name, input) = random.pick(&seeds);
        let mut input = input.clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut input, &seeds, &mut random);
        }
        try_input(target, &input, &format!("mutation {seed}, of {name}"));
        runs += 1;
    }
    crate::common::report(format_args!(
        "{}: {} seeds and {runs} inputs made of them",
        target.0,
        seeds.len()
    ));
}

fn mutate(input: &mut Vec<u8>, seeds: &Seeds, random: &mut Random) {
    const TELLING: [u8; 8] = [0, 1, 6, 10, 0x7f, 0x80, 0xfe, 0xff];
    let at = random.below(input.len() + 1);
    let end = (at + 1 + random.below(40)).min(input.len());
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = *random.pick(&TELLING),
        2 if at < input.len() => input[at] = random.next() as u8,
        3 => drop(input.drain(at..end)),
        4 => {
            let copy = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        5 => {
            let (_, other) = random.pick(seeds);
            let from = random.below(other.len());
            let to = (from + random.below(200)).min(other.len());
            input.splice(at..end, other[from..to].iter().copied());
        }
        6 => {
            let count = random.below(6);
            input.splice(at..at, random.bytes(count));
        }
        _ => input.truncate(at),
    }
}

#[test]
fn any_marker_stream_is_accepted_or_refused_as_the_reference_does() {
    run_target(TARGETS[0]);
}

#[test]
fn any_messages_of_criu_are_understood_as_the_reference_does() {
    run_target(TARGETS[1]);
}

#[test]
fn any_files_img_is_changed_in_its_ports_alone() {
    run_target(TARGETS[2]);
}
