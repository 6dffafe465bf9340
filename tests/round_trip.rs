//! What went in comes out: capture and serve, and capture and extract, with the image kept in
//! between or handed straight from one streamer to the other.

use std::fs::File;
use std::io::Write;

use crate::common::child::queued;
use crate::common::image::{self, Files, Shard};
use crate::common::keeping::Keeping;
use crate::common::random::Random;
use crate::common::runs::{self, assert_same_files};
use crate::common::shards;
use crate::common::streamer::{Launch, Streamer};
use crate::common::{PAGE, wait_until};

/// Kilobytes to a megabyte of anything: random names, sizes, numbers of files.
fn random_files(seed: u64) -> Files {
    let mut random = Random::new(seed);
    let mut files = Files::new();
    for i in 0..1 + random.below(20) {
        let bound = *random.pick(&[1, 10, PAGE, PAGE + 2, 20 * PAGE, 200 * PAGE]);
        let size = random.below(bound);
        files.insert(format!("file-{i}.img"), random.bytes(size));
    }
    files.insert("inventory.img".into(), random.bytes(40));
    files
}

#[test]
fn any_image_through_any_number_of_shards_and_any_pipe_comes_back() {
    let pipe_sizes = [Some(PAGE), None, Some(256 * PAGE)];
    for shard_count in [1, 2, 3, 5, 8, 13, 21, 32] {
        let files = random_files(shard_count as u64);
        let shards = runs::capture(&files, shard_count, pipe_sizes[shard_count % 3]);
        assert_same_files(&image::decode(&shards).unwrap(), &files);

        let (dir, exit) = runs::extract(&shards);
        exit.expect_success();
        assert_same_files(&runs::read_dir(dir.path()), &files);

        for keeping in Keeping::ALL {
            let (mut streamer, feeder) = runs::feed(keeping.serve(), &shards);
            runs::assert_served(&mut streamer, &files);
            feeder.finish().into_iter().for_each(Result::unwrap);
        }
    }
}

/// They may be the application's own, which can still change. Those of a capture that has ended are
/// held as they are.
#[test]
fn pages_of_a_capture_that_runs_are_copied() {
    const SIZE: usize = 32 << 20;
    let mut files = runs::sample_files(3);
    files.insert("pages-1.img".into(), vec![7; SIZE]);
    let (readers, writers) = shards::pipes(2, None);
    let mut capture = Streamer::capture().shards(writers).start();
    let mut serve = Streamer::serve().shards(readers).start();
    capture.criu().write_files(&files);
    capture.expect_success();
    serve.wait_for_line("socket-init");
    let copied = serve.memory_kib("VmRSS");
    assert!(copied > (SIZE >> 10) as u64, "{copied} KiB");
    runs::assert_served(&mut serve, &files);

    let (mut serve, _feeder) = runs::feed(Streamer::serve(), &runs::capture(&files, 2, None));
    serve.wait_for_line("socket-init");
    let held = serve.memory_kib("VmRSS");
    assert!(held < (SIZE >> 11) as u64, "{held} KiB");
    runs::assert_served(&mut serve, &files);
}

/// Whatever is to wait for its turn meanwhile.
#[test]
fn one_shard_may_come_after_the_other() {
    const CHUNKS: u64 = 257;
    let chunk = vec![7; 1 << 20];
    let first = Shard::new().filename(0, "pages-1.img").data(1, b"first");
    let first = first.file_eof(2 + CHUNKS).inventory_and_end(3 + CHUNKS);
    for launch in [Streamer::extract as fn() -> Launch, Streamer::list] {
        let (readers, writers) = shards::pipes(2, None);
        let mut streamer = launch().shards(readers).start();
        let mut writers = writers.into_iter().map(File::from).rev();
        let mut writer = writers.next().unwrap();
        for seq in 2..2 + CHUNKS {
            let marker = Shard::new().data_marker(seq, chunk.len() as u32);
            writer.write_all(&marker.bytes).unwrap();
            writer.write_all(&chunk).unwrap();
        }
        drop(writer);
        writers.next().unwrap().write_all(&first.bytes).unwrap();
        streamer.expect_success();
    }
}

/// What came of a chunk before its turn is held in a pipe, and the rest goes straight to its file.
#[test]
fn a_chunk_whose_turn_comes_when_half_of_it_is_here_is_whole() {
    let content = crate::common::random::bytes(7, 200_000);
    let (before, after) = content.split_at(100_000);
    let files = image::files([("inventory.img", content.clone())]);
    let first = Shard::new().filename(0, "inventory.img").bytes;
    let marker = Shard::new().data_marker(1, content.len() as u32);
    let ahead = marker.raw(before).bytes;
    let rest = Shard::new().raw(after).file_eof(2).image_eof(3).bytes;
    for (launch, serves) in [(Streamer::extract(), false), (Streamer::serve(), true)] {
        let (readers, writers) = shards::pipes(2, Some(256 * PAGE));
        let looking = readers[1].try_clone().unwrap();
        let mut streamer = launch.shards(readers).start();
        let mut writers: Vec<_> = writers.into_iter().map(File::from).collect();
        writers[1].write_all(&ahead).unwrap();
        wait_until("what is ahead is taken", || queued(&looking) == 0);
        writers[0].write_all(&first).unwrap();
        writers[1].write_all(&rest).unwrap();
        drop((writers, looking));
        if serves {
            runs::assert_served(&mut streamer, &files);
        } else {
            streamer.expect_success();
            assert_same_files(&runs::read_dir(streamer.images_dir()), &files);
        }
    }
}
