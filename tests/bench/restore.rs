//! Restore scenarios: producers, the streamer or what it is compared with, and a simulated CRIU.
//!
//! Receiving lasts from the start of the process, when the producers have filled their pipes
//! already, until it listens for CRIU; serving lasts from CRIU's first request to its last byte.
//! What the process has used up when it listens was for receiving, the rest for serving. What all
//! processes use together, from there to the end, counts too, as a receiver can leave its work to
//! others.
//!
//! Each round runs the naive receiver, the streamer, and the streamer under a limit that has it
//! hold nothing in pipes: on memory that was in use a moment ago, and on cold memory.

use crate::Options;
use crate::clock::{now_ns, seconds_between};
use crate::image::{Content, Image};
use crate::machine::{Memory, Temperature, UsedUpPipes, WorkDir, pipe_max_size};
use crate::measured::{cpu_s, cpu_s_of_ended_children, spawn_with_fds};
use crate::naive::Naive;
use crate::peak::PeakWatch;
use crate::producer::Producer;
use crate::reader::Reader;
use crate::role::{Performer, Role};
use crate::statistics::{GB, median_of, over_image_mib};
use crate::streamer::{Executable, Restriction, Streamer, fd_list, pipe, streamer_command};
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::Uid;
use serde::Serialize;
use std::{
    env::current_exe,
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    process::{Child, Command},
};

#[derive(Clone, Copy, PartialEq)]
pub enum Source {
    /// Writes this many bytes at a time.
    Blocks(usize),
    /// `lz4 -d`.
    Lz4,
}

/// What the receiver is not allowed.
#[derive(Clone, Copy, PartialEq)]
enum Limits {
    None,
    Restricted(Restriction),
    /// It is an ordinary user, and root, whose pipes the shards are, has used up what one user may
    /// have in pipes.
    NoPipePages,
}

impl Limits {
    fn restriction(self) -> Restriction {
        match self {
            Self::None => Restriction::None,
            Self::Restricted(restriction) => restriction,
            Self::NoPipePages => Restriction::User,
        }
    }
}

pub struct Scenario {
    pub name: String,
    content: Content,
    shards: usize,
    source: Source,
    temperature: Temperature,
    limits: Limits,
    /// CRIU keeps what it reads.
    kept: bool,
}

pub const SMALL_FILES: usize = 50_000;

pub const EXTRACT: &str = "extract/1-shard";

const LITTLE: Source = Source::Blocks(64 << 10);
const LARGE: Source = Source::Blocks(4 << 20);

pub fn scenarios(options: &Options) -> Vec<Scenario> {
    let pages = Content::Pages {
        files: 4,
        bytes: options.size_bytes(),
    };
    let small = Content::Small {
        count: SMALL_FILES,
        bytes: 1024,
    };
    let scenario = |name: &str, content, shards, source| Scenario {
        name: format!("restore/{name}"),
        content,
        shards,
        source,
        temperature: Temperature::Warm,
        limits: Limits::None,
        kept: false,
    };
    let cold = |scenario: Scenario| Scenario {
        name: format!("{}-cold", scenario.name),
        temperature: Temperature::Cold,
        ..scenario
    };
    let mut scenarios = vec![];
    for (source, name) in [
        (LITTLE, "64KiB-blocks"),
        (LARGE, "4MiB-blocks"),
        (Source::Lz4, "lz4"),
    ] {
        let of = |shards: usize| {
            let plural = if shards == 1 { "" } else { "s" };
            scenario(
                &format!("{shards}-shard{plural}-{name}"),
                pages,
                shards,
                source,
            )
        };
        scenarios.extend([of(1), of(4), of(32), cold(of(4))]);
    }
    scenarios.push(Scenario {
        kept: true,
        ..scenario("4-shards-64KiB-blocks-kept", pages, 4, LITTLE)
    });
    let restrictions = [
        ("as-user", Limits::Restricted(Restriction::User)),
        (
            "64-descriptors",
            Limits::Restricted(Restriction::OpenFiles(64)),
        ),
        ("no-pipe-pages", Limits::NoPipePages),
    ];
    // Only root can become another user.
    let possible = if Uid::effective().is_root() {
        restrictions.as_slice()
    } else {
        &[]
    };
    for &(name, limits) in possible {
        let of = || Scenario {
            limits,
            ..scenario(&format!("4-shards-64KiB-blocks-{name}"), pages, 4, LITTLE)
        };
        scenarios.extend([of(), cold(of())]);
    }
    scenarios.push(scenario("small-files-1-shard", small, 1, LITTLE));
    scenarios.push(scenario("small-files-4-shards", small, 4, LITTLE));
    scenarios
}

/// It shall not matter who comes first.
fn in_turn<T>(round: usize, programs: &mut [T]) -> &[T] {
    let count = programs.len();
    programs.rotate_left(round % count);
    programs
}

struct Run {
    receive_s: f64,
    receive_cpu_s: f64,
    receive_peak_rss_bytes: f64,
    serve_s: f64,
    serve_cpu_s: f64,
    /// Of the producers, the receiver and CRIU.
    all_cpu_s: f64,
    /// Of the same.
    peak_bytes: Option<u64>,
}

/// One program's medians.
#[derive(Serialize)]
pub struct Side {
    pub receive_gb_per_s: f64,
    pub receive_cpu_s_per_gb: f64,
    pub serve_s: f64,
    pub serve_gb_per_s: f64,
    pub serve_cpu_s_per_gb: f64,
    pub cpu_s: f64,
    pub cpu_s_per_gb: f64,
    pub all_cpu_s_per_gb: f64,
    pub receive_peak_rss_over_image_mb: f64,
    pub peak_over_image_mib: Option<f64>,
}

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    pub memory: Temperature,
    /// The receiver is not allowed everything, and nothing is held in pipes.
    pub restricted: bool,
    pub streamer: Side,
    /// The streamer under a limit that has it hold nothing in pipes, unless the scenario does.
    pub in_memory: Option<Side>,
    pub naive: Side,
}

#[derive(Clone, Copy, PartialEq)]
enum Program {
    Streamer,
    /// The streamer with few descriptors, so that all of the image goes to memory.
    InMemory,
    Naive,
}

/// Few enough that nothing is held in pipes, and more than is needed for anything else.
const FEW_DESCRIPTORS: u64 = 256;

impl Program {
    fn restriction(self, scenario: &Scenario) -> Restriction {
        match self {
            Self::InMemory => Restriction::OpenFiles(FEW_DESCRIPTORS),
            Self::Streamer | Self::Naive => scenario.limits.restriction(),
        }
    }
}

pub fn measure(
    scenario: &Scenario,
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Figures> {
    let image = match scenario.source {
        Source::Lz4 => Some(compressed(scenario, work_dir)?),
        Source::Blocks(_) => None,
    };
    let bytes = scenario.content.total_bytes();
    let mut memory = Memory::new(scenario.temperature, bytes)?;
    let mut programs = vec![Program::Naive, Program::Streamer];
    let holds =
        scenario.limits == Limits::None && matches!(scenario.content, Content::Pages { .. });
    if holds {
        programs.push(Program::InMemory);
    }
    let mut runs: Vec<(Program, Run)> = vec![];
    for round in 1..=options.runs() {
        said(&format!("{} {round}/{}", scenario.name, options.runs()));
        for &program in in_turn(round, &mut programs) {
            let run = run(
                program,
                scenario,
                image.as_ref(),
                options,
                work_dir,
                &mut memory,
            );
            runs.push((program, run.context(scenario.name.clone())?));
        }
    }
    let side = |program| {
        let of_program = runs.iter().filter(|(of, _)| *of == program);
        Side::of(&of_program.map(|(_, run)| run).collect::<Vec<_>>(), bytes)
    };
    Ok(Figures {
        scenario: scenario.name.clone(),
        runs: options.runs(),
        bytes,
        memory: scenario.temperature,
        restricted: scenario.limits != Limits::None,
        streamer: side(Program::Streamer),
        in_memory: holds.then(|| side(Program::InMemory)),
        naive: side(Program::Naive),
    })
}

impl Side {
    fn of(runs: &[&Run], bytes: u64) -> Self {
        let gb = bytes as f64 / GB;
        let median = |figure: &dyn Fn(&Run) -> f64| median_of(runs.iter().map(|run| figure(run)));
        let serve_s = median(&|run| run.serve_s);
        let cpu_s = median(&|run| run.receive_cpu_s + run.serve_cpu_s);
        let receive_peak_rss_bytes = median(&|run| run.receive_peak_rss_bytes);
        Self {
            receive_gb_per_s: gb / median(&|run| run.receive_s),
            receive_cpu_s_per_gb: median(&|run| run.receive_cpu_s) / gb,
            serve_s,
            serve_gb_per_s: gb / serve_s,
            serve_cpu_s_per_gb: median(&|run| run.serve_cpu_s) / gb,
            cpu_s,
            cpu_s_per_gb: cpu_s / gb,
            all_cpu_s_per_gb: median(&|run| run.all_cpu_s) / gb,
            receive_peak_rss_over_image_mb: (receive_peak_rss_bytes - bytes as f64) / 1e6,
            peak_over_image_mib: over_image_mib(runs.iter().map(|run| run.peak_bytes), bytes),
        }
    }
}

fn compressed(scenario: &Scenario, work_dir: &WorkDir) -> Result<Image> {
    let dir = work_dir.subdirectory("image")?;
    let image = Image::build(&dir, scenario.content, scenario.shards)?;
    image.shards.iter().try_for_each(|shard| compress(shard))?;
    Ok(image)
}

/// Leaves `<shard>.lz4` in the place of `<shard>`.
fn compress(shard: &Path) -> Result<()> {
    let mut lz4 = Command::new("lz4");
    lz4.args(["-q", "-1", "-f"]).arg(shard);
    lz4.arg(shard.with_extension("lz4"));
    let status = lz4.status().context("Failed to run lz4")?;
    ensure!(status.success(), "lz4 failed with {status}");
    std::fs::rename(shard.with_extension("lz4"), shard)?;
    Ok(())
}

fn producers(scenario: &Scenario, image: Option<&Image>) -> Result<Vec<Command>> {
    match (scenario.source, image) {
        (Source::Blocks(block), _) => (0..scenario.shards)
            .map(|shard| {
                let producer = Producer {
                    content: scenario.content,
                    shards: scenario.shards,
                    shard,
                    block,
                };
                Role::Producer(producer).command()
            })
            .collect(),
        (Source::Lz4, image) => (image.context("Nothing to decompress")?.shards.iter())
            .map(|shard| {
                let mut lz4 = Command::new("lz4");
                lz4.args(["-d", "-c"]).stdin(File::open(shard)?);
                Ok(lz4)
            })
            .collect(),
    }
}

/// Starts the producers, and returns when each has put something into its pipe.
fn start_producers(commands: Vec<Command>) -> Result<(Vec<Child>, Vec<OwnedFd>)> {
    let mut producers = vec![];
    let mut shards = vec![];
    for mut command in commands {
        let (read_end, write_end) = pipe()?;
        command.stdout(write_end);
        producers.push(spawn_with_fds(&mut command, &[])?);
        shards.push(read_end);
    }
    for shard in &shards {
        let mut polled = [PollFd::new(shard.as_fd(), PollFlags::POLLIN)];
        poll(&mut polled, PollTimeout::NONE)?;
    }
    Ok((producers, shards))
}

fn finish_producers(producers: Vec<Child>) -> Result<()> {
    for mut producer in producers {
        let status = producer.wait()?;
        ensure!(status.success(), "A producer failed with {status}");
    }
    Ok(())
}

fn run(
    program: Program,
    scenario: &Scenario,
    image: Option<&Image>,
    options: &Options,
    work_dir: &WorkDir,
    memory: &mut Memory,
) -> Result<Run> {
    let ended_before_s = cpu_s_of_ended_children()?;
    let reader = Role::Reader(Reader {
        content: scenario.content,
        keeps: scenario.kept,
    });
    let mut reader = Performer::prepare(&reader, &[])?;
    let (producers, shards) = start_producers(producers(scenario, image)?)?;
    let mut prepared_s = reader.cpu_s()?;
    for producer in &producers {
        prepared_s += cpu_s(producer.id() as i32)?;
    }
    let _used_up = match scenario.limits {
        Limits::NoPipePages => Some(UsedUpPipes::new()?),
        Limits::None | Limits::Restricted(_) => None,
    };
    let restriction = program.restriction(scenario);
    memory.prepare();
    let watch = PeakWatch::start();
    reader.count_in(&watch)?;
    for producer in &producers {
        watch.add(producer.id())?;
    }
    let executable = match program {
        Program::Streamer | Program::InMemory => Executable::open(&options.streamer)?,
        Program::Naive => Executable::open(&current_exe()?)?,
    };
    let path = executable.path();
    let fds = fd_list(&shards);
    let numbers = shards.iter().map(AsRawFd::as_raw_fd).collect();
    let mut streamer = Streamer::spawn_as(shards, work_dir, |images_dir, progress| {
        let mut command = match program {
            Program::Streamer | Program::InMemory => {
                streamer_command(&path, &["serve"], &fds, images_dir, progress)
            }
            Program::Naive => {
                let role = Role::Naive(Naive {
                    images_dir: images_dir.to_owned(),
                    shards: numbers,
                    progress,
                    pipe_size: pipe_max_size()?,
                });
                role.command_of(&path)?
            }
        };
        restriction.apply(&mut command, images_dir)?;
        watch.count(&mut command);
        Ok(command)
    })?;
    streamer.wait_for_socket()?;
    let receive_s = seconds_between(streamer.started_ns, now_ns());
    let receive_cpu_s = streamer.process.cpu_s()?;
    let receive_peak_rss_bytes = streamer.process.peak_rss_bytes()? as f64;
    reader.start(streamer.images_dir.to_str().context("Odd directory")?)?;
    let span = reader.finish();
    let finished = streamer.finish()?;
    let peak_bytes = watch.peak()?;
    finish_producers(producers)?;
    let all_cpu_s = cpu_s_of_ended_children()? - ended_before_s - prepared_s;
    memory.finish()?;
    Ok(Run {
        receive_s,
        receive_cpu_s,
        receive_peak_rss_bytes,
        serve_s: span?.seconds(),
        serve_cpu_s: finished.cpu_s - receive_cpu_s,
        all_cpu_s,
        peak_bytes,
    })
}

/// `extract` to a file system in memory beside `cat shard > file` there.
#[derive(Serialize)]
pub struct ExtractFigures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    pub seconds: f64,
    pub cat_seconds: f64,
    pub cpu_s: f64,
    pub cat_cpu_s: f64,
    pub peak_rss_mb: f64,
}

pub fn measure_extract(
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<ExtractFigures> {
    let bytes = options.size_bytes();
    let scenario = Scenario {
        name: EXTRACT.to_owned(),
        content: Content::Pages { files: 4, bytes },
        shards: 1,
        source: Source::Blocks(1 << 20),
        temperature: Temperature::Warm,
        limits: Limits::None,
        kept: false,
    };
    let mut memory = Memory::new(scenario.temperature, bytes)?;
    let mut programs = [Extractor::Cat, Extractor::Streamer];
    let mut extracts = vec![];
    let mut cats = vec![];
    for round in 1..=options.runs() {
        said(&format!("{EXTRACT} {round}/{}", options.runs()));
        for &program in in_turn(round, &mut programs) {
            let run = time_extraction(program, &scenario, options, work_dir, &mut memory);
            let run = run.context(EXTRACT)?;
            match program {
                Extractor::Streamer => extracts.push(run),
                Extractor::Cat => cats.push(run),
            }
        }
    }
    let median = |runs: &[Extraction], figure: &dyn Fn(&Extraction) -> f64| {
        median_of(runs.iter().map(figure))
    };
    Ok(ExtractFigures {
        scenario: EXTRACT.to_owned(),
        runs: options.runs(),
        bytes,
        seconds: median(&extracts, &|run| run.seconds),
        cat_seconds: median(&cats, &|run| run.seconds),
        cpu_s: median(&extracts, &|run| run.cpu_s),
        cat_cpu_s: median(&cats, &|run| run.cpu_s),
        peak_rss_mb: median(&extracts, &|run| run.peak_rss_bytes) / 1e6,
    })
}

#[derive(Clone, Copy)]
enum Extractor {
    Streamer,
    Cat,
}

struct Extraction {
    seconds: f64,
    cpu_s: f64,
    peak_rss_bytes: f64,
}

fn time_extraction(
    program: Extractor,
    scenario: &Scenario,
    options: &Options,
    work_dir: &WorkDir,
    memory: &mut Memory,
) -> Result<Extraction> {
    let (producers, mut shards) = start_producers(producers(scenario, None)?)?;
    memory.prepare();
    let streamer = match program {
        Extractor::Streamer => Streamer::spawn(&options.streamer, &["extract"], shards, work_dir)?,
        Extractor::Cat => Streamer::spawn_as(vec![], work_dir, |images_dir, _| {
            let mut cat = Command::new("cat");
            cat.stdin(shards.remove(0));
            cat.stdout(File::create(images_dir.join("shard"))?);
            Ok(cat)
        })?,
    };
    let started_ns = streamer.started_ns;
    let finished = streamer.finish()?;
    let seconds = seconds_between(started_ns, finished.ended_ns);
    // Clears what the run left there.
    work_dir.subdirectory("images")?;
    memory.finish()?;
    finish_producers(producers)?;
    Ok(Extraction {
        seconds,
        cpu_s: finished.cpu_s,
        peak_rss_bytes: finished.peak_rss_bytes as f64,
    })
}
