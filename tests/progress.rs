//! Progress lines are parsed by supervisors: exactly these, whole, in this order, and never a
//! reason to fail.

use std::fs::File;
use std::io::Read;

use crate::common::criu::Criu;
use crate::common::image;
use crate::common::runs;
use crate::common::shards;
use crate::common::streamer::Streamer;

fn write_image(criu: &Criu) {
    criu.write_file("pages-1.img", &[1; 100_000]);
    criu.write_file("inventory.img", b"inventory");
}

/// The line with the statistics has these and nothing else.
#[track_caller]
fn assert_statistics(line: &str, shards: &[Vec<u8>]) {
    let stats: serde_json::Value = serde_json::from_str(line).unwrap();
    assert_eq!(stats.as_object().unwrap().len(), 1, "{stats}");
    let stats = stats["shards"].as_array().unwrap();
    assert_eq!(stats.len(), shards.len());
    // Markers and data, in the order of --shard-fds.
    for (stats, shard) in stats.iter().zip(shards) {
        assert_eq!(stats.as_object().unwrap().len(), 2, "{stats}");
        assert_eq!(stats["size"].as_u64(), Some(shard.len() as u64));
        assert!(stats["transfer_duration_millis"].is_u64());
    }
}

#[test]
fn capture_tells_of_its_socket_the_freeze_and_the_shards() {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 3);
    let criu = streamer.criu();
    assert_eq!(streamer.progress_lines(), ["socket-init"]);
    write_image(&criu);
    drop(criu);
    let exit = streamer.expect_success();
    assert_eq!(exit.progress[..2], ["socket-init", "checkpoint-start"]);
    assert_eq!(exit.progress.len(), 3, "{:?}", exit.progress);
    assert_statistics(&exit.progress[2], &collector.finish());
}

/// The image is complete before CRIU may connect.
#[test]
fn a_restore_tells_of_the_shards_and_serve_of_its_socket_behind_them() {
    let shards = image::encode([("inventory.img", &b"inventory"[..])], 3, 4);
    let (_dir, exit) = runs::extract(&shards);
    assert_eq!(exit.progress.len(), 1, "{:?}", exit.progress);
    assert_statistics(&exit.progress[0], &shards);

    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &shards);
    streamer.criu().expect_file("inventory.img", b"inventory");
    let exit = streamer.expect_success();
    assert_eq!(exit.progress[1..], ["socket-init"]);
    assert_statistics(&exit.progress[0], &shards);
}

/// CRIU sends `cpuinfo.img` before it freezes the application, so supervisors must not start `tar`
/// yet.
#[test]
fn the_checkpoint_starts_with_the_first_file_other_than_cpuinfo() {
    let (mut readers, writers) = shards::pipes(1, None);
    let mut streamer = Streamer::capture().shards(writers).start();
    let criu = streamer.criu();
    criu.write_file("cpuinfo.img", b"cpuinfo");
    let cpuinfo = image::Shard::new()
        .filename(0, "cpuinfo.img")
        .data(1, b"cpuinfo")
        .file_eof(2)
        .bytes;
    let mut shard = File::from(readers.pop().unwrap());
    shard.read_exact(&mut vec![0; cpuinfo.len()]).unwrap();
    assert_eq!(streamer.progress_lines(), ["socket-init"]);

    let pages = criu.create_file("pages-1.img");
    streamer.wait_for_line("checkpoint-start");
    drop(pages);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    shard.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(streamer.expect_success().progress.len(), 3);
}
