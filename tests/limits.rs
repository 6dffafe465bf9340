//! Ordinary users, exhausted limits: slower or a clear error, never a hang, never a wrong byte.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use common::PAGE;
use common::child::Limit;
use common::image::{self, Files};
use common::random;
use common::runs::{self, assert_same_bytes, assert_same_files};
use common::shards::{self, Collector, pipe};
use common::streamer::{Launch, Streamer};
use nix::fcntl::{FcntlArg, fcntl};
use tempfile::TempDir;

const NOBODY: u32 = 65_534;

/// True: the test cannot be done here, and that is no reason to fail.
fn not_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return false;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "this test needs root, to start the streamer as another user"
    );
    eprintln!("skipped: starting the streamer as another user needs root");
    true
}

fn open_dir() -> TempDir {
    let dir = TempDir::with_prefix("images-").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    dir
}

/// Captures with `capture`, and gives the image back through `serve` and through `extract`.
fn round_trip(
    configure: impl Fn(Launch) -> Launch,
    files: &Files,
    shard_count: usize,
    pipe_size: Option<usize>,
) {
    let dir = open_dir();
    let (readers, writers) = shards::pipes(shard_count, pipe_size);
    let mut capture = configure(Streamer::capture().images_dir(dir.path()).shards(writers)).start();
    let collector = Collector::start(readers);
    let criu = capture.criu();
    for (name, content) in runs::inventory_last(files) {
        let mut file = criu.create_file_in_pipe(name, pipe_size);
        content
            .chunks(1500)
            .for_each(|piece| file.write_all(piece).unwrap());
    }
    drop(criu);
    capture.expect_success();
    let image = collector.finish();
    assert_same_files(&image::decode(&image).unwrap(), files);

    let (mut serve, _feeder) =
        runs::feed(configure(Streamer::serve().images_dir(dir.path())), &image);
    let criu = serve.criu();
    for (name, content) in files {
        assert_same_bytes(name, &criu.read_file(name).expect(name), content);
    }
    drop(criu);
    serve.expect_success();

    let (mut extract, _feeder) = runs::feed(
        configure(Streamer::extract().images_dir(dir.path())),
        &image,
    );
    extract.expect_success();
    assert_same_files(&runs::read_dir(dir.path()), files);
}

#[test]
fn an_ordinary_user_captures_and_restores() {
    if not_root() {
        return;
    }
    round_trip(
        |launch| launch.user(NOBODY),
        &runs::sample_files(1),
        3,
        None,
    );
}

#[test]
fn extracted_files_belong_to_the_user_who_extracts() {
    if not_root() {
        return;
    }
    let dir = open_dir();
    let image = image::encode([("inventory.img", &b"inventory"[..])], 1, 100);
    let (mut streamer, _feeder) = runs::feed(
        Streamer::extract().user(NOBODY).images_dir(dir.path()),
        &image,
    );
    streamer.expect_success();
    let metadata = fs::metadata(dir.path().join("inventory.img")).unwrap();
    assert_eq!((metadata.uid(), metadata.mode() & 0o7777), (NOBODY, 0o600));
}

/// Fills the account that a user has for pipes, so that no further pipe can be made larger without privileges.
fn exhaust_pipe_pages() -> Vec<OwnedFd> {
    let soft = fs::read_to_string("/proc/sys/fs/pipe-user-pages-soft").unwrap();
    let soft: usize = soft.trim().parse().unwrap();
    assert!(
        (1..1 << 20).contains(&soft),
        "pipe-user-pages-soft is {soft}: there is no limit to reach"
    );
    let mut pages = 0;
    let mut pipes = Vec::new();
    while pages < soft {
        let (read_end, write_end) = pipe();
        match fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(1 << 20)) {
            Ok(size) => pages += size as usize / PAGE,
            Err(nix::Error::EPERM) => return pipes,
            Err(error) => panic!("enlarge a pipe: {error}"),
        }
        pipes.extend([read_end, write_end]);
    }
    pipes
}

/// Pipes of one, two or three slots which stay so: a marker and its data never fit together into the first.
#[test]
fn tiny_pipes_that_cannot_be_enlarged_still_carry_everything() {
    if not_root() {
        return;
    }
    let _held = exhaust_pipe_pages();
    let files: Files = [
        ("empty.img".into(), vec![]),
        ("page.img".into(), random::bytes(1, PAGE)),
        ("pages-1.img".into(), random::bytes(2, 50 * PAGE + 7)),
        ("inventory.img".into(), random::bytes(3, 100)),
    ]
    .into();
    for pipe_size in [PAGE, 2 * PAGE, 4 * PAGE] {
        for shard_count in [1, 3] {
            round_trip(
                |launch| launch.user(NOBODY),
                &files,
                shard_count,
                Some(pipe_size),
            );
        }
    }
}

#[test]
fn a_limit_that_costs_speed_is_told_on_standard_error_once() {
    if not_root() {
        return;
    }
    let _held = exhaust_pipe_pages();
    let dir = open_dir();
    let (readers, writers) = shards::pipes(3, None);
    let mut streamer = Streamer::capture()
        .user(NOBODY)
        .images_dir(dir.path())
        .shards(writers)
        .start();
    let collector = Collector::start(readers);
    let criu = streamer.criu();
    criu.write_file("pages-1.img", &vec![1; 4 << 20]);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    let exit = streamer.expect_success();
    collector.finish();
    let about_pipes: Vec<_> = exit
        .stderr
        .lines()
        .filter(|line| line.contains("pipe-user-pages-soft"))
        .collect();
    assert_eq!(about_pipes.len(), 1, "{}", exit.stderr);
    assert_eq!(exit.progress.len(), 3, "{:?}", exit.progress);
}

#[test]
fn few_descriptors_are_enough_for_files_one_after_another() {
    let files = runs::small_files(500, 5000, 1);
    round_trip(|launch| launch.limit(Limit::OpenFiles(64)), &files, 8, None);
}

#[test]
fn too_few_descriptors_are_an_error_and_no_hang() {
    let (readers, writers) = shards::pipes(1, None);
    let mut capture = Streamer::capture()
        .limit(Limit::OpenFiles(64))
        .shards(writers)
        .start();
    let collector = Collector::start(readers);
    let criu = capture.criu();
    let open: Vec<_> = (0..200)
        .map_while(|i| criu.try_create_file(&format!("file-{i}.img"), None).ok())
        .collect();
    capture.expect_failure(&["descriptors"]);
    drop((open, criu));
    assert!(image::decode(&collector.finish()).is_err());
}

/// CRIU waits for each answer, so a streamer that has no descriptor left may let it wait until one is free, or fail.
#[test]
fn a_restore_with_few_descriptors_ends_one_way_or_the_other() {
    let files: Files = (0..200)
        .map(|i| (format!("file-{i}.img"), random::bytes(i, 100)))
        .collect();
    let image = image::encode_files(&files, 1, 1000);
    let (mut serve, _feeder) = runs::feed(Streamer::serve().limit(Limit::OpenFiles(64)), &image);
    let criu = serve.criu();
    let open: Vec<_> = files
        .keys()
        .map_while(|name| criu.try_open_file(name, None).ok().flatten())
        .collect();
    drop((open, criu));
    if !serve.wait().status.success() {
        serve.expect_failure(&["descriptors"]);
    }
}

#[test]
fn an_image_larger_than_the_memory_is_a_clear_error() {
    let content = vec![1; 64 << 20];
    let image = image::encode(
        [
            ("pages-1.img", &content[..]),
            ("inventory.img", b"inventory"),
        ],
        2,
        1 << 20,
    );
    let (mut streamer, _feeder) = runs::feed(
        Streamer::serve().limit(Limit::AddressSpace(40 << 20)),
        &image,
    );
    let exit = streamer.expect_failure(&["memory"]);
    assert_eq!(exit.progress, [""; 0]);
}

/// A full disk, without filling one.
#[test]
fn a_disk_that_takes_no_more_leaves_nothing_behind() {
    let content = vec![1; 4 << 20];
    let image = image::encode(
        [("small.img", &content[..10]), ("pages-1.img", &content[..])],
        2,
        1 << 20,
    );
    let (mut streamer, _feeder) =
        runs::feed(Streamer::extract().limit(Limit::FileSize(1 << 20)), &image);
    streamer.expect_failure(&["pages-1.img"]);
    assert_eq!(runs::read_dir(streamer.images_dir()), Files::new());
}
