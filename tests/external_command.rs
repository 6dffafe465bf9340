//! `--ext-file-cmd`: an external file that a command writes while the application is frozen, and
//! another unpacks before CRIU comes back. Each must succeed.

use std::fs;
use std::os::fd::AsRawFd;
use std::time::Duration;

use crate::common::gate::Gate;
use crate::common::image::{self, Files};
use crate::common::random;
use crate::common::runs::{self, assert_same_bytes, assert_same_files};
use crate::common::shards::pipe;
use crate::common::streamer::{Exit, Launch, Streamer};
use crate::dumps;
use tempfile::TempDir;

const NAME: &str = "fs.tar";

fn files() -> Files {
    image::files([
        ("core-1.img", random::bytes(1, 700)),
        ("pages-1.img", random::bytes(2, 5 << 20)),
        ("inventory.img", random::bytes(3, 50)),
    ])
}

/// What the external file holds.
fn archive() -> Vec<u8> {
    random::bytes(4, (7 << 20) + 5)
}

/// A directory with the archive, a gate, and the image's shards once they are there. Commands run
/// in it.
struct Place(Gate);

impl Place {
    fn new() -> Self {
        let place = Gate::new();
        fs::write(place.path("archive"), archive()).unwrap();
        Self(place)
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path(name)
    }

    fn command(&self, command: &str) -> String {
        format!("{NAME}:{}", self.0.inside(command))
    }

    /// With this command for the external file, and the shards here.
    fn with(&self, launch: Launch, command: &str, options: &[&str]) -> Launch {
        let shard = match launch.writes_shards() {
            true => "cat >s{}",
            false => "cat s{}",
        };
        launch
            .args(["--num-shards", "2", "--shard-cmd", &self.0.inside(shard)])
            .args(["--ext-file-cmd", &self.command(command)])
            .args(options)
    }

    fn capture(&self, command: &str, options: &[&str]) -> Exit {
        let mut streamer = self.with(Streamer::capture(), command, options).start();
        runs::send(&streamer, &files());
        streamer.wait()
    }

    fn captured(options: &[&str]) -> Self {
        let place = Self::new();
        place.capture("cat archive", options).expect_success();
        place
    }

    fn shards(&self) -> Vec<Vec<u8>> {
        let names = ["s1", "s2", "sindex"].map(|name| self.path(name));
        let found = names.iter().filter(|path| path.exists());
        found.map(|path| fs::read(path).unwrap()).collect()
    }
}

const INDEX: &[&str] = &["--index"];

type WayBack = (fn() -> Launch, &'static [&'static str]);

/// Every way back, with the options of the capture that it needs.
fn ways_back() -> [WayBack; 4] {
    [
        (Streamer::extract, &[]),
        (Streamer::serve, &[]),
        (Streamer::extract_serve, &[]),
        (Streamer::serve, INDEX),
    ]
}

/// `tar` archives what the application has left, and not what it still writes.
#[test]
fn on_capture_the_command_is_started_when_the_application_is_frozen() {
    let place = Place::new();
    let command = "echo started >started; cat archive";
    let mut streamer = place.with(Streamer::capture(), command, &[]).start();
    let criu = streamer.criu();
    criu.write_file("cpuinfo.img", b"cpuinfo");
    assert!(streamer.outlasts(Duration::from_millis(300)));
    assert!(
        !place.path("started").exists(),
        "the application still runs"
    );
    criu.write_files(&files());
    drop(criu);
    streamer.expect_success();
    assert!(place.path("started").exists());
}

#[test]
fn a_command_that_fails_fails_the_capture_and_its_image() {
    for command in [
        "exit 4",
        "head -c 100000 archive; exit 4",
        "cat archive; exit 4",
        // Of its output everything is there by then.
        "cat archive; exec >&-; sleep 0.3; exit 4",
        "(exit 4) | cat archive",
        "cat archive; (exec >&-; sleep 0.3; exit 4) &",
    ] {
        let place = Place::new();
        let exit = place.capture(command, &[]);
        exit.expect_failure(&[NAME, command, "exit status 4"]);
        assert!(image::decode(&place.shards()).is_err(), "{command}");
    }
}

/// CRIU is not started for an application whose files are not there. What a command has not read is
/// lost, whatever it says.
#[test]
fn a_command_that_fails_fails_the_restore_before_criu_is_started() {
    for (launch, options) in ways_back() {
        let place = Place::captured(options);
        for (command, how) in [
            ("exit 5", "exit status 5"),
            ("cat >/dev/null; exit 5", "exit status 5"),
            ("cat >/dev/null; sleep 0.3; exit 5", "exit status 5"),
            ("head -c 10 >/dev/null", "head -c 10"),
        ] {
            let images = TempDir::new().unwrap();
            let launch = launch().images_dir(images.path());
            let exit = place.with(launch, command, options).run();
            exit.expect_failure(&[NAME, command, how]);
            assert!(exit.progress.iter().all(|line| line != "socket-init"));
            assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
        }
    }
}

#[test]
fn a_file_comes_from_a_command_and_goes_to_one_that_ends_before_criu_can_connect() {
    for (launch, options) in ways_back() {
        let place = Place::captured(options);
        let mut with_archive = files();
        with_archive.insert(NAME.into(), archive());
        assert_same_files(&image::decode(&place.shards()).unwrap(), &with_archive);

        let images = TempDir::new().unwrap();
        let launch = launch().images_dir(images.path());
        let command = "cat >unpacked; echo read >read; read -r _ <gate; echo done >done";
        let mut streamer = place.with(launch, command, options).start();
        assert!(streamer.outlasts(Duration::from_millis(500)));
        assert!(!streamer.progress_lines().contains(&"socket-init".into()));
        assert!(!images.path().join("inventory.img").exists());
        place.0.open();
        if streamer.listens() {
            assert!(place.path("done").exists());
            runs::assert_served(&mut streamer, &files());
        } else {
            streamer.expect_success();
            assert_same_files(&runs::read_dir(images.path()), &files());
        }
        assert_same_bytes(NAME, &fs::read(place.path("unpacked")).unwrap(), &archive());
    }
}

/// An archive that was cut off must not look like one that has ended.
#[test]
fn a_command_does_not_see_the_end_of_a_file_that_has_none() {
    for (launch, options) in ways_back() {
        let place = Place::captured(options);
        // Nor does it wait for that of one that is not there.
        let other = ["--ext-file-cmd", "nosuch:cat >/dev/null"];
        let both = place.with(launch(), "cat >/dev/null", options).args(other);
        both.run().expect_failure(&["no file named nosuch"]);
        for name in ["s1", "s2"] {
            let shard = fs::File::options()
                .write(true)
                .open(place.path(name))
                .unwrap();
            let length = shard.metadata().unwrap().len();
            shard.set_len(length / 3).unwrap();
        }
        let exit = place
            .with(launch(), "cat >/dev/null; touch ended", options)
            .run();
        exit.expect_failure(&["shard command"]);
        assert!(!place.path("ended").exists(), "it saw an end");
    }
}

/// `criu cpuinfo dump` freezes nothing, and the image would lack what was asked for.
#[test]
fn a_command_that_was_never_started_is_an_error() {
    let place = Place::new();
    let mut streamer = place.with(Streamer::capture(), "cat archive", &[]).start();
    streamer.wait_for_line("socket-init");
    dumps::send_cpuinfo(&streamer);
    streamer.expect_failure(&[NAME, "not started", "--ext-file-cmd"]);
    assert!(image::decode(&place.shards()).is_err());
}

#[test]
fn a_file_of_criu_cannot_have_the_same_name() {
    for name in ["cpuinfo.img", "core-1.img"] {
        let launch = Streamer::capture()
            .args(["--shard-cmd", "cat >/dev/null"])
            .args(["--ext-file-cmd", &format!("{name}:cat /dev/null")]);
        let mut streamer = launch.start();
        let criu = streamer.criu();
        let _refused = criu.try_create_file(name, None);
        streamer.expect_failure(&[name, "another name"]);
    }
}

const CMD: &str = "--ext-file-cmd";

#[test]
fn a_name_is_given_once_and_a_command_is_there() {
    let place = Place::new();
    let (_other, fd) = pipe();
    let descriptor = format!("fs.tar:{}", fd.as_raw_fd());
    for (options, words) in [
        (
            &["fs.tar:cat", CMD, "fs.tar:cat"][..],
            &["fs.tar", "twice"][..],
        ),
        (
            &["fs.tar:cat", "--ext-file-fds", &descriptor],
            &["fs.tar", "twice"],
        ),
        (&["fs.tar: "], &["fs.tar", "empty"]),
        (&["a/b:cat"], &["a/b"]),
        (&["fs.tar"], &["name:command"]),
    ] {
        let capture = Streamer::capture().images_dir(place.path("images"));
        let capture = capture.args(["--shard-cmd", "cat >/dev/null", CMD]);
        let capture = capture.inherit(fd.try_clone().unwrap());
        let exit = capture.args(options.iter().copied()).run();
        exit.expect_failure(words);
    }
    assert!(!place.path("images").exists(), "nothing has happened");
}
