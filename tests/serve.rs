//! What `serve` promises to CRIU: the image is complete before CRIU may connect, nothing of it is
//! ever on disk, and the memory of a file is given back while it is sent.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::HANG_TIMEOUT;
use crate::common::child::{self, Limit};
use crate::common::image;
use crate::common::random;
use crate::common::runs::{self, assert_same_bytes};
use crate::common::shards::{self, Collector, Feeder, pipe};
use crate::common::streamer::{Launch, Streamer};

const MIB: usize = 1 << 20;

fn image_of<const N: usize>(files: [(&str, &[u8]); N]) -> Vec<Vec<u8>> {
    image::encode(files, 2, 100_000)
}

#[test]
fn files_are_served_in_any_order_by_both_names_of_the_command() {
    let files = runs::sample_files(1);
    for launch in [Streamer::serve(), Streamer::extract_serve()] {
        let (mut streamer, _feeder) = runs::feed(launch, &image::encode_files(&files, 3, 70_000));
        let criu = streamer.criu();
        for (name, content) in files.iter().rev() {
            criu.expect_file(name, content);
        }
        let on_disk = fs::read_dir(streamer.images_dir()).unwrap();
        let on_disk: Vec<_> = on_disk.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(
            on_disk,
            ["streamer-serve.sock"],
            "nothing is written to disk"
        );
        drop(criu);
        streamer.expect_success();
        assert_eq!(fs::read_dir(streamer.images_dir()).unwrap().count(), 0);
    }
}

#[test]
fn a_file_that_does_not_exist_is_a_normal_answer() {
    let (mut streamer, _feeder) = runs::feed(
        Streamer::serve(),
        &image_of([("inventory.img", b"inventory")]),
    );
    let criu = streamer.criu();
    for i in 0..1000 {
        assert_eq!(criu.read_file(&format!("file-{i}.img")), None);
    }
    criu.expect_file("inventory.img", b"inventory");
    assert_eq!(criu.read_file("../inventory.img"), None);
    drop(criu);
    streamer.expect_success();
}

#[test]
fn the_image_is_complete_before_criu_may_connect() {
    let shards = image_of([("inventory.img", b"inventory")]);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &shards);
    let criu = streamer.criu();
    let progress = streamer.progress_lines();
    let [stats, ready] = &progress[..] else {
        panic!("two lines expected: {progress:?}")
    };
    assert_eq!(ready, "socket-init");
    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    assert_eq!(
        stats.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["shards"]
    );
    for (stats, shard) in stats["shards"].as_array().unwrap().iter().zip(&shards) {
        assert_eq!(stats.as_object().unwrap().len(), 2, "{stats}");
        assert_eq!(stats["size"].as_u64(), Some(shard.len() as u64));
        assert!(stats["transfer_duration_millis"].is_u64());
    }
    criu.read_file("inventory.img").unwrap();
    drop(criu);
    assert_eq!(
        streamer.expect_success().progress,
        progress,
        "nothing follows"
    );
}

#[test]
fn a_broken_image_is_never_served() {
    let image = image_of([("a.img", b"first"), ("inventory.img", b"inventory")]);
    for cut_shard in 0..2 {
        let mut shards = image.clone();
        shards[cut_shard].pop();
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &shards);
        let exit = streamer.expect_failure(&["shard"]);
        assert_eq!(exit.progress, [""; 0]);
    }
}

#[test]
fn criu_may_close_a_file_having_read_some_of_it_or_nothing() {
    let pages = random::bytes(1, 8 * MIB);
    let image = image_of([
        ("pages-1.img", &pages),
        ("pages-2.img", &pages),
        ("inventory.img", b"inventory"),
    ]);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let criu = streamer.criu();
    drop(criu.open_file("pages-1.img").unwrap());
    let mut some = vec![0; MIB];
    let mut file = criu.open_file("pages-2.img").unwrap();
    file.read_exact(&mut some).unwrap();
    drop(file);
    assert_same_bytes("pages-2.img", &some, &pages[..MIB]);
    drop(criu.open_file("inventory.img").unwrap());
    drop(criu);
    streamer.expect_success();
}

#[test]
fn a_later_file_can_be_read_before_an_earlier_one() {
    let pages = random::bytes(1, 4 * MIB);
    let image = image_of([
        ("pages-1.img", &pages),
        ("pages-2.img", &pages),
        ("inventory.img", b"inventory"),
    ]);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let criu = streamer.criu();
    let mut first = criu.open_file("pages-1.img").unwrap();
    let mut second = criu.open_file("pages-2.img").unwrap();
    criu.expect_file("inventory.img", b"inventory");
    for (name, file) in [("pages-2.img", &mut second), ("pages-1.img", &mut first)] {
        let mut content = Vec::new();
        file.read_to_end(&mut content).unwrap();
        assert_same_bytes(name, &content, &pages);
    }
    drop(criu);
    streamer.expect_success();
}

#[test]
fn files_go_on_after_criu_has_closed_its_connection() {
    let pages = random::bytes(1, 4 * MIB);
    let image = image_of([("pages-1.img", &pages), ("inventory.img", b"inventory")]);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    let criu = streamer.criu();
    let mut file = criu.open_file("pages-1.img").unwrap();
    drop(criu);
    let mut content = Vec::new();
    file.read_to_end(&mut content).unwrap();
    assert_same_bytes("pages-1.img", &content, &pages);
    streamer.expect_success();
}

#[test]
fn of_a_file_that_was_sent_twice_the_last_one_is_served() {
    for (first, last) in [(3 * MIB, 10), (10, 3 * MIB), (0, 5), (5, 0)] {
        let last_version = random::bytes(2, last);
        let image = image_of([
            ("fdinfo.img", &random::bytes(1, first)),
            ("other.img", b"other"),
            ("fdinfo.img", &last_version),
            ("inventory.img", image::INVENTORY),
        ]);
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
        let criu = streamer.criu();
        criu.expect_file("fdinfo.img", &last_version);
        assert_eq!(criu.read_file("other.img").as_deref(), Some(&b"other"[..]));
        drop(criu);
        streamer.expect_success();
    }
}

/// Even while the external file's reader is slow and shards run ahead.
#[test]
fn external_files_are_streamed_through_without_being_kept() {
    const SIZE: usize = 64 * MIB;
    let content = vec![7; SIZE];
    let image = image::encode(
        [("fs.tar", &content[..]), ("inventory.img", b"inventory")],
        2,
        MIB,
    );
    let (readers, mut writers) = shards::pipes(2, None);
    let (tar_reader, tar_writer) = pipe();
    let mut streamer = Streamer::serve()
        .shards(readers)
        .ext_file("fs.tar", tar_writer)
        .start();
    // The file's name first, so that the other shard is known to be ahead in an external file.
    let mut first = File::from(writers.remove(0));
    let name_size = image::split(0, &image[0]).unwrap()[1].offset;
    first.write_all(&image[0][..name_size]).unwrap();
    while child::queued(&first) > 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let ahead = Feeder::start(writers, &image[1..]);
    let rest = Feeder::start(vec![first.into()], &[image[0][name_size..].to_vec()]);
    while child::queued(&tar_reader) == 0 {
        thread::sleep(Duration::from_millis(1));
    }
    let tar = Collector::start(vec![tar_reader]);
    assert_eq!(tar.finish()[0].len(), SIZE);
    let criu = streamer.criu();
    assert_eq!(criu.read_file("fs.tar"), None, "it is no file of CRIU's");
    let peak = streamer.memory_kib("VmHWM");
    assert!(peak < (SIZE >> 10) as u64 / 4, "{peak} KiB");
    drop(criu);
    streamer.expect_success();
    ahead.finish();
    rest.finish();
}

/// CRIU copies what it reads: if the streamer kept it as well, the machine would need the memory
/// twice.
#[test]
fn memory_is_given_back_while_a_slow_criu_takes_a_large_file() {
    memory_is_given_back(Streamer::serve());
    // With few descriptors, nothing is held in pipes.
    memory_is_given_back(Streamer::serve().limit(Limit::OpenFiles(256)));
}

fn memory_is_given_back(launch: Launch) {
    const SIZE: usize = 96 * MIB;
    const STEP: usize = 16 * MIB;
    const SLACK_KIB: u64 = 8 << 10;
    let pages = random::bytes(1, SIZE);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        4,
        MIB,
    );
    let (mut streamer, _feeder) = runs::feed(launch, &image);
    let criu = streamer.criu();
    let before = streamer.image_kib();
    assert!(
        before >= (SIZE >> 10) as u64,
        "the image is held in memory: {before} KiB"
    );

    let mut file = criu.open_file("pages-1.img").unwrap();
    let mut taken = vec![0; STEP];
    for offset in (0..SIZE).step_by(STEP) {
        file.read_exact(&mut taken).unwrap();
        assert_same_bytes("pages-1.img", &taken, &pages[offset..offset + STEP]);
        let allowed = before - ((offset + STEP) >> 10) as u64 + SLACK_KIB;
        let deadline = Instant::now() + HANG_TIMEOUT;
        while streamer.image_kib() > allowed {
            assert!(
                Instant::now() < deadline,
                "{} KiB, at most {allowed} allowed",
                streamer.image_kib()
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
    drop((file, criu));
    streamer.expect_success();
}

/// CRIU reads them by the size of the file, which a pipe does not have.
#[test]
fn firewall_rules_that_criu_does_not_restore_from_a_stream_are_told() {
    let stderr_with = |rules: &[u8]| {
        let image = image_of([
            ("nftables-12.img", rules),
            ("nftables-13.img", b""),
            ("inventory.img", b"inventory"),
        ]);
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
        let criu = streamer.criu();
        // It is told before CRIU begins.
        if !rules.is_empty() {
            streamer.wait_for_stderr("nftables-12.img");
        }
        let stderr = streamer.stderr();
        criu.expect_file("nftables-12.img", rules);
        drop(criu);
        streamer.expect_success();
        stderr
    };
    let stderr = stderr_with(b"table inet filter {}");
    for word in ["nftables-12.img", "extract"] {
        assert!(stderr.contains(word), "nothing about {word}: {stderr}");
    }
    assert!(!stderr.contains("nftables-13.img"), "{stderr}");
    assert_eq!(stderr_with(b""), "");
}
