//! `make bench`: what the streamer costs, measured from outside.
//!
//! The streamer runs as a process of its own, and so does everything that it deals with: CRIU, the
//! sinks, the producers. All but the streamer are simulated by this same program (see `role`), so
//! that the figures are the streamer's alone and the same on every machine with the same kernel.
//! Each capture is measured beside the same writer feeding the same sinks without a streamer, each
//! restore beside a naive receiver and the streamer without its pipes, in turns, because figures of
//! a machine only mean something beside others of the same minute.

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

mod arriving;
mod capture;
mod clock;
mod download;
mod frozen;
mod image;
mod machine;
mod measured;
mod memory;
mod naive;
mod peak;
mod producer;
mod reader;
mod real_criu;
mod report;
mod restore;
mod role;
mod sink;
mod statistics;
mod streamer;
mod writer;

use anyhow::{Context, Result};
use machine::{Machine, WorkDir};
use report::Report;
use role::Role;
use std::{
    fs::File,
    path::PathBuf,
    process::exit,
    sync::mpsc::{RecvTimeoutError, Sender, channel},
    thread,
    time::Duration,
};
use structopt::StructOpt;

/// Measures criu-image-streamer: throughput, CPU time and memory of captures and restores.
#[derive(StructOpt)]
struct Options {
    /// Few runs of 256 MiB
    #[structopt(long)]
    quick: bool,

    /// Run only the scenarios whose name contains one of these
    #[structopt(long, value_name = "pattern", number_of_values = 1)]
    only: Vec<String>,

    /// Print the scenarios' names
    #[structopt(long)]
    list: bool,

    /// Write the figures to this file as well
    #[structopt(long, value_name = "file")]
    json: Option<PathBuf>,

    /// Size of the image to restore; captures move four times as much (default: 1024, quick: 256)
    #[structopt(long, value_name = "MiB")]
    size: Option<u64>,

    /// Runs of each scenario (default: 5, quick: 3)
    #[structopt(long, value_name = "count")]
    runs: Option<usize>,

    /// Measure another build of the streamer
    #[structopt(long, value_name = "program", default_value = env!("CARGO_BIN_EXE_criu-image-streamer"))]
    streamer: PathBuf,

    /// What `cargo bench` says to every benchmark
    #[structopt(long, hidden = true)]
    bench: bool,
}

impl Options {
    fn size_bytes(&self) -> u64 {
        self.size.unwrap_or(if self.quick { 256 } else { 1024 }) << 20
    }

    fn runs(&self) -> usize {
        self.runs.unwrap_or(if self.quick { 3 } else { 5 }).max(1)
    }

    fn wants(&self, name: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|pattern| name.contains(pattern))
    }
}

fn main() -> Result<()> {
    if let Some(role) = Role::from_arguments()? {
        return role.play();
    }
    let options = Options::from_args();
    if !options.bench {
        println!("Nothing is measured in a test run: use `make bench`.");
        return Ok(());
    }
    if options.list {
        list(&options);
        return Ok(());
    }
    let report = measure(&options)?;
    report.print();
    if let Some(path) = &options.json {
        let file = File::create(path).with_context(|| path.display().to_string())?;
        serde_json::to_writer_pretty(file, &report)?;
    }
    Ok(())
}

fn list(options: &Options) {
    let captures = capture::scenarios(options).into_iter().map(|s| s.name);
    let restores = restore::scenarios(options).into_iter().map(|s| s.name);
    for name in captures
        .chain(restores)
        .chain([restore::EXTRACT, frozen::UPLOADS, real_criu::SCENARIO].map(str::to_owned))
        .chain(arriving::SCENARIOS.map(|scenario| scenario.name.to_owned()))
    {
        println!("{name}");
    }
}

fn measure(options: &Options) -> Result<Report> {
    let work_dir = WorkDir::create()?;
    let watchdog = start_watchdog();
    let say = |step: &str| {
        eprintln!("{step}");
        let _ = watchdog.send(step.to_owned());
    };
    let mut report = Report {
        machine: Machine::describe()?,
        capture: vec![],
        restore: vec![],
        extract: None,
        arriving: vec![],
        no_criu: None,
        frozen: None,
        real_criu: None,
        bounds: vec![],
    };
    let mut arrivals = arriving::SCENARIOS.to_vec();
    arrivals.retain(|scenario| options.wants(scenario.name));
    match arriving::measure(&arrivals, options, &work_dir, say)? {
        Ok(figures) => report.arriving = figures,
        Err(why) => report.no_criu = Some(why),
    }
    if options.wants(real_criu::SCENARIO) {
        match real_criu::measure(options, &work_dir, say)? {
            Ok(figures) => report.real_criu = Some(figures),
            Err(why) => report.no_criu = Some(why),
        }
    }
    // CRIU needs it, and all that follows does without.
    machine::drop_resource_capability();
    let mut captures = capture::scenarios(options);
    captures.retain(|scenario| options.wants(&scenario.name));
    report.capture = capture::measure(&captures, options, &work_dir, say)?;
    for scenario in restore::scenarios(options) {
        if options.wants(&scenario.name) {
            let figures = restore::measure(&scenario, options, &work_dir, say)?;
            report.restore.push(figures);
        }
    }
    if options.wants(restore::EXTRACT) {
        report.extract = Some(restore::measure_extract(options, &work_dir, say)?);
    }
    if options.wants(frozen::UPLOADS) {
        report.frozen = Some(frozen::measure(options, &work_dir, say)?);
    }
    report.judge();
    Ok(report)
}

/// Ends the benchmark when a step takes so long that something must hang. The streamer dies with
/// its tracer, and the others with their pipes.
fn start_watchdog() -> Sender<String> {
    const HANG: Duration = Duration::from_secs(180);
    let (sender, steps) = channel();
    thread::spawn(move || {
        let mut current = String::new();
        loop {
            match steps.recv_timeout(HANG) {
                Ok(step) => current = step,
                Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("{current} hangs");
                    exit(1);
                }
            }
        }
    });
    sender
}
