//! What supervisors and scripts lean on: the reason of a failure comes first, the streamer survives
//! the terminal that it was started from, and examples/checkpoint-safely.sh, which does it for
//! those who have no supervisor.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio};

use crate::common::child::{Child, queued};
use crate::common::criu::{Criu, Role};
use crate::common::image::Shard;
use crate::common::shards::pipe;
use crate::common::streamer::binary;
use crate::criu::machine;
use nix::sys::signal::Signal;
use tempfile::TempDir;

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
        let mut streamer = Child::spawn(&mut command, &[archive_end], Vec::new()).unwrap();
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

/// The terminal that it was started from may be closed. Standard error may be open for reading and
/// writing, as Python's subprocess.DEVNULL is, and what stands in for a closed descriptor.
#[test]
fn a_streamer_without_a_terminal_survives_a_hangup() {
    let images = TempDir::new().unwrap();
    let script = format!(
        "trap '' HUP; exec {} -D '{}' -p 1 --shard-cmd 'cat >/dev/null' capture 2<>/dev/null",
        binary().display(),
        images.path().display()
    );
    let mut sh = Command::new("sh");
    let sh = sh.args(["-c", &script]).stdin(Stdio::null());
    let mut streamer = sh.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = [0; "socket-init".len()];
    let mut progress = streamer.stdout.take().unwrap();
    progress.read_exact(&mut line).unwrap();
    let pid = nix::unistd::Pid::from_raw(streamer.id().cast_signed());
    nix::sys::signal::kill(pid, Signal::SIGHUP).unwrap();
    let criu = Criu::connect(images.path(), Role::Capture);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    let status = streamer.wait().unwrap();
    assert!(status.success(), "{status}");
}

fn safely(command: &str) -> String {
    let checkout = env!("CARGO_MANIFEST_DIR");
    format!("'{checkout}/examples/checkpoint-safely.sh' $PID images 2 '{command}'")
}

#[test]
fn the_example_ends_the_application_only_when_everything_has_succeeded() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=40 tree=2x2");
    let before = application.goes_on();
    // Early, so that CRIU sees a broken pipe, and so late that CRIU has succeeded.
    for command in [
        "head -c 100000 >app-{}; exit 3",
        "cat >app-{}; sleep 0.5; test {} != 2",
    ] {
        let said = application.run(&safely(command)).failure().stderr();
        let told = said.contains("goes on") && said.contains("Error: shard command");
        assert!(told, "{said}");
        application.goes_on_from(before);
    }
    let interrupted = format!(
        "{} & script=$!
        until test -e waiting; do sleep 0.05; done
        kill -TERM $script
        ! wait $script",
        safely("cat >app-{}; touch waiting; sleep 1000")
    );
    application.run(&interrupted).success();
    application.goes_on_from(before);

    application.run(&safely("lz4 >app-{}.lz4")).success();
    application.is_gone();
    // Restored as it was dumped: stopped.
    let restore =
        "criu-image-streamer -D images --num-shards 2 --shard-cmd 'lz4 -d <app-{}.lz4' serve -- \\
            criu restore --stream -D images -d
        kill -CONT -- -$PID";
    application.run(restore).success();
    application.goes_on_from(before);
}
