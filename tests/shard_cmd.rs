//! `--shard-cmd`: one exit status for the whole pipeline. The transfer has succeeded only if every
//! command has; otherwise the error says which failed and how, and the others are ended.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::common::child::{Limit, wait_for_end};
use crate::common::image::{self, Files};
use crate::common::runs::{self, assert_same_files, read_dir, sample_files};
use crate::common::streamer::{Exit, Launch, Streamer, binary};
use crate::common::{HANG_TIMEOUT, random};
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
    Files::from([
        ("pages-1.img".to_owned(), random::bytes(1, 16 << 20)),
        ("inventory.img".to_owned(), random::bytes(2, 50)),
    ])
}

fn small_files() -> Files {
    Files::from([("inventory.img".to_owned(), random::bytes(3, 50))])
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

fn wait_for_file(path: &Path) -> String {
    let deadline = Instant::now() + HANG_TIMEOUT;
    loop {
        match fs::read_to_string(path) {
            Ok(text) if text.ends_with('\n') => return text,
            _ => assert!(Instant::now() < deadline, "{} did not come", path.display()),
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Waits until no process has `marker` among its arguments.
fn wait_until_nothing_runs(marker: &str) {
    let deadline = Instant::now() + HANG_TIMEOUT;
    let found = || {
        fs::read_dir("/proc").unwrap().flatten().any(|entry| {
            fs::read(entry.path().join("cmdline"))
                .is_ok_and(|line| String::from_utf8_lossy(&line).contains(marker))
        })
    };
    while found() {
        assert!(Instant::now() < deadline, "{marker} is still running");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn an_image_goes_out_and_comes_back_through_commands() {
    for count in [1, 4, 32] {
        let dir = TempDir::new().unwrap();
        let path = dir.path().display();
        let files = sample_files(count as u64);
        let exit = capture(count, &format!("cat >'{path}'/s{{}}"), &files);
        assert!(exit.status.success(), "{}", exit.stderr);
        assert_same_files(
            &image::decode(&read_shards(dir.path(), count)).unwrap(),
            &files,
        );

        let bring = format!("cat '{path}'/s{{}}");
        let images = TempDir::new().unwrap();
        let extract = Streamer::extract().images_dir(images.path());
        let exit = with(extract, count, &bring).run();
        assert!(exit.status.success(), "{}", exit.stderr);
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
    ] {
        let exit = capture(4, command, &large_files());
        exit.expect_failure(&words);
        assert!(exit.progress.iter().all(|line| !line.starts_with('{')));
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
            exit.expect_failure(&words);
            assert_eq!(exit.progress, [""; 0], "neither statistics nor socket-init");
            assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
        }
    }
    wait_until_nothing_runs(&marker);
}

/// Any part of a pipeline counts, not only its last.
#[test]
fn a_pipeline_fails_with_any_of_its_parts() {
    for command in [
        "(cat >/dev/null; exit 9) | cat",
        "cat | (cat >/dev/null; exit 9) | cat",
        "cat | (exit 9)",
    ] {
        capture(2, command, &small_files()).expect_failure(&["shard command", "exit status 9"]);
    }
    // An upload that gives up breaks the pipe of the compressor before it.
    capture(2, "cat | (head -c 1000 >/dev/null; exit 9)", &large_files())
        .expect_failure(&["shard command"]);
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
        assert!(exit.progress.iter().all(|line| !line.starts_with('{')));
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
        let exit = capture(3, &command, &large_files());
        exit.expect_failure(&["shard command 2", "exit status 6"]);
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
    let exit = capture(2, &command, &large_files());
    exit.expect_failure(&["shard command 2", "exit status 4"]);
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
        let dir = TempDir::new().unwrap();
        let command = format!(
            "echo started >'{}'/started-{{}}; sleep {marker}",
            dir.path().display()
        );
        let mut streamer = with(launch(), 2, &command).start();
        wait_for_file(&dir.path().join("started-1"));
        wait_for_file(&dir.path().join("started-2"));
        streamer.signal(Signal::SIGTERM);
        assert_eq!(streamer.wait().status.code(), Some(128 + 15));
        wait_until_nothing_runs(&marker);
    }
}

/// The streamer blocks the signals that it waits for, ignores SIGPIPE, and has many descriptors
/// open.
#[test]
fn a_command_starts_like_one_that_a_shell_started() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().display();
    let command = format!(
        "grep Sig /proc/self/status >'{path}'/signals; echo /proc/self/fd/* >'{path}'/fds; \
         ps -o pgid= -p $$ >'{path}'/group; echo $$ >>'{path}'/group; cat >/dev/null"
    );
    let (_reader, leaked) = crate::common::shards::pipe();
    let mut streamer = with(Streamer::capture(), 1, &command)
        .inherit(leaked)
        .start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();

    let signals = fs::read_to_string(dir.path().join("signals")).unwrap();
    for mask in ["SigBlk", "SigIgn"] {
        let line = signals.lines().find(|line| line.starts_with(mask)).unwrap();
        let signals = u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap();
        // Real-time signals are the C library's business, or of the starter of this test.
        let standard = signals & ((1 << 31) - 1);
        assert_eq!(standard, 0, "{line}");
    }
    let fds = fs::read_to_string(dir.path().join("fds")).unwrap();
    let extra: Vec<_> = fds
        .split_whitespace()
        .filter_map(|path| path.rsplit('/').next()?.parse::<u32>().ok())
        .filter(|&fd| fd > 2)
        .collect();
    // The shell holds the directory that it lists, and bash may hold one of its own at 255.
    assert!(extra.len() <= 1, "descriptors of the command: {fds}");
    let group = fs::read_to_string(dir.path().join("group")).unwrap();
    let ids: Vec<_> = group.split_whitespace().collect();
    assert_eq!(ids[0], ids[1], "a process group of its own");
}

/// With `tee >(upload)` the shell ends before the upload.
#[test]
fn what_a_command_leaves_behind_is_waited_for() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().display();
    write_shards(dir.path(), &small_files(), 1);
    nix::unistd::mkfifo(&dir.path().join("gate"), nix::sys::stat::Mode::S_IRWXU).unwrap();
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
        let _ = fs::remove_file(dir.path().join("rest"));
        let _ = fs::remove_file(dir.path().join("done"));
        let captures = launch.writes_shards();
        let mut streamer = with(launch, 1, &format!("cd '{path}'; {command}")).start();
        if captures {
            runs::send(&streamer, &small_files());
        }
        wait_for_file(&dir.path().join("rest"));
        let ended = wait_for_end(&streamer.pidfd(), Duration::from_millis(300));
        assert!(!ended, "{command}: it was not waited for");
        fs::write(dir.path().join("gate"), "go\n").unwrap();
        streamer.expect_success();
        assert!(dir.path().join("done").exists(), "{command}");
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
        assert!(exit.progress.iter().all(|line| !line.starts_with('{')));
    }
    for launch in [Streamer::extract, Streamer::serve] {
        let images = TempDir::new().unwrap();
        let command = format!("cat '{path}'/s{{}}; test {{}} != 2 || (sleep 0.3; exit 8) &");
        let exit = with(launch().images_dir(images.path()), 2, &command).run();
        exit.expect_failure(&["shard command 2", "background", "exit status 8"]);
        assert_eq!(exit.progress, [""; 0]);
        assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
    }
}

#[test]
fn a_signal_ends_the_wait_for_what_a_command_left_behind() {
    let marker = format!("1000.{}5", std::process::id());
    let dir = TempDir::new().unwrap();
    let left = dir.path().join("left");
    let command = format!(
        "cat >/dev/null; sleep {marker} & echo $! >'{}'",
        left.display()
    );
    let mut streamer = with(Streamer::capture(), 1, &command).start();
    runs::send(&streamer, &small_files());
    wait_for_file(&left);
    assert!(streamer.is_running());
    streamer.signal(Signal::SIGTERM);
    assert_eq!(streamer.wait().status.code(), Some(128 + 15));
    wait_until_nothing_runs(&marker);
}

/// Such as ssh's control master, which other connections will use.
#[test]
fn a_daemon_is_neither_waited_for_nor_ended() {
    let dir = TempDir::new().unwrap();
    let command = format!(
        "cat >/dev/null; cd '{}'; setsid sh -c 'echo $$ >daemon; exec sleep 1000' <&- >&- 2>&- &",
        dir.path().display()
    );
    let mut streamer = with(Streamer::capture(), 1, &command).start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();
    let daemon = wait_for_file(&dir.path().join("daemon"));
    let daemon = nix::unistd::Pid::from_raw(daemon.trim().parse().unwrap());
    nix::sys::signal::kill(daemon, Signal::SIGKILL).unwrap();
}

/// Programs that use `select` break where descriptors may have numbers over 1023.
#[test]
fn a_command_has_the_descriptor_limit_that_the_streamer_was_started_with() {
    let dir = TempDir::new().unwrap();
    let limits = dir.path().join("limits");
    let command = format!(
        "cat >/dev/null; (ulimit -Sn; ulimit -Hn) >'{}'",
        limits.display()
    );
    let mut streamer = with(Streamer::capture(), 1, &command)
        .limit(Limit::OpenFiles(900))
        .limit(Limit::SoftOpenFiles(300))
        .start();
    runs::send(&streamer, &small_files());
    streamer.expect_success();
    assert_eq!(fs::read_to_string(limits).unwrap(), "300\n900\n");
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
            Streamer::capture()
                .shards([end])
                .args(["--shard-cmd", &touch]),
            "--shard-fds",
        ),
        (with(Streamer::capture(), 0, &touch), "--num-shards"),
        (with(Streamer::capture(), 33, &touch), "--num-shards"),
        (with(Streamer::serve(), 1, " "), "--shard-cmd"),
        (
            Streamer::serve().args(["--num-shards", "2"]),
            "--num-shards",
        ),
        (
            with(Streamer::capture(), 1, &touch).args(["--ext-file-fds", "fs.tar:987"]),
            "987",
        ),
    ];
    for (launch, word) in refused {
        let exit = launch.run();
        exit.expect_failure(&[word]);
        assert_eq!(exit.progress, [""; 0]);
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
