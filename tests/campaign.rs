//! A campaign of faults: each party of a capture, an extract and a serve is killed or leaves at a
//! random moment, hundreds of times, and each time the exit status must tell the truth and no wreck
//! may look like an image.
//!
//! The shards are pipes, sockets, files or shell commands, each in a campaign of its own.
//!
//! `CAMPAIGN_ROUNDS` sets how many rounds of each kind; a failing round prints its seed, and
//! `CAMPAIGN_FIRST_SEED=<seed> CAMPAIGN_ROUNDS=1` runs it alone. Moments are counted in bytes and
//! files, not in time, but for a restore from files or commands, which feed themselves; only what
//! the kernel does between two processes is left to chance.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::common::child::Limit;
use crate::common::criu::{Criu, Role};
use crate::common::image::{self, Files};
use crate::common::keeping::Keeping;
use crate::common::random::{Random, for_each_seed};
use crate::common::runs;
use crate::common::shards::pipe;
use crate::common::streamer::{Exit, Launch, Streamer};
use crate::common::{PAGE, setting};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// What is counted, and printed at the end.
#[derive(Default)]
struct Tally {
    rounds: usize,
    accepted: usize,
    faults: BTreeMap<&'static str, usize>,
}

impl Tally {
    fn count(&mut self, fault: &'static str, accepted: bool) {
        self.rounds += 1;
        self.accepted += usize::from(accepted);
        *self.faults.entry(fault).or_default() += 1;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} rounds, {} images accepted, 0 of them wrongly; faults:",
            self.rounds, self.accepted
        )?;
        self.faults
            .iter()
            .try_for_each(|(fault, count)| write!(f, " {fault} {count}"))
    }
}

/// Runs all rounds of one kind, and says what was done.
fn campaign(kind: &str, round: impl Fn(&mut Random, &mut Tally)) {
    let mut tally = Tally::default();
    let first = setting("CAMPAIGN_FIRST_SEED", 0);
    let seeds = first..first + setting("CAMPAIGN_ROUNDS", 150);
    for_each_seed(seeds, |seed| round(&mut Random::new(seed), &mut tally));
    crate::common::report(format_args!("{kind}: {tally}"));
}

const INVENTORY_SIZE: usize = 60;

fn random_files(random: &mut Random) -> Files {
    let mut files = Files::new();
    for i in 0..1 + random.below(6) {
        let bound = *random.pick(&[1, 100, 3 * PAGE, 100 * PAGE]);
        let size = random.below(bound);
        files.insert(format!("file-{i}.img"), random.bytes(size));
    }
    files.insert("inventory.img".into(), random.bytes(INVENTORY_SIZE));
    files
}

/// Nothing is left in the images directory but what was there before: no socket, no temporary, no
/// half of an image.
#[track_caller]
fn assert_nothing_new(dir: &Path, before: &Files) {
    for entry in fs::read_dir(dir).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(
            before.contains_key(name.to_str().unwrap()),
            "{name:?} stays behind"
        );
    }
    assert!(
        runs::read_dir(dir) == *before,
        "what was there before has changed"
    );
}

#[track_caller]
fn assert_ended_by_itself(exit: &Exit) {
    assert!(!exit.stderr.contains("panicked"), "{}", exit.stderr);
    match exit.status.code() {
        Some(0) => assert!(
            !exit.stderr.contains(" Error: "),
            "an error, and success: {}",
            exit.stderr
        ),
        Some(1) => drop(exit.error()),
        Some(143) => {}
        // So early that there was nothing to clean up yet.
        None if exit.status.signal() == Some(Signal::SIGTERM as i32) => {}
        _ => panic!("{}\n{}", exit.status, exit.stderr),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CaptureFault {
    None,
    CriuDies,
    NoInventory,
    ShardReaderLeaves,
    ProgressReaderLeaves,
    Terminated,
    Killed,
}

impl CaptureFault {
    const ALL: [Self; 7] = [
        Self::None,
        Self::CriuDies,
        Self::NoInventory,
        Self::ShardReaderLeaves,
        Self::ProgressReaderLeaves,
        Self::Terminated,
        Self::Killed,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::CriuDies => "CRIU-dies",
            Self::NoInventory => "no-inventory",
            Self::ShardReaderLeaves => "shard-reader-leaves",
            Self::ProgressReaderLeaves => "progress-reader-leaves",
            Self::Terminated => "SIGTERM",
            Self::Killed => "SIGKILL",
        }
    }
}

/// CRIU writes everything, and does something when `moment` bytes are written. If that says so, or
/// when the streamer is gone, it ends then and there.
fn dump(criu: &Criu, files: &Files, moment: usize, at_moment: impl FnOnce() -> Then) {
    let mut at_moment = Some(at_moment);
    let mut written = 0;
    let mut dies = |written| {
        let act = if written >= moment {
            at_moment.take()
        } else {
            None
        };
        act.is_some_and(|act| act() == Then::Dies)
    };
    for (name, content) in runs::inventory_last(files) {
        if dies(written) {
            return;
        }
        let Ok(mut file) = criu.try_create_file(name, None) else {
            return;
        };
        for piece in content.chunks(5000) {
            if dies(written) || file.write_all(piece).is_err() {
                return;
            }
            written += piece.len();
        }
    }
}

#[derive(PartialEq, Eq)]
enum Then {
    GoesOn,
    Dies,
}

/// Reads a shard to its end, or leaves after some bytes. A socket whose writer was killed may end
/// with an error.
fn read_shard(shard: OwnedFd, leave_after: Option<usize>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let limit = leave_after.map_or(u64::MAX, |bytes| bytes as u64);
    let _end_or_reset = File::from(shard).take(limit).read_to_end(&mut bytes);
    bytes
}

/// What the shards are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pipes,
    UnixSockets,
    TcpSockets,
    Files,
    Commands,
}

impl Kind {
    const SOCKETS: [Self; 2] = [Self::UnixSockets, Self::TcpSockets];

    /// The end that data comes out of, and the one that it goes into.
    fn pair(self) -> (OwnedFd, OwnedFd) {
        match self {
            Self::UnixSockets => {
                let (reader, writer) = UnixStream::pair().unwrap();
                (reader.into(), writer.into())
            }
            Self::TcpSockets => {
                let listener = TcpListener::bind("127.0.0.1:0").unwrap();
                let writer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                (listener.accept().unwrap().0.into(), writer.into())
            }
            Self::Pipes | Self::Files | Self::Commands => pipe(),
        }
    }

    /// Whether everything is sure to have been taken when the streamer says so. A pipe's reader may
    /// take what is in the pipe with it, and a kernel acknowledges what its process never reads.
    fn tells_of_readers(self) -> bool {
        !matches!(self, Self::Pipes | Self::TcpSockets)
    }
}

fn paths(dir: &Path, count: usize) -> Vec<PathBuf> {
    (1..=count).map(|i| dir.join(format!("s{i}"))).collect()
}

fn with_commands(launch: Launch, count: usize, command: &str) -> Launch {
    let count = count.to_string();
    launch.args(["--num-shards", &count, "--shard-cmd", command])
}

/// What takes the shards of a capture.
enum Readers {
    Threads(Vec<thread::JoinHandle<Vec<u8>>>),
    /// Written by the streamer, or by its commands.
    Files(Vec<PathBuf>),
}

impl Readers {
    /// `leaver` is the shard whose reader leaves, and after how many bytes.
    fn start(
        kind: Kind,
        count: usize,
        dir: &Path,
        leaver: Option<(usize, usize)>,
        launch: Launch,
        random: &mut Random,
    ) -> (Launch, Self) {
        let paths = paths(dir, count);
        match kind {
            Kind::Pipes | Kind::UnixSockets | Kind::TcpSockets => {
                let (readers, writers): (Vec<_>, Vec<_>) = (0..count).map(|_| kind.pair()).unzip();
                let mut threads = Vec::new();
                for (i, reader) in readers.into_iter().enumerate() {
                    let leave_after = leaver.and_then(|(who, bytes)| (who == i).then_some(bytes));
                    let greets = kind != Kind::Pipes && random.one_in(2);
                    threads.push(thread::spawn(move || {
                        let mut reader = File::from(reader);
                        if greets {
                            let _gone = reader.write_all(b"220 ready");
                        }
                        read_shard(reader.into(), leave_after)
                    }));
                }
                (launch.shards(writers), Self::Threads(threads))
            }
            Kind::Files => {
                let files = paths.iter().map(|path| File::create(path).unwrap().into());
                let launch = launch.shards(files);
                let launch = match leaver {
                    Some((_, bytes)) => launch.limit(Limit::FileSize(bytes as u64)),
                    None => launch,
                };
                (launch, Self::Files(paths))
            }
            Kind::Commands => {
                let (dir, takes) = (dir.display(), format!("cat >'{}'/s{{}}", dir.display()));
                let command = leaver.map(|(who, bytes)| {
                    let who = who + 1;
                    let ways = [
                        format!("head -c {bytes} >'{dir}'/s{who}; exit 3"),
                        format!("head -c {bytes} >'{dir}'/s{who}; exit 0"),
                        format!("cat >'{dir}'/s{who}; exit 3"),
                        format!("tee '{dir}'/s{who} > >(cat >/dev/null; exit 3)"),
                        format!("cat >'{dir}'/s{who}; kill -KILL $$"),
                    ];
                    let fails = random.pick(&ways);
                    format!("if test {{}} = {who}; then {fails}; else {takes}; fi")
                });
                let command = command.unwrap_or(takes);
                (with_commands(launch, count, &command), Self::Files(paths))
            }
        }
    }

    /// What arrived, when the streamer has ended.
    fn finish(self) -> Vec<Vec<u8>> {
        match self {
            Self::Threads(threads) => threads.into_iter().map(|t| t.join().unwrap()).collect(),
            Self::Files(paths) => paths
                .iter()
                .map(|path| fs::read(path).unwrap_or_default())
                .collect(),
        }
    }
}

#[test]
fn captures() {
    captures_to("capture", &[Kind::Pipes]);
}

#[test]
fn captures_to_sockets() {
    captures_to("capture to sockets", &Kind::SOCKETS);
}

#[test]
fn captures_to_files() {
    captures_to("capture to files", &[Kind::Files]);
}

#[test]
fn captures_to_commands() {
    captures_to("capture to commands", &[Kind::Commands]);
}

fn captures_to(what: &str, kinds: &[Kind]) {
    campaign(what, |random, tally| {
        let mut files = random_files(random);
        let total: usize = files.values().map(Vec::len).sum();
        let fault = *random.pick(&CaptureFault::ALL);
        // Before the inventory at the latest: what comes after is a complete dump.
        let moment = random.below(total - INVENTORY_SIZE + 1);
        let shard_count = 1 + random.below(4);
        let leaver = random.below(shard_count);
        if fault == CaptureFault::NoInventory {
            files.remove("inventory.img");
        }

        let kind = *random.pick(kinds);
        let dir = TempDir::with_prefix("images-").unwrap();
        let shards_dir = TempDir::with_prefix("shards-").unwrap();
        let leaver =
            (fault == CaptureFault::ShardReaderLeaves).then_some((leaver, moment / shard_count));
        let launch = Streamer::capture().images_dir(dir.path());
        let launch = match fault {
            CaptureFault::ProgressReaderLeaves => launch.progress_reader_gone(),
            _ => launch,
        };
        let (launch, readers) =
            Readers::start(kind, shard_count, shards_dir.path(), leaver, launch, random);
        let mut streamer = launch.start();

        let criu = connect(&streamer, Role::Capture);
        if let Some(criu) = criu {
            dump(&criu, &files, moment, || match fault {
                CaptureFault::CriuDies => Then::Dies,
                CaptureFault::Terminated => {
                    streamer.signal(Signal::SIGTERM);
                    Then::GoesOn
                }
                CaptureFault::Killed => {
                    streamer.signal(Signal::SIGKILL);
                    Then::GoesOn
                }
                _ => Then::GoesOn,
            });
        }
        let exit = streamer.wait();
        let decoded = image::decode(&readers.finish());

        if fault != CaptureFault::Killed {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), &Files::new());
        }
        let succeeded = exit.status.success();
        if let Ok(decoded) = &decoded {
            assert!(*decoded == files, "{fault:?}: a broken image looks whole");
        }
        if succeeded && (fault != CaptureFault::ShardReaderLeaves || kind.tells_of_readers()) {
            assert!(
                decoded.is_ok(),
                "{fault:?}, {kind:?}: success without an image: {decoded:?}"
            );
        }
        match fault {
            CaptureFault::None | CaptureFault::ProgressReaderLeaves => {
                assert!(succeeded, "{}", exit.stderr)
            }
            CaptureFault::CriuDies | CaptureFault::NoInventory => {
                assert_eq!(exit.status.code(), Some(1), "{fault:?}")
            }
            _ => {}
        }
        tally.count(fault.name(), succeeded);
    });
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RestoreFault {
    None,
    FeederDies,
    ExternalReaderLeaves,
    ProgressReaderLeaves,
    Terminated,
    Killed,
    CriuDies,
}

impl RestoreFault {
    const ALL: [Self; 7] = [
        Self::None,
        Self::FeederDies,
        Self::ExternalReaderLeaves,
        Self::ProgressReaderLeaves,
        Self::Terminated,
        Self::Killed,
        Self::CriuDies,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::FeederDies => "feeder-dies",
            Self::ExternalReaderLeaves => "ext-reader-leaves",
            Self::ProgressReaderLeaves => "progress-reader-leaves",
            Self::Terminated => "SIGTERM",
            Self::Killed => "SIGKILL",
            Self::CriuDies => "CRIU-dies",
        }
    }
}

/// A restore that is being fed, with an external file, and its fault at some moment of the feeding.
struct Restore {
    streamer: Streamer,
    feeding: Vec<thread::JoinHandle<()>>,
    external: ExternalReader,
    _files: TempDir,
}

/// Where the external file goes.
enum ExternalReader {
    Thread(thread::JoinHandle<Vec<u8>>),
    File(PathBuf),
}

const TAR: &str = "fs.tar";

impl Restore {
    fn start(
        launch: Launch,
        kind: Kind,
        fault: RestoreFault,
        shards: Vec<Vec<u8>>,
        random: &mut Random,
    ) -> Self {
        let dir = TempDir::with_prefix("shards-").unwrap();
        let reader_leaves = fault == RestoreFault::ExternalReaderLeaves;
        let (launch, external) = if kind == Kind::Files && !reader_leaves {
            let path = dir.path().join(TAR);
            let file = File::create(&path).unwrap();
            (
                launch.ext_file(TAR, file.into()),
                ExternalReader::File(path),
            )
        } else {
            let (reader, writer) = kind.pair();
            let leave_after = reader_leaves.then(|| random.below(1000));
            let thread = thread::spawn(move || read_shard(reader, leave_after));
            (launch.ext_file(TAR, writer), ExternalReader::Thread(thread))
        };
        let launch = match fault {
            RestoreFault::ProgressReaderLeaves => launch.progress_reader_gone(),
            _ => launch,
        };
        let culprit = random.below(shards.len());
        let moment = random.below(shards[culprit].len());
        let signal = match fault {
            RestoreFault::Terminated => Some(Signal::SIGTERM),
            RestoreFault::Killed => Some(Signal::SIGKILL),
            _ => None,
        };
        if matches!(kind, Kind::Files | Kind::Commands) {
            let fails = (fault == RestoreFault::FeederDies).then_some((culprit, moment));
            let launch = match kind {
                Kind::Files => from_files(launch, dir.path(), &shards, fails),
                _ => from_commands(launch, dir.path(), &shards, fails, random),
            };
            let streamer = launch.start();
            if let Some(signal) = signal {
                thread::sleep(Duration::from_micros(random.below(20_000) as u64));
                streamer.signal(signal);
            }
            return Self {
                streamer,
                feeding: Vec::new(),
                external,
                _files: dir,
            };
        }

        let (readers, writers): (Vec<_>, Vec<_>) = shards.iter().map(|_| kind.pair()).unzip();
        let streamer = launch.shards(readers).start();
        let mut feeding = Vec::new();
        for (i, (writer, bytes)) in writers.into_iter().zip(shards).enumerate() {
            let pidfd = streamer.pidfd();
            feeding.push(thread::spawn(move || {
                let mut shard = File::from(writer);
                let (before, after) = bytes.split_at(if i == culprit { moment } else { 0 });
                // A streamer that gave up breaks the pipe.
                let _gone = shard.write_all(before);
                if i == culprit {
                    if fault == RestoreFault::FeederDies {
                        return;
                    }
                    if let Some(signal) = signal {
                        let _ended = crate::common::child::send_signal(&pidfd, signal);
                    }
                }
                let _gone = shard.write_all(after);
            }));
        }
        Self {
            streamer,
            feeding,
            external,
            _files: dir,
        }
    }

    /// Its end, and what the external file's reader got.
    fn finish(mut self) -> (Exit, Vec<u8>) {
        let exit = self.streamer.wait();
        self.feeding
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
        let external = match self.external {
            ExternalReader::Thread(thread) => thread.join().unwrap(),
            ExternalReader::File(path) => fs::read(path).unwrap(),
        };
        (exit, external)
    }
}

/// `cut` is the shard that ends too early, and after how many bytes.
fn from_files(
    launch: Launch,
    dir: &Path,
    shards: &[Vec<u8>],
    cut: Option<(usize, usize)>,
) -> Launch {
    let mut files = Vec::new();
    for (i, (path, bytes)) in paths(dir, shards.len()).iter().zip(shards).enumerate() {
        let len = match cut {
            Some((culprit, moment)) if culprit == i => moment,
            _ => bytes.len(),
        };
        fs::write(path, &bytes[..len]).unwrap();
        files.push(File::open(path).unwrap().into());
    }
    launch.shards(files)
}

/// `fails` is the shard whose command fails, and after how many bytes if it does so in the middle.
fn from_commands(
    launch: Launch,
    dir: &Path,
    shards: &[Vec<u8>],
    fails: Option<(usize, usize)>,
    random: &mut Random,
) -> Launch {
    for (path, bytes) in paths(dir, shards.len()).iter().zip(shards) {
        fs::write(path, bytes).unwrap();
    }
    let dir = dir.display();
    let brings = format!("cat '{dir}'/s{{}}");
    let command = fails.map(|(culprit, moment)| {
        let culprit = culprit + 1;
        let ways = [
            format!("head -c {moment} '{dir}'/s{culprit}; exit 3"),
            format!("head -c {moment} '{dir}'/s{culprit}; exit 0"),
            format!("cat '{dir}'/s{culprit}; exit 3"),
            format!("cat '{dir}'/s{culprit} > >(cat; exit 3)"),
            format!("cat '{dir}'/s{culprit}; kill -KILL $$"),
        ];
        let fails = random.pick(&ways);
        format!("if test {{}} = {culprit}; then {fails}; else {brings}; fi")
    });
    with_commands(launch, shards.len(), &command.unwrap_or(brings))
}

#[test]
fn extracts() {
    extracts_from("extract", &[Kind::Pipes]);
}

#[test]
fn extracts_from_sockets() {
    extracts_from("extract from sockets", &Kind::SOCKETS);
}

#[test]
fn extracts_from_files() {
    extracts_from("extract from files", &[Kind::Files]);
}

#[test]
fn extracts_from_commands() {
    extracts_from("extract from commands", &[Kind::Commands]);
}

fn extracts_from(what: &str, kinds: &[Kind]) {
    campaign(what, |random, tally| {
        let kind = *random.pick(kinds);
        let files = random_files(random);
        let tar_size = random.below(200_000);
        let tar = random.bytes(tar_size);
        let fault = *random.pick(&RestoreFault::ALL[..6]);
        let dir = TempDir::with_prefix("images-").unwrap();
        // An earlier image with the same names and others, or nothing.
        let mut before = Files::new();
        if random.one_in(2) {
            before = files
                .keys()
                .map(|name| (name.clone(), b"of an earlier image".to_vec()))
                .collect();
            before.insert("earlier.img".into(), b"of an earlier image".to_vec());
            before
                .iter()
                .for_each(|(name, content)| fs::write(dir.path().join(name), content).unwrap());
        }
        let mut after = before.clone();
        after.extend(files.clone());

        let mut with_tar = files;
        with_tar.insert(TAR.into(), tar.clone());
        let shards = image::encode_files(&with_tar, 1 + random.below(3), 30_000);
        let (exit, got_tar) = Restore::start(
            Streamer::extract().images_dir(dir.path()),
            kind,
            fault,
            shards,
            random,
        )
        .finish();
        let succeeded = exit.status.success();

        if fault == RestoreFault::Killed {
            // SIGKILL leaves things behind, but what looks like an image must be one: the old one
            // or the new one.
            let found = regular_files(dir.path());
            if found.contains_key("inventory.img") {
                let found: Files = found
                    .into_iter()
                    .filter(|(name, _)| after.contains_key(name))
                    .collect();
                assert!(
                    found == before || found == after,
                    "killed: a mixture that looks like an image"
                );
            }
        } else {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), if succeeded { &after } else { &before });
        }
        if succeeded && fault != RestoreFault::ExternalReaderLeaves {
            assert!(
                got_tar == tar,
                "{fault:?}: success, and another external file"
            );
        }
        match fault {
            RestoreFault::None | RestoreFault::ProgressReaderLeaves => {
                assert!(succeeded, "{}", exit.stderr)
            }
            RestoreFault::FeederDies => assert_eq!(exit.status.code(), Some(1)),
            _ => {}
        }
        tally.count(fault.name(), succeeded);
    });
}

fn regular_files(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .filter(|entry| entry.file_type().unwrap().is_file())
        .map(|entry| {
            (
                entry.file_name().into_string().unwrap(),
                fs::read(entry.path()).unwrap(),
            )
        })
        .collect()
}

#[test]
fn serves() {
    serves_from("serve", &[Kind::Pipes]);
}

#[test]
fn serves_from_sockets() {
    serves_from("serve from sockets", &Kind::SOCKETS);
}

#[test]
fn serves_from_files() {
    serves_from("serve from files", &[Kind::Files]);
}

#[test]
fn serves_from_commands() {
    serves_from("serve from commands", &[Kind::Commands]);
}

fn serves_from(what: &str, kinds: &[Kind]) {
    campaign(what, |random, tally| {
        let kind = *random.pick(kinds);
        let files = random_files(random);
        let tar_size = random.below(200_000);
        let tar = random.bytes(tar_size);
        let fault = *random.pick(&RestoreFault::ALL);
        let criu_dies_after =
            (fault == RestoreFault::CriuDies).then(|| 1 + random.below(files.len()));
        let dir = TempDir::with_prefix("images-").unwrap();
        let mut with_tar = files.clone();
        with_tar.insert(TAR.into(), tar.clone());
        let chunk = *random.pick(&[30_000, 120_000]);
        let shards = image::encode_files(&with_tar, 1 + random.below(3), chunk);
        let keeping = *random.pick(&Keeping::ALL);
        let restore = Restore::start(
            keeping.serve().images_dir(dir.path()),
            kind,
            fault,
            shards,
            random,
        );

        let criu = connect(&restore.streamer, Role::Serve);
        let complete = criu.is_some_and(|criu| read_all(&criu, &files, criu_dies_after));
        let (exit, got_tar) = restore.finish();
        let succeeded = exit.status.success();

        if fault != RestoreFault::Killed {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), &Files::new());
        }
        if complete && fault != RestoreFault::ExternalReaderLeaves {
            assert!(
                got_tar == tar,
                "{fault:?}: served, with another external file"
            );
        }
        match fault {
            RestoreFault::None | RestoreFault::ProgressReaderLeaves => {
                assert!(succeeded && complete, "{}", exit.stderr);
            }
            RestoreFault::FeederDies => assert!(
                exit.status.code() == Some(1) && !complete,
                "{}",
                exit.stderr
            ),
            _ => {}
        }
        tally.count(fault.name(), succeeded);
    });
}

/// CRIU's connection, unless the streamer ends before it listens.
fn connect(streamer: &Streamer, role: Role) -> Option<Criu> {
    while streamer.is_running() {
        if let Ok(criu) = Criu::try_connect(streamer.images_dir(), role) {
            return Some(criu);
        }
        thread::sleep(std::time::Duration::from_millis(1));
    }
    None
}

/// Whether every file came to its end. What came of each is right in any case.
fn read_all(criu: &Criu, files: &Files, die_after: Option<usize>) -> bool {
    for (i, (name, expected)) in files.iter().enumerate() {
        if die_after == Some(i) {
            return false;
        }
        let Ok(file) = criu.try_open_file(name, None) else {
            return false;
        };
        let mut content = Vec::new();
        file.unwrap_or_else(|| panic!("{name} is missing"))
            .read_to_end(&mut content)
            .unwrap();
        if content != *expected {
            // The streamer died: what CRIU gets is cut, but never wrong.
            assert!(expected.starts_with(&content), "{name}: wrong bytes");
            return false;
        }
    }
    true
}
