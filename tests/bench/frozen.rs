//! How long an application is frozen while it is captured to slow shards: with a buffer and without
//! one, and beside programs that copy the same pipe into memory.

use crate::Options;
use crate::capture::{LARGEST_PIPE, Sinks};
use crate::clock::{now_ns, seconds_between};
use crate::machine::{Memory, Temperature, WorkDir, pipe_max_size};
use crate::measured::spawn_with_fds;
use crate::role::{Performer, Role};
use crate::sink::Sink;
use crate::statistics::{GB, median_of};
use crate::streamer::{Streamer, pipe};
use crate::writer::{Files, Writer};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use serde::Serialize;
use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd},
    process::{Command, Stdio},
};

pub const UPLOADS: &str = "frozen/4-shards-100MB-per-s";

/// Together they take 100 MB per second.
const SINKS: [Sink; 4] = [Sink::Upload; 4];

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    /// As CRIU sees it: from its first request to its last file's end.
    pub criu_s: f64,
    /// From CRIU's first request to the line `memory-copied`.
    pub copied_s: f64,
    pub cpu_s_per_gb: f64,
    pub peak_rss_over_image_mib: f64,
    /// The streamer without a buffer.
    pub unbuffered_s: f64,
    /// `cat` to a file in memory.
    pub cat_s: f64,
    /// A program that reads into memory of huge pages.
    pub reader_s: f64,
}

struct Run {
    criu_s: f64,
    copied_s: f64,
    cpu_s: f64,
    peak_rss_bytes: f64,
}

pub fn measure(
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Figures> {
    let bytes = options.size_bytes();
    let mut memory = Memory::new(Temperature::Warm, bytes)?;
    let (mut buffered, mut unbuffered, mut cats, mut readers) = (vec![], vec![], vec![], vec![]);
    for round in 1..=options.runs() {
        said(&format!("{UPLOADS} {round}/{}", options.runs()));
        cats.push(copy(Copier::Cat, bytes, work_dir, &mut memory)?);
        readers.push(copy(Copier::Reader, bytes, work_dir, &mut memory)?);
        let size = (bytes + bytes / 4).to_string();
        let arguments = ["capture", "--buffer", &size];
        buffered.push(capture(&arguments, bytes, options, work_dir, &mut memory)?);
        unbuffered.push(capture(
            &arguments[..1],
            bytes,
            options,
            work_dir,
            &mut memory,
        )?);
    }
    let median = |runs: &[Run], figure: &dyn Fn(&Run) -> f64| median_of(runs.iter().map(figure));
    let over_image = |run: &Run| (run.peak_rss_bytes - bytes as f64) / f64::from(1 << 20);
    Ok(Figures {
        scenario: UPLOADS.to_owned(),
        runs: options.runs(),
        bytes,
        criu_s: median(&buffered, &|run| run.criu_s),
        copied_s: median(&buffered, &|run| run.copied_s),
        cpu_s_per_gb: median(&buffered, &|run| run.cpu_s) / (bytes as f64 / GB),
        peak_rss_over_image_mib: median(&buffered, &over_image),
        unbuffered_s: median(&unbuffered, &|run| run.criu_s),
        cat_s: median_of(cats.into_iter()),
        reader_s: median_of(readers.into_iter()),
    })
}

fn writer(bytes: u64, direct: Vec<i32>) -> Role {
    Role::Writer(Writer {
        files: Files::Pages { writers: 1, bytes },
        huge_pages: false,
        direct,
    })
}

fn capture(
    arguments: &[&str],
    bytes: u64,
    options: &Options,
    work_dir: &WorkDir,
    memory: &mut Memory,
) -> Result<Run> {
    let mut writer = Performer::prepare(&writer(bytes, vec![]), &[])?;
    let (sinks, shards) = Sinks::start(&SINKS)?;
    memory.prepare();
    let program = &options.streamer;
    let mut streamer = Streamer::spawn(program, arguments, shards, work_dir)?;
    streamer.wait_for_socket()?;
    writer.start(streamer.images_dir.to_str().context("Odd directory")?)?;
    let copied_ns = if arguments.contains(&"--buffer") {
        streamer.wait_for_line("memory-copied")?;
        now_ns()
    } else {
        0
    };
    let span = writer.finish()?;
    let finished = streamer.finish()?;
    sinks.finish(span)?;
    memory.finish()?;
    Ok(Run {
        criu_s: span.seconds(),
        copied_s: seconds_between(span.start_ns, copied_ns.max(span.end_ns)),
        cpu_s: finished.cpu_s,
        peak_rss_bytes: finished.peak_rss_bytes as f64,
    })
}

#[derive(Clone, Copy, PartialEq)]
enum Copier {
    Cat,
    Reader,
}

/// The seconds that a program takes to copy the same pages out of a pipe into memory.
fn copy(copier: Copier, bytes: u64, work_dir: &WorkDir, memory: &mut Memory) -> Result<f64> {
    let (read_end, write_end) = pipe()?;
    let capacity = pipe_max_size()?.min(LARGEST_PIPE) as i32;
    fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(capacity)).context("Failed to resize a pipe")?;
    let mut writer = Performer::prepare(
        &writer(bytes, vec![write_end.as_raw_fd()]),
        &[write_end.as_fd()],
    )?;
    drop(write_end);
    memory.prepare();
    let mut command = match copier {
        Copier::Cat => Command::new("cat"),
        Copier::Reader => Role::Sink(Sink::Keep).command()?,
    };
    let target = work_dir.subdirectory("copy")?.join("pages-1.img");
    command.stdin(read_end);
    command.stdout(match copier {
        Copier::Cat => Stdio::from(File::create(&target)?),
        Copier::Reader => Stdio::null(),
    });
    let mut running = spawn_with_fds(&mut command, &[])?;
    drop(command);
    writer.start("")?;
    let span = writer.finish()?;
    let status = running.wait()?;
    ensure!(status.success(), "A copier failed with {status}");
    work_dir.subdirectory("copy")?;
    memory.finish()?;
    Ok(span.seconds())
}
