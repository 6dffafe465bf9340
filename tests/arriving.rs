//! Images while they arrive, with an index and without: shards at any pace, readers of any kind,
//! faults of every kind at any place. Readers get right bytes, and the last of the pages only of a
//! whole image.
//!
//! `ARRIVING_SEEDS` sets the number of rounds; a failing round prints its seed, and
//! `ARRIVING_FIRST_SEED=<seed> ARRIVING_SEEDS=1` runs it alone.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::common::cgroup::MemoryCgroup;
use crate::common::child::Limit;
use crate::common::criu::{Criu, Role};
use crate::common::image::{self, Files};
use crate::common::indexed::{self, Indexed, KEPT_IN_INDEX};
use crate::common::keeping::Keeping;
use crate::common::random::{Random, for_each_seed};
use crate::common::setting;
use crate::common::shards;
use crate::common::streamer::{Launch, Streamer};
use tempfile::TempDir;

/// Files of which CRIU reads those with pages and those that exceed [`KEPT_IN_INDEX`] once.
fn random_files(random: &mut Random) -> Files {
    let mut files = Files::new();
    for number in 0..1 + random.below(6) {
        let size = random.below(30_000);
        files.insert(format!("file-{number}.img"), random.bytes(size));
    }
    for number in 0..1 + random.below(4) {
        let most = *random.pick(&[1, 5_000, 1_000_000]);
        let size = 1 + random.below(most);
        files.insert(format!("pages-{number}.img"), random.bytes(size));
    }
    files.insert("pagemap-1.img".into(), random.bytes(KEPT_IN_INDEX - 1));
    if random.one_in(2) {
        let size = KEPT_IN_INDEX + random.below(KEPT_IN_INDEX / 2);
        files.insert("ghost-file-1.img".into(), random.bytes(size));
    }
    files.insert("inventory.img".into(), random.bytes(60));
    files
}

fn is_read_once(name: &str, files: &Files) -> bool {
    name.starts_with("pages-") || files[name].len() > KEPT_IN_INDEX
}

/// A file that a reader has open.
struct Reading<'a> {
    name: &'a str,
    file: File,
    /// What is still to come.
    rest: &'a [u8],
    /// The reader leaves when no more than this is to come.
    leaves_at: Option<usize>,
}

impl Reading<'_> {
    /// True: that was all that is wanted.
    fn go_on(&mut self, random: &mut Random) -> io::Result<bool> {
        if self.leaves_at.is_some_and(|left| self.rest.len() <= left) {
            return Ok(true);
        }
        let mut bytes = vec![0; 1 + random.below(200_000)];
        let got = self.file.read(&mut bytes)?;
        // Of an image whose markers are damaged, or of two images, CRIU may get anything. It is
        // only the end that it never gets.
        let Some(rest) = self.rest.strip_prefix(&bytes[..got]) else {
            let (name, left) = (self.name, self.rest.len());
            let what = format!("{name}: wrong bytes {left} before the end");
            return Err(io::Error::new(ErrorKind::InvalidData, what));
        };
        self.rest = rest;
        match (got, self.rest) {
            (0, []) => Ok(true),
            (0, _) => Err(ErrorKind::UnexpectedEof.into()),
            _ => Ok(false),
        }
    }
}

/// One process of CRIU: it reads these files, several at a time. An error: one was cut short, or
/// is another.
fn read_all(
    criu: &Criu,
    names: &[&str],
    files: &Files,
    patience: Patience,
    mut random: Random,
) -> io::Result<()> {
    let mut names = names.iter().copied();
    let mut open: Vec<Reading> = Vec::new();
    loop {
        if random.one_in(8) {
            thread::sleep(Duration::from_micros(random.next() % 1000));
        }
        if random.one_in(10) {
            assert!(criu.try_open_file("none.img")?.is_none());
        }
        if open.is_empty() || (open.len() < 3 && random.one_in(3)) {
            match names.next() {
                Some(name) => {
                    let file = criu.try_open_file(name)?;
                    let size = files[name].len();
                    let leaves = match patience {
                        Patience::All => false,
                        Patience::Pages => !name.starts_with("pages-"),
                        Patience::Little => true,
                    };
                    let leaves = leaves && random.one_in(4);
                    open.push(Reading {
                        name,
                        file: file.unwrap_or_else(|| panic!("{name} is not in the image")),
                        rest: &files[name],
                        leaves_at: leaves.then(|| random.below(size + 1)),
                    });
                }
                None if open.is_empty() => return Ok(()),
                None => {}
            }
        }
        let turn = random.below(open.len());
        if open[turn].go_on(&mut random)? {
            open.swap_remove(turn);
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    /// Everything is read to its end.
    All,
    /// Some files are left early, but not those with pages. CRIU does so too.
    Pages,
    /// Some files are left early, of any kind.
    Little,
}

/// A whole CRIU, of several processes. An error: one of them has not all that it needs.
fn restore(criu: &Criu, files: &Files, patience: Patience, random: &mut Random) -> io::Result<()> {
    let processes = 1 + random.below(3);
    let mut shares: Vec<Vec<&str>> = vec![Vec::new(); processes];
    for name in files.keys() {
        shares[random.below(processes)].push(name);
    }
    let again = files.keys().filter(|name| !is_read_once(name, files));
    for name in again {
        for _ in 0..random.below(3) {
            shares[random.below(processes)].push(name);
        }
    }
    thread::scope(|scope| {
        let start = |mut share: Vec<_>| {
            random.shuffle(&mut share);
            let own = Random::new(random.next());
            scope.spawn(move || read_all(criu, &share, files, patience, own))
        };
        let readers: Vec<_> = shares.into_iter().map(start).collect();
        let results = readers.into_iter().map(|reader| reader.join().unwrap());
        // All of them are waited for.
        results.fold(Ok(()), Result::and)
    })
}

/// Writes a shard at a pace of its own. What the streamer does not want is lost.
fn feed(end: OwnedFd, bytes: Vec<u8>, mut random: Random) -> JoinHandle<()> {
    thread::spawn(move || {
        let mut end = File::from(end);
        let mut rest = &bytes[..];
        thread::sleep(Duration::from_micros(random.next() % 3000));
        while !rest.is_empty() {
            let most = *random.pick(&[10, 5_000, 200_000]);
            let (block, later) = rest.split_at(rest.len().min(1 + random.below(most)));
            if end.write_all(block).is_err() {
                return;
            }
            rest = later;
            if random.one_in(8) {
                thread::sleep(Duration::from_micros(random.next() % 1000));
            }
        }
    })
}

/// How the shards come.
enum Source {
    Pipes,
    /// The index is a shard like the others: CRIU connects when all is here.
    WithoutIndex,
    /// From commands, of which this one fails after its last byte.
    Commands {
        failing: Option<usize>,
    },
}

/// A streamer to which an image comes.
struct Arrival {
    streamer: Streamer,
    feeders: Vec<JoinHandle<()>>,
    _files: Option<TempDir>,
}

impl Arrival {
    fn begin(source: &Source, image: &Indexed, launch: Launch, random: &mut Random) -> Self {
        match source {
            Source::Pipes | Source::WithoutIndex => {
                let count = image.shards.len();
                let (streamer, ends) = if matches!(source, Source::Pipes) {
                    indexed::serve(count, launch).into_parts()
                } else {
                    let (readers, ends) = shards::pipes(count + 1, None);
                    (launch.shards(readers).start(), ends)
                };
                let own = |random: &mut Random| Random::new(random.next());
                let shards = ends.into_iter().zip(image.all());
                Self {
                    streamer,
                    feeders: shards
                        .map(|(end, bytes)| feed(end, bytes, own(random)))
                        .collect(),
                    _files: None,
                }
            }
            Source::Commands { failing } => {
                let dir = TempDir::with_prefix("shards-").unwrap();
                for (number, bytes) in (1..).zip(&image.shards) {
                    fs::write(dir.path().join(number.to_string()), bytes).unwrap();
                }
                fs::write(dir.path().join("index"), &image.index).unwrap();
                let mut command = format!("cat '{}'/{{}}", dir.path().display());
                if let Some(failing) = *failing {
                    let name = match failing {
                        data if data < image.shards.len() => (data + 1).to_string(),
                        _ => "index".into(),
                    };
                    let pause = random.below(3);
                    command += &format!("; [ {{}} != {name} ] || {{ sleep 0.0{pause}; exit 3; }}");
                }
                let count = image.shards.len().to_string();
                let commands = ["--index", "--num-shards", &count, "--shard-cmd", &command];
                Self {
                    streamer: launch.args(commands).start(),
                    feeders: Vec::new(),
                    _files: Some(dir),
                }
            }
        }
    }
}

/// A cgroup in which memory is short from the start, so that shards rest wherever they may; for a
/// third of the images, where one can be made.
fn shortage(random: &mut Random) -> Option<MemoryCgroup> {
    let limit = Some(64 << 20);
    random.one_in(3).then(|| MemoryCgroup::create(limit).ok())?
}

/// A `serve` that keeps data anywhere, at times where a zero-copy call is refused.
fn launch(seed: u64, shortage: Option<&MemoryCgroup>) -> Launch {
    let launch = Keeping::in_turn(seed as usize).serve();
    let launch = match seed % 10 {
        0 => launch.limit(Limit::Refused(libc::SYS_splice)),
        1 => launch.limit(Limit::Refused(libc::SYS_vmsplice)),
        _ => launch,
    };
    match shortage {
        None => launch,
        Some(cgroup) => launch.limit(cgroup.limit()),
    }
}

fn a_whole_image_arrives(seed: u64) {
    let mut random = Random::new(seed);
    let files = random_files(&mut random);
    let shard_count = 1 + random.below(4);
    let image = indexed::encode(&files, shard_count, &mut random);
    assert!(image::decode(&image.all()).unwrap() == files);
    let source = match random.below(5) {
        0 => Source::Commands { failing: None },
        1 => Source::WithoutIndex,
        _ => Source::Pipes,
    };
    let shortage = match source {
        Source::WithoutIndex => None,
        _ => shortage(&mut random),
    };
    let launch = launch(seed, shortage.as_ref());
    let mut arrival = Arrival::begin(&source, &image, launch, &mut random);
    let criu = arrival.streamer.criu();
    let patience = match &shortage {
        None => *random.pick(&[Patience::All, Patience::Pages, Patience::Little]),
        // Shards rest while no one waits for the last of the pages.
        Some(_) => *random.pick(&[Patience::All, Patience::Pages]),
    };
    restore(&criu, &files, patience, &mut random).unwrap();
    arrival.streamer.wait_for_stats();
    drop(criu);
    arrival.streamer.expect_success();
}

/// The image, damaged, and what was done to it. It may not be damaged after all.
fn damaged(image: &Indexed, other: &Indexed, random: &mut Random) -> (Indexed, String) {
    let mut image = image.clone();
    let which = random.below(image.shards.len() + 1);
    let is_index = which == image.shards.len();
    let (own, others) = if is_index {
        (&mut image.index, &other.index)
    } else {
        (&mut image.shards[which], &other.shards[which])
    };
    let what = match random.below(6) {
        0 | 1 if !own.is_empty() => {
            own.truncate(random.below(own.len()));
            format!("cut to {} bytes", own.len())
        }
        2 => {
            let more = 1 + random.below(100);
            own.extend(random.bytes(more));
            format!("{more} bytes longer")
        }
        3 if !own.is_empty() => {
            let entries = image::split(which, own).unwrap();
            // A marker's length or its first bytes.
            let at = random.pick(&entries).offset + random.below(8);
            let at = at.min(own.len() - 1);
            let bit = random.below(8);
            own[at] ^= 1 << bit;
            format!("bit {bit} of byte {at} is flipped")
        }
        4 => {
            own.clear();
            "missing".into()
        }
        _ => {
            own.clone_from(others);
            "of another image".into()
        }
    };
    let name = if is_index { "the index" } else { "a shard" };
    (image, format!("{name} ({which}) is {what}"))
}

fn a_damaged_image_arrives(seed: u64) {
    let mut random = Random::new(seed);
    let files = random_files(&mut random);
    let shard_count = 1 + random.below(4);
    let image = indexed::encode(&files, shard_count, &mut random);
    let (image, source, what) = if random.one_in(5) {
        let failing = Some(random.below(shard_count + 1));
        let what = format!("command {failing:?} fails");
        (image, Source::Commands { failing }, what)
    } else {
        let other = indexed::encode(&files, shard_count, &mut random);
        let (damaged, what) = damaged(&image, &other, &mut random);
        if image::decode(&damaged.all()).is_ok() {
            return;
        }
        (damaged, Source::Pipes, what)
    };
    let shortage = shortage(&mut random);
    let launch = launch(seed, shortage.as_ref());
    let mut arrival = Arrival::begin(&source, &image, launch, &mut random);
    if arrival.streamer.listens()
        && let Ok(criu) = Criu::try_connect(arrival.streamer.images_dir(), Role::Serve)
    {
        let restored = restore(&criu, &files, Patience::All, &mut random);
        assert!(restored.is_err(), "{what}: restored");
    }
    let exit = arrival.streamer.wait();
    assert_eq!(exit.status.code(), Some(1), "{what}: {}", exit.stderr);
    exit.error();
    let is_statistics = |line: &String| line.starts_with('{');
    assert!(!exit.progress.iter().any(is_statistics), "{what}");
    for feeder in arrival.feeders {
        feeder.join().unwrap();
    }
}

/// On several threads: most of the time is spent waiting.
fn seeds(default: u64, round: impl Fn(u64) + Sync) {
    const THREADS: u64 = 4;
    let first = setting("ARRIVING_FIRST_SEED", 0);
    let count = setting("ARRIVING_SEEDS", default);
    let end = |thread| first + count * thread / THREADS;
    let round = &round;
    thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || for_each_seed(end(thread)..end(thread + 1), round));
        }
    });
}

#[test]
fn readers_of_every_kind_get_a_whole_image_at_any_pace() {
    seeds(90, a_whole_image_arrives);
}

#[test]
fn no_reader_gets_all_pages_of_a_damaged_image() {
    seeds(140, a_damaged_image_arrives);
}
