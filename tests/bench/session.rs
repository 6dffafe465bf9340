//! Scripts in a machine of namespaces, and the figures that they print.

use crate::Bench;
use crate::criu::{Application, Machine};
use crate::meter::Meter;
use crate::report::Figures;
use anyhow::{Context, Result, anyhow, ensure};
use std::{
    env::current_exe,
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

/// A build of the streamer, or the original.
#[derive(Clone)]
pub struct Program {
    pub name: &'static str,
    path: String,
}

pub const ORIGINAL: &str = "original";

impl Program {
    pub fn new(name: &'static str, path: &Path) -> Result<Self> {
        let path = fs::canonicalize(path).with_context(|| path.display().to_string())?;
        let path = path.into_os_string().into_string();
        let path = path.map_err(|path| anyhow!("odd path {}", path.display()))?;
        Ok(Self { name, path })
    }

    pub fn is_original(&self) -> bool {
        self.name == ORIGINAL
    }

    pub fn has_option(&self, option: &str) -> Result<bool> {
        let help = Command::new(&self.path).arg("--help").output()?;
        Ok(String::from_utf8_lossy(&help.stdout).contains(option))
    }

    /// The variable by which scripts know it.
    pub fn variable(&self) -> (&'static str, String) {
        ("STREAMER", self.path.clone())
    }
}

/// The head of each script. The streamer is started with `$START`, so that it has no right to
/// exceed the limits of pipes, as the root of many containers has none.
///
/// `$BESIDE` loops take processor time. `$PIPE_SIZE` is the largest size of pipes until it ends.
const HEAD: &str = r#"
export CRIU_CONFIG_FILE=/dev/null
TIMEFORMAT='%3U %3S'
START="setpriv --bounding-set=-sys_resource"
loops= limit=$(cat /proc/sys/fs/pipe-max-size)
trap 'kill $loops 2>/dev/null || true; echo $limit >/proc/sys/fs/pipe-max-size' EXIT
for ((loop = 0; loop < ${BESIDE:-0}; loop++)); do
    while :; do :; done & loops+=" $!"
done
[ -z "${PIPE_SIZE:-}" ] || echo $PIPE_SIZE >/proc/sys/fs/pipe-max-size
for members in $MEMBERS; do echo 0 >$members; done
rm -rf images shards ready; mkdir images shards; mkfifo ready
"#;

/// An application in a machine of its own.
pub fn boot(bench: &Bench) -> Result<Machine> {
    Machine::try_new_in(bench.work_dir.path()).map_err(|why| anyhow!("no CRIU: {why}"))
}

/// Starts an application that is nearly idle, with `bytes` of memory over all its processes.
pub fn start(machine: &Machine, bytes: u64, processes: u64) -> Application<'_> {
    let mib = (bytes >> 20) / processes;
    let tree = match processes {
        1 => String::new(),
        several => format!("tree=1x{}", several - 1),
    };
    machine.start(&format!("compressible={mib} pause=500 {tree}"))
}

/// Waits until it has gone on from an earlier state.
pub fn goes_on_from(application: &Application<'_>, before: crate::criu::State) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let now = application.state();
        ensure!(now.nonce == before.nonce, "another process");
        if now.rounds > before.rounds {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "the application stands still");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a script, and returns the figures that it printed, each as a line with its name, and those
/// of the processes in it, which the meter must outlive.
pub fn run(
    machine: &Machine,
    meter: &Meter,
    variables: Vec<(&'static str, String)>,
    script: &str,
) -> Result<Figures> {
    let bench: PathBuf = current_exe()?;
    let mut variables = variables;
    variables.push(("MEMBERS", meter.members()));
    variables.push(("BENCH", bench.to_str().context("odd path")?.to_owned()));
    let borrowed: Vec<_> = variables
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let ran = machine.run_with(&borrowed, &format!("{HEAD}{script}"));
    ensure!(ran.succeeded(), "{}", ran.describe());
    let mut figures = Figures::new();
    for line in ran.stdout().lines() {
        let (name, value) = line.split_once(' ').context("a line of a script")?;
        let value = value.parse().with_context(|| line.to_owned())?;
        figures.insert(name.to_owned(), value);
    }
    if let Some(cpu_s) = meter.cpu_s()? {
        figures.insert("all_cpu_s".into(), cpu_s);
    }
    if let Some(peak) = meter.peak_bytes()? {
        figures.insert("peak_bytes".into(), peak as f64);
    }
    Ok(figures)
}
