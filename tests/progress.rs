//! Progress lines are parsed by supervisors: exactly these, whole, in this order, and never a
//! reason to fail. (Those of `extract` and `serve` stand in their own tests.)

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

#[test]
fn capture_tells_of_its_socket_the_freeze_and_the_shards() {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 3);
    let criu = streamer.criu();
    assert_eq!(streamer.progress_lines(), ["socket-init"]);
    write_image(&criu);
    drop(criu);
    let exit = streamer.expect_success();
    let [ready, frozen, stats] = &exit.progress[..] else {
        panic!("three lines expected: {:?}", exit.progress)
    };
    assert_eq!(
        (ready.as_str(), frozen.as_str()),
        ("socket-init", "checkpoint-start")
    );

    let stats: serde_json::Value = serde_json::from_str(stats).unwrap();
    assert_eq!(
        stats.as_object().unwrap().keys().collect::<Vec<_>>(),
        ["shards"]
    );
    let shards = collector.finish();
    let stats = stats["shards"].as_array().unwrap();
    assert_eq!(stats.len(), shards.len());
    for (stats, shard) in stats.iter().zip(&shards) {
        assert_eq!(stats.as_object().unwrap().len(), 2, "{stats}");
        assert_eq!(
            stats["size"].as_u64(),
            Some(shard.len() as u64),
            "markers and data, in the order of --shard-fds"
        );
        assert!(stats["transfer_duration_millis"].is_u64());
    }
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

#[test]
fn without_progress_fd_the_lines_go_to_standard_error() {
    let (mut streamer, collector) = runs::collect(Streamer::capture().progress_on_stderr(), 1);
    let criu = streamer.criu();
    write_image(&criu);
    drop(criu);
    let exit = streamer.expect_success();
    assert_eq!(exit.progress[..2], ["socket-init", "checkpoint-start"]);
    collector.finish();
}

#[test]
fn a_capture_goes_on_when_no_program_reads_its_progress() {
    let (mut streamer, collector) = runs::collect(Streamer::capture().progress_reader_gone(), 1);
    let criu = streamer.criu_when_socket_is_there();
    write_image(&criu);
    drop(criu);
    streamer.expect_success();
    assert_eq!(image::decode(&collector.finish()).unwrap().len(), 2);
}

#[test]
fn a_restore_goes_on_when_no_program_reads_its_progress() {
    let image = image::encode([("inventory.img", &b"inventory"[..])], 2, 100);
    let (mut extract, _feeder) = runs::feed(Streamer::extract().progress_reader_gone(), &image);
    extract.expect_success();
    let (mut serve, _feeder) = runs::feed(Streamer::serve().progress_reader_gone(), &image);
    let criu = serve.criu_when_socket_is_there();
    criu.expect_file("inventory.img", b"inventory");
    drop(criu);
    serve.expect_success();
}

#[test]
fn nothing_else_is_said_to_a_progress_pipe_when_it_fails() {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
    let criu = streamer.criu();
    criu.write_file("pages-1.img", &[1; 100]);
    drop(criu);
    let exit = streamer.expect_failure(&["inventory.img"]);
    assert_eq!(exit.progress, ["socket-init", "checkpoint-start"]);
    collector.finish();
}
