//! The machine that is measured, its pipe limits, and what the benchmark must leave behind:
//! nothing.
#![allow(unsafe_code)] // prctl has no safe form here.

use crate::memory::{PageMemory, Pages};
use crate::role::Role;
use crate::streamer::pipe;
use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::utsname::uname;
use serde::{Deserialize, Serialize};
use std::{
    env, fs, io,
    os::fd::OwnedFd,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio, id},
    thread,
    time::{Duration, Instant},
};

const PIPE_MAX_SIZE: &str = "/proc/sys/fs/pipe-max-size";
pub const RAISED_PIPE_MAX_SIZE: usize = 4 << 20;

/// What must stand above every table of figures.
#[derive(Serialize)]
pub struct Machine {
    pub date: String,
    pub cpu: String,
    pub cores: usize,
    pub memory: String,
    pub kernel: String,
    pub pipe_max_size: usize,
    pub pipe_user_pages_soft: String,
    pub transparent_huge_pages: String,
    pub load_before: String,
}

impl Machine {
    pub fn describe() -> Result<Self> {
        let kernel = uname()?;
        let first_field = |path: &str, field: &str| {
            let text = fs::read_to_string(path).unwrap_or_default();
            (text.lines().find(|line| line.starts_with(field)))
                .and_then(|line| line.split_once(':'))
                .map_or("unknown".to_owned(), |(_, value)| value.trim().to_owned())
        };
        let setting = |path: &str| {
            fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let date = Command::new("date").args(["-u", "+%F %T UTC"]).output()?;
        Ok(Self {
            date: String::from_utf8_lossy(&date.stdout).trim().to_owned(),
            cpu: first_field("/proc/cpuinfo", "model name"),
            cores: thread::available_parallelism()?.get(),
            memory: first_field("/proc/meminfo", "MemTotal"),
            kernel: kernel.release().to_string_lossy().into_owned(),
            pipe_max_size: pipe_max_size()?,
            pipe_user_pages_soft: setting("/proc/sys/fs/pipe-user-pages-soft"),
            transparent_huge_pages: setting("/sys/kernel/mm/transparent_hugepage/enabled"),
            load_before: setting("/proc/loadavg"),
        })
    }
}

pub fn pipe_max_size() -> Result<usize> {
    let text = fs::read_to_string(PIPE_MAX_SIZE)?;
    text.trim().parse().context("Malformed pipe-max-size")
}

/// With CAP_SYS_RESOURCE no limit would be a limit: no process that we start shall have it.
pub fn drop_resource_capability() {
    const CAP_SYS_RESOURCE: libc::c_ulong = 24;
    // SAFETY: this prctl takes two numbers. Without the right to do so it fails, and then (as good
    // as always) the capability is not there either.
    unsafe { libc::prctl(libc::PR_CAPBSET_DROP, CAP_SYS_RESOURCE, 0, 0, 0) };
}

/// Pipes that use up what one user may have in pipes: without privileges, no further pipe of root's
/// can be made larger while they are there.
pub struct UsedUpPipes {
    _pipes: Vec<OwnedFd>,
}

impl UsedUpPipes {
    pub fn new() -> Result<Self> {
        let soft = fs::read_to_string("/proc/sys/fs/pipe-user-pages-soft")?;
        let soft: usize = soft.trim().parse().context("Malformed limit of pipes")?;
        let size = pipe_max_size()?;
        let mut pipes = vec![];
        for _ in 0..soft.div_ceil(size / 4096) {
            let (read_end, write_end) = pipe()?;
            // Refused: the limit is reached.
            let grown = fcntl(&write_end, FcntlArg::F_SETPIPE_SZ(size as i32));
            pipes.extend([read_end, write_end]);
            if grown.is_err() {
                break;
            }
        }
        Ok(Self { _pipes: pipes })
    }
}

/// Larger pipes for a while.
pub struct RaisedLimit {
    before: usize,
}

impl RaisedLimit {
    /// `None` where we may not.
    pub fn raise() -> Result<Option<Self>> {
        let before = pipe_max_size()?;
        match fs::write(PIPE_MAX_SIZE, RAISED_PIPE_MAX_SIZE.to_string()) {
            Ok(()) => Ok(Some(Self { before })),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::EROFS) => Ok(None),
            Err(error) => Err(error).context(PIPE_MAX_SIZE),
        }
    }
}

impl Drop for RaisedLimit {
    fn drop(&mut self) {
        if let Err(error) = fs::write(PIPE_MAX_SIZE, self.before.to_string()) {
            eprintln!(
                "Failed to set {PIPE_MAX_SIZE} back to {}: {error}",
                self.before
            );
        }
    }
}

/// How long ago memory was in use.
#[derive(Clone, Copy, PartialEq, Serialize)]
pub enum Temperature {
    /// A moment.
    Warm,
    /// A while: a virtual machine has given it back to its host.
    Cold,
}

/// The memory that a run finds.
pub enum Memory {
    Warm(Reserve),
    Cold,
}

impl Memory {
    /// Twice the kernel's time between two looks for memory to give back, and some: it does not
    /// take all at once.
    const COOLING: Duration = Duration::from_secs(6);

    /// Memory for runs that fill `image` bytes.
    pub fn new(temperature: Temperature, image: u64) -> Result<Self> {
        Ok(match temperature {
            Temperature::Warm => Self::Warm(Reserve::new(image)?),
            Temperature::Cold => Self::Cold,
        })
    }

    /// Makes it ready for a run, which follows at once.
    pub fn prepare(&mut self) {
        match self {
            Self::Warm(reserve) => reserve.let_go(),
            Self::Cold => thread::sleep(Self::COOLING),
        }
    }

    /// The run is over.
    pub fn finish(&mut self) -> Result<()> {
        match self {
            Self::Warm(reserve) => reserve.take(),
            Self::Cold => Ok(()),
        }
    }
}

/// Memory for the runs, which is in use between them too.
///
/// A virtual machine gives free memory back to its host, and pays the host's page faults when it
/// touches it again: up to 2.5 CPU s/GB, which hides all that programs do better or worse (with
/// memory that was in use until then, huge pages take 0.06). The kernel looks for memory to give
/// back every two seconds while there is some. So this holds what a run will need until it is left
/// in peace, lets go of it just before the run, and takes it again right after.
pub struct Reserve {
    bytes: usize,
    held: Option<([PageMemory; 2], Instant)>,
}

/// `PAGE_REPORTING_DELAY` of the kernel, and some.
const REPORTING_PERIOD: Duration = Duration::from_millis(2500);

impl Reserve {
    /// For runs that fill `image` bytes of memory.
    pub fn new(image: u64) -> Result<Self> {
        let mut reserve = Self {
            bytes: (image + image / 4) as usize,
            held: None,
        };
        reserve.take()?;
        Ok(reserve)
    }

    pub fn take(&mut self) -> Result<()> {
        let touched = |pages| -> Result<PageMemory> {
            let mut memory = PageMemory::fresh(self.bytes, pages)?;
            for page in memory.as_mut_slice().chunks_mut(4096) {
                page[0] = 1;
            }
            Ok(memory)
        };
        // The kernel takes small pages out of the rests between the huge ones as long as there are
        // some.
        let held = [touched(Pages::Small)?, touched(Pages::Huge)?];
        self.held = Some((held, Instant::now()));
        Ok(())
    }

    pub fn let_go(&mut self) {
        if let Some((_memory, since)) = self.held.take() {
            thread::sleep(REPORTING_PERIOD.saturating_sub(since.elapsed()));
        }
    }
}

/// Clears up when the benchmark has ended, however it ended. It runs in a process group of its own,
/// out of reach of a Ctrl-C, and sees its input end.
#[derive(Serialize, Deserialize)]
pub struct Janitor {
    work_dir: PathBuf,
    pipe_max_size: usize,
}

impl Janitor {
    pub fn play(self) -> Result<()> {
        io::copy(&mut io::stdin(), &mut io::sink())?;
        if pipe_max_size()? == RAISED_PIPE_MAX_SIZE && self.pipe_max_size != RAISED_PIPE_MAX_SIZE {
            fs::write(PIPE_MAX_SIZE, self.pipe_max_size.to_string())?;
        }
        // What was measured may still be on its way out, and put files there meanwhile.
        for _ in 0..50 {
            if fs::remove_dir_all(&self.work_dir).is_ok() || !self.work_dir.exists() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        bail!("{} is left behind", self.work_dir.display())
    }
}

/// A directory in memory that ends with the benchmark.
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
        let role = Role::Janitor(Janitor {
            work_dir: path.clone(),
            pipe_max_size: pipe_max_size()?,
        });
        let janitor = (role.command()?.stdin(Stdio::piped()))
            .process_group(0)
            .spawn()?;
        Ok(Self { path, janitor })
    }

    pub fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir(&path)?;
        Ok(path)
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        drop(self.janitor.stdin.take());
        let _ = self.janitor.wait();
    }
}
