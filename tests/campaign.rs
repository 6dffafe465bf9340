//! A campaign of faults: each party of a capture, an extract and a serve is killed or leaves at a
//! random moment, hundreds of times, and each time the exit status must tell the truth and no wreck
//! may look like an image.
//!
//! The shards are pipes, sockets, files or shell commands.
//!
//! `CAMPAIGN_ROUNDS` sets how many rounds of each kind; a failing round prints its seed, and
//! `CAMPAIGN_FIRST_SEED=<seed> CAMPAIGN_ROUNDS=1` runs it alone. Moments are counted in bytes and
//! files, not in time, but for a restore from files or commands, which feed themselves; only what
//! the kernel does between two processes is left to chance.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use crate::common::child::{Limit, send_signal};
use crate::common::criu::Criu;
use crate::common::image::{self, Files};
use crate::common::keeping::Keeping;
use crate::common::random::{Random, for_each_seed};
use crate::common::runs;
use crate::common::shards::{pipe, tcp_pair, unix_pair};
use crate::common::streamer::{Exit, Launch, Streamer};
use crate::common::{PAGE, setting};
use nix::sys::signal::Signal;
use tempfile::TempDir;

/// Runs all rounds of one kind, each of which tells its fault and whether the streamer succeeded,
/// and says what was done.
fn campaign(kind: &str, faults: &[Fault], round: impl Fn(&mut Random, Fault) -> bool) {
    let mut tally = BTreeMap::<String, [usize; 2]>::new();
    let first = setting("CAMPAIGN_FIRST_SEED", 0);
    let seeds = first..first + setting("CAMPAIGN_ROUNDS", 100);
    for_each_seed(seeds, |seed| {
        let mut random = Random::new(seed);
        let fault = *random.pick(faults);
        let succeeded = usize::from(round(&mut random, fault));
        let [rounds, successes] = tally.entry(format!("{fault:?}")).or_default();
        (*rounds, *successes) = (*rounds + 1, *successes + succeeded);
    });
    crate::common::report(format_args!("{kind}: [rounds, successes] of {tally:?}"));
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    CriuDies,
    NoInventory,
    /// That of a shard, or of an external file.
    ReaderLeaves,
    FeederDies,
    ProgressReaderLeaves,
    /// The streamer, CRIU, or a reader or feeder, for a while.
    StandsStill,
    Terminated,
    Killed,
}

impl Fault {
    fn of_progress(self, launch: Launch) -> Launch {
        match self {
            Self::ProgressReaderLeaves => launch.progress_reader_gone(),
            _ => launch,
        }
    }

    /// Without a fault of a party that counts there is a success; a party that dies is an error.
    #[track_caller]
    fn is_told(self, exit: &Exit) {
        let code = exit.status.code();
        match self {
            Self::None | Self::ProgressReaderLeaves | Self::StandsStill => {
                assert_eq!(code, Some(0), "{}", exit.stderr)
            }
            Self::FeederDies | Self::NoInventory => assert_eq!(code, Some(1), "{}", exit.stderr),
            _ => {}
        }
    }
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

/// CRIU writes everything, and does something when `moment` bytes are written. If that says so, or
/// when the streamer is gone, it ends then and there.
fn dump(criu: &Criu, files: &Files, moment: usize, dies_at_moment: impl FnOnce() -> bool) {
    let mut at_moment = Some(dies_at_moment);
    let mut written = 0;
    let mut dies = |written| written >= moment && at_moment.take().is_some_and(|act| act());
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

/// Reads a shard to its end; after some bytes it leaves, or stands still for a while. A socket
/// whose writer was killed may end with an error.
fn read_shard(shard: OwnedFd, moment: Option<usize>, fault: Fault) -> Vec<u8> {
    let (mut shard, mut bytes) = (File::from(shard), Vec::new());
    if let Some(moment) = moment {
        let _end_or_reset = (&mut shard).take(moment as u64).read_to_end(&mut bytes);
        if fault == Fault::ReaderLeaves {
            return bytes;
        }
        stand_still();
    }
    let _end_or_reset = shard.read_to_end(&mut bytes);
    bytes
}

fn stand_still() {
    thread::sleep(Duration::from_millis(30));
}

/// The streamer gets the signal, if the fault has one, or stands still for a while.
fn disturb(streamer: &OwnedFd, fault: Fault) {
    let signals: &[Signal] = match fault {
        Fault::Terminated => &[Signal::SIGTERM],
        Fault::Killed => &[Signal::SIGKILL],
        Fault::StandsStill => &[Signal::SIGSTOP, Signal::SIGCONT],
        _ => &[],
    };
    for signal in signals {
        let _may_have_ended = send_signal(streamer, *signal);
        if *signal == Signal::SIGSTOP {
            stand_still();
        }
    }
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
    const ALL: [Self; 5] = [
        Self::Pipes,
        Self::UnixSockets,
        Self::TcpSockets,
        Self::Files,
        Self::Commands,
    ];

    /// The end that data comes out of, and the one that it goes into.
    fn pair(self) -> (OwnedFd, OwnedFd) {
        match self {
            Self::UnixSockets => unix_pair(),
            Self::TcpSockets => tcp_pair(),
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

/// A command for each shard; that of one fails, in one of these ways or after a part.
fn with_commands(
    launch: Launch,
    count: usize,
    command: &str,
    fails: Option<(usize, String, String)>,
    random: &mut Random,
) -> Launch {
    let mut command = command.to_owned();
    if let Some((who, part, leaves_a_failure_behind)) = fails {
        let ways = [
            format!("{part}; exit 3"),
            format!("{part}; exit 0"),
            format!("{command}; exit 3"),
            format!("{command}; kill -KILL $$"),
            leaves_a_failure_behind,
        ];
        let fails = random.pick(&ways);
        command = format!(
            "if test {{}} = {}; then {fails}; else {command}; fi",
            who + 1
        );
    }
    launch.args(["--num-shards", &count.to_string(), "--shard-cmd", &command])
}

/// What takes the shards of a capture.
enum Readers {
    Threads(Vec<thread::JoinHandle<Vec<u8>>>),
    /// Written by the streamer, or by its commands.
    Files(Vec<PathBuf>),
}

impl Readers {
    /// `leaver` is the shard whose reader leaves or stands still, and after how many bytes.
    fn start(
        kind: Kind,
        count: usize,
        dir: &Path,
        leaver: Option<(usize, usize)>,
        fault: Fault,
        launch: Launch,
        random: &mut Random,
    ) -> (Launch, Self) {
        let paths = paths(dir, count);
        let fails = leaver.filter(|_| fault == Fault::ReaderLeaves);
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
                        read_shard(reader.into(), leave_after, fault)
                    }));
                }
                (launch.shards(writers), Self::Threads(threads))
            }
            Kind::Files => {
                let files = paths.iter().map(|path| File::create(path).unwrap().into());
                let launch = launch.shards(files);
                let launch = match fails {
                    Some((_, bytes)) => launch.limit(Limit::FileSize(bytes as u64)),
                    None => launch,
                };
                (launch, Self::Files(paths))
            }
            Kind::Commands => {
                let shard = format!("'{}'/s{{}}", dir.display());
                let fails = fails.map(|(who, bytes)| {
                    let part = format!("head -c {bytes} >{shard}");
                    (
                        who,
                        part,
                        format!("tee {shard} > >(cat >/dev/null; exit 3)"),
                    )
                });
                let takes = format!("cat >{shard}");
                let launch = with_commands(launch, count, &takes, fails, random);
                (launch, Self::Files(paths))
            }
        }
    }

    /// What arrived, when the streamer has ended.
    fn finish(self) -> Vec<Vec<u8>> {
        match self {
            Self::Threads(threads) => threads.into_iter().map(|t| t.join().unwrap()).collect(),
            Self::Files(paths) => {
                let read = |path: &PathBuf| fs::read(path).unwrap_or_default();
                paths.iter().map(read).collect()
            }
        }
    }
}

#[test]
fn captures() {
    let faults = [
        Fault::None,
        Fault::CriuDies,
        Fault::NoInventory,
        Fault::ReaderLeaves,
        Fault::ProgressReaderLeaves,
        Fault::StandsStill,
        Fault::Terminated,
        Fault::Killed,
    ];
    campaign("capture", &faults, |random, fault| {
        let mut files = random_files(random);
        let total: usize = files.values().map(Vec::len).sum();
        // Before the inventory at the latest: what comes after is a complete dump.
        let moment = random.below(total - INVENTORY_SIZE + 1);
        let shard_count = 1 + random.below(4);
        let leaver = (random.below(shard_count), moment / shard_count);
        let reader_stands_still = fault == Fault::StandsStill && random.one_in(3);
        let has_leaver = fault == Fault::ReaderLeaves || reader_stands_still;
        let leaver = has_leaver.then_some(leaver);
        if fault == Fault::NoInventory {
            files.remove("inventory.img");
        }

        let kind = *random.pick(&Kind::ALL);
        let dir = TempDir::with_prefix("images-").unwrap();
        let shards_dir = TempDir::with_prefix("shards-").unwrap();
        let launch = fault.of_progress(Streamer::capture().images_dir(dir.path()));
        let (launch, readers) = Readers::start(
            kind,
            shard_count,
            shards_dir.path(),
            leaver,
            fault,
            launch,
            random,
        );
        let mut streamer = launch.start();
        if let Some(criu) = streamer.criu_unless_it_ends() {
            dump(&criu, &files, moment, || {
                match fault {
                    Fault::StandsStill if random.one_in(2) => stand_still(),
                    _ => disturb(&streamer.pidfd(), fault),
                }
                fault == Fault::CriuDies
            });
        }
        let exit = streamer.wait();
        let decoded = image::decode(&readers.finish());

        if fault != Fault::Killed {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), &Files::new());
        }
        let succeeded = exit.status.success();
        if let Ok(decoded) = &decoded {
            assert!(*decoded == files, "{fault:?}: a broken image looks whole");
        }
        if succeeded && (fault != Fault::ReaderLeaves || kind.tells_of_readers()) {
            let found = decoded.as_ref().err();
            assert!(
                found.is_none(),
                "{fault:?}, {kind:?}: success, and {found:?}"
            );
        }
        assert!(fault != Fault::CriuDies || exit.status.code() == Some(1));
        fault.is_told(&exit);
        succeeded
    });
}

const RESTORE_FAULTS: [Fault; 8] = [
    Fault::None,
    Fault::FeederDies,
    Fault::ReaderLeaves,
    Fault::ProgressReaderLeaves,
    Fault::StandsStill,
    Fault::Terminated,
    Fault::Killed,
    Fault::CriuDies,
];

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
    fn start(launch: Launch, fault: Fault, shards: Vec<Vec<u8>>, random: &mut Random) -> Self {
        let kind = *random.pick(&Kind::ALL);
        let dir = TempDir::with_prefix("shards-").unwrap();
        let reader_leaves = fault == Fault::ReaderLeaves;
        let (launch, external) = if kind == Kind::Files && !reader_leaves {
            let path = dir.path().join(TAR);
            let file = File::create(&path).unwrap();
            let launch = launch.ext_file(TAR, file.into());
            (launch, ExternalReader::File(path))
        } else {
            let (reader, writer) = kind.pair();
            let acts = reader_leaves || (fault == Fault::StandsStill && random.one_in(3));
            let moment = acts.then(|| random.below(1000));
            let thread = thread::spawn(move || read_shard(reader, moment, fault));
            (launch.ext_file(TAR, writer), ExternalReader::Thread(thread))
        };
        let launch = fault.of_progress(launch);
        let culprit = random.below(shards.len());
        let moment = random.below(shards[culprit].len());
        let dies = fault == Fault::FeederDies;
        if matches!(kind, Kind::Files | Kind::Commands) {
            let paths = paths(dir.path(), shards.len());
            for (path, bytes) in paths.iter().zip(&shards) {
                fs::write(path, bytes).unwrap();
            }
            let launch = if kind == Kind::Files {
                if dies {
                    fs::write(&paths[culprit], &shards[culprit][..moment]).unwrap();
                }
                launch.shards(paths.iter().map(|path| File::open(path).unwrap().into()))
            } else {
                let shard = format!("'{}'/s{{}}", dir.path().display());
                let part = format!("head -c {moment} {shard}");
                let fails = (culprit, part, format!("cat {shard} > >(cat; exit 3)"));
                let brings = format!("cat {shard}");
                with_commands(launch, shards.len(), &brings, dies.then_some(fails), random)
            };
            let streamer = launch.start();
            if matches!(
                fault,
                Fault::Terminated | Fault::Killed | Fault::StandsStill
            ) {
                thread::sleep(Duration::from_micros(random.below(20_000) as u64));
                disturb(&streamer.pidfd(), fault);
            }
            return Self {
                streamer,
                feeding: Vec::new(),
                external,
                _files: dir,
            };
        }

        let feeder_stands_still = fault == Fault::StandsStill && random.one_in(2);
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
                if i == culprit && dies {
                    return;
                }
                if i == culprit && feeder_stands_still {
                    stand_still();
                } else if i == culprit {
                    disturb(&pidfd, fault);
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

/// The shards of an image of these files and of an external one, whose contents come along.
fn image_with_tar(files: &Files, random: &mut Random) -> (Vec<Vec<u8>>, Vec<u8>) {
    let tar_size = random.below(200_000);
    let tar = random.bytes(tar_size);
    let mut with_tar = files.clone();
    with_tar.insert(TAR.into(), tar.clone());
    let chunk = *random.pick(&[30_000, 120_000]);
    (
        image::encode_files(&with_tar, 1 + random.below(3), chunk),
        tar,
    )
}

#[test]
fn extracts() {
    campaign("extract", &RESTORE_FAULTS[..7], |random, fault| {
        let files = random_files(random);
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

        let (shards, tar) = image_with_tar(&files, random);
        let launch = Streamer::extract().images_dir(dir.path());
        let restore = Restore::start(launch, fault, shards.clone(), random);
        let (exit, got_tar) = restore.finish();
        let succeeded = exit.status.success();

        if fault == Fault::Killed {
            // SIGKILL leaves things behind, but what looks like an image must be one: the old one
            // or the new one. The next run goes through, and sweeps up.
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
            after.insert(TAR.into(), tar.clone());
            let next = Streamer::extract().images_dir(dir.path());
            runs::feed(next, &shards).0.expect_success();
            assert_nothing_new(dir.path(), &after);
        } else {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), if succeeded { &after } else { &before });
        }
        if succeeded && fault != Fault::ReaderLeaves {
            assert!(
                got_tar == tar,
                "{fault:?}: success, and another external file"
            );
        }
        fault.is_told(&exit);
        succeeded
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
    campaign("serve", &RESTORE_FAULTS, |random, fault| {
        let files = random_files(random);
        let dies_after = 1 + random.below(files.len());
        let dies_after = (fault == Fault::CriuDies).then_some(dies_after);
        let dir = TempDir::with_prefix("images-").unwrap();
        let (shards, tar) = image_with_tar(&files, random);
        let launch = random.pick(&Keeping::ALL).serve().images_dir(dir.path());
        let restore = Restore::start(launch, fault, shards, random);

        let criu = restore.streamer.criu_unless_it_ends();
        let complete = criu.is_some_and(|criu| read_all(&criu, &files, dies_after, fault));
        let (exit, got_tar) = restore.finish();
        let succeeded = exit.status.success();

        if fault != Fault::Killed {
            assert_ended_by_itself(&exit);
            assert_nothing_new(dir.path(), &Files::new());
        }
        if complete && fault != Fault::ReaderLeaves {
            assert!(
                got_tar == tar,
                "{fault:?}: served, with another external file"
            );
        }
        fault.is_told(&exit);
        let unharmed =
            [Fault::None, Fault::ProgressReaderLeaves, Fault::StandsStill].contains(&fault);
        assert!(complete || !unharmed, "{}", exit.stderr);
        assert!(!complete || fault != Fault::FeederDies, "{}", exit.stderr);
        succeeded
    });
}

/// Whether every file came to its end. What came of each is right in any case.
fn read_all(criu: &Criu, files: &Files, die_after: Option<usize>, fault: Fault) -> bool {
    for (i, (name, expected)) in files.iter().enumerate() {
        if die_after == Some(i) {
            return false;
        }
        let Ok(file) = criu.try_open_file(name) else {
            return false;
        };
        if fault == Fault::StandsStill && i == 0 {
            stand_still();
        }
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
