//! Restore scenarios: producers, the streamer or what it is compared with, and a simulated CRIU.
//!
//! Receiving lasts from the start of the process, when the producers have filled their pipes
//! already, until it listens for CRIU; serving lasts from CRIU's first request to its last byte.
//! What the process has used up when it listens was for receiving, the rest for serving.

use crate::Options;
use crate::clock::{now_ns, seconds_between};
use crate::image::{Content, Image};
use crate::machine::{Reserve, WorkDir, pipe_max_size};
use crate::measured::spawn_with_fds;
use crate::naive::Naive;
use crate::producer::Producer;
use crate::reader::Reader;
use crate::role::{Performer, Role};
use crate::statistics::{GB, median_of};
use crate::streamer::{Streamer, pipe};
use anyhow::{Context, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use std::{
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

pub struct Scenario {
    pub name: String,
    content: Content,
    shards: usize,
    source: Source,
}

pub const SMALL_FILES: usize = 50_000;

pub const EXTRACT: &str = "extract/1-shard";

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
    };
    let (little, large) = (Source::Blocks(64 << 10), Source::Blocks(4 << 20));
    vec![
        scenario("1-shard-64KiB-blocks", pages, 1, little),
        scenario("4-shards-64KiB-blocks", pages, 4, little),
        scenario("32-shards-64KiB-blocks", pages, 32, little),
        scenario("1-shard-4MiB-blocks", pages, 1, large),
        scenario("4-shards-4MiB-blocks", pages, 4, large),
        scenario("4-shards-lz4", pages, 4, Source::Lz4),
        scenario("small-files-1-shard", small, 1, little),
        scenario("small-files-4-shards", small, 4, little),
    ]
}

/// It shall not matter who comes first of two.
fn in_turn<T>(round: usize, mut pair: [T; 2]) -> [T; 2] {
    if round % 2 == 1 {
        pair.reverse();
    }
    pair
}

struct Run {
    receive_s: f64,
    receive_cpu_s: f64,
    receive_peak_rss_bytes: f64,
    serve_s: f64,
    serve_cpu_s: f64,
    peak_rss_bytes: f64,
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
    pub receive_peak_rss_over_image_mb: f64,
    pub peak_rss_over_image_mb: f64,
}

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    pub streamer: Side,
    pub naive: Side,
}

#[derive(Clone, Copy)]
enum Program {
    Streamer,
    Naive,
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
    let mut reserve = Reserve::new(scenario.content.total_bytes())?;
    let mut streamer = vec![];
    let mut naive = vec![];
    for round in 1..=options.runs() {
        said(&format!("{} {round}/{}", scenario.name, options.runs()));
        for program in in_turn(round, [Program::Naive, Program::Streamer]) {
            let run = run(
                program,
                scenario,
                image.as_ref(),
                options,
                work_dir,
                &mut reserve,
            );
            let run = run.context(scenario.name.clone())?;
            match program {
                Program::Streamer => streamer.push(run),
                Program::Naive => naive.push(run),
            }
        }
    }
    let bytes = scenario.content.total_bytes();
    Ok(Figures {
        scenario: scenario.name.clone(),
        runs: options.runs(),
        bytes,
        streamer: Side::of(&streamer, bytes),
        naive: Side::of(&naive, bytes),
    })
}

impl Side {
    fn of(runs: &[Run], bytes: u64) -> Self {
        let gb = bytes as f64 / GB;
        let median = |figure: &dyn Fn(&Run) -> f64| median_of(runs.iter().map(figure));
        let serve_s = median(&|run| run.serve_s);
        let cpu_s = median(&|run| run.receive_cpu_s + run.serve_cpu_s);
        let over_image_mb = |rss: f64| (rss - bytes as f64) / 1e6;
        Self {
            receive_gb_per_s: gb / median(&|run| run.receive_s),
            receive_cpu_s_per_gb: median(&|run| run.receive_cpu_s) / gb,
            serve_s,
            serve_gb_per_s: gb / serve_s,
            serve_cpu_s_per_gb: median(&|run| run.serve_cpu_s) / gb,
            cpu_s,
            cpu_s_per_gb: cpu_s / gb,
            receive_peak_rss_over_image_mb: over_image_mb(median(&|run| {
                run.receive_peak_rss_bytes
            })),
            peak_rss_over_image_mb: over_image_mb(median(&|run| run.peak_rss_bytes)),
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
    reserve: &mut Reserve,
) -> Result<Run> {
    let reader = Role::Reader(Reader {
        content: scenario.content,
    });
    let mut reader = Performer::prepare(&reader, &[])?;
    let (producers, shards) = start_producers(producers(scenario, image)?)?;
    reserve.let_go();
    let mut streamer = match program {
        Program::Streamer => Streamer::spawn(&options.streamer, "serve", shards, work_dir)?,
        Program::Naive => {
            let numbers = shards.iter().map(AsRawFd::as_raw_fd).collect();
            Streamer::spawn_as(shards, work_dir, |images_dir, progress| {
                let role = Role::Naive(Naive {
                    images_dir: images_dir.to_owned(),
                    shards: numbers,
                    progress,
                    pipe_size: pipe_max_size()?,
                });
                role.command()
            })?
        }
    };
    streamer.wait_for_socket()?;
    let receive_s = seconds_between(streamer.started_ns, now_ns());
    let receive_cpu_s = streamer.process.cpu_s()?;
    let receive_peak_rss_bytes = streamer.process.peak_rss_bytes()? as f64;
    reader.start(streamer.images_dir.to_str().context("Odd directory")?)?;
    let span = reader.finish();
    let finished = streamer.finish()?;
    reserve.take()?;
    finish_producers(producers)?;
    Ok(Run {
        receive_s,
        receive_cpu_s,
        receive_peak_rss_bytes,
        serve_s: span?.seconds(),
        serve_cpu_s: finished.cpu_s - receive_cpu_s,
        peak_rss_bytes: finished.peak_rss_bytes as f64,
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
    };
    let mut reserve = Reserve::new(bytes)?;
    let mut extracts = vec![];
    let mut cats = vec![];
    for round in 1..=options.runs() {
        said(&format!("{EXTRACT} {round}/{}", options.runs()));
        for program in in_turn(round, [Extractor::Cat, Extractor::Streamer]) {
            let run = time_extraction(program, &scenario, options, work_dir, &mut reserve);
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
    reserve: &mut Reserve,
) -> Result<Extraction> {
    let (producers, mut shards) = start_producers(producers(scenario, None)?)?;
    reserve.let_go();
    let streamer = match program {
        Extractor::Streamer => Streamer::spawn(&options.streamer, "extract", shards, work_dir)?,
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
    reserve.take()?;
    finish_producers(producers)?;
    Ok(Extraction {
        seconds,
        cpu_s: finished.cpu_s,
        peak_rss_bytes: finished.peak_rss_bytes as f64,
    })
}
