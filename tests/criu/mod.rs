//! A small machine for each test that uses a real CRIU: namespaces for processes, network and
//! mounts.
//!
//! CRIU restores a process with the PID that it had. Inside, PIDs are few and no other process
//! takes one, so tests run side by side and beside whatever the host does. Ports are free too, and
//! when the machine is dropped, or the test dies, the kernel ends every process in it. A container
//! engine gets a machine with a hierarchy of cgroups, too: see [`Machine::for_containers`].
//!
//! What a test does there it does in bash, as the README shows it: see [`Machine::run`].

pub mod huge_pages;
pub mod recipes;

use std::cell::Cell;
use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use crate::common::cgroup::Cgroup;
use crate::common::child::inherit;
use crate::common::skip;
use crate::common::streamer::binary;

/// How long anything may take before it counts as hanging. Generous: it is reached only by a bug.
const HANG_TIMEOUT: Duration = Duration::from_secs(120);

/// How often a condition is looked at while waiting for it.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// What comes before each script: descriptors inherited from the starter of these tests would
/// become part of an application's image, and nsenter leaves us in the root directory.
const SCRIPT_HEAD: &str = r#"
for fd in $(ls /proc/self/fd); do [ $fd -le 2 ] || eval "exec $fd>&-"; done
cd "$MACHINE"
"#;

/// What a machine for containers does first: engines keep their state in `/run`, and take the
/// cgroups that they see for their own.
const HIERARCHY_OF_ITS_OWN: &str = "
mount -t tmpfs tmpfs /run
if mountpoint -q /sys/fs/cgroup; then umount -R /sys/fs/cgroup; fi
mount -t cgroup2 cgroup2 /sys/fs/cgroup
";

/// The programs that every machine has: CRIU, and the application to checkpoint.
struct Programs {
    criu: PathBuf,
    application: PathBuf,
    home: PathBuf,
}

impl Programs {
    /// The application for a container without any library.
    fn static_application(&self) -> PathBuf {
        self.home.join("static/application")
    }
}

/// Brings the programs, once; `Err` says why there are none.
fn programs() -> &'static Result<Programs, String> {
    static PROGRAMS: OnceLock<Result<Programs, String>> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        if !nix::unistd::geteuid().is_root() {
            return Err("needs root".into());
        }
        let home = Path::new(env!("CARGO_TARGET_TMPDIR"))
            .parent()
            .expect("the target directory")
            .join("criu");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu");
        let found = Command::new(source.join("find-criu"))
            .env("CRIU_HOME", &home)
            .output()
            .expect("tests/criu/find-criu");
        if !found.status.success() {
            return Err(String::from_utf8_lossy(&found.stderr).trim().into());
        }
        let application = home.join("application");
        compile("application.rs", &application, &[]);
        Ok(Programs {
            criu: String::from_utf8_lossy(&found.stdout).trim().into(),
            application,
            home,
        })
    })
}

/// Compiles an application, unless that was done since its source changed.
fn compile(source: &str, program: &Path, options: &[&str]) {
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/criu");
    let source = sources.join(source);
    let home = program.parent().expect("a directory");
    std::fs::create_dir_all(home).expect("make a directory");
    // Another run of the tests may be doing the same, and a program that is replaced while it runs
    // is a file that CRIU misses.
    let lock = File::create(home.join("application.lock")).expect("a lock");
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, why)| why)
        .expect("lock");
    let modified = |path: &Path| path.metadata().and_then(|file| file.modified()).ok();
    if modified(program) > modified(&source) {
        return;
    }
    let unfinished = program.with_extension("new");
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(rustc)
        .args(["--edition=2024", "-O", "-o"])
        .arg(&unfinished)
        .args(options)
        .arg(&source)
        .output()
        .expect("rustc");
    let complaints = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}: {complaints}",
        source.display()
    );
    std::fs::rename(&unfinished, program).expect("rename the application");
}

/// A machine, with a directory of its own that is its scripts' working directory.
pub struct Machine {
    directory: tempfile::TempDir,
    path: std::ffi::OsString,
    unshare: Child,
    init: String,
    scripts: Cell<u32>,
    cgroups: Option<Cgroups>,
}

/// The cgroups of a machine for containers. A container's may be below the root that the machine
/// sees, and never where other processes are.
struct Cgroups {
    /// Where its own processes are; removed first.
    machine: Cgroup,
    root: Cgroup,
}

impl Cgroups {
    fn create() -> Result<Self, String> {
        let mounts = std::fs::read_to_string("/proc/mounts").map_err(|why| why.to_string())?;
        let hierarchy = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup2")).then(|| fields[1].to_owned())
        });
        let hierarchy = hierarchy.ok_or("no cgroup2 is mounted here")?;
        let create_in = |parent: &Path| {
            Cgroup::create_in(parent)
                .map_err(|why| format!("no cgroup in {}: {why}", parent.display()))
        };
        let root = create_in(Path::new(&hierarchy))?;
        let machine = create_in(root.path())?;
        Ok(Self { machine, root })
    }
}

/// A machine; `None`, having said why, where none can be had. That is never so where `CI` is
/// `true`.
pub fn machine() -> Option<Machine> {
    Machine::new_in(&std::env::temp_dir())
}

impl Machine {
    /// A machine that has the program `shuffler`, too; see tests/criu/shuffler.rs.
    pub fn with_shuffler() -> Option<Self> {
        if let Ok(programs) = programs() {
            compile("shuffler.rs", &programs.home.join("shuffler"), &[]);
        }
        machine()
    }

    /// A machine whose directory is on the root file system, where the directory for temporary
    /// files need not be.
    pub fn new_on_root_file_system() -> Option<Self> {
        let file_system = |path: &Path| path.metadata().map(|found| found.dev()).ok();
        let candidates = [&std::env::temp_dir(), Path::new("/var/tmp")];
        let mut candidates = candidates.into_iter();
        let found = candidates.find(|path| file_system(path) == file_system(Path::new("/")));
        if found.is_none() {
            skip("no directory for temporary files is on the root file system");
        }
        Self::new_in(found?)
    }

    /// A machine for a container engine: it has a hierarchy of cgroups and a `/run` of its own, and
    /// its scripts know the application, linked statically, as `$APPLICATION`.
    pub fn for_containers() -> Option<Self> {
        let boot = |programs: &Programs| {
            let cgroups = Cgroups::create()?;
            let program = programs.static_application();
            // Not position-independent: the README's Limits say what may happen to such a program.
            compile(
                "application.rs",
                &program,
                &["-Ctarget-feature=+crt-static", "-Crelocation-model=static"],
            );
            Ok(Self::boot(programs, &std::env::temp_dir(), Some(cgroups)))
        };
        Self::or_skip(programs().as_ref().map_err(String::clone).and_then(boot))
    }

    fn new_in(parent: &Path) -> Option<Self> {
        Self::or_skip(Self::try_new_in(parent))
    }

    /// A machine whose directory is in `parent`; `Err` says why none can be had.
    pub fn try_new_in(parent: &Path) -> Result<Self, String> {
        Ok(Self::boot(programs().as_ref()?, parent, None))
    }

    fn or_skip(booted: Result<Self, String>) -> Option<Self> {
        booted.inspect_err(|why| skip(why)).ok()
    }

    fn boot(programs: &Programs, parent: &Path, cgroups: Option<Cgroups>) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("criu-image-streamer-")
            .tempdir_in(parent)
            .expect("make a directory");
        // To standard error, where it comes in order with what the streamer says.
        std::fs::write(directory.path().join("criu.conf"), "verbosity 4\n").expect("criu.conf");
        let streamer = binary();
        let host_path = std::env::var_os("PATH").unwrap_or_default();
        let first = [streamer, &programs.criu, &programs.application];
        let first = first.map(|program| program.parent().expect("a directory").to_owned());
        let system = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
        let all = first
            .into_iter()
            .chain(std::env::split_paths(&host_path))
            .chain(system);
        let path = std::env::join_paths(all).expect("a PATH");

        // The first process: reaps what is left to it, and ends, and all with it, when its standard
        // input does.
        let mut unshare = Command::new("unshare");
        unshare.args(["--pid", "--fork", "--mount-proc", "--net"]);
        let mut script = String::new();
        if let Some(cgroups) = &cgroups {
            // The root of what it sees is where it is when it makes the namespace.
            unshare.arg("--cgroup");
            inherit(&mut unshare, Vec::new(), vec![cgroups.root.limit()]);
            script += HIERARCHY_OF_ITS_OWN;
        }
        script += "ip link set lo up; : >booted; while read -r; do :; done";
        let mut unshare = unshare
            .args(["bash", "-euc", &script])
            .env("PATH", &path)
            .current_dir(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("boot.log")).expect("boot.log"))
            .spawn()
            .expect("unshare");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let booted = wait_until(|| {
            directory.path().join("booted").exists()
                || unshare.try_wait().expect("wait for unshare").is_some()
        });
        let init = std::fs::read_to_string(children).unwrap_or_default();
        let machine = Self {
            directory,
            path,
            unshare,
            init: init.trim().into(),
            scripts: Cell::new(0),
            cgroups,
        };
        if !booted || machine.init.is_empty() {
            panic!("cannot make namespaces\n{}", machine.describe());
        }
        if let Some(cgroups) = &machine.cgroups {
            for process in [&machine.unshare.id().to_string(), &machine.init] {
                std::fs::write(cgroups.machine.path().join("cgroup.procs"), process)
                    .expect("move a process");
            }
        }
        machine
    }

    /// Its first process, as seen from here.
    pub fn init(&self) -> &str {
        &self.init
    }

    /// The cgroups that its container engine has made, as seen from here.
    pub fn container_cgroups(&self) -> Vec<PathBuf> {
        let cgroups = self.cgroups.as_ref().expect("a machine for containers");
        let mut found = cgroups.root.below();
        found.retain(|path| path != cgroups.machine.path());
        found.extend(cgroups.machine.below());
        found
    }

    /// The root of its cgroups, as seen from here.
    pub fn cgroups(&self) -> PathBuf {
        let cgroups = self.cgroups.as_ref().expect("a machine for containers");
        cgroups.root.path().to_owned()
    }

    /// The machine's directory, as seen from here and from inside.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The contents of a file there.
    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name))
            .unwrap_or_else(|why| panic!("read {name}: {why}\n{}", self.describe()))
    }

    pub fn text(&self, name: &str) -> String {
        String::from_utf8_lossy(&self.read(name)).into()
    }

    /// Runs a script with bash, in which the first failure of a command or pipeline is the
    /// script's.
    pub fn run(&self, script: &str) -> Ran<'_> {
        self.run_with(&[], script)
    }

    /// The same with these variables.
    pub fn run_with(&self, variables: &[(&str, &str)], script: &str) -> Ran<'_> {
        let number = self.scripts.replace(self.scripts.get() + 1);
        let log = |stream: &str| File::create(self.path(&log_name(number, stream))).expect("a log");
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &self.init, "--pid", "--mount", "--net"]);
        if let Some(cgroups) = &self.cgroups {
            nsenter.arg("--cgroup");
            inherit(&mut nsenter, Vec::new(), vec![cgroups.machine.limit()]);
            let program = programs().as_ref().map(Programs::static_application);
            nsenter.env("APPLICATION", program.expect("this machine has booted"));
        }
        let mut bash = nsenter
            .args(["--", "bash", "-euo", "pipefail", "-c"])
            .arg(format!("{SCRIPT_HEAD}{script}"))
            .env("PATH", &self.path)
            .env("MACHINE", self.directory.path())
            .env("CRIU_CONFIG_FILE", self.path("criu.conf"))
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(log("stdout"))
            .stderr(log("stderr"))
            .spawn()
            .expect("nsenter");
        let mut status = None;
        wait_until(|| {
            status = bash.try_wait().expect("wait for bash");
            status.is_some()
        });
        let status = status.unwrap_or_else(|| {
            let state = self.describe();
            // The script's processes end with the machine.
            bash.kill().expect("kill nsenter");
            bash.wait().expect("wait for nsenter");
            panic!("this hangs:\n{script}\n{state}");
        });
        Ran {
            machine: self,
            number,
            script: script.into(),
            status,
        }
    }

    /// Starts the application with the given parts; see tests/criu/application.rs.
    pub fn start(&self, parts: &str) -> Application<'_> {
        self.start_in("", parts)
    }

    /// Starts the application through a command like `unshare`, which runs the program that its
    /// arguments name.
    pub fn start_in(&self, command: &str, parts: &str) -> Application<'_> {
        // A session of its own and no terminal, or CRIU would have to be told about the shell's.
        // Its files are opened in its own mount namespace.
        let script = r#"
rm -f application.state
COMMAND \
    bash -c "exec setsid application $PWD/application.state PARTS </dev/null &>application.log" &
pid=$!
until [ -s application.state ]; do sleep 0.05; done
until [ "$(cat /proc/$pid/comm)" = application ]; do
    # Between fork and exec there is nothing to see.
    read -r child rest <<<"$(cat /proc/$pid/task/$pid/children)"
    pid=${child:-$pid}
done
echo $pid
"#;
        let script = script.replace("COMMAND", command).replace("PARTS", parts);
        let pid = self.run(&script).success().stdout();
        self.adopt(&pid, "application.state")
    }

    /// An application that a script has started, and the name of its state file.
    pub fn adopt(&self, pid: &str, state: &str) -> Application<'_> {
        let application = Application {
            machine: self,
            pid: pid.trim().into(),
            state: self.path(state),
        };
        if !wait_until(|| application.state_line().is_some()) {
            panic!("the application did not start\n{}", self.describe());
        }
        application
    }

    /// Everything that may explain a failure: the processes, what the scripts said, and every log's
    /// errors and last lines.
    pub fn describe(&self) -> String {
        const DESCRIBE: &str = r#"
nsenter --target $1 --pid --mount ps -axwwo pid,ppid,stat,wchan:20,args
find "$0" -type f \( -name '*.log' -o -name 'script-*' -o -name '*.state' \) -size +0 | sort | while read -r log; do
    echo "--- $log"
    head -n -20 "$log" | grep -a Error
    tail -n 20 "$log"
done
"#;
        let mut bash = Command::new("bash");
        let bash = bash.args(["-c", DESCRIBE]).arg(self.directory.path());
        let output = bash.arg(&self.init).output().expect("bash");
        String::from_utf8_lossy(&output.stdout).into()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.unshare.stdin.take());
        if !wait_until(|| self.unshare.try_wait().is_ok_and(|ended| ended.is_some())) {
            // Only a process that even SIGKILL cannot end brings us here.
            let _ = self.unshare.kill();
            let _ = self.unshare.wait();
        }
        if thread::panicking() && std::env::var_os("KEEP_MACHINES").is_some() {
            self.directory.disable_cleanup(true);
        }
    }
}

/// The file with what a script wrote to its standard output or error.
fn log_name(script: u32, stream: &str) -> String {
    format!("script-{script}.{stream}")
}

/// Waits for a condition; false if it did not come about in [`HANG_TIMEOUT`].
fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + HANG_TIMEOUT;
    while !condition() {
        if Instant::now() > deadline {
            return false;
        }
        thread::sleep(POLL_INTERVAL);
    }
    true
}

/// A script that has run.
pub struct Ran<'machine> {
    machine: &'machine Machine,
    number: u32,
    script: String,
    status: ExitStatus,
}

impl Ran<'_> {
    /// Fails the test unless the script exited with status 0.
    #[track_caller]
    pub fn success(self) -> Self {
        assert!(self.status.success(), "{}", self.describe());
        self
    }

    /// Fails the test if the script exited with status 0.
    #[track_caller]
    pub fn failure(self) -> Self {
        assert!(!self.status.success(), "{}", self.describe());
        self
    }

    pub fn succeeded(&self) -> bool {
        self.status.success()
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.machine.read(&log_name(self.number, "stdout"))).into()
    }

    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.machine.read(&log_name(self.number, "stderr"))).into()
    }

    pub fn describe(&self) -> String {
        let ended = match (self.status.code(), self.status.signal()) {
            (Some(code), _) => format!("exit status {code}"),
            (None, signal) => format!("signal {signal:?}"),
        };
        let script = &self.script;
        format!("{ended}:\n{script}\n{}", self.machine.describe())
    }
}

/// The line that the application keeps in its state file.
#[derive(Debug, Clone, Copy)]
pub struct State {
    /// Drawn when the application started: a restored process has kept it, a restarted one has not.
    pub nonce: u64,
    /// How often it has looked at its state.
    pub rounds: u64,
    /// How often it has looked at all of it.
    pub sweeps: u64,
}

/// An application that runs, or ran, in a machine.
pub struct Application<'machine> {
    machine: &'machine Machine,
    /// The root of its process tree, as CRIU in the same machine knows it.
    pub pid: String,
    state: PathBuf,
}

impl Application<'_> {
    /// Runs a script that knows the application's PID as `$PID`.
    pub fn run(&self, script: &str) -> Ran<'_> {
        self.machine.run_with(&[("PID", &self.pid)], script)
    }

    fn state_line(&self) -> Option<String> {
        let line = std::fs::read_to_string(&self.state).unwrap_or_default();
        line.ends_with('\n').then(|| line.trim().to_owned())
    }

    /// The present state, which is an error if the application has found anything damaged.
    #[track_caller]
    pub fn state(&self) -> State {
        let line = self.state_line().expect("a line of state");
        let numbers: Option<Vec<u64>> = line.split(' ').map(|word| word.parse().ok()).collect();
        match numbers.as_deref() {
            Some(&[nonce, rounds, sweeps]) => State {
                nonce,
                rounds,
                sweeps,
            },
            _ => panic!("{line}\n{}", self.machine.describe()),
        }
    }

    /// Waits until the application has gone over all of its state once more, and found it
    /// undamaged.
    #[track_caller]
    pub fn goes_on(&self) -> State {
        let from = self.state();
        // The sweep that is under way may have begun before now.
        if !wait_until(|| self.state().sweeps >= from.sweeps + 2) {
            panic!("{from:?} is all it came to\n{}", self.machine.describe());
        }
        self.state()
    }

    /// The same for an application that was restored, which must be the one that was there before.
    #[track_caller]
    pub fn goes_on_from(&self, before: State) {
        let after = self.goes_on();
        assert_eq!(after.nonce, before.nonce, "another process");
        assert!(after.rounds > before.rounds, "{after:?} after {before:?}");
    }

    /// Whatever happened to it, it can still be checkpointed and restored.
    #[track_caller]
    pub fn is_unharmed(&self) {
        let before = self.goes_on();
        self.run(recipes::CAPTURE).success();
        self.is_gone();
        self.run(recipes::RESTORE).success();
        self.goes_on_from(before);
    }

    /// Waits until no process of the application's is left: a killed one takes a moment to go, and
    /// has its PID until then.
    #[track_caller]
    pub fn is_gone(&self) {
        if !wait_until(|| !self.run("kill -0 -- -$PID").succeeded()) {
            panic!(
                "the application is still there\n{}",
                self.machine.describe()
            );
        }
    }
}
