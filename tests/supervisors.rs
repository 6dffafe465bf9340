//! The way in which supervisors such as FastFreeze drive the streamer: their own pipes as shards,
//! progress lines that they read one by one and act on, an external file from and to `tar`,
//! separate processes for each step, and an exit status that is waited for from each. And
//! examples/checkpoint-safely.sh, which does it for those who have no supervisor.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::common::HANG_TIMEOUT;
use crate::common::child::{Child as Inheriting, queued, send_signal, wait_for_end};
use crate::common::criu::{Criu, Role};
use crate::common::image::{Files, Shard};
use crate::common::random;
use crate::common::runs::{self, assert_same_bytes};
use crate::common::shards::pipe;
use crate::common::streamer::binary;
use crate::criu::Machine;
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// The streamer as a supervisor starts it: nothing but a command line and inherited descriptors.
struct Supervised {
    process: Inheriting,
    progress: BufReader<File>,
}

impl Supervised {
    fn start(images_dir: &Path, shards: Vec<OwnedFd>, archive: OwnedFd, subcommand: &str) -> Self {
        let (progress, progress_end) = pipe();
        let fds: Vec<_> = shards.iter().map(|fd| fd.as_raw_fd().to_string()).collect();
        let mut command = Command::new(binary());
        command
            .arg("--images-dir")
            .arg(images_dir)
            .args(["--shard-fds", &fds.join(",")])
            .args(["--progress-fd", &progress_end.as_raw_fd().to_string()])
            .args(["--ext-file-fds", &format!("fs.tar:{}", archive.as_raw_fd())])
            .arg(subcommand)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        let mut inherited = shards;
        inherited.extend([progress_end, archive]);
        let process = Inheriting::spawn(&mut command, &inherited, Vec::new()).unwrap();
        let watched = process.pidfd().unwrap();
        std::thread::spawn(move || {
            if !wait_for_end(&watched, HANG_TIMEOUT) {
                eprintln!("the streamer hangs");
                let _ended_just_now = send_signal(&watched, Signal::SIGKILL);
            }
        });
        Self {
            process,
            progress: BufReader::new(File::from(progress)),
        }
    }

    /// The next line, whatever comes after it.
    fn line(&mut self) -> String {
        let mut line = String::new();
        self.progress.read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "not a whole line: {line:?}");
        line.trim_end().to_owned()
    }

    /// The sizes of all shards.
    fn stats(&mut self) -> Vec<u64> {
        let line = self.line();
        let stats: serde_json::Value = serde_json::from_str(&line).unwrap();
        let shards = stats["shards"].as_array().unwrap();
        shards
            .iter()
            .map(|shard| {
                assert!(shard["transfer_duration_millis"].is_u64(), "{line}");
                shard["size"].as_u64().unwrap()
            })
            .collect()
    }

    fn ends_well(mut self) {
        let mut after = self.progress;
        let status = self.process.reap().unwrap();
        assert!(status.success(), "{status}");
        let mut rest = String::new();
        after.read_line(&mut rest).unwrap();
        assert_eq!(rest, "", "nothing follows the last line");
    }
}

fn process(program: &str, arguments: &[&str], stdin: Stdio, stdout: Stdio) -> Child {
    Command::new(program)
        .args(arguments)
        .stdin(stdin)
        .stdout(stdout)
        .spawn()
        .unwrap_or_else(|why| panic!("{program}: {why}"))
}

#[track_caller]
fn ends_well(mut process: Child) {
    let status = process.wait().unwrap();
    assert!(status.success(), "{status}");
}

fn files() -> Files {
    Files::from([
        ("core-1.img".to_owned(), random::bytes(1, 700)),
        ("pages-1.img".to_owned(), random::bytes(2, runs::PAGES)),
        ("inventory.img".to_owned(), random::bytes(3, 50)),
    ])
}

/// A directory to archive, and where the compressed shards go.
fn place() -> (TempDir, PathBuf, PathBuf) {
    let dir = TempDir::new().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("target"));
    fs::create_dir_all(source.join("deep")).unwrap();
    fs::create_dir(&target).unwrap();
    fs::write(source.join("deep/data"), random::bytes(4, 3_000_000)).unwrap();
    (dir, source, target)
}

fn compressed(dir: &Path, shard: usize) -> PathBuf {
    dir.join(format!("shard-{shard}.lz4"))
}

fn capture(dir: &Path, source: &Path, shards: usize) {
    let images = dir.join("images-captured");
    let (archive, archive_end) = pipe();
    let mut ends = Vec::new();
    let compressors: Vec<_> = (0..shards)
        .map(|shard| {
            let (reader, writer) = pipe();
            ends.push(writer);
            let output = File::create(compressed(dir, shard)).unwrap();
            process("lz4", &["-q"], reader.into(), output.into())
        })
        .collect();
    let mut streamer = Supervised::start(&images, ends, archive, "capture");
    assert_eq!(streamer.line(), "socket-init");

    let criu = Criu::connect(&images, Role::Capture);
    criu.write_file("cpuinfo.img", b"cpuinfo");
    let files = files();
    criu.write_file("core-1.img", &files["core-1.img"]);
    assert_eq!(streamer.line(), "checkpoint-start");
    // Not before the application is frozen.
    let tar = process(
        "tar",
        &["-C", source.to_str().unwrap(), "-cf", "-", "."],
        Stdio::null(),
        archive_end.into(),
    );
    for (name, content) in runs::inventory_last(&files).filter(|(name, _)| *name != "core-1.img") {
        criu.write_file(name, content);
    }
    drop(criu);
    ends_well(tar);
    let sizes = streamer.stats();
    assert_eq!(sizes.len(), shards);
    streamer.ends_well();
    for compressor in compressors {
        ends_well(compressor);
    }
    let data: usize = files.values().map(Vec::len).sum();
    assert!(sizes.iter().sum::<u64>() > 3_000_000 + data as u64);
}

/// Starts what restores: decompressors, `tar`, and the streamer between them.
fn restore(
    dir: &Path,
    target: &Path,
    images: &Path,
    shards: usize,
    subcommand: &str,
) -> (Supervised, Child, Vec<Child>) {
    let (archive_end, archive) = pipe();
    let tar = process(
        "tar",
        &["-C", target.to_str().unwrap(), "-xf", "-"],
        archive_end.into(),
        Stdio::null(),
    );
    let mut ends = Vec::new();
    let decompressors = (0..shards)
        .map(|shard| {
            let (reader, writer) = pipe();
            ends.push(reader);
            let input = File::open(compressed(dir, shard)).unwrap();
            process("lz4", &["-q", "-d"], input.into(), writer.into())
        })
        .collect();
    let streamer = Supervised::start(images, ends, archive, subcommand);
    (streamer, tar, decompressors)
}

fn assert_same_tree(source: &Path, target: &Path) {
    let data = |dir: &Path| fs::read(dir.join("deep/data")).unwrap();
    assert_same_bytes("data", &data(target), &data(source));
}

#[test]
fn a_supervisor_checkpoints_and_restores_with_a_file_system() {
    let (dir, source, target) = place();
    capture(dir.path(), &source, 3);

    let images = dir.path().join("images");
    let (mut streamer, tar, decompressors) = restore(dir.path(), &target, &images, 3, "serve");
    // Statistics first: the image has arrived; then CRIU can come.
    assert_eq!(streamer.stats().len(), 3);
    assert_eq!(streamer.line(), "socket-init");
    ends_well(tar);
    assert_same_tree(&source, &target);
    let criu = Criu::connect(&images, Role::Serve);
    for (name, content) in &files() {
        criu.expect_file(name, content);
    }
    assert!(criu.read_file("fs.tar").is_none(), "it was never CRIU's");
    drop(criu);
    streamer.ends_well();
    decompressors.into_iter().for_each(ends_well);
}

#[test]
fn a_supervisor_extracts_with_a_file_system() {
    let (dir, source, target) = place();
    capture(dir.path(), &source, 2);
    let images = dir.path().join("images");
    let (mut streamer, tar, decompressors) = restore(dir.path(), &target, &images, 2, "extract");
    assert_eq!(streamer.stats().len(), 2);
    streamer.ends_well();
    ends_well(tar);
    decompressors.into_iter().for_each(ends_well);
    assert_same_tree(&source, &target);
    let mut expected = files();
    expected.insert("cpuinfo.img".into(), b"cpuinfo".to_vec());
    runs::assert_same_files(&runs::read_dir(&images), &expected);
}

/// A supervisor takes the first failure for the reason: not `tar`'s, whose archive was cut.
#[test]
fn the_reason_is_told_before_the_parties_see_the_end() {
    let damaged = Shard::new().filename(0, "fs.tar").data(1, &[1; 5000]);
    let damaged = damaged.raw(&[0xff; 100]).bytes;
    let other = Shard::new().filename(0, "inventory.img").file_eof(1);
    let other = other.image_eof(2).bytes;
    for (shard, subcommand) in [
        (&damaged, "extract"),
        (&damaged, "serve"),
        (&other, "extract"),
    ] {
        let dir = TempDir::new().unwrap();
        let image = dir.path().join("image");
        fs::write(&image, shard).unwrap();
        let (archive, archive_end) = pipe();
        let (said, stderr) = pipe();
        // It takes a while to end, as commands may.
        let bring = format!(
            "trap 'sleep 0.3; exit' TERM; cat '{}'; while :; do sleep 0.01; done",
            image.display()
        );
        let mut command = Command::new(binary());
        command
            .arg("-D")
            .arg(dir.path().join("images"))
            .args([
                "--ext-file-fds",
                &format!("fs.tar:{}", archive_end.as_raw_fd()),
            ])
            .args(["--shard-cmd", &bring, subcommand])
            .stderr(stderr);
        let mut streamer = Inheriting::spawn(&mut command, &[archive_end], Vec::new()).unwrap();
        drop(command);
        File::from(archive).read_to_end(&mut Vec::new()).unwrap();
        let told = queued(&said);
        assert!(
            told > 0,
            "{subcommand}: the archive ended before the reason was told"
        );
        assert_eq!(streamer.reap().unwrap().code(), Some(1));
        let mut reason = String::new();
        File::from(said).read_to_string(&mut reason).unwrap();
        assert!(reason.contains("Error: "), "{reason}");
    }
}

/// The terminal that it was started from may be closed.
#[test]
fn a_streamer_under_nohup_survives_a_hangup() {
    let images = TempDir::new().unwrap();
    let script = format!(
        "trap '' HUP; exec {} -D '{}' -p 1 --shard-cmd 'cat >/dev/null' capture",
        binary().display(),
        images.path().display()
    );
    let mut streamer = process("sh", &["-c", &script], Stdio::null(), Stdio::piped());
    let mut progress = BufReader::new(streamer.stdout.take().unwrap());
    let mut line = String::new();
    progress.read_line(&mut line).unwrap();
    assert_eq!(line, "socket-init\n");
    let pid = nix::unistd::Pid::from_raw(streamer.id().cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    let criu = Criu::connect(images.path(), Role::Capture);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    ends_well(streamer);
}

/// Python's subprocess.DEVNULL, for one, is open for reading and writing: like what stands in for a
/// closed descriptor.
#[test]
fn a_supervisor_may_have_no_interest_in_standard_error() {
    let images = TempDir::new().unwrap();
    let null = File::options()
        .read(true)
        .write(true)
        .open("/dev/null")
        .unwrap();
    let streamer = Command::new(binary())
        .arg("-D")
        .arg(images.path())
        .args(["--shard-cmd", "cat >/dev/null", "capture"])
        .stdin(Stdio::null())
        .stderr(null)
        .spawn()
        .unwrap();
    let socket = Role::Capture.socket(images.path());
    let deadline = std::time::Instant::now() + HANG_TIMEOUT;
    while !socket.exists() && std::time::Instant::now() < deadline {
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
    // Bound, it may not listen yet.
    let criu = loop {
        match Criu::try_connect(images.path(), Role::Capture) {
            Ok(criu) => break criu,
            Err(why) => assert!(std::time::Instant::now() < deadline, "{why}"),
        }
    };
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    ends_well(streamer);
}

fn safely(command: &str) -> String {
    format!(
        "'{}' $PID images 2 '{command}'",
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("examples/checkpoint-safely.sh")
            .display()
    )
}

#[test]
fn the_example_ends_the_application_when_everything_has_succeeded() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=2x2");
    let before = application.goes_on();
    application.run(&safely("lz4 >app-{}.lz4")).success();
    application.is_gone();
    application
        .run(
            r#"
mkfifo ready
criu-image-streamer --images-dir images --num-shards 2 --shard-cmd 'lz4 -d <app-{}.lz4' --progress-fd 3 serve 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached
# Restored as it was dumped: stopped.
kill -CONT -- -$PID
wait $streamer
"#,
        )
        .success();
    application.goes_on_from(before);
}

/// Early, so that CRIU sees a broken pipe, and so late that CRIU has succeeded.
#[test]
fn the_example_lets_the_application_go_on_when_something_failed() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=2x2");
    for command in [
        "head -c 100000 >app-{}; exit 3",
        "cat >app-{}; sleep 0.5; test {} != 2",
    ] {
        let before = application.goes_on();
        let ran = application.run(&safely(command)).failure();
        let said = ran.stderr();
        assert!(
            said.contains("goes on") && said.contains("Error: shard command"),
            "{}",
            ran.describe()
        );
        application.goes_on_from(before);
    }
}

#[test]
fn the_example_lets_the_application_go_on_when_it_is_interrupted() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=1x2");
    let before = application.goes_on();
    application
        .run(&format!(
            "{} & script=$!
            until test -e waiting; do sleep 0.05; done
            kill -TERM $script
            ! wait $script",
            safely("cat >app-{}; touch waiting; sleep 1000")
        ))
        .success();
    application.goes_on_from(before);
}
