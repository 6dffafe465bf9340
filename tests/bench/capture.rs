//! Capture scenarios: a simulated CRIU, the streamer, and sinks of several kinds.

use crate::Options;
use crate::clock::seconds_between;
use crate::machine::{RaisedLimit, WorkDir, pipe_max_size};
use crate::measured::spawn_with_fds;
use crate::role::{Performer, Role, Span};
use crate::sink::Sink;
use crate::statistics::{GB, median_of};
use crate::streamer::{Streamer, pipe};
use crate::writer::{Files, Writer};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;
use std::{
    os::fd::{AsFd, AsRawFd, OwnedFd},
    process::{Child, Command, Stdio, id},
    thread,
    time::Duration,
};

#[derive(Clone)]
pub struct Scenario {
    pub name: String,
    pub files: Files,
    pub sinks: Vec<Sink>,
    pub raised_limits: bool,
    pub huge_pages: bool,
    /// Processes beside it that do nothing but take processor time.
    pub busy_loops: usize,
}

/// CRIU misbehaves with larger pipes, so no streamer makes them larger, nor do we.
pub const LARGEST_PIPE: usize = 4 << 20;

pub const STALL_BYTES: u64 = 256 << 20;

pub fn scenarios(options: &Options) -> Vec<Scenario> {
    // Captures are fast: the same memory is sent several times, for the start of the process not to
    // count.
    let bytes = 4 * options.size_bytes();
    let pages = |writers, bytes| Files::Pages { writers, bytes };
    let small = Files::Small {
        count: 50_000,
        bytes: 1024,
    };
    let scenario = |name: &str, files: &Files, sinks: Vec<Sink>| Scenario {
        name: format!("capture/{name}"),
        files: files.clone(),
        sinks,
        raised_limits: false,
        huge_pages: false,
        busy_loops: 0,
    };
    let one_of_four = |odd: Sink| vec![odd, Sink::Splice, Sink::Splice, Sink::Splice];
    let one_file = pages(1, bytes);
    let eight_files = pages(8, bytes);
    let short = pages(1, STALL_BYTES);
    let plain = [
        scenario("1-shard", &one_file, vec![Sink::Splice; 1]),
        scenario("4-shards", &one_file, vec![Sink::Splice; 4]),
        scenario("32-shards", &one_file, vec![Sink::Splice; 32]),
        scenario("8-files-1-shard", &eight_files, vec![Sink::Splice; 1]),
        scenario("8-files-4-shards", &eight_files, vec![Sink::Splice; 4]),
        scenario("small-files-1-shard", &small, vec![Sink::Splice; 1]),
        scenario("small-files-4-shards", &small, vec![Sink::Splice; 4]),
        scenario("4-shards-read", &one_file, vec![Sink::Read; 4]),
        scenario(
            "4-shards-lz4",
            &pages(1, options.size_bytes()),
            vec![Sink::Lz4; 4],
        ),
        scenario("4-shards-slow-1", &one_file, one_of_four(Sink::Slow)),
        scenario("4-shards-256MiB", &short, vec![Sink::Splice; 4]),
        scenario("4-shards-256MiB-slow-1", &short, one_of_four(Sink::Slow)),
        scenario(
            "4-shards-256MiB-stalled-1",
            &short,
            one_of_four(Sink::Stalled),
        ),
    ];
    let huge_pages = Scenario {
        huge_pages: true,
        ..scenario("4-shards-huge-pages", &one_file, vec![Sink::Splice; 4])
    };
    let lz4 = plain.iter().filter(|plain| plain.name.ends_with("-lz4"));
    let beside_busy_loops: Vec<_> = (plain
        .iter()
        .filter(|plain| plain.name.ends_with("/4-shards")))
    .chain(lz4)
    .map(|plain| Scenario {
        name: format!("{}-busy", plain.name),
        busy_loops: 2,
        ..plain.clone()
    })
    .collect();
    let with_raised_limits = [0, 1, 4].map(|index: usize| Scenario {
        name: format!("{}-4MiB-pipes", plain[index].name),
        raised_limits: true,
        ..plain[index].clone()
    });
    (plain.into_iter())
        .chain([huge_pages])
        .chain(beside_busy_loops)
        .chain(with_raised_limits)
        .collect()
}

/// One capture, or what the writer did without a streamer.
struct Run {
    criu_s: f64,
    /// Until the last sink had its last byte.
    sinks_s: Option<f64>,
    cpu_s: f64,
    peak_rss_bytes: f64,
    /// The largest shard's size, in mean sizes.
    largest_over_mean: f64,
}

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    /// As CRIU sees it: from its first request to its last file's end.
    pub gb_per_s: f64,
    pub direct_gb_per_s: f64,
    pub wall_multiple_of_direct: f64,
    /// The same to the moment when the sinks have all.
    pub sinks_gb_per_s: Option<f64>,
    pub sinks_wall_multiple_of_direct: Option<f64>,
    pub cpu_s: f64,
    pub cpu_s_per_gb: f64,
    pub peak_rss_mb: f64,
    pub criu_s: f64,
    pub largest_over_mean: f64,
}

/// All scenarios in turn, and all again, so that a busy minute of the machine hits them all. A
/// scenario that this machine does not permit has no figures.
pub fn measure(
    scenarios: &[Scenario],
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Vec<Figures>> {
    let mut runs: Vec<Vec<(Run, Run)>> = scenarios.iter().map(|_| vec![]).collect();
    for round in 1..=options.runs() {
        for (scenario, runs) in scenarios.iter().zip(&mut runs) {
            said(&format!("{} {round}/{}", scenario.name, options.runs()));
            let _raised = if scenario.raised_limits {
                let Some(raised) = RaisedLimit::raise()? else {
                    continue;
                };
                Some(raised)
            } else {
                None
            };
            let _beside = BusyLoops::start(scenario.busy_loops)?;
            let direct = run_direct(scenario)
                .with_context(|| format!("{} without a streamer", scenario.name))?;
            let through =
                run_streamer(scenario, options, work_dir).context(scenario.name.clone())?;
            runs.push((direct, through));
        }
    }
    let figures = scenarios.iter().zip(&runs);
    Ok(figures
        .filter(|(_, runs)| !runs.is_empty())
        .map(|(scenario, runs)| Figures::of(scenario, runs))
        .collect())
}

impl Figures {
    fn of(scenario: &Scenario, runs: &[(Run, Run)]) -> Self {
        let bytes = scenario.files.total_bytes();
        let gb = bytes as f64 / GB;
        let median = |figure: &dyn Fn(&(Run, Run)) -> f64| median_of(runs.iter().map(figure));
        let sinks_count = runs.iter().all(|(_, run)| run.sinks_s.is_some());
        let of_sinks = |figure: &dyn Fn(f64, f64) -> f64| {
            let of_run = |(direct, run): &(Run, Run)| {
                figure(direct.sinks_s.unwrap_or(0.0), run.sinks_s.unwrap_or(0.0))
            };
            sinks_count.then(|| median(&of_run))
        };
        let criu_s = median(&|(_, run)| run.criu_s);
        Self {
            scenario: scenario.name.clone(),
            runs: runs.len(),
            bytes,
            gb_per_s: gb / criu_s,
            direct_gb_per_s: gb / median(&|(direct, _)| direct.criu_s),
            wall_multiple_of_direct: criu_s / median(&|(direct, _)| direct.criu_s),
            sinks_gb_per_s: of_sinks(&|_, run| gb / run),
            sinks_wall_multiple_of_direct: of_sinks(&|direct, run| run / direct),
            cpu_s: median(&|(_, run)| run.cpu_s),
            cpu_s_per_gb: median(&|(_, run)| run.cpu_s) / gb,
            peak_rss_mb: median(&|(_, run)| run.peak_rss_bytes) / 1e6,
            criu_s,
            largest_over_mean: median(&|(_, run)| run.largest_over_mean),
        }
    }
}

/// Takes processor time until it is dropped.
struct BusyLoops(Vec<Child>);

impl BusyLoops {
    fn start(count: usize) -> Result<Self> {
        let start = |_| {
            // It ends with the benchmark, however that ends.
            Ok(Command::new("sh")
                .args(["-c", "while kill -0 $0; do :; done", &id().to_string()])
                .stderr(Stdio::null())
                .spawn()?)
        };
        (0..count).map(start).collect::<Result<_>>().map(Self)
    }
}

impl Drop for BusyLoops {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

pub struct Sinks {
    running: Vec<Child>,
    hindered: bool,
}

impl Sinks {
    /// Starts the sinks and returns them and their pipes.
    pub fn start(kinds: &[Sink]) -> Result<(Self, Vec<OwnedFd>)> {
        let mut running = vec![];
        let mut shards = vec![];
        for &kind in kinds {
            let (read_end, write_end) = pipe()?;
            let mut command = match kind {
                Sink::Lz4 => {
                    let mut lz4 = Command::new("lz4");
                    lz4.args(["-1", "-c"]);
                    lz4
                }
                kind => Role::Sink(kind).command()?,
            };
            command.stdin(read_end).stdout(Stdio::null());
            running.push(spawn_with_fds(&mut command, &[])?);
            shards.push(write_end);
        }
        let hindered = kinds.iter().any(|kind| kind.hinders());
        Ok((Self { running, hindered }, shards))
    }

    /// Waits for the sinks, but not for those that take their time, and tells how long they took.
    pub fn finish(self, span: Span) -> Result<Option<f64>> {
        let hindered = self.hindered;
        self.wait()?;
        let ended_ns = crate::clock::now_ns();
        Ok((!hindered).then(|| seconds_between(span.start_ns, ended_ns)))
    }

    /// Waits for the sinks, but not for those that take their time.
    pub fn wait(self) -> Result<()> {
        for mut sink in self.running {
            if self.hindered {
                sink.kill()?;
                sink.wait()?;
            } else {
                let status = sink.wait()?;
                ensure!(status.success(), "A sink failed with {status}");
            }
        }
        Ok(())
    }
}

fn run_direct(scenario: &Scenario) -> Result<Run> {
    let (sinks, shards) = Sinks::start(&scenario.sinks)?;
    let capacity = pipe_max_size()?.min(LARGEST_PIPE) as i32;
    for shard in &shards {
        fcntl(shard, FcntlArg::F_SETPIPE_SZ(capacity)).context("Failed to resize a shard")?;
    }
    let writer = Role::Writer(Writer {
        files: scenario.files.clone(),
        huge_pages: scenario.huge_pages,
        direct: shards.iter().map(AsRawFd::as_raw_fd).collect(),
    });
    let inherited: Vec<_> = shards.iter().map(AsFd::as_fd).collect();
    let mut writer = Performer::prepare(&writer, &inherited)?;
    drop(inherited);
    drop(shards);
    writer.start("")?;
    let span = writer.finish()?;
    Ok(Run {
        criu_s: span.seconds(),
        sinks_s: sinks.finish(span)?,
        cpu_s: 0.0,
        peak_rss_bytes: 0.0,
        largest_over_mean: 1.0,
    })
}

fn run_streamer(scenario: &Scenario, options: &Options, work_dir: &WorkDir) -> Result<Run> {
    let writer = Role::Writer(Writer {
        files: scenario.files.clone(),
        huge_pages: scenario.huge_pages,
        direct: vec![],
    });
    let mut writer = Performer::prepare(&writer, &[])?;
    let (sinks, shards) = Sinks::start(&scenario.sinks)?;
    let mut streamer = Streamer::spawn(&options.streamer, &["capture"], shards, work_dir)?;
    streamer.wait_for_socket()?;
    // The sinks have started by then: without a streamer it is the writer's memory that they have
    // time for.
    thread::sleep(Duration::from_millis(50));
    writer.start(streamer.images_dir.to_str().context("Odd directory")?)?;
    let span = writer.finish();
    let (finished, sizes) = streamer.finish_with_sizes()?;
    let span = span?;
    let mean = sizes.iter().sum::<u64>() as f64 / sizes.len() as f64;
    let largest = sizes.iter().max().context("No statistics")?;
    Ok(Run {
        criu_s: span.seconds(),
        sinks_s: sinks.finish(span)?,
        cpu_s: finished.cpu_s,
        peak_rss_bytes: finished.peak_rss_bytes as f64,
        largest_over_mean: *largest as f64 / mean,
    })
}
