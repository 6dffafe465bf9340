//! `make bench`: the streamer's costs, with a real CRIU.
//!
//! A small application is dumped by a real CRIU, and restored from the image that this made, in a
//! machine of namespaces as in the tests. All programs that are compared run in turns, because
//! figures of a machine only mean something beside others of the same minute: this build,
//! `BASELINE=` (another build of the streamer) and `ORIGINAL=` (the original program). Everything
//! is in memory, so that no disk is measured.

#[allow(
    dead_code,
    reason = "the tests use all of it, and the benchmark a part"
)]
#[path = "../common/mod.rs"]
mod common;

#[allow(
    dead_code,
    reason = "the tests use all of it, and the benchmark a part"
)]
#[path = "../criu/mod.rs"]
mod criu;

mod capture;
mod frozen;
mod link;
mod machine;
mod meter;
mod report;
mod restore;
mod session;
mod timelines;

use anyhow::{Context, Result};
use machine::{Machine, WorkDir};
use report::{Figures, Report};
use session::Program;
use std::{env, path::PathBuf};
use structopt::StructOpt;

/// Measures criu-image-streamer with a real CRIU: seconds, CPU time, memory, and how even shards
/// are.
#[derive(StructOpt)]
struct Options {
    /// Run only the scenarios with one of these in their names
    #[structopt(long, value_name = "pattern", number_of_values = 1)]
    only: Vec<String>,

    /// Print the scenarios' names
    #[structopt(long)]
    list: bool,

    /// Runs of each scenario (default: 5; 10 for evenness, 2 where a run takes long)
    #[structopt(long, value_name = "count")]
    runs: Option<usize>,

    /// Divide the sizes of all applications by this
    #[structopt(long, value_name = "divisor", default_value = "1")]
    shrink: u64,

    /// Keep the figures in this file, beside the figures of other scenarios in it
    #[structopt(long, value_name = "file")]
    json: Option<PathBuf>,

    /// Draw the timelines of a restore and of a frozen application
    #[structopt(long, value_name = "file.svg")]
    timelines: Option<PathBuf>,

    /// Measure another build of the streamer
    #[structopt(long, value_name = "program", default_value = env!("CARGO_BIN_EXE_criu-image-streamer"))]
    streamer: PathBuf,

    /// The option that `cargo bench` gives to every benchmark
    #[structopt(long, hidden = true)]
    bench: bool,

    /// Copy standard input to standard output at this speed, and say how much it was
    #[structopt(long, hidden = true, value_name = "bytes per second")]
    link: Option<f64>,
}

impl Options {
    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern))
    }

    /// How many runs, where that many are usual.
    fn runs(&self, usual: usize) -> usize {
        self.runs.unwrap_or(usual).max(1)
    }

    fn bytes(&self, mib: u64) -> u64 {
        (mib / self.shrink).max(1) << 20
    }

    /// The builds of this program that are measured, and the original.
    fn programs(&self) -> Result<Vec<Program>> {
        let given = |variable| env::var_os(variable).map(PathBuf::from);
        let mut programs = vec![Program::new("streamer", &self.streamer)?];
        if let Some(path) = given("BASELINE") {
            programs.push(Program::new("baseline", &path)?);
        }
        if let Some(path) = given("ORIGINAL") {
            programs.push(Program::new(session::ORIGINAL, &path)?);
        }
        Ok(programs)
    }
}

/// The means of all measurements.
struct Bench {
    options: Options,
    programs: Vec<Program>,
    work_dir: WorkDir,
    report: Report,
}

impl Bench {
    /// Runs all ways of a scenario, and all again, so that a busy moment of the machine hits them
    /// all; none is always the first.
    fn in_turns<W>(
        &mut self,
        scenario: &str,
        usual_runs: usize,
        ways: Vec<(String, W)>,
        mut run: impl FnMut(&W) -> Result<Figures>,
    ) -> Result<()> {
        let runs = self.options.runs(usual_runs);
        let mut figures: Vec<Vec<Figures>> = ways.iter().map(|_| vec![]).collect();
        for round in 0..runs {
            eprintln!("{scenario} {}/{runs}", round + 1);
            for turn in 0..ways.len() {
                let number = (round + turn) % ways.len();
                figures[number].push(run(&ways[number].1)?);
            }
        }
        for ((way, _), figures) in ways.iter().zip(&figures) {
            self.report.add(scenario, way, figures)?;
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let options = Options::from_args();
    if let Some(bytes_per_s) = options.link {
        return link::copy(bytes_per_s);
    }
    if !options.bench {
        println!("Nothing is measured in a test run: use `make bench`.");
        return Ok(());
    }
    let captures = capture::scenarios();
    let restores = restore::scenarios();
    if options.list {
        let captures = captures.iter().map(|scenario| &scenario.name);
        let frozen = frozen::SCENARIOS.iter().map(|scenario| scenario.name);
        let restores = restores.iter().map(|scenario| scenario.name);
        for name in captures.map(String::as_str).chain(frozen).chain(restores) {
            println!("{name}");
        }
        return Ok(());
    }
    let mut bench = Bench {
        programs: options.programs()?,
        work_dir: WorkDir::create()?,
        report: Report::open(options.json.as_deref(), Machine::describe()?)?,
        options,
    };
    for scenario in captures {
        if bench.options.wants(&scenario.name) {
            capture::measure(&scenario, &mut bench).context(scenario.name)?;
        }
    }
    for scenario in &frozen::SCENARIOS {
        if bench.options.wants(scenario.name) {
            frozen::measure(scenario, &mut bench).context(scenario.name)?;
        }
    }
    for scenario in restores {
        if bench.options.wants(scenario.name) {
            restore::measure(&scenario, &mut bench).context(scenario.name)?;
        }
    }
    bench.report.print();
    if let Some(path) = &bench.options.timelines {
        timelines::draw(&bench.report, path)?;
    }
    Ok(())
}
