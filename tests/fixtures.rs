//! Images that the original criu-image-streamer captured from a real CRIU dump (with an external
//! file `fs.tar`), and the SHA-256 of every file in them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::image::{self, Files};
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

#[test]
fn extract_writes_the_original_streamers_images_to_disk() {
    for name in ["one-shard", "three-shards"] {
        let fixture = fixture(name);
        let (dir, exit) = runs::extract(&shards(&fixture));
        assert!(exit.status.success(), "{name}: {}", exit.stderr);
        assert_eq!(
            sums(&runs::read_dir(dir.path())),
            expected_sums(&fixture),
            "{name}"
        );
    }
}

/// `fs.tar` is an external file of these images: it goes to its own descriptor, and CRIU never sees
/// it.
#[test]
fn serve_gives_the_original_streamers_images_to_criu() {
    for name in ["one-shard", "three-shards"] {
        let fixture = fixture(name);
        let (tar_reader, tar_writer) = pipe();
        let tar = Collector::start(vec![tar_reader]);
        let (mut streamer, _feeder) = runs::feed(
            Streamer::serve().ext_file("fs.tar", tar_writer),
            &shards(&fixture),
        );
        let criu = streamer.criu();
        let mut expected = expected_sums(&fixture);
        assert_eq!(Some(sum(&tar.finish()[0])), expected.remove("fs.tar"));
        assert_eq!(criu.read_file("fs.tar"), None, "{name}");
        for (file, expected) in expected {
            assert_eq!(
                sum(&criu.read_file(&file).expect(&file)),
                expected,
                "{name}: {file}"
            );
        }
        drop(criu);
        streamer.expect_success();
    }
}

#[test]
fn the_reference_decoder_reads_the_original_streamers_images() {
    for name in ["one-shard", "three-shards"] {
        let fixture = fixture(name);
        let files = image::decode(&shards(&fixture)).unwrap();
        let sums: BTreeMap<_, _> = files
            .iter()
            .map(|(name, content)| (name.clone(), sum(content)))
            .collect();
        assert_eq!(sums, expected_sums(&fixture), "{name}");
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

#[test]
fn the_reference_encoder_and_decoder_agree() {
    let files = image::decode(&shards(&fixture("three-shards"))).unwrap();
    for count in [1, 3, 32] {
        let shards = image::encode_files(&files, count, 4096);
        assert!(image::decode(&shards).unwrap() == files, "{count} shards");
    }
}
