//! `--statistics`: what the image, the shards and CRIU waited for, and what to do about it.

use std::fs;
use std::io::Write;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::image;
use crate::common::random;
use crate::common::runs::{self, sample_files};
use crate::common::shards::{self, Feeder};
use crate::common::streamer::{Launch, Streamer};
use serde_json::Value;
use tempfile::TempDir;

const MIB: usize = 1 << 20;

/// How long the slow one is slow: nearly all of the time that anything here takes.
const SLOW: Duration = Duration::from_millis(1500);

/// A transfer that is asked for its statistics, in a file and for people.
struct Asked {
    dir: TempDir,
    start: Instant,
}

impl Asked {
    fn new() -> Self {
        Self {
            dir: TempDir::with_prefix("statistics-").unwrap(),
            start: Instant::now(),
        }
    }

    fn of(&self, launch: Launch) -> Launch {
        let file = self.dir.path().join("statistics.json");
        let file = file.to_str().unwrap();
        launch.args(["--progress-bar", "--statistics", file])
    }

    /// The times of all phases, of which the longest, one of `of`, was long for this reason that
    /// people are told.
    #[track_caller]
    fn expect(&self, streamer: &mut Streamer, of: &[&str], limit: &str, reason: &str) -> Value {
        let stderr = streamer.expect_success().stderr;
        assert!(stderr.contains(reason), "{stderr}");
        let text = fs::read_to_string(self.dir.path().join("statistics.json")).unwrap();
        let statistics: Value = serde_json::from_str(&text).unwrap();
        let phases = statistics["phases"].as_array().unwrap();
        let millis = |phase: &Value, what: &str| phase[what].as_u64().unwrap();
        let causes = ["moving", "waiting_for_shards", "waiting_for_criu"];
        let whole = |phase| causes.map(|cause| millis(phase, &format!("{cause}_millis")));
        // All of the time is told of, and no time twice.
        let sum: u64 = phases.iter().flat_map(whole).sum();
        let shards = statistics["shards"].as_array().unwrap();
        let of_shards = shards.iter().map(|s| millis(s, "transfer_duration_millis"));
        let longest = of_shards.max().unwrap();
        let all = self.start.elapsed().as_millis() as u64;
        assert!(
            (longest * 95 / 100..=all).contains(&sum),
            "{longest} to {all}: {text}"
        );
        let long = phases
            .iter()
            .max_by_key(|phase| whole(phase).iter().sum::<u64>());
        let long = long.unwrap();
        assert!(of.contains(&long["phase"].as_str().unwrap()), "{text}");
        assert!(
            millis(long, &format!("waiting_for_{limit}_millis")) * 2
                >= whole(long).iter().sum::<u64>(),
            "{text}"
        );
        statistics
    }
}

/// A capture by commands of an image of 16 MiB, of which CRIU sends all at once. The shards for
/// which `is_slow` holds, in a shell, take nothing for a while.
fn capture_by(is_slow: &str, shards: &str) -> (Asked, Streamer) {
    let pages = random::bytes(1, 16 * MIB);
    let asked = Asked::new();
    let go = asked.dir.path().join("go");
    let command = format!(
        "! {is_slow} || until [ -e {} ]; do sleep 0.02; done; cat >/dev/null",
        go.display()
    );
    let launch = Streamer::capture().args(["--shard-cmd", &command, "--num-shards", shards]);
    let streamer = asked.of(launch).start();
    let criu = streamer.criu_unless_it_ends().unwrap();
    thread::scope(|scope| {
        scope.spawn(move || {
            criu.write_file("pages-1.img", &pages);
            criu.write_file("inventory.img", b"inventory");
        });
        thread::sleep(SLOW);
        fs::write(&go, "").unwrap();
    });
    (asked, streamer)
}

#[test]
fn a_capture_tells_when_all_shards_were_too_slow() {
    let (asked, mut streamer) = capture_by("true", "2");
    asked.expect(
        &mut streamer,
        &["frozen"],
        "shards",
        "because all shards were full: more shards, a faster compressor, or --buffer",
    );
}

#[test]
fn a_capture_tells_which_shard_was_slower_than_the_others() {
    let (asked, mut streamer) = capture_by("[ {} = 2 ]", "4");
    let statistics = asked.expect(
        &mut streamer,
        &["frozen", "written"],
        "shards",
        "because shard command 2 was full, and others were not",
    );
    assert_eq!(statistics["shards"][1]["name"], "shard command 2");
}

#[test]
fn a_capture_tells_when_criu_was_slow() {
    let asked = Asked::new();
    let (mut streamer, collector) = runs::collect(asked.of(Streamer::capture()), 2);
    let criu = streamer.criu_unless_it_ends().unwrap();
    let mut pages = criu.create_file("pages-1.img");
    pages.write_all(&random::bytes(1, MIB)).unwrap();
    thread::sleep(SLOW);
    drop(pages);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    asked.expect(
        &mut streamer,
        &["frozen"],
        "criu",
        "because CRIU had no more data yet",
    );
    collector.finish();
}

#[test]
fn a_restore_tells_which_shard_was_slower_than_the_others() {
    let shards = image::encode_files(&sample_files(1), 2, 64 << 10);
    let asked = Asked::new();
    let (readers, mut writers) = shards::pipes(2, None);
    let mut streamer = asked.of(Streamer::extract()).shards(readers).start();
    let late = writers.split_off(1);
    let early = Feeder::start(writers, &shards[..1]);
    thread::sleep(SLOW);
    let late = Feeder::start(late, &shards[1..]);
    let statistics = asked.expect(
        &mut streamer,
        &["received"],
        "shards",
        "was empty, and others were not",
    );
    let waited = &statistics["phases"][0]["each_shard_millis"];
    assert!(waited[1].as_u64() > waited[0].as_u64(), "{waited}");
    early.finish();
    late.finish();
}

#[test]
fn a_restore_tells_when_criu_was_slow() {
    let shards = image::encode_files(&sample_files(1), 1, 64 << 10);
    let asked = Asked::new();
    let (mut streamer, feeder) = runs::feed(asked.of(Streamer::serve()), &shards);
    let criu = streamer.criu_unless_it_ends().unwrap();
    thread::sleep(SLOW);
    criu.read_file("inventory.img");
    drop(criu);
    asked.expect(
        &mut streamer,
        &["served"],
        "criu",
        "because CRIU read no faster: with --lazy-pages",
    );
    feeder.finish();
}

#[test]
fn a_file_that_cannot_be_made_is_refused_before_anything_happens() {
    let launch = Streamer::capture().args(["--statistics", "/nonexistent/statistics.json"]);
    let (mut streamer, _collector) = runs::collect(launch, 1);
    streamer.expect_failure(&["--statistics", "creating /nonexistent/statistics.json"]);
}
