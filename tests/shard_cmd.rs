//! `--shard-cmd`: one exit status for the whole pipeline. The transfer has succeeded only if every
//! command has; otherwise the error says which failed and how, and the others are ended.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::common::child::Limit;
use crate::common::gate::Gate;
use crate::common::image::{self, Files};
use crate::common::runs::{self, assert_same_files, read_dir, sample_files};
use crate::common::streamer::{Exit, Launch, Streamer, binary};
use crate::common::{random, wait_until};
use nix::sys::signal::Signal;
use tempfile::TempDir;

fn with(launch: Launch, shards: usize, command: &str) -> Launch {
    launch
        .args(["--num-shards".to_owned(), shards.to_string()])
        .args(["--shard-cmd", command])
}

fn capture(shards: usize, command: &str, files: &Files) -> Exit {
    let mut streamer = with(Streamer::capture(), shards, command).start();
    runs::send(&streamer, files);
    streamer.wait()
}

/// Enough to fill every pipe several times.
fn large_files() -> Files {
    image::files([
        ("pages-1.img", random::bytes(1, 16 << 20)),
        ("inventory.img", random::bytes(2, 50)),
    ])
}

fn small_files() -> Files {
    image::files([("inventory.img", random::bytes(3, 50))])
}

fn write_shards(dir: &Path, files: &Files, count: usize) {
    for (i, shard) in image::encode_files(files, count, 4096).iter().enumerate() {
        fs::write(dir.join(format!("s{}", i + 1)), shard).unwrap();
    }
}

fn read_shards(dir: &Path, count: usize) -> Vec<Vec<u8>> {
    (1..=count)
        .map(|i| fs::read(dir.join(format!("s{i}"))).unwrap())
        .collect()
}

/// Waits until no process has `marker` among its arguments.
fn wait_until_nothing_runs(marker: &str) {
    let found = || {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(marker))
        })
    };
    wait_until(&format!("the end of {marker}"), || !found());
}

#[test]
fn an_image_goes_out_and_comes_back_through_commands() {
    for count in [1, 4, 32] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().display();
        let files = sample_files(count as u64);
        let exit = capture(count, &format!("cat >'{path}'/s{{}}"), &files);
        exit.expect_success();
        assert_same_files(
            &image::decode(&read_shards(dir.path(), count)).unwrap(),
            &files,
        );

        let bring = format!("cat '{path}'/s{{}}");
        let images = TempDir::new().unwrap();
        let extract = Streamer::extract().images_dir(images.path());
        with(extract, count, &bring).run().expect_success();
        assert_same_files(&read_dir(images.path()), &files);

        for launch in [Streamer::serve, Streamer::extract_serve] {
            let mut streamer = with(launch(), count, &bring).start();
            runs::assert_served(&mut streamer, &files);
        }
    }
}

/// Early, or after it has seen the end of its input: the streamer itself has nothing more to do
/// then.
#[test]
fn a_command_that_fails_fails_the_capture() {
    for (command, words) in [
        (
            "test {} != 3 || exit 5; cat >/dev/null",
            ["command 3", "test 3 != 3", "exit status 5"],
        ),
        (
            "cat >/dev/null; test {} != 2 || exit 7",
            ["command 2", "cat", "exit status 7"],
        ),
        (
            "cat >/dev/null; kill -KILL $$",
            ["shard command", "signal 9", "SIGKILL"],
        ),
        ("kill -40 $$", ["shard command", "kill", "signal 40"]),
        // Any part of a pipeline counts, not only its last.
        (
            "(cat >/dev/null; exit 9) | cat",
            ["shard command", "cat", "exit status 9"],
        ),
        (
            "cat | (cat >/dev/null; exit 9) | cat",
            ["shard command", "cat", "exit status 9"],
        ),
        // An upload that gives up breaks the pipe of the compressor before it.
        (
            "cat | (head -c 1000 >/dev/null; exit 9)",
            ["shard command", "head", ""],
        ),
    ] {
        capture(4, command, &large_files()).expect_failure(&words);
    }
}

/// At once, while the others still bring data; at its end; whatever arrived of the image. Only what
/// breaks off without a word is a shard that was cut off.
#[test]
fn a_download_that_fails_is_not_served_and_not_extracted() {
    let dir = TempDir::new().unwrap();
    write_shards(dir.path(), &sample_files(2), 3);
    let path = dir.path().display();
    let marker = format!("1000.{}4", std::process::id());
    for (command, words) in [
        (
            format!("test {{}} != 2 || exit 13; sleep {marker}"),
            ["command 2", "exit status 13"],
        ),
        (
            format!("cat '{path}'/s{{}}; sleep 0.3; test {{}} != 2 || exit 11"),
            ["command 2", "exit status 11"],
        ),
        (
            format!("test {{}} = 3 || exec cat '{path}'/s{{}}; head -c 5000 '{path}'/s3; exit 12"),
            ["command 3", "exit status 12"],
        ),
        (
            format!("head -c 5000 '{path}'/s{{}}"),
            ["shard command", ""],
        ),
    ] {
        for launch in [Streamer::serve, Streamer::extract] {
            let images = TempDir::new().unwrap();
            let exit = with(launch().images_dir(images.path()), 3, &command).run();
            exit.expect_refusal(&words);
            assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
        }
    }
    wait_until_nothing_runs(&marker);
}

/// Its data is lost, whatever it says.
#[test]
fn a_command_that_succeeds_without_reading_everything_fails_the_capture() {
    for (command, files) in [
        ("true", large_files()),
        ("true", small_files()),
        ("head -c 10 >/dev/null", small_files()),
        ("head -c 100000 >/dev/null", large_files()),
        // The shell has the pipe open as long as it lives.
        ("head -c 10 >/dev/null | sleep 0.3", small_files()),
        ("head -c 10 >/dev/null; sleep 0.3", large_files()),
    ] {
        let exit = capture(1, command, &files);
        exit.expect_failure(&["shard command 1", command, "before it had read"]);
    }
}

/// The whole pipeline, and one that does not want to.
#[test]
fn when_one_command_fails_the_others_are_ended() {
    // An argument that no other process has.
    let marker = format!("1000.{}1", std::process::id());
    for other in ["", "trap '' TERM;"] {
        let command =
            format!("test {{}} != 2 || exit 6; {other} cat | (sleep {marker}; cat >/dev/null)");
        capture(3, &command, &large_files()).expect_failure(&["shard command 2", "exit status 6"]);
        wait_until_nothing_runs(&marker);
    }
}

/// It is told to end first, and can clean up.
#[test]
fn a_command_that_is_ended_can_clean_up() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().display();
    let command = format!(
        "cd '{path}'; test {{}} = 1 || {{ until test -e ready; do sleep 0.01; done; exit 4; }}; \
         trap 'sleep 0.2; echo cleaned >cleaned; exit 0' TERM; touch ready; while :; do sleep 0.01; done"
    );
    capture(2, &command, &large_files()).expect_failure(&["shard command 2", "exit status 4"]);
    assert!(dir.path().join("cleaned").exists());
}

/// An upload completes what it has got when its input ends: it must not see an end that is none.
#[test]
fn a_failed_dump_is_not_uploaded_as_if_it_were_whole() {
    let dir = TempDir::new().unwrap();
    let command = format!(
        "cat >/dev/null; touch '{}'/uploaded-{{}}",
        dir.path().display()
    );
    let mut streamer = with(Streamer::capture(), 3, &command).start();
    let criu = streamer.criu();
    criu.write_file("pages-1.img", &[1; 100_000]);
    drop(criu);
    streamer.expect_failure(&["inventory.img"]);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_signal_ends_the_commands_too() {
    let marker = format!("1000.{}3", std::process::id());
    for launch in [Streamer::capture, Streamer::serve] {
        let place = Gate::new();
        let command = place.inside(&format!("echo started >started-{{}}; sleep {marker}"));
        let mut streamer = with(launch(), 2, &command).start();
        place.wait_for("started-1");
        place.wait_for("started-2");
        streamer.signal(Signal::SIGTERM);
        assert_eq!(streamer.wait().status.code(), Some(128 + 15));
        wait_until_nothing_runs(&marker);
    }
}

/// With `tee >(upload)` the shell ends before the upload.
#[test]
fn what_a_command_leaves_behind_is_waited_for() {
    let place = Gate::new();
    write_shards(&place.path(""), &small_files(), 1);
    let rest = "echo rest >rest; read -r _ <gate; echo done >done";
    for (launch, command) in [
        (
            Streamer::capture(),
            format!("tee >(cat >/dev/null; {rest}) >/dev/null"),
        ),
        (Streamer::capture(), format!("cat >/dev/null; ({rest}) &")),
        (
            Streamer::extract(),
            format!("cat s1; ({rest}) >/dev/null &"),
        ),
    ] {
        let captures = launch.writes_shards();
        let mut streamer = with(launch, 1, &place.inside(&command)).start();
        if captures {
            runs::send(&streamer, &small_files());
        }
        place.wait_for("rest");
        let waits = streamer.outlasts(Duration::from_millis(300));
        assert!(waits, "{command}: it was not waited for");
        place.open();
        streamer.expect_success();
        for name in ["rest", "done"] {
            fs::remove_file(place.path(name)).expect(&command);
        }
    }
}

#[test]
fn what_a_command_leaves_behind_fails_the_transfer_with_its_failure() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().display();
    write_shards(dir.path(), &small_files(), 2);
    for (command, how) in [
        ("tee >(cat >/dev/null; exit 7) >/dev/null", "exit status 7"),
        (
            "tee >(cat >/dev/null; sleep 0.2; exit 7) >/dev/null; true",
            "exit status 7",
        ),
        (
            "cat > >(cat >/dev/null; sleep 0.2; kill -KILL $BASHPID)",
            "SIGKILL",
        ),
    ] {
        let exit = capture(2, command, &small_files());
        exit.expect_failure(&["shard command", command, "background", how]);
    }
    for launch in [Streamer::extract, Streamer::serve] {
        let images = TempDir::new().unwrap();
        let command = format!("cat '{path}'/s{{}}; test {{}} != 2 || (sleep 0.3; exit 8) &");
        let exit = with(launch().images_dir(images.path()), 2, &command).run();
        exit.expect_refusal(&["shard command 2", "background", "exit status 8"]);
        assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_signal_ends_the_wait_for_what_a_command_left_behind() {
    let marker = format!("1000.{}5", std::process::id());
    let place = Gate::new();
    let command = place.inside(&format!("cat >/dev/null; sleep {marker} & echo $! >left"));
    let mut streamer = with(Streamer::capture(), 1, &command).start();
    runs::send(&streamer, &small_files());
    place.wait_for("left");
    assert!(streamer.is_running());
    streamer.signal(Signal::SIGTERM);
    assert_eq!(streamer.wait().status.code(), Some(128 + 15));
    wait_until_nothing_runs(&marker);
}

/// Such as ssh's control master, which other connections will use.
#[test]
fn a_daemon_is_neither_waited_for_nor_ended() {
    let place = Gate::new();
    let daemon = "setsid sh -c 'echo $$ >daemon; exec sleep 1000' <&- >&- 2>&-";
    let command = place.inside(&format!("cat >/dev/null; {daemon} &"));
    let mut streamer = with(Streamer::capture(), 1, &command).start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();
    let daemon = place.wait_for("daemon");
    let daemon = nix::unistd::Pid::from_raw(daemon.trim().parse().unwrap());
    nix::sys::signal::kill(daemon, Signal::SIGKILL).unwrap();
}

/// A directory with these programs alone, for PATH.
fn path_with(dir: &Path, programs: &[&str]) -> String {
    let path = dir.join("path");
    let _ = fs::remove_dir_all(&path);
    fs::create_dir(&path).unwrap();
    for program in programs {
        let places = ["/bin", "/usr/bin"].map(|dir| Path::new(dir).join(program));
        let real = places.iter().find(|path| path.exists()).unwrap();
        std::os::unix::fs::symlink(real, path.join(program)).unwrap();
    }
    path.display().to_string()
}

#[test]
fn sh_takes_the_place_of_a_bash_that_is_not_there() {
    let dir = TempDir::new().unwrap();
    let path = path_with(dir.path(), &["sh", "cat"]);
    let command = format!("cat >'{}'/s{{}} || exit 7", dir.path().display());
    let launch = with(Streamer::capture(), 2, &command).env("PATH", &path);
    let mut streamer = launch.start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();
    assert_same_files(
        &image::decode(&read_shards(dir.path(), 2)).unwrap(),
        &small_files(),
    );
    let path = path_with(dir.path(), &[]);
    let exit = with(Streamer::capture(), 1, &command).env("PATH", &path);
    exit.run().expect_failure(&["shard command 1", "shell"]);
}

/// dash has no `pipefail` before 0.5.13, and none of its pipelines a status but the last one's.
#[test]
fn without_a_shell_that_has_pipefail_a_pipeline_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = path_with(dir.path(), &["sh", "cat"]);
    let has_pipefail = std::process::Command::new("sh")
        .args(["-o", "pipefail", "-c", ":"])
        .output()
        .unwrap();
    let pipeline = "(cat; exit 3) | cat >/dev/null";
    let files = ["--shard-cmd", "cat", "--ext-file-cmd"];
    let for_file = format!("fs.tar:{pipeline}");
    for launch in [
        with(Streamer::capture(), 1, pipeline),
        Streamer::capture().args(files).args([for_file]),
    ] {
        let mut streamer = launch.env("PATH", &path).start();
        if has_pipefail.status.success() {
            runs::send(&streamer, &small_files());
            streamer.expect_failure(&["exit status 3"]);
        } else {
            let exit = streamer.expect_failure(&["bash", "pipefail", pipeline]);
            assert!(exit.progress.iter().all(|line| line != "socket-init"));
        }
    }
}

#[test]
fn commands_start_where_close_range_is_refused() {
    let launch = with(Streamer::capture(), 1, "cat >/dev/null");
    let mut streamer = launch.limit(Limit::Refused(libc::SYS_close_range)).start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();
}

#[test]
fn commands_are_not_started_for_bad_usage() {
    let dir = TempDir::new().unwrap();
    let touch = format!("touch '{}'/started", dir.path().display());
    let (_reader, end) = crate::common::shards::pipe();
    let refused = [
        (
            with(Streamer::capture().shards([end]), 1, &touch),
            "--shard-fds",
        ),
        (with(Streamer::capture(), 33, &touch), "--num-shards"),
        (with(Streamer::serve(), 1, " "), "--shard-cmd"),
        (
            Streamer::serve().args(["--num-shards", "2"]),
            "--num-shards",
        ),
    ];
    for (launch, word) in refused {
        launch.run().expect_refusal(&[word]);
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// It is not in the terminal's foreground, where it could be answered. `script` gives it a
/// terminal.
#[test]
fn a_command_that_wants_a_password_from_the_terminal_is_told_off() {
    let dir = TempDir::new().unwrap();
    let command = format!(
        "{} -D '{}' --shard-cmd 'read -r password </dev/tty; cat' serve",
        binary().display(),
        dir.path().display()
    );
    let output = std::process::Command::new("script")
        .args(["--quiet", "--return", "--command", &command, "/dev/null"])
        .stdin(std::process::Stdio::null())
        .output()
        .expect("script (Debian: bsdutils)");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains("shard command 1") && said.contains("terminal"),
        "{said}"
    );
}
