//! Images of a real CRIU's dump (with an external file `fs.tar`), and the SHA-256 of every file in
//! them: two that the original criu-image-streamer captured, and one of ours with an index, whose
//! sums are those of the files that the original has extracted from it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::image::{self, Files};
use crate::common::indexed::{self, Indexed};
use crate::common::runs;
use crate::common::shards::{Collector, pipe};
use crate::common::streamer::Streamer;
use sha2::{Digest, Sha256};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(name)
}

fn shards(fixture: &Path) -> Vec<Vec<u8>> {
    (0..)
        .map_while(|i| fs::read(fixture.join(format!("s{i}.bin"))).ok())
        .collect()
}

fn expected_sums(fixture: &Path) -> BTreeMap<String, String> {
    let sums = fs::read_to_string(fixture.join("SHA256SUMS")).unwrap();
    let pair = |line: &str| {
        line.split_once("  ")
            .map(|(sum, name)| (name.to_owned(), sum.to_owned()))
    };
    sums.lines().map(|line| pair(line).unwrap()).collect()
}

fn sum(content: &[u8]) -> String {
    Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn sums(files: &Files) -> BTreeMap<String, String> {
    files
        .iter()
        .map(|(name, content)| (name.clone(), sum(content)))
        .collect()
}

const WITH_INDEX: &str = "two-shards-and-index";

fn with_index() -> Indexed {
    let fixture = fixture(WITH_INDEX);
    Indexed {
        shards: shards(&fixture),
        index: fs::read(fixture.join("index.bin")).unwrap(),
    }
}

#[test]
fn extract_writes_the_original_streamers_images_to_disk() {
    for name in ["one-shard", "three-shards"] {
        let fixture = fixture(name);
        assert_extracts(&shards(&fixture), &fixture);
    }
}

/// What the reference decoder makes of these shards, and `extract`, are the fixture's files.
#[track_caller]
fn assert_extracts(shards: &[Vec<u8>], fixture: &Path) {
    let expected = expected_sums(fixture);
    assert_eq!(sums(&image::decode(shards).unwrap()), expected);
    let (dir, exit) = runs::extract(shards);
    exit.expect_success();
    assert_eq!(sums(&runs::read_dir(dir.path())), expected);
}

/// `fs.tar` is an external file of these images: it goes to its own descriptor, and CRIU never sees
/// it.
#[test]
fn serve_gives_the_original_streamers_images_to_criu() {
    for name in ["one-shard", "three-shards"] {
        let fixture = fixture(name);
        let (tar_reader, tar_writer) = pipe();
        let tar = Collector::start(vec![tar_reader]);
        let (streamer, _feeder) = runs::feed(
            Streamer::serve().ext_file("fs.tar", tar_writer),
            &shards(&fixture),
        );
        assert_serves(streamer, tar, &fixture);
    }
}

/// CRIU and the reader of `fs.tar` get what is theirs.
#[track_caller]
fn assert_serves(mut streamer: Streamer, tar: Collector, fixture: &Path) {
    let criu = streamer.criu();
    let mut expected = expected_sums(fixture);
    assert_eq!(Some(sum(&tar.finish()[0])), expected.remove("fs.tar"));
    assert_eq!(criu.read_file("fs.tar"), None);
    for (file, expected) in expected {
        let content = criu.read_file(&file).expect(&file);
        assert_eq!(sum(&content), expected, "{file}");
    }
    drop(criu);
    streamer.expect_success();
}

#[test]
fn an_image_with_an_index_arrives() {
    let image = with_index();
    let (tar_reader, tar_writer) = pipe();
    let tar = Collector::start(vec![tar_reader]);
    let launch = Streamer::serve().ext_file("fs.tar", tar_writer);
    let (streamer, _feeder) = indexed::feed(launch, &image);
    assert_serves(streamer, tar, &fixture(WITH_INDEX));
}

/// The index is a shard like any other, in any place among them.
#[test]
fn an_image_with_an_index_is_read_by_all_who_know_of_none() {
    let fixture = fixture(WITH_INDEX);
    let mut shards = with_index().all();
    for _ in 0..shards.len() {
        shards.rotate_left(1);
        assert_extracts(&shards, &fixture);
        let (tar_reader, tar_writer) = pipe();
        let tar = Collector::start(vec![tar_reader]);
        let launch = Streamer::serve().ext_file("fs.tar", tar_writer);
        let (streamer, _feeder) = runs::feed(launch, &shards);
        assert_serves(streamer, tar, &fixture);
    }
}

/// The other tests lean on the reference decoder, so it must not be easily pleased.
#[test]
fn the_reference_decoder_refuses_an_image_with_anything_missing() {
    let shards = shards(&fixture("three-shards"));
    for lost in 0..shards.len() {
        let mut without = shards.clone();
        without.remove(lost);
        assert!(image::decode(&without).is_err(), "shard {lost} is missing");

        let ends = image::split(lost, &shards[lost]).unwrap();
        for cut in ends
            .iter()
            .flat_map(|entry| [entry.offset, entry.offset + 1, entry.offset + 5])
        {
            let mut short = shards.clone();
            short[lost].truncate(cut);
            assert!(
                image::decode(&short).is_err(),
                "shard {lost} is cut at {cut}"
            );
        }
    }
}
