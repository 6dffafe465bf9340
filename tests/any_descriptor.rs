//! Whatever a shard or an external file is redirected to works: files, sockets, FIFOs, devices; not
//! only pipes. A success means that all of it was written, a failure names the descriptor and the
//! reason, and pipes cost nothing for it.

use std::fs::{self, File};
use std::io::{IoSlice, Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::common::child::{Child, Limit, queued};
use crate::common::criu::{Criu, Role};
use crate::common::image::{self, Files};
use crate::common::runs::{self, assert_same_files, read_dir, sample_files};
use crate::common::shards::{Collector, Feeder, pipe, pipes, tcp_pair, unix_pair};
use crate::common::streamer::{Exit, Streamer, binary};
use crate::common::{PAGE, root_or_skip, skip, wait_until};
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, vmsplice};
use nix::sys::socket::{setsockopt, sockopt};
use tempfile::TempDir;

fn capture_to(ends: Vec<OwnedFd>, files: &Files) -> Exit {
    let mut streamer = Streamer::capture().shards(ends).start();
    runs::send(&streamer, files);
    streamer.wait()
}

fn extract_from(ends: Vec<OwnedFd>) -> (TempDir, Exit) {
    let dir = TempDir::with_prefix("images-").unwrap();
    let exit = Streamer::extract()
        .images_dir(dir.path())
        .shards(ends)
        .run();
    (dir, exit)
}

fn paths(dir: &Path, count: usize) -> Vec<PathBuf> {
    (0..count).map(|i| dir.join(format!("shard-{i}"))).collect()
}

fn open(paths: &[PathBuf]) -> Vec<OwnedFd> {
    paths
        .iter()
        .map(|path| File::open(path).unwrap().into())
        .collect()
}

#[test]
fn an_image_goes_to_regular_files_and_comes_back_from_them() {
    let dir = TempDir::new().unwrap();
    let files = sample_files(1);
    for count in [1, 4] {
        let paths = paths(dir.path(), count);
        let ends = paths.iter().map(|path| File::create(path).unwrap().into());
        capture_to(ends.collect(), &files).expect_success();

        let written: Vec<_> = paths.iter().map(|path| fs::read(path).unwrap()).collect();
        assert_same_files(&image::decode(&written).unwrap(), &files);

        let (extracted, exit) = extract_from(open(&paths));
        exit.expect_success();
        assert_same_files(&read_dir(extracted.path()), &files);
        runs::assert_served(&mut Streamer::serve().shards(open(&paths)).start(), &files);
    }
}

/// What the file holds stays, and the image comes behind it. A file is read from where its
/// descriptor stands.
#[test]
fn a_file_opened_for_appending_is_appended_to_and_read_from_there() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("shard");
    fs::write(&path, "before").unwrap();
    let files = sample_files(3);
    let end = File::options().append(true).open(&path).unwrap();
    capture_to(vec![end.into()], &files).expect_success();
    let mut written = File::open(&path).unwrap();
    let mut before = [0; 6];
    written.read_exact(&mut before).unwrap();
    assert_eq!(&before, b"before");
    let (dir, exit) = extract_from(vec![written.into()]);
    exit.expect_success();
    assert_same_files(&read_dir(dir.path()), &files);
}

#[test]
fn nothing_is_left_of_what_a_file_held_behind_the_image() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("shard");
    fs::write(&path, vec![7; 20 << 20]).unwrap();
    let files = sample_files(3);
    let end = File::options().write(true).open(&path).unwrap();
    capture_to(vec![end.into()], &files).expect_success();
    assert_same_files(&image::decode(&[fs::read(&path).unwrap()]).unwrap(), &files);
}

/// The kernel's page cache is the file's, and not the image's.
#[test]
fn a_file_that_is_written_over_while_criu_waits_changes_nothing() {
    let files = sample_files(5);
    let shard = &image::encode_files(&files, 1, 1 << 20)[0];
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(shard).unwrap();
    file.rewind().unwrap();
    let reader = file.try_clone().unwrap();
    let mut streamer = Streamer::serve().shards([reader.into()]).start();
    streamer.wait_for_line("socket-init");
    file.rewind().unwrap();
    file.write_all(&vec![7; shard.len()]).unwrap();
    runs::assert_served(&mut streamer, &files);
}

/// A loop device, for as long as it lives.
struct BlockDevice(String);

impl BlockDevice {
    fn new(file: &Path) -> Option<Self> {
        let file = file.to_str().unwrap();
        let mut losetup = Command::new("losetup");
        let made = losetup.args(["--find", "--show", file]).output().ok();
        let made = made.filter(|made| made.status.success())?;
        Some(Self(String::from_utf8(made.stdout).unwrap().trim().into()))
    }
}

impl Drop for BlockDevice {
    fn drop(&mut self) {
        let detached = Command::new("losetup").args(["--detach", &self.0]).status();
        assert!(detached.unwrap().success());
    }
}

/// A device has no end where the image has one: behind it is what an earlier image has left, each
/// of whose markers may well stand where the next one of this image would.
#[test]
fn an_image_comes_back_from_block_devices_that_are_longer_than_it_is() {
    let dir = TempDir::new().unwrap();
    let devices: Vec<_> = paths(dir.path(), 2)
        .iter()
        .map_while(|path| {
            File::create(path).unwrap().set_len(64 << 20).unwrap();
            BlockDevice::new(path)
        })
        .collect();
    if devices.len() < 2 {
        return skip("needs root and loop devices");
    }
    let paths: Vec<_> = devices
        .iter()
        .map(|device| device.0.clone().into())
        .collect();
    for seed in [1, 2] {
        let mut files = sample_files(seed);
        if seed == 1 {
            files.insert("pages-9.img".into(), vec![7; 5 << 20]);
        }
        let writers = paths.iter().map(|path| {
            let opened = File::options().write(true).open(path);
            opened.unwrap().into()
        });
        capture_to(writers.collect(), &files).expect_success();
        let (extracted, exit) = extract_from(open(&paths));
        exit.expect_success();
        assert_same_files(&read_dir(extracted.path()), &files);
        runs::assert_served(&mut Streamer::serve().shards(open(&paths)).start(), &files);
    }
}

/// As some supervisors hand them over.
fn nonblocking_pair() -> (OwnedFd, OwnedFd) {
    let (ours, theirs) = unix_pair();
    fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    (ours, theirs)
}

#[test]
fn an_image_goes_through_sockets_in_both_directions() {
    for pair in [unix_pair as fn() -> _, tcp_pair, nonblocking_pair] {
        let files = sample_files(5);
        let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| pair()).unzip();
        let collector = Collector::start(theirs);
        capture_to(ours, &files).expect_success();
        let shards = collector.finish();
        assert_same_files(&image::decode(&shards).unwrap(), &files);

        let (ours, theirs): (Vec<_>, Vec<_>) = (0..3).map(|_| pair()).unzip();
        let feeder = Feeder::start(theirs, &shards);
        let (dir, exit) = extract_from(ours);
        exit.expect_success();
        feeder.finish();
        assert_same_files(&read_dir(dir.path()), &files);
    }
}

/// The feeder of a socket may keep it open: the image itself says where it ends.
#[test]
fn a_socket_that_stays_open_does_not_hold_up_the_end() {
    let files = sample_files(6);
    let shards = image::encode_files(&files, 1, 4096);
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut kept = theirs.try_clone().unwrap();
    let feeder = Feeder::start(vec![theirs.into()], &shards);
    let (dir, exit) = extract_from(vec![ours.into()]);
    exit.expect_success();
    feeder.finish();
    assert_same_files(&read_dir(dir.path()), &files);
    assert_eq!(kept.read(&mut [0]).unwrap(), 0, "the streamer is gone");
}

/// The last bytes are in the pipe between when CRIU is done: they have to be waited for.
#[test]
fn a_limit_reached_by_the_last_bytes_fails_the_capture_too() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("shard");
    let files = image::files([("inventory.img", vec![7; 50_000])]);
    capture_to(vec![File::create(&path).unwrap().into()], &files).expect_success();
    let size = fs::metadata(&path).unwrap().len();
    for (short, options) in [
        (1, File::options().write(true)),
        (1, File::options().append(true)),
        (size, File::options().write(true)),
    ] {
        fs::write(&path, "").unwrap();
        let end: OwnedFd = options.open(&path).unwrap().into();
        let fd = end.as_raw_fd();
        let mut streamer = Streamer::capture()
            .shards([end])
            .limit(Limit::FileSize(size - short))
            .start();
        runs::send(&streamer, &files);
        streamer.expect_failure(&[&format!("shard fd {fd}"), "File too large"]);
    }
}

#[test]
fn an_input_that_cannot_be_read_is_not_taken_for_its_end() {
    let open = |path| OwnedFd::from(File::open(path).unwrap());
    for (path, reason) in [
        ("/proc/self/mem", "Input/output error"),
        ("/dev/null", "missing"),
    ] {
        let (dir, exit) = extract_from(vec![open(path)]);
        exit.expect_failure(&["shard fd ", reason]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
    let launch = Streamer::capture().ext_file("fs.tar", open("/proc/self/mem"));
    let (mut streamer, collector) = runs::collect(launch, 1);
    runs::send(&streamer, &sample_files(10));
    streamer.expect_failure(&["fs.tar", "Input/output error"]);
    assert!(image::decode(&collector.finish()).is_err());
}

#[test]
fn an_external_file_that_does_not_fit_fails_the_restore() {
    let files = image::files([("fs.tar", vec![1; 10_000]), ("inventory.img", vec![2; 50])]);
    let shards = image::encode_files(&files, 1, 4096);
    for launch in [Streamer::extract, Streamer::serve] {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let (mut streamer, feeder) = runs::feed(launch().ext_file("fs.tar", full.into()), &shards);
        streamer.expect_refusal(&["fs.tar", "No space left on device"]);
        feeder.finish();
    }
}

#[test]
fn what_cannot_carry_an_image_in_that_direction_is_refused() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("file");
    let write_only = || OwnedFd::from(File::create(&path).unwrap());
    let read_only = || OwnedFd::from(File::open(&path).unwrap());
    let datagrams = || OwnedFd::from(UnixDatagram::pair().unwrap().0);
    let directory = || OwnedFd::from(File::open(dir.path()).unwrap());
    let terminal = || {
        let mut options = File::options();
        OwnedFd::from(options.read(true).write(true).open("/dev/ptmx").unwrap())
    };
    write_only();
    let refused = [
        (Streamer::capture(), read_only(), "writing"),
        (Streamer::extract(), write_only(), "reading"),
        (Streamer::serve(), write_only(), "reading"),
        (Streamer::capture(), datagrams(), "stream"),
        (Streamer::serve(), datagrams(), "stream"),
        (Streamer::capture(), directory(), "directory"),
        (Streamer::extract(), directory(), "directory"),
        (
            Streamer::capture(),
            terminal(),
            "is a terminal, which cannot carry an image: redirect it",
        ),
        (Streamer::serve(), terminal(), "or give --shard-fds or"),
    ];
    for (launch, end, reason) in refused {
        let fd = end.as_raw_fd();
        let named = format!("--shard-fds {fd}");
        launch.shards([end]).run().expect_refusal(&[&named, reason]);
    }
}

/// A connection whose queue takes far more than its peer's kernel does.
fn tcp_with_a_long_queue() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    // What it accepts inherits the size.
    setsockopt(&listener, sockopt::RcvBuf, &4096).unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    setsockopt(&client, sockopt::SndBuf, &(4 << 20)).unwrap();
    (client.into(), listener.accept().unwrap().0.into())
}

/// The streamer has written everything, and its peer has said something and read nothing yet. It
/// need not close its socket.
fn start_capture_that_is_queued(
    pair: fn() -> (OwnedFd, OwnedFd),
    files: &Files,
) -> (Streamer, OwnedFd) {
    let (ours, theirs) = pair();
    let mut greeting = File::from(theirs);
    greeting.write_all(b"220 ready").unwrap();
    let streamer = Streamer::capture().shards([ours]).start();
    runs::send(&streamer, files);
    assert_waits(&streamer);
    (streamer, greeting.into())
}

/// A streamer that has nothing to wait for is gone long before.
#[track_caller]
fn assert_waits(streamer: &Streamer) {
    let waits = streamer.outlasts(Duration::from_millis(500));
    assert!(waits, "it ended before its peer had everything");
}

fn small_enough_for_a_queue() -> Files {
    let pages = crate::common::random::bytes(14, 100_000);
    image::files([("pages-1.img", pages), ("inventory.img", vec![2; 50])])
}

#[test]
fn a_success_means_that_a_sockets_peer_has_everything() {
    let files = small_enough_for_a_queue();
    for pair in [unix_pair as fn() -> _, tcp_with_a_long_queue] {
        let (mut streamer, theirs) = start_capture_that_is_queued(pair, &files);
        let _kept = theirs.try_clone().unwrap();
        let shards = Collector::start(vec![theirs]).finish();
        streamer.expect_success();
        assert_same_files(&image::decode(&shards).unwrap(), &files);
    }
}

#[test]
fn a_peer_that_refuses_the_rest_fails_the_capture() {
    for pair in [unix_pair as fn() -> _, tcp_with_a_long_queue] {
        let (mut streamer, theirs) =
            start_capture_that_is_queued(pair, &small_enough_for_a_queue());
        drop(theirs);
        let exit = streamer.expect_failure(&["shard fd", "Connection reset by peer"]);
        assert!(exit.progress.iter().all(|line| !line.starts_with('{')));
    }
}

#[test]
fn an_external_file_that_a_sockets_peer_does_not_take_fails_the_restore() {
    let files = image::files([("fs.tar", vec![1; 50_000]), ("inventory.img", vec![2; 50])]);
    let shards = image::encode_files(&files, 1, 4096);
    for takes in [true, false] {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"220 ready").unwrap();
        let launch = Streamer::extract().ext_file("fs.tar", ours.into());
        let (mut streamer, _feeder) = runs::feed(launch, &shards);
        assert_waits(&streamer);
        if takes {
            let mut got = Vec::new();
            theirs.read_to_end(&mut got).unwrap();
            runs::assert_same_bytes("fs.tar", &got, &files["fs.tar"]);
            drop(theirs);
            streamer.expect_success();
        } else {
            drop(theirs);
            streamer.expect_refusal(&["fs.tar", "Connection reset by peer"]);
        }
    }
}

/// The application may go on when the capture has ended, and writes to its pages then.
#[test]
fn a_sockets_queue_holds_copies_of_the_pages() {
    let (ours, theirs) = unix_pair();
    let mut streamer = Streamer::capture().shards([ours]).start();
    let criu = streamer.criu();
    let mut pages = vec![1; 15 * PAGE];
    let pipe = criu.create_file("pages-1.img");
    let flags = SpliceFFlags::empty();
    let sent = vmsplice(&pipe, &[IoSlice::new(&pages)], flags).unwrap();
    assert_eq!(sent, pages.len());
    drop(pipe);
    wait_until("the pages", || queued(&theirs) >= pages.len());
    pages.fill(2);
    criu.write_file("inventory.img", b"inventory");
    drop(criu);
    let shards = Collector::start(vec![theirs]).finish();
    streamer.expect_success();
    let captured = &image::decode(&shards).unwrap()["pages-1.img"];
    runs::assert_same_bytes("pages-1.img", captured, &[1; 15 * PAGE]);
}

/// What is in the page cache is lost with the machine, and a disk tells of its errors when it is
/// written to. Here the disk is a file on a file system that is full.
#[test]
fn a_success_means_that_a_file_or_a_block_device_is_on_disk() {
    if !crate::common::root_or_skip() {
        return;
    }
    let device = "exec 3>$disk";
    let file = "mkdir dir; mount $disk dir; exec 3>dir/shard";
    for target in [device, file] {
        for (subcommand, size) in [
            ("-s 3 capture", 4 << 20),
            ("-e fs.tar:3 extract <../image", 4 << 20),
            ("-s 3 capture", 1000),
            ("-e fs.tar:3 extract <../image", 1000),
        ] {
            let files = image::files([("fs.tar", vec![1; size]), ("inventory.img", vec![2; 50])]);
            let Some((succeeded, said)) = run_on_a_full_disk(target, subcommand, &files) else {
                return crate::common::skip("needs a loop device");
            };
            assert_eq!(succeeded, size == 1000, "{target} {subcommand}: {said}");
            let named = said.contains("Error: flushing to disk");
            assert_eq!(named, size > 1000, "{target} {subcommand}: {said}");
        }
    }
}

/// Whether the streamer succeeded with `target` as descriptor 3, and what it said.
fn run_on_a_full_disk(target: &str, subcommand: &str, files: &Files) -> Option<(bool, String)> {
    let dir = TempDir::new().unwrap();
    let (images, said) = (dir.path().join("images"), dir.path().join("said"));
    fs::write(
        dir.path().join("image"),
        &image::encode_files(files, 1, 1 << 20)[0],
    )
    .unwrap();
    let (progress, progress_end) = pipe();
    let script = format!(
        "mkdir disk; mount -t tmpfs -o size=1m none disk; cd disk; truncate -s 16M image
        mkfs.ext4 -q -O ^has_journal -N 16 -F image
        disk=$(losetup -f --show image) || exit 77
        trap 'losetup -d $disk' EXIT
        {target}
        '{}' -D '{}' -p {} {subcommand}",
        binary().display(),
        images.display(),
        progress_end.as_raw_fd(),
    );
    let mut command = Command::new("unshare");
    command
        .args(["-m", "bash", "-euc", &script])
        .current_dir(dir.path())
        .stderr(File::create(&said).unwrap());
    let mut child = Child::spawn(&mut command, &[progress_end], Vec::new()).unwrap();
    let mut line = [0; "socket-init".len()];
    let listens = File::from(progress).read_exact(&mut line).is_ok() && line == *b"socket-init";
    if listens {
        let criu = Criu::connect(&images, Role::Capture);
        criu.write_files(files);
    }
    let status = child.reap().unwrap();
    let said = fs::read_to_string(said).unwrap();
    (status.code() != Some(77)).then_some((status.success(), said))
}

/// Where it cannot be opened anew, the program shares it with the shell that goes on behind it.
#[test]
fn another_users_pipe_blocks_again_at_the_end() {
    const USER: u32 = 4321;
    if !root_or_skip() {
        return;
    }
    let (readers, writers) = pipes(1, None);
    let shared = writers[0].try_clone().unwrap();
    let dir = TempDir::new().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let capture = Streamer::capture().images_dir(dir.path());
    let capture = capture.shards(writers).user(USER);
    let (mut streamer, collector) = (capture.start(), Collector::start(readers));
    runs::send(&streamer, &sample_files(1));
    streamer.expect_success();
    let flags = OFlag::from_bits_retain(fcntl(&shared, FcntlArg::F_GETFL).unwrap());
    assert!(!flags.contains(OFlag::O_NONBLOCK));
    drop(shared);
    collector.finish();
}
