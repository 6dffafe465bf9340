//! `--progress-bar`: what people see on standard error, which is never among the lines that
//! programs read.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;

use crate::common::image;
use crate::common::runs::{self, sample_files};
use crate::common::shards;
use crate::common::streamer::{Launch, Streamer, binary};
use tempfile::TempDir;

const BAR: [&str; 1] = ["--progress-bar"];

/// Captures an image into two shards, which are returned, and standard error with them.
fn capture(launch: Launch) -> (Vec<Vec<u8>>, crate::common::streamer::Exit) {
    let (mut streamer, collector) = runs::collect(launch, 2);
    let criu = streamer.criu_unless_it_ends().unwrap();
    criu.write_files(&sample_files(1));
    drop(criu);
    let exit = streamer.expect_success();
    (collector.finish(), exit)
}

#[track_caller]
fn assert_summary(stderr: &str, verb: &str) {
    let files = sample_files(1).len();
    let first = format!("{verb} {files} files, 3.3 MB in ");
    let mut lines = stderr.lines().skip_while(|line| !line.starts_with(&first));
    assert!(lines.next().is_some(), "{first:?} is not in\n{stderr}");
    for _ in 0..2 {
        let line = lines.next().unwrap_or_default();
        assert!(
            line.starts_with("  shard fd ") && line.ends_with("% of the image"),
            "{line:?} in\n{stderr}"
        );
    }
}

#[test]
fn each_shard_has_a_line_at_the_end_of_a_capture_and_a_restore() {
    let (shards, exit) = capture(Streamer::capture().args(BAR));
    assert_summary(&exit.stderr, "captured");
    assert_eq!(exit.progress[..2], ["socket-init", "checkpoint-start"]);
    assert!(exit.progress[2].starts_with("{\"shards\":[{\"size\":"));
    assert_eq!(exit.progress.len(), 3, "{:?}", exit.progress);

    let (mut streamer, _feeder) = runs::feed(Streamer::extract().args(BAR), &shards);
    let exit = streamer.expect_success();
    assert_summary(&exit.stderr, "received");
    assert_eq!(exit.progress.len(), 1, "{:?}", exit.progress);

    let (mut streamer, _feeder) = runs::feed(Streamer::serve().args(BAR), &shards);
    streamer.wait_for_stderr("run `criu restore --stream`");
    drop(streamer.criu().read_file("inventory.img"));
    let exit = streamer.expect_success();
    assert_summary(&exit.stderr, "received");
}

/// Progress lines on the same standard error would be lines among the bar's.
#[test]
fn without_a_descriptor_for_them_there_are_no_progress_lines() {
    let (_, exit) = capture(Streamer::capture().progress_on_stderr().args(BAR));
    assert_summary(&exit.stderr, "captured");
    assert!(
        !exit.stderr.contains("socket-init") && !exit.stderr.contains('{'),
        "{}",
        exit.stderr
    );
}

#[test]
fn nothing_is_shown_unless_asked_for() {
    let (_, exit) = capture(Streamer::capture());
    assert_eq!(exit.stderr, "");
}

#[test]
fn standard_error_cannot_be_the_bars_and_the_progress_lines_place() {
    let (_reader, end) = shards::pipe();
    Streamer::capture()
        .progress_on_stderr()
        .shards([end])
        .args(["--progress-bar", "--progress-fd", "2"])
        .run()
        .expect_failure(&["--progress-bar", "--progress-fd"]);

    // Under another number it is the same place.
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("log");
    let script = format!(
        "{} -D '{}' --progress-bar -p 3 serve </dev/null 2>'{}' 3>&2",
        binary().display(),
        dir.path().display(),
        path.display()
    );
    let status = Command::new("sh").args(["-c", &script]).status().unwrap();
    assert!(!status.success());
    let said = fs::read_to_string(&path).unwrap();
    assert!(said.contains("Error: --progress-bar"), "{said}");
}

#[test]
fn where_it_cannot_be_redrawn_a_line_comes_now_and_then() {
    let (_reader, end) = shards::pipe();
    let streamer = Streamer::capture().shards([end]).args(BAR).start();
    let line = streamer.wait_for_stderr("waiting for CRIU");
    assert!(!line.contains(['\r', '\x1b']), "{line:?}");
    drop(streamer.criu());
}

/// `script` gives it a terminal.
#[test]
fn on_a_terminal_one_line_is_drawn_again_and_again() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().display();
    let files = sample_files(1);
    for (i, shard) in image::encode_files(&files, 2, 4096).iter().enumerate() {
        fs::write(dir.path().join(format!("s{}", i + 1)), shard).unwrap();
    }
    // The data comes in two pieces, so that something is seen between them.
    let bring = "sleep 0.5; head -c 100000 s{}; sleep 0.5; tail -c +100001 s{}";
    let command = format!(
        "cd '{path}' && {} -D images --progress-bar --num-shards 2 --shard-cmd '{bring}' extract",
        binary().display()
    );
    let output = Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(OwnedFd::from(File::open("/dev/null").unwrap()))
        .output()
        .expect("script (Debian: bsdutils)");
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
    let shown = without_control_sequences(&shown);
    // Nothing but the summary ends a line: all before it is one line, drawn again and again.
    let (bar, summary) = shown
        .split_once(&format!("received {} files, 3.3 MB in ", files.len()))
        .unwrap_or_else(|| panic!("no summary in {shown:?}"));
    assert!(!bar.contains('\n'), "{shown:?}");
    let drawn: Vec<_> = bar.split('\r').collect();
    assert!(drawn.len() > 3, "{drawn:?}");
    for state in ["waiting for the image", "B/s"] {
        assert!(
            drawn.iter().any(|line| line.contains(state)),
            "no {state:?} in {drawn:?}"
        );
    }
    assert!(summary.contains("  shard command 2: "), "{summary:?}");
}

/// Text without what tells a terminal to clear a line, hide its cursor, or the like.
fn without_control_sequences(text: &str) -> String {
    let mut pieces = text.split("\x1b[");
    let mut plain = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        plain += piece
            .trim_start_matches(|c: char| !c.is_ascii_alphabetic())
            .get(1..)
            .unwrap_or_default();
    }
    plain
}

/// The error stands on a line of its own.
#[test]
fn an_error_is_not_hidden_behind_the_bar() {
    let (reader, end) = shards::pipe();
    let fd = end.as_raw_fd();
    drop(reader);
    let mut streamer = Streamer::capture().shards([end]).args(BAR).start();
    streamer.expect_failure(&[&format!("shard fd {fd}")]);
}
