//! `capture -- COMMAND` and `serve -- COMMAND`: the streamer starts CRIU, and its one exit status
//! tells of both. A shell script stands in for the command, and the test for CRIU's connection.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::time::Duration;

use crate::common::child::Limit;
use crate::common::criu::{Criu, Role};
use crate::common::gate::Gate;
use crate::common::image::{self, Files};
use crate::common::runs::{self, assert_same_files};
use crate::common::shards::{Collector, pipe, pipes};
use crate::common::streamer::{Exit, Launch, Streamer, binary};
use crate::common::{random, root_or_skip, wait_until};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Long enough for the end of what must not end.
const AWHILE: Duration = Duration::from_millis(300);

fn files() -> Files {
    image::files([
        ("pages-1.img", random::bytes(1, 3 << 20)),
        ("inventory.img", random::bytes(2, 50)),
    ])
}

/// Another status than 1 is only ever that of the command.
#[track_caller]
fn assert_ended(exit: &Exit, status: i32, words: &[&str]) {
    assert_eq!(exit.status.code(), Some(status), "{}", exit.stderr);
    for word in words {
        assert!(exit.error().contains(word), "{word}: {}", exit.error());
    }
}

/// What a launch needs beside the command.
fn serving(launch: Launch, dir: &Path) -> Launch {
    let shards = image::encode_files(&files(), 1, 4096);
    fs::write(dir.join("image"), &shards[0]).unwrap();
    let bring = format!("cat '{}'", dir.join("image").display());
    launch.args(["--shard-cmd", &bring])
}

fn serving_with_index(dir: &Path) -> Launch {
    let script = format!("cat >'{}/s{{}}'", dir.display());
    let with = |launch: Launch, script: &str| launch.args(["--index", "--shard-cmd", script]);
    let mut capture = with(Streamer::capture(), &script).start();
    runs::send(&capture, &files());
    capture.expect_success();
    with(Streamer::serve(), &format!("cat '{}/s{{}}'", dir.display()))
}

/// A capture whose image is of no interest.
fn discarding() -> Launch {
    Streamer::capture().args(["--shard-cmd", "cat >/dev/null"])
}

fn all_launches(dir: &Path) -> [Launch; 4] {
    [
        discarding(),
        serving(Streamer::serve(), dir),
        serving(Streamer::extract_serve(), dir),
        serving_with_index(dir),
    ]
}

#[test]
fn a_command_that_fails_before_it_connects_fails_the_transfer_at_once() {
    let dir = TempDir::new().unwrap();
    for launch in all_launches(dir.path()) {
        let exit = launch.criu_command("exit 7").run();
        assert_ended(&exit, 7, &["sh -c exit 7", "exit status 7"]);
        assert!(exit.progress.contains(&"socket-init".to_owned()));
    }
    // The second is a real-time signal.
    for (signal, words) in [(9, &["signal 9", "SIGKILL"][..]), (40, &["signal 40"])] {
        for launch in all_launches(dir.path()) {
            let script = format!("kill -{signal} $$");
            let exit = launch.criu_command(&script).run();
            assert_ended(&exit, 128 + signal, words);
        }
    }
}

#[test]
fn a_command_that_ends_well_without_having_connected_is_an_error_that_says_what_to_look_at() {
    let dir = TempDir::new().unwrap();
    for launch in all_launches(dir.path()) {
        let exit = launch.criu_command("true").run();
        exit.expect_failure(&["without having connected", "--stream", "--images-dir"]);
    }
}

#[test]
fn a_dump_into_the_directory_is_known_for_what_it_is() {
    let images = TempDir::new().unwrap();
    // CRIU's magic.
    let script = format!(
        r"printf '\026\061\061\130...' >'{}/inventory.img'",
        images.path().display()
    );
    let capture = discarding().images_dir(images.path());
    let exit = capture.criu_command(&script).run();
    exit.expect_failure(&["--stream was probably forgotten"]);
}

#[test]
fn a_command_that_is_not_there_is_named() {
    let dir = TempDir::new().unwrap();
    let output = std::process::Command::new(binary())
        .arg("-D")
        .arg(dir.path())
        .args(["--shard-cmd", "cat", "capture", "--", "nonesuch", "dump"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("Error: starting `nonesuch dump`"), "{said}");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

/// CRIU may fail when it has delivered everything: to unlock the network, or in an action script.
#[test]
fn an_image_is_whole_only_when_the_command_has_ended_well() {
    for (status, is_whole) in [(0, true), (3, false)] {
        let gate = Gate::new();
        let (readers, writers) = pipes(2, None);
        let script = gate.script(&format!("exit {status}"));
        let launch = Streamer::capture().shards(writers);
        let mut streamer = launch.criu_command(&script).start();
        let collector = Collector::start(readers);
        runs::send(&streamer, &files());
        assert!(streamer.outlasts(AWHILE), "it waits for the command");
        gate.open();
        let exit = streamer.wait();
        let decoded = image::decode(&collector.finish());
        if is_whole {
            exit.expect_success();
            assert_same_files(&decoded.unwrap(), &files());
            assert!(exit.progress.last().unwrap().starts_with('{'));
        } else {
            assert_ended(&exit, status, &["exit status 3"]);
            assert!(decoded.is_err(), "it has an end marker");
        }
    }
}

/// What CRIU says is the reason, not what its end looks like from here.
#[test]
fn a_dump_that_fails_half_way_ends_with_its_own_status() {
    let gate = Gate::new();
    let script = gate.script("sleep 0.3; exit 5");
    let mut streamer = discarding().criu_command(&script).start();
    let criu = streamer.criu();
    criu.write_file("pages-1.img", &[1; 100_000]);
    gate.open();
    drop(criu);
    assert_ended(&streamer.wait(), 5, &["exit status 5", "inventory.img"]);
}

/// CRIU sees its pipes break, lets the application go on, and only then are we gone.
#[test]
fn when_the_transfer_fails_the_command_is_waited_for_and_not_ended() {
    for signal in [None, Some(Signal::SIGTERM), Some(Signal::SIGINT)] {
        let gate = Gate::new();
        let script = gate.script("echo thawed >thawed; exit 1");
        let shard = match signal {
            None => "head -c 100000 >/dev/null; exit 6",
            Some(_) => "cat >/dev/null",
        };
        let capture = Streamer::capture().args(["--shard-cmd", shard]);
        let mut streamer = capture.criu_command(&script).start();
        let criu = streamer.criu();
        let mut pages = criu.create_file("pages-1.img");
        if let Some(signal) = signal {
            streamer.signal(signal);
        }
        let bytes = vec![1; 32 << 20];
        let error = loop {
            if let Err(error) = std::io::Write::write_all(&mut pages, &bytes) {
                break error;
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
        assert!(streamer.outlasts(AWHILE), "it was not waited for");
        gate.open();
        let exit = streamer.wait();
        let (status, word) = match signal {
            None => (1, "shard command 1"),
            Some(signal) => (128 + signal as i32, signal.as_str()),
        };
        assert_ended(&exit, status, &[word]);
        assert!(gate.path("thawed").exists());
    }
}

/// The images directory's socket is gone, so that it cannot connect any more.
#[test]
fn a_command_that_does_not_end_is_left_alone_after_a_signal() {
    let gate = Gate::new();
    // Of its standard streams the test waits for the end.
    let script = gate.script("echo done >done");
    let script = format!("exec 2>/dev/null; {script}");
    let mut streamer = discarding().criu_command(&script).start();
    streamer.wait_for_line("socket-init");
    streamer.signal(Signal::SIGTERM);
    let exit = streamer.wait();
    assert_eq!(exit.status.code(), Some(128 + 15));
    assert!(
        exit.stderr.contains("goes on, as process"),
        "{}",
        exit.stderr
    );
    gate.open();
    gate.wait_for("done");
}

#[test]
fn a_restore_is_waited_for_and_its_status_counts() {
    let dir = TempDir::new().unwrap();
    let launches = |dir| all_launches(dir).into_iter().skip(1);
    // A file that it asks for twice is a reason of ours, whatever becomes of it then.
    for (asks_again, status, ours) in [(false, 0, 0), (false, 9, 9), (true, 9, 1)] {
        for launch in launches(dir.path()) {
            let gate = Gate::new();
            let script = gate.script(&format!("exit {status}"));
            let mut streamer = launch.criu_command(&script).start();
            let criu = streamer.criu();
            criu.expect_files(&files());
            if asks_again {
                assert_eq!(criu.read_file("pages-1.img"), None);
            }
            drop(criu);
            assert!(streamer.outlasts(AWHILE), "it waits for the command");
            gate.open();
            let exit = streamer.wait();
            assert_eq!(exit.status.code(), Some(ours), "{}", exit.stderr);
        }
    }
}

/// A restored application in the terminal's foreground has a use for ^C, which the whole group
/// gets. SIGTERM is meant for us, and ends neither CRIU nor the application.
#[test]
fn when_all_is_restored_an_interrupt_is_the_applications() {
    let dir = TempDir::new().unwrap();
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let gate = Gate::new();
        let launch = serving(Streamer::serve(), dir.path());
        let script = format!("exec 2>/dev/null; {}", gate.script("echo done >done"));
        let mut streamer = launch.criu_command(&script).start();
        let criu = streamer.criu();
        criu.expect_files(&files());
        drop(criu);
        assert!(streamer.outlasts(AWHILE));
        streamer.signal(signal);
        if signal == Signal::SIGTERM {
            assert_eq!(streamer.wait().status.code(), Some(128 + 15));
            gate.open();
        } else {
            assert!(streamer.outlasts(AWHILE));
            gate.open();
            streamer.expect_success();
            assert!(gate.path("done").exists());
        }
    }
}

/// `timeout 25 criu-image-streamer capture … -- criu dump …`, with an upload that takes longer.
#[test]
fn a_signal_after_criu_has_killed_the_application_lets_the_upload_go_on_once() {
    for (leaves, signals, status) in [
        ("", vec![Signal::SIGTERM], 0),
        ("", vec![Signal::SIGHUP, Signal::SIGINT], 128 + 2),
        ("--leave-stopped", vec![Signal::SIGTERM], 128 + 15),
    ] {
        let upload = Gate::new();
        let image = upload.path("image");
        let shard = format!("cat >'{}'; {}", image.display(), upload.script(":"));
        let (pid, writer) = pipe();
        let script = "echo $$ >&0; read -r _ <\"$1\"";
        let criu = Gate::new();
        let fifo = criu.path("gate");
        let command = [
            "--",
            "sh",
            "-c",
            script,
            "criu",
            fifo.to_str().unwrap(),
            leaves,
        ];
        let capture = Streamer::capture().args(["--shard-cmd", &shard]);
        let mut streamer = capture.stdin(writer).args_behind(command).start();
        runs::send(&streamer, &files());
        let mut line = String::new();
        BufReader::new(fs::File::from(pid))
            .read_line(&mut line)
            .unwrap();
        criu.open();
        let stat = format!("/proc/{}/stat", line.trim());
        let runs = || fs::read_to_string(&stat).is_ok_and(|stat| !stat.contains(") Z "));
        wait_until("the end of CRIU", || !runs());
        for (sent, signal) in signals.iter().enumerate() {
            streamer.signal(*signal);
            if status == 0 || sent + 1 < signals.len() {
                streamer.wait_for_stderr("a second signal");
                assert!(streamer.outlasts(AWHILE));
            }
        }
        if status == 0 {
            upload.open();
        }
        assert_eq!(streamer.wait().status.code(), Some(status), "{leaves}");
        if status == 0 {
            let shard = fs::read(image).unwrap();
            assert_same_files(&image::decode(&[shard]).unwrap(), &files());
        }
    }
}

/// As PID 1 of a container it is the parent of all that the restored application leaves behind.
#[test]
fn as_pid_1_it_reaps_what_the_application_leaves_behind() {
    if !root_or_skip() {
        return;
    }
    let dir = TempDir::new().unwrap();
    let images = dir.path().join("images");
    let gate = Gate::new();
    let launch = image::encode_files(&files(), 1, 4096);
    fs::write(dir.path().join("image"), &launch[0]).unwrap();
    let script = gate.script(
        "(sleep 0.1 & exec sleep 0); for i in 1 2 3 4 5 6 7 8 9 10; do sleep 0.2; \
         grep -q 'State:.Z' /proc/[0-9]*/status || exit 0; done; exit 9",
    );
    let mut streamer = std::process::Command::new("unshare")
        .args(["--pid", "--fork", "--mount-proc"])
        .arg(binary())
        .arg("-D")
        .arg(&images)
        .arg("--shard-cmd")
        .arg(format!("cat '{}'/image", dir.path().display()))
        .args(["serve", "--", "sh", "-c", &script])
        .spawn()
        .unwrap();
    let mut criu = None;
    // A socket is there a moment before it listens.
    wait_until("a socket", || {
        criu = Criu::try_connect(&images, Role::Serve).ok();
        criu.is_some()
    });
    let criu = criu.unwrap();
    criu.expect_files(&files());
    drop(criu);
    gate.open();
    assert_eq!(streamer.wait().unwrap().code(), Some(0));
}

/// A command's signals, descriptors, process groups and limits, and how late its sleeps end.
const LOOK: &str = "{ grep -e SigBlk -e SigIgn /proc/self/status
printf 'fds: '; ls -m /proc/$$/fd; ps -o pgid= -p $PPID; ps -o pgid= -p $$; echo $$
ulimit -Sn; ulimit -Hn; cat /proc/self/timerslack_ns; } >seeing; mv seeing seen";

/// `--shell-job` needs our process group. A dump that is killed leaves the application as it is, so
/// that signals for the whole group are kept from it; a restore is a program like any other.
/// Programs that use `select` break where descriptors may have numbers over 1023.
#[test]
fn commands_start_like_those_of_a_shell() {
    let (_reader, leaked) = pipe();
    let number = |signal: Signal| 1_u64 << (signal as i32 - 1);
    let ending = [
        Signal::SIGHUP,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGTERM,
    ];
    let ending = ending.into_iter().map(number).sum::<u64>();
    let signals = |of: &str, name| {
        let line = of.lines().find(|line| line.starts_with(name)).unwrap();
        let all = u64::from_str_radix(line.rsplit('\t').next().unwrap(), 16).unwrap();
        // Others are the business of the C library, or of the starter of this test.
        all & (ending | number(Signal::SIGPIPE) | number(Signal::SIGCHLD))
    };
    let own = |file| fs::read_to_string(format!("/proc/self/{file}")).unwrap();
    // These tests may have been started by nohup.
    let ignored_here = signals(&own("status"), "SigIgn") & number(Signal::SIGHUP);
    let place = Gate::new();
    let look = place.inside(LOOK);
    let shard_command = ["--shard-cmd", &look];
    for (launch, ignored, group) in [
        (discarding().criu_command(&look), ending, 0),
        (
            serving(Streamer::serve(), &place.path("")).criu_command(&look),
            0,
            0,
        ),
        (Streamer::capture().args(shard_command), 0, 2),
    ] {
        let launch = launch.inherit(leaked.try_clone().unwrap());
        let launch = launch.limit(Limit::OpenFiles(900));
        let _streamer = launch.limit(Limit::SoftOpenFiles(300)).start();
        let seen = place.wait_for("seen");
        fs::remove_file(place.path("seen")).unwrap();
        assert_eq!(signals(&seen, "SigBlk"), 0, "{seen}");
        assert_eq!(signals(&seen, "SigIgn"), ignored | ignored_here, "{seen}");
        let mut lines = seen.lines().skip_while(|line| !line.starts_with("fds"));
        let fds = lines.next().unwrap()["fds: ".len()..].split(", ");
        // The shell may hold a copy of its standard output.
        let others = fds.filter(|fd| !["0", "1", "2"].contains(fd));
        assert!(others.count() <= 1, "{seen}");
        let numbers: Vec<_> = lines.map(str::trim).collect();
        // The streamer's process group, or one of the command's own.
        assert_eq!(numbers[1], numbers[group], "{seen}");
        assert_eq!(numbers[3..5], ["300", "900"], "limits on descriptors");
        // A restored application would keep it for life.
        assert_eq!(numbers[5], own("timerslack_ns").trim());
    }
}

#[test]
fn extract_starts_no_command() {
    let exit = Streamer::extract().criu_command("true").run();
    exit.expect_failure(&["extract", "--serve"]);
}

/// `-- $CRIU`, where the variable is not set.
#[test]
fn an_empty_command_is_refused() {
    for launch in [Streamer::capture, Streamer::serve] {
        let images = TempDir::new().unwrap();
        let launch = launch().images_dir(images.path().join("images"));
        launch
            .args(["--shard-cmd", "cat"])
            .args_behind(["--"])
            .run()
            .expect_failure(&["no command"]);
        assert!(!images.path().join("images").exists());
    }
}

/// Nobody has to run it.
#[test]
fn people_are_not_told_to_run_criu_where_it_is_started() {
    let dir = TempDir::new().unwrap();
    let launch = serving(Streamer::serve(), dir.path()).args(["--progress-bar"]);
    let said = launch.criu_command("exit 3").run().stderr;
    assert!(!said.contains("run `criu restore"), "{said}");
}
