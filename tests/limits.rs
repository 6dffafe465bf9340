//! Ordinary users, exhausted limits: slower or a clear error, never a hang, never a wrong byte.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Limit};
use crate::common::image::{self, Files};
use crate::common::random;
use crate::common::runs::{self, assert_same_bytes, assert_same_files};
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::{Launch, Streamer};
use crate::common::{PAGE, root_or_skip, wait_until};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const NOBODY: u32 = 65_534;

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
    runs::assert_served(&mut serve, files);

    let (mut extract, _feeder) = runs::feed(
        configure(Streamer::extract().images_dir(dir.path())),
        &image,
    );
    extract.expect_success();
    assert_same_files(&runs::read_dir(dir.path()), files);
}

#[test]
fn an_ordinary_user_captures_and_restores() {
    if !root_or_skip() {
        return;
    }
    round_trip(
        |launch| launch.user(NOBODY),
        &runs::sample_files(1),
        3,
        None,
    );
}

/// Fills the account that a user has for pipes, so that no further pipe can be made larger without
/// privileges.
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

/// Pipes of one, two or three slots which stay so: a marker and its data never fit together into
/// the first.
#[test]
fn tiny_pipes_that_cannot_be_enlarged_still_carry_everything() {
    if !root_or_skip() {
        return;
    }
    let _held = exhaust_pipe_pages();
    let files = image::files([
        ("empty.img", vec![]),
        ("page.img", random::bytes(1, PAGE)),
        ("pages-1.img", random::bytes(2, 50 * PAGE + 7)),
        ("inventory.img", random::bytes(3, 100)),
    ]);
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

/// A user who has no other pipe on this machine.
fn unknown_user(number: u32) -> u32 {
    20_000 + (std::process::id() * 8 + number) % 40_000
}

/// Captures, as an ordinary user, through shards of this capacity, what a CRIU of the same user
/// sends through a pipe of 1 MiB for each file, all of them open at once.
fn capture_beside_large_pipes(user: u32, shard_count: usize, pipe_size: Option<usize>) {
    let dir = open_dir();
    let (readers, writers) = child::as_user(user, || shards::pipes(shard_count, pipe_size));
    let mut capture = Streamer::capture()
        .user(user)
        .images_dir(dir.path())
        .shards(writers)
        .start();
    let collector = Collector::start(readers);
    let criu = capture.criu();
    let mut files: Files = (1..=17)
        .map(|i| (format!("pages-{i}.img"), random::bytes(i, 300_000)))
        .collect();
    let create = |name| criu.create_file_in_pipe(name, Some(1 << 20));
    let open: Vec<_> = child::as_user(user, || files.keys().map(|name| create(name)).collect());
    for (mut file, content) in open.into_iter().zip(files.values()) {
        file.write_all(content).unwrap();
    }
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    let exit = capture.expect_success();
    files.insert("inventory.img".into(), b"inventory".to_vec());
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
    // With larger pipes the shards would leave CRIU still less.
    assert!(!exit.stderr.contains("pipe-max-size"), "{}", exit.stderr);
}

#[test]
fn an_ordinary_user_with_many_shards_leaves_criu_pipes_of_its_own() {
    if !root_or_skip() {
        return;
    }
    for (number, shard_count) in [48, 64, 100].into_iter().enumerate() {
        capture_beside_large_pipes(unknown_user(number as u32), shard_count, None);
    }
    // Those that others made large are made smaller.
    capture_beside_large_pipes(unknown_user(7), 63, Some(1 << 20));
}

#[test]
fn a_limit_that_costs_speed_is_told_on_standard_error_once() {
    if !root_or_skip() {
        return;
    }
    let _held = exhaust_pipe_pages();
    let dir = open_dir();
    let (mut streamer, collector) =
        runs::collect(Streamer::capture().user(NOBODY).images_dir(dir.path()), 3);
    let pages = ("pages-1.img", vec![1; 4 << 20]);
    runs::send(
        &streamer,
        &image::files([pages, ("inventory.img", vec![2; 9])]),
    );
    let exit = streamer.expect_success();
    collector.finish();
    let told = exit.stderr.matches("pipe-user-pages-soft").count();
    assert_eq!(told, 1, "{}", exit.stderr);
    assert_eq!(exit.progress.len(), 3, "{:?}", exit.progress);
}

#[test]
fn few_descriptors_are_enough_for_files_one_after_another() {
    let files = runs::small_files(500, 5000, 1);
    round_trip(|launch| launch.limit(Limit::OpenFiles(64)), &files, 8, None);
}

/// Each socket costs the streamer more descriptors than its own.
#[test]
fn files_wait_for_descriptors_where_sockets_take_some() {
    const LIMIT: u64 = 256;
    let (ours, theirs): (Vec<_>, Vec<_>) = (0..4).map(|_| shards::unix_pair()).unzip();
    let mut capture = Streamer::capture()
        .limit(Limit::OpenFiles(LIMIT))
        .shards(theirs)
        .start();
    let files: Files = (0..400)
        .map(|i| (format!("file-{i}.img"), random::bytes(i, 50_000)))
        .chain([("inventory.img".into(), random::bytes(400, 50))])
        .collect();
    let criu = capture.criu();
    let collector = thread::scope(|scope| {
        scope.spawn(|| {
            // A streamer that gives up is no failure of this thread.
            let _gone = runs::inventory_last(&files).try_for_each(|(name, content)| {
                let mut file = criu.try_create_file(name, None)?;
                file.write_all(content)
            });
        });
        // No shard is read yet, so that the files stay open.
        let (mut open, mut since) = (0, Instant::now());
        wait_until("half of the descriptors are open", || {
            assert!(capture.is_running(), "it gave up");
            if capture.open_fds() != open {
                (open, since) = (capture.open_fds(), Instant::now());
            }
            open >= LIMIT as usize / 2 && since.elapsed() > Duration::from_millis(300)
        });
        Collector::start(ours)
    });
    drop(criu);
    capture.expect_success();
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
}

#[test]
fn too_few_descriptors_are_an_error_and_no_hang() {
    let (mut capture, collector) =
        runs::collect(Streamer::capture().limit(Limit::OpenFiles(64)), 1);
    let criu = capture.criu();
    let open: Vec<_> = (0..200)
        .map_while(|i| criu.try_create_file(&format!("file-{i}.img"), None).ok())
        .collect();
    capture.expect_failure(&["descriptors"]);
    drop((open, criu));
    assert!(image::decode(&collector.finish()).is_err());
}

/// Serves files of this size with 64 descriptors, and opens as many at once as it lets CRIU open.
fn open_at_once(count: u64, size: usize) -> (Streamer, usize) {
    let files: Files = (0..count)
        .map(|i| (format!("file-{i}.img"), random::bytes(i, size)))
        .collect();
    let image = image::encode_files(&files, 1, 100_000);
    let (serve, _feeder) = runs::feed(Streamer::serve().limit(Limit::OpenFiles(64)), &image);
    let criu = serve.criu();
    let opened = files.keys().map(|name| criu.try_open_file(name));
    let open: Vec<_> = opened.map_while(|file| file.ok().flatten()).collect();
    (serve, open.len())
}

/// A small file goes into its pipe at once, and its descriptor is free again.
#[test]
fn few_descriptors_are_enough_for_any_number_of_small_files_open_at_once() {
    let (mut serve, opened) = open_at_once(200, 100);
    assert_eq!(opened, 200);
    serve.expect_success();
}

/// A file that is larger than its pipe takes a descriptor for as long as it is read.
#[test]
fn a_restore_with_more_large_files_open_than_descriptors_is_a_clear_error() {
    let (mut serve, opened) = open_at_once(64, 1_500_000);
    assert!(opened < 64);
    serve.expect_failure(&["descriptors", "ulimit -n"]);
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

/// The calls that a container engine's seccomp profile may refuse.
const REFUSABLE: [libc::c_long; 2] = [libc::SYS_vmsplice, libc::SYS_splice];

#[test]
fn images_come_through_where_zero_copy_calls_are_refused() {
    for call in REFUSABLE {
        for (shard_count, pipe_size) in [(1, Some(PAGE)), (3, None)] {
            let files = runs::sample_files(call as u64);
            let refused = |launch: Launch| launch.limit(Limit::Refused(call));
            round_trip(refused, &files, shard_count, pipe_size);
        }
    }
}

#[test]
fn external_and_regular_files_come_through_even_where_zero_copy_calls_are_refused() {
    let content = random::bytes(1, 3 << 20);
    let dir = TempDir::new().unwrap();
    let at = |name| dir.path().join(name);
    fs::write(at("fs.tar"), &content).unwrap();
    let open = |name| OwnedFd::from(File::open(at(name)).unwrap());
    let create = |name| OwnedFd::from(File::create(at(name)).unwrap());
    for call in [None, Some(libc::SYS_vmsplice), Some(libc::SYS_splice)] {
        let limited = |launch: Launch| match call {
            Some(call) => launch.limit(Limit::Refused(call)),
            None => launch,
        };
        let launch = limited(Streamer::capture()).shards([create("shard")]);
        let mut capture = launch.ext_file("fs.tar", open("fs.tar")).start();
        let inventory = image::files([("inventory.img", *b"inventory")]);
        runs::send(&capture, &inventory);
        capture.expect_success();
        for launch in [Streamer::extract, Streamer::serve] {
            let launch = limited(launch()).shards([open("shard")]);
            let mut streamer = launch.ext_file("fs.tar", create("copy")).start();
            streamer.wait_for_stats();
            // CRIU has not come yet.
            assert_same_bytes("fs.tar", &fs::read(at("copy")).unwrap(), &content);
            streamer.signal(Signal::SIGTERM);
            streamer.wait();
        }
    }
}
