//! How long a real CRIU freezes an application: by a dump into a directory in memory, and through
//! the streamer to `lz4`, with a buffer and without one.
//!
//! The figure is CRIU's own, from its statistics.

use crate::Options;
use crate::capture::Sinks;
use crate::machine::{Memory, Temperature, WorkDir};
use crate::memory::{PageMemory, Pages};
use crate::role::Role;
use crate::sink::Sink;
use crate::statistics::median_of;
use crate::streamer::{Restriction, Streamer};
use anyhow::{Context, Result, bail, ensure};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

pub const SCENARIO: &str = "frozen/real-criu-4-shards-lz4";

/// An application with memory, and nothing to do.
#[derive(Serialize, Deserialize)]
pub struct Application {
    pub bytes: u64,
    /// Made when the memory is there.
    pub ready: PathBuf,
}

impl Application {
    pub fn play(self) -> Result<()> {
        let _memory = PageMemory::filled(self.bytes as usize, Pages::Small)?;
        fs::write(&self.ready, "")?;
        loop {
            thread::sleep(Duration::from_millis(100));
        }
    }
}

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    pub buffered_s: f64,
    pub unbuffered_s: f64,
    pub directory_s: f64,
}

/// The part of CRIU's `stats-dump` that counts here (`stats_entry`).
#[derive(Message)]
struct Statistics {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatistics>,
}

/// CRIU's `dump_stats_entry`. Times are in microseconds.
#[derive(Message)]
struct DumpStatistics {
    #[prost(uint32, tag = "2")]
    frozen_time: u32,
}

/// For how many seconds the dump that left its statistics there had the application frozen.
fn frozen_s(images_dir: &Path) -> Result<f64> {
    // Two magic numbers and the length of the one message.
    const HEAD: usize = 12;
    let bytes = fs::read(images_dir.join("stats-dump")).context("CRIU left no statistics")?;
    let message = bytes.get(HEAD..).context("CRIU's statistics are short")?;
    let dump = Statistics::decode(message)?.dump;
    let dump = dump.context("CRIU's statistics are not of a dump")?;
    Ok(f64::from(dump.frozen_time) / 1e6)
}

/// A CRIU that works here, or why there is none.
fn find_criu() -> Result<PathBuf> {
    let found = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/criu/find-criu"))
        .stderr(Stdio::piped())
        .output()?;
    ensure!(
        found.status.success(),
        "{}",
        String::from_utf8_lossy(&found.stderr).trim()
    );
    Ok(String::from_utf8(found.stdout)?.trim().into())
}

#[derive(Clone, Copy)]
enum Way {
    Directory,
    Stream { buffer: Option<u64> },
}

/// `None` where no CRIU works, having said why.
pub fn measure(
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Option<Figures>> {
    let criu = match find_criu() {
        Ok(criu) => criu,
        Err(why) => {
            said(&format!("{SCENARIO} is left out: {why:#}"));
            return Ok(None);
        }
    };
    let bytes = options.size_bytes();
    let application = Running::start(bytes, work_dir)?;
    let mut memory = Memory::new(Temperature::Warm, bytes)?;
    let ways = [
        Way::Directory,
        Way::Stream {
            buffer: Some(2 * bytes),
        },
        Way::Stream { buffer: None },
    ];
    let mut figures = [const { vec![] }; 3];
    for round in 1..=options.runs() {
        said(&format!("{SCENARIO} {round}/{}", options.runs()));
        for (way, figures) in ways.iter().zip(&mut figures) {
            memory.prepare();
            let dumped = application.dump(&criu, *way, options, work_dir);
            figures.push(dumped.context(SCENARIO)?);
            work_dir.subdirectory("images")?;
            memory.finish()?;
        }
    }
    let [directory_s, buffered_s, unbuffered_s] =
        figures.map(|figures| median_of(figures.into_iter()));
    Ok(Some(Figures {
        scenario: SCENARIO.to_owned(),
        runs: options.runs(),
        bytes,
        buffered_s,
        unbuffered_s,
        directory_s,
    }))
}

struct Running(Child);

impl Running {
    fn start(bytes: u64, work_dir: &WorkDir) -> Result<Self> {
        let ready = work_dir.subdirectory("application")?.join("ready");
        let role = Role::Application(Application {
            bytes,
            ready: ready.clone(),
        });
        let command = role.command()?;
        // A session of its own and no terminal, as CRIU wants it.
        let child = Command::new("setsid")
            .arg(command.get_program())
            .args(command.get_args())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("setsid")?;
        let running = Self(child);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !ready.exists() {
            ensure!(Instant::now() < deadline, "The application did not start");
            thread::sleep(Duration::from_millis(10));
        }
        Ok(running)
    }

    /// Dumps it, lets it go on, and tells for how many seconds it was frozen.
    fn dump(&self, criu: &Path, way: Way, options: &Options, work_dir: &WorkDir) -> Result<f64> {
        let run = |images_dir: &Path, more: &[&str]| {
            let log = work_dir.subdirectory("log")?.join("dump.log");
            let status = Command::new(criu)
                .arg("dump")
                .args(["--leave-running", "--tree", &self.0.id().to_string()])
                .arg("--images-dir")
                .arg(images_dir)
                .arg("--log-file")
                .arg(&log)
                .args(more)
                .status()
                .context("criu")?;
            if !status.success() {
                bail!("CRIU failed with {status}: {}", fs::read_to_string(log)?);
            }
            frozen_s(images_dir)
        };
        let buffer = match way {
            Way::Directory => return run(&work_dir.subdirectory("images")?, &[]),
            Way::Stream { buffer } => buffer,
        };
        let (sinks, shards) = Sinks::start(&[Sink::Lz4; 4])?;
        let size = buffer.map(|bytes| bytes.to_string());
        let mut arguments = vec!["capture"];
        if let Some(size) = &size {
            arguments.extend(["--buffer", size]);
        }
        let program = &options.streamer;
        let mut streamer =
            Streamer::spawn_with(program, &arguments, shards, work_dir, Restriction::None)?;
        streamer.wait_for_socket()?;
        let frozen_s = run(&streamer.images_dir, &["--stream"])?;
        streamer.finish()?;
        sinks.wait()?;
        Ok(frozen_s)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
