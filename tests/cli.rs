//! What the command line accepts, and how it refuses the rest: before anything else happens, naming
//! the argument.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output};

use crate::common::image;
use crate::common::runs;
use crate::common::shards::pipe;
use crate::common::streamer::{Launch, Streamer, binary};
use tempfile::TempDir;

const SUBCOMMANDS: [fn() -> Launch; 4] = [
    Streamer::capture,
    Streamer::extract,
    Streamer::extract_serve,
    Streamer::serve,
];

const NAMES: [&str; 4] = ["capture", "extract", "list", "serve"];

fn run(args: &[&str]) -> Output {
    Command::new(binary()).args(args).output().unwrap()
}

/// Refused: exit status 1, one error that contains `words`, no progress, and nothing made in the
/// images directory.
#[track_caller]
fn assert_refused(launch: Launch, words: &[&str]) {
    let dir = TempDir::new().unwrap();
    let exit = launch.images_dir(dir.path()).run();
    exit.expect_failure(words);
    // Without a progress pipe the lines would stand beside the error.
    assert!(
        exit.progress.iter().all(|line| line == exit.error()),
        "{:?}",
        exit.progress
    );
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn help_and_version_need_nothing_else() {
    let help = run(&["--help"]);
    assert!(help.status.success());
    let help = String::from_utf8(help.stdout).unwrap();
    for word in ["-D, --images-dir", "-s, --shard-fds", "--tcp-listen-remap"] {
        assert!(help.contains(word), "{word} is not explained:\n{help}");
    }
    for subcommand in NAMES {
        let help = run(&[subcommand, "--help"]);
        assert!(
            help.status.success() && !help.stdout.is_empty(),
            "{subcommand} --help: {help:?}"
        );
    }
    let version = run(&["--version"]);
    let version = String::from_utf8(version.stdout).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

/// Who types only the name wants to know what comes next.
#[test]
fn without_a_subcommand_the_subcommands_are_told() {
    let told = |args: &[&str]| {
        let output = run(args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        // Standard output is a shard, not a place for messages.
        assert!(output.stdout.is_empty(), "{args:?}");
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(!told(&["-D", "/tmp", "capture", "-x"]).is_empty());
    let usage = told(&[]);
    for word in ["Usage:", "--images-dir"].iter().chain(&NAMES) {
        assert!(usage.contains(word), "{word} is not in {usage}");
    }
    assert_eq!(told(&["-D", "/tmp"]), usage);
}

#[test]
fn a_descriptor_that_is_not_open_is_named() {
    for subcommand in SUBCOMMANDS {
        assert_refused(subcommand().args(["--shard-fds", "987"]), &["987", "shard"]);
        assert_refused(
            with_shard(subcommand()).args(["--ext-file-fds", "fs.tar:987"]),
            &["987", "fs.tar"],
        );
        assert_refused(
            with_shard(subcommand())
                .progress_on_stderr()
                .args(["--progress-fd", "987"]),
            &["987", "progress"],
        );
    }
}

#[test]
fn a_descriptor_serves_one_purpose() {
    for subcommand in SUBCOMMANDS {
        let uses: [&[&str]; 4] = [
            &["--shard-fds=FD,FD"],
            &["--shard-fds=FD", "--ext-file-fds=fs.tar:FD"],
            &["--ext-file-fds=fs.tar:FD", "--ext-file-fds=fs.zip:FD"],
            &["--shard-fds=FD", "--progress-fd=FD"],
        ];
        for uses in uses {
            let end = free_pipe(subcommand);
            let fd = end.as_raw_fd().to_string();
            let launch = subcommand().inherit(end);
            let launch = launch.args(uses.iter().map(|option| option.replace("FD", &fd)));
            let launch = match uses.last() {
                Some(&"--progress-fd=FD") => launch.progress_on_stderr(),
                _ => launch,
            };
            assert_refused(launch, &[&fd]);
        }
        let launch = with_shard(subcommand())
            .ext_file("fs.tar", free_pipe(subcommand))
            .ext_file("fs.tar", free_pipe(subcommand));
        assert_refused(launch, &["fs.tar"]);
    }
}

/// Runs a shell script in a directory of its own, in which `streamer` is the program. What is not
/// refused waits for something for ever, and is ended.
fn shell(dir: &Path, script: &str) -> Output {
    let streamer = format!(
        "streamer() {{ timeout 20 '{}' \"$@\"; }}",
        binary().display()
    );
    Command::new("bash")
        .args(["-c", &format!("{streamer}\n{script}")])
        .current_dir(dir)
        .output()
        .unwrap()
}

/// Whatever names them: a message in the middle of an image, or two shards in one file, is an image
/// lost.
#[test]
fn two_names_of_one_file_are_refused() {
    let refused = [
        // Where messages go.
        (
            "streamer -D images capture 2>&1 | cat >said; exit ${PIPESTATUS[0]}",
            "standard error",
        ),
        (
            "streamer -D images --progress-bar capture >app.img 2>&1",
            "standard error",
        ),
        (
            "streamer -D images capture -p 3 >app.img 3>>app.img",
            "--progress-fd",
        ),
        ("streamer -D images serve <whole 2>>whole", "standard error"),
        // Shards and external files.
        (
            "streamer -D images capture -s 3,4 3>app.img 4>>app.img",
            "--shard-fds 3",
        ),
        (
            ": >app.img; ln app.img link; streamer -D images capture -s 3,4 3>app.img 4>link",
            "--shard-fds 3",
        ),
        (
            "streamer -D images capture -e fs.tar:3 3<whole >>whole",
            "--shard-fds 1",
        ),
        (
            "mkfifo fifo; exec 5<>fifo 3<fifo 4>fifo; streamer -D images capture -s 4 -e fs.tar:3",
            "--shard-fds 4",
        ),
    ];
    for (script, other) in refused {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("whole"), &image::inventory()[0]).unwrap();
        let output = shell(dir.path(), script);
        assert_eq!(output.status.code(), Some(1), "{script}: {output:?}");
        // The message is where standard error leads.
        let mut said = String::from_utf8_lossy(&output.stderr).into_owned();
        for file in ["said", "app.img", "whole"] {
            if let Ok(text) = fs::read(dir.path().join(file)) {
                said.push_str(&String::from_utf8_lossy(&text));
            }
        }
        for word in ["same file, pipe or socket", other] {
            assert!(said.contains(word), "{script}: {said}");
        }
        assert!(!said.contains("socket-init"), "{script}: {said}");
        assert!(!dir.path().join("images").exists(), "{script}");
    }
}

/// /dev/null keeps nothing that could be mixed up, and lines for programs may stand beside errors.
#[test]
fn devices_are_shared_and_progress_lines_stand_beside_errors() {
    for script in [
        "streamer -D images extract -s 3 3<whole >/dev/null 2>/dev/null",
        "streamer -D images extract -p 4 <whole 4>said 2>>said",
        "streamer -D images extract -e null:3 -p 4 <whole 3>/dev/null 4>/dev/null 2>/dev/null || test $? = 1",
    ] {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("whole"), &image::inventory()[0]).unwrap();
        let output = shell(dir.path(), script);
        assert!(output.status.success(), "{script}: {output:?}");
    }
    let null = || OwnedFd::from(fs::File::options().write(true).open("/dev/null").unwrap());
    let mut streamer = Streamer::capture().shards([null(), null()]).start();
    runs::send(&streamer, &runs::sample_files(1));
    streamer.expect_success();
}

/// What comes out of a socket and what goes into it are two streams: sshd gives a command one
/// socket for standard input and output. The two ends of a pair are two sockets.
#[test]
fn a_socket_carries_a_shard_one_way_and_progress_lines_the_other() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let dir = TempDir::new().unwrap();
    let end = OwnedFd::from(ours);
    let mut streamer = Command::new(binary())
        .arg("-D")
        .arg(dir.path())
        .args(["--progress-fd", "1", "extract"])
        .stdin(end.try_clone().unwrap())
        .stdout(end)
        .spawn()
        .unwrap();
    theirs.write_all(&image::inventory()[0]).unwrap();
    theirs.shutdown(std::net::Shutdown::Write).unwrap();
    let mut lines = String::new();
    theirs.read_to_string(&mut lines).unwrap();
    assert!(streamer.wait().unwrap().success(), "{lines}");
    assert!(lines.starts_with("{\"shards\""), "{lines}");

    let (ours, theirs) = UnixStream::pair().unwrap();
    let (ours, theirs) = (OwnedFd::from(ours), OwnedFd::from(theirs));
    let same = ours.try_clone().unwrap();
    let fd = same.as_raw_fd().to_string();
    let exit = Streamer::capture().shards([ours, same]).run();
    exit.expect_failure(&[&fd, "same file, pipe or socket"]);
    drop(theirs);
}

#[test]
fn values_that_make_no_sense_are_refused() {
    for (launch, option, values) in [
        (
            Streamer::capture as fn() -> Launch,
            "shard-fds",
            &[
                "",
                "a",
                "1a",
                "-1",
                "10,",
                ",10",
                "10 11",
                "10;11",
                "99999999999",
            ][..],
        ),
        (
            Streamer::capture,
            "ext-file-fds",
            &[
                "fs.tar",
                "fs.tar:",
                "fs.tar:x",
                ":10",
                "fs.tar=10",
                "fs.tar:-1",
            ],
        ),
        (
            Streamer::serve,
            "tcp-listen-remap",
            &[
                "", "80", "80:", ":80", "80:65536", "65536:80", "80:-1", "http:80", "80:81:82",
            ],
        ),
        (Streamer::serve, "tcp-listen-remap", &["80:81,80:82"]),
        (
            Streamer::capture,
            "buffer",
            &["0", "1T", "0%", "101%", "much"],
        ),
    ] {
        for value in values {
            let launch = with_shard(launch()).args([format!("--{option}={value}")]);
            assert_refused(launch, &[option]);
        }
    }
}

#[test]
fn options_are_refused_where_they_mean_nothing() {
    for (subcommands, options, words) in [
        (
            &SUBCOMMANDS[..2],
            &["--tcp-listen-remap=80:81"][..],
            ["tcp-listen-remap", "serve"],
        ),
        (&SUBCOMMANDS[1..], &["--buffer=1M"], ["--buffer", "capture"]),
        (
            &SUBCOMMANDS[..1],
            &["--buffer=1M", "--go-on-when-copied"],
            ["--go-on-when-copied", "hook"],
        ),
    ] {
        for subcommand in subcommands {
            assert_refused(
                with_shard(subcommand()).args(options.iter().copied()),
                &words,
            );
        }
    }
}

/// CRIU copies the socket's path into 108 bytes without looking.
#[test]
fn an_images_dir_too_long_for_a_socket_is_refused() {
    let dir = TempDir::new().unwrap();
    let long = dir.path().join("d".repeat(100));
    fs::create_dir(&long).unwrap();
    for subcommand in [Streamer::capture, Streamer::serve] {
        let exit = with_shard(subcommand()).images_dir(&long).run();
        exit.expect_refusal(&["images-dir"]);
    }
    // No socket, no limit.
    let image = image::inventory();
    let (mut streamer, _feeder) = runs::feed(Streamer::extract().images_dir(&long), &image);
    streamer.expect_success();
    assert_eq!(fs::read(long.join("inventory.img")).unwrap(), b"inventory");
}

/// A shard that is all right, so that something else is refused.
fn with_shard(launch: Launch) -> Launch {
    let (reader, writer) = pipe();
    let end = match launch.writes_shards() {
        true => writer,
        false => reader,
    };
    launch.shards([end])
}

/// The streamer's end of a pipe that is not used, as the run ends before.
fn free_pipe(subcommand: fn() -> Launch) -> OwnedFd {
    let (reader, writer) = pipe();
    match subcommand().writes_shards() {
        true => writer,
        false => reader,
    }
}
