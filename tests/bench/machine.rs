//! The machine that is measured, and its state, which the benchmark must leave as it was.

use anyhow::{Context, Result};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};
use std::{
    env, fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio, id},
    thread,
    time::{Duration, Instant},
};

/// The facts that must stand above every table of figures.
#[derive(Serialize, Deserialize)]
pub struct Machine {
    date: String,
    cpu: String,
    cores: usize,
    memory: String,
    kernel: String,
    pipe_max_size: String,
    transparent_huge_pages: String,
    load_before: String,
}

impl Machine {
    pub fn describe() -> Result<Self> {
        let setting = |path: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            text.trim().to_owned()
        };
        let first_field = |path: &str, field: &str| {
            (setting(path).lines().find(|line| line.starts_with(field)))
                .and_then(|line| line.split_once(':'))
                .map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
        };
        let date = Command::new("date").args(["-u", "+%F %T UTC"]).output()?;
        Ok(Self {
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            cpu: first_field("/proc/cpuinfo", "model name"),
            cores: thread::available_parallelism()?.get(),
            memory: first_field("/proc/meminfo", "MemTotal"),
            kernel: uname()?.release().to_string_lossy().into_owned(),
            pipe_max_size: setting("/proc/sys/fs/pipe-max-size"),
            transparent_huge_pages: setting("/sys/kernel/mm/transparent_hugepage/enabled"),
            load_before: setting("/proc/loadavg"),
        })
    }

    pub fn print(&self) {
        println!(
            "{}: {} cores ({}), {} memory, Linux {}",
            self.date, self.cores, self.cpu, self.memory, self.kernel
        );
        println!(
            "pipe-max-size {}, transparent huge pages {}, load {}",
            self.pipe_max_size, self.transparent_huge_pages, self.load_before
        );
    }
}

/// Memory for the runs, which is in use between them too.
///
/// A virtual machine gives free memory back to its host, and pays the host's page faults when it
/// touches it again: up to 2.5 CPU s/GB, which hides all that programs do better or worse. The
/// kernel looks for memory to give back every two seconds while there is some. So this holds the
/// memory that a run will need until the kernel has looked, and frees it just before the run.
pub struct Reserve {
    bytes: usize,
    held: Option<(Vec<u8>, Instant)>,
}

/// `PAGE_REPORTING_DELAY` of the kernel, and some.
const REPORTING_PERIOD: Duration = Duration::from_millis(2500);

impl Reserve {
    /// For runs that fill about `bytes` of memory.
    pub fn new(bytes: u64) -> Self {
        let mut reserve = Self {
            bytes: (bytes + bytes / 4) as usize,
            held: None,
        };
        reserve.take();
        reserve
    }

    pub fn take(&mut self) {
        self.held = Some((vec![1; self.bytes], Instant::now()));
    }

    /// The run follows at once.
    pub fn let_go(&mut self) {
        if let Some((_memory, since)) = self.held.take() {
            thread::sleep(REPORTING_PERIOD.saturating_sub(since.elapsed()));
        }
    }
}

/// A directory in memory that ends with the benchmark, however that ends.
pub struct WorkDir {
    path: PathBuf,
    janitor: Child,
}

impl WorkDir {
    pub fn create() -> Result<Self> {
        let in_memory = Path::new("/dev/shm");
        let parent = if in_memory.is_dir() {
            in_memory.to_owned()
        } else {
            env::temp_dir()
        };
        let path = parent.join(format!("criu-image-streamer-bench-{}", id()));
        fs::create_dir(&path).with_context(|| path.display().to_string())?;
        // In a process group of its own, out of reach of a Ctrl-C, it sees its input end.
        let janitor = Command::new("sh")
            .args([
                "-c",
                "cat >/dev/null; until rm -rf \"$0\"; do sleep 0.1; done",
            ])
            .arg(&path)
            .stdin(Stdio::piped())
            .process_group(0)
            .spawn()?;
        Ok(Self { path, janitor })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}
