//! The built binary as a child process, in an images directory of its own.
//!
//! ```ignore
//! let (shard_readers, shard_writers) = shards::pipes(4, None);
//! let mut streamer = Streamer::capture().shards(shard_writers).start();
//! let collector = Collector::start(shard_readers);
//! let criu = streamer.criu();                       // waits for socket-init, and connects
//! criu.write_file("inventory.img", b"...");
//! drop(criu);
//! streamer.expect_success();
//! image::decode(&collector.finish())
//! ```
//!
//! A descriptor is handed over under the number that it has here, so nothing needs to be duplicated
//! onto a number that something else may be using. The watchdog kills a streamer that is still
//! there after [`HANG_TIMEOUT`]: what waits for it then sees a broken pipe.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;
use tempfile::TempDir;

use super::child::{self, Child, Limit};
use super::criu::{Criu, Role};
use super::lines::Lines;
use super::shards::pipe;
use super::{HANG_TIMEOUT, wait_until};

/// The program that is tested: a link to what cargo built, as `make install`, which some test runs,
/// puts another build in its place.
pub fn binary() -> &'static Path {
    static LINK: OnceLock<PathBuf> = OnceLock::new();
    LINK.get_or_init(|| {
        let name = "criu-image-streamer";
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("bin");
        fs::create_dir_all(&dir).expect("make a directory");
        // Made aside and then moved, so that another run of the tests does not find it missing.
        let aside = TempDir::new_in(&dir).expect("make a directory");
        let link = aside.path().join(name);
        // It is not there for a moment when it is replaced.
        wait_until("the streamer's binary", || {
            fs::hard_link(env!("CARGO_BIN_EXE_criu-image-streamer"), &link).is_ok()
        });
        fs::rename(&link, dir.join(name)).expect("move the link");
        dir.join(name)
    })
}

/// How the streamer is to be started.
pub struct Launch {
    subcommand: Vec<&'static str>,
    role: Role,
    images_dir: Option<PathBuf>,
    shards: Vec<OwnedFd>,
    ext_files: Vec<(String, OwnedFd)>,
    inherited: Vec<OwnedFd>,
    arguments: Vec<OsString>,
    arguments_behind: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    progress: Progress,
    stderr_reader_gone: bool,
    stdin: Stdio,
    stdout: Stdio,
    user: Option<u32>,
    limits: Vec<Limit>,
}

#[derive(PartialEq, Eq)]
enum Progress {
    Pipe,
    Stderr,
    ReaderGone,
}

impl Launch {
    fn new(subcommand: Vec<&'static str>, role: Role) -> Self {
        Self {
            subcommand,
            role,
            images_dir: None,
            shards: Vec::new(),
            ext_files: Vec::new(),
            inherited: Vec::new(),
            arguments: Vec::new(),
            arguments_behind: Vec::new(),
            environment: Vec::new(),
            progress: Progress::Pipe,
            stderr_reader_gone: false,
            stdin: Stdio::null(),
            stdout: Stdio::null(),
            user: None,
            limits: Vec::new(),
        }
    }

    /// Instead of a temporary directory that ends with the streamer.
    pub fn images_dir(mut self, dir: impl Into<PathBuf>) -> Self {
        self.images_dir = Some(dir.into());
        self
    }

    /// The streamer's ends of the shards. None at all: `--shard-fds` is not given.
    pub fn shards(mut self, ends: impl IntoIterator<Item = OwnedFd>) -> Self {
        self.shards.extend(ends);
        self
    }

    /// An external file, with the streamer's end of its pipe.
    pub fn ext_file(mut self, name: &str, end: OwnedFd) -> Self {
        self.ext_files.push((name.to_owned(), end));
        self
    }

    /// A descriptor for which the test writes the argument itself.
    pub fn inherit(mut self, fd: OwnedFd) -> Self {
        self.inherited.push(fd);
        self
    }

    pub fn args<S: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = S>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// Arguments that stand behind the subcommand.
    pub fn args_behind<S: Into<OsString>>(mut self, all: impl IntoIterator<Item = S>) -> Self {
        self.arguments_behind
            .extend(all.into_iter().map(Into::into));
        self
    }

    /// A shell script as the command that is to run CRIU.
    pub fn criu_command(self, script: &str) -> Self {
        self.args_behind(["--", "sh", "-c", script])
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.environment.push((name.into(), value.into()));
        self
    }

    /// No `--progress-fd`: the lines go to standard error.
    pub fn progress_on_stderr(mut self) -> Self {
        self.progress = Progress::Stderr;
        self
    }

    /// A progress pipe whose reader is gone from the start.
    pub fn progress_reader_gone(mut self) -> Self {
        self.progress = Progress::ReaderGone;
        self
    }

    /// A standard error whose reader is gone from the start.
    pub fn stderr_reader_gone(mut self) -> Self {
        self.stderr_reader_gone = true;
        self
    }

    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdin = stdin.into();
        self
    }

    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdout = stdout.into();
        self
    }

    /// As another user, who must be able to enter the images directory. Needs root.
    pub fn user(mut self, uid: u32) -> Self {
        self.user = Some(uid);
        self
    }

    pub fn limit(mut self, limit: Limit) -> Self {
        self.limits.push(limit);
        self
    }

    /// Whether the streamer's ends of the shards are write ends.
    pub fn writes_shards(&self) -> bool {
        self.role == Role::Capture
    }

    pub fn start(self) -> Streamer {
        let own_dir = TempDir::with_prefix("images-").unwrap();
        let images_dir = self.images_dir.unwrap_or(own_dir.path().to_owned());

        // Another user may not be able to walk to the binary, so it is named by a descriptor.
        let named = fs::File::open(binary()).expect("open the streamer's binary");
        let mut command = match self.user {
            None => Command::new(binary()),
            Some(_) => Command::new(format!("/proc/self/fd/{}", named.as_raw_fd())),
        };
        command.arg("--images-dir").arg(&images_dir);
        let mut inherited = self.inherited;
        for fd in self.shards {
            command.arg(format!("--shard-fds={}", fd.as_raw_fd()));
            inherited.push(fd);
        }
        for (name, fd) in self.ext_files {
            command.arg(format!("--ext-file-fds={name}:{}", fd.as_raw_fd()));
            inherited.push(fd);
        }
        let mut progress = None;
        if self.progress != Progress::Stderr {
            let (reader, writer) = pipe();
            command.arg(format!("--progress-fd={}", writer.as_raw_fd()));
            inherited.push(writer);
            progress = (self.progress == Progress::Pipe).then_some(reader);
        }
        let (stderr_reader, stderr_writer) = pipe();
        command
            .args(self.arguments)
            .args(self.subcommand)
            .args(self.arguments_behind)
            .envs(self.environment)
            .stdin(self.stdin)
            .stdout(self.stdout)
            .stderr(stderr_writer);
        if let Some(uid) = self.user {
            command.uid(uid).gid(uid);
        }
        let child =
            Child::spawn(&mut command, &inherited, self.limits).expect("start the streamer");
        let argv = format!("{command:?}");
        drop((command, inherited));

        let stderr = if self.stderr_reader_gone {
            drop(stderr_reader);
            Lines::ended()
        } else {
            Lines::collect(stderr_reader)
        };
        let progress = match self.progress {
            Progress::Stderr => stderr.clone(),
            _ => progress.map_or_else(Lines::ended, Lines::collect),
        };
        let hung = watch(&child);
        Streamer {
            role: self.role,
            images_dir,
            _own_dir: own_dir,
            argv,
            child,
            stderr,
            progress,
            hung,
            exit: None,
        }
    }

    /// Starts it and waits for its end: for what is refused at once.
    pub fn run(self) -> Exit {
        self.start().wait()
    }
}

/// The variable that gives every capture of this run of the tests a buffer of that size.
pub const BUFFER: &str = "BUFFER";

fn watch(child: &Child) -> Arc<AtomicBool> {
    let pidfd = child.pidfd().expect("duplicate a pidfd");
    let hung = Arc::new(AtomicBool::new(false));
    let report = Arc::clone(&hung);
    thread::spawn(move || {
        if !child::wait_for_end(&pidfd, HANG_TIMEOUT) {
            report.store(true, Ordering::SeqCst);
            let _ended_just_now = child::send_signal(&pidfd, Signal::SIGKILL);
        }
    });
    hung
}

/// A started streamer. Dropped while running, it is killed; dropped by a failing test, it tells all
/// it knows.
pub struct Streamer {
    role: Role,
    images_dir: PathBuf,
    _own_dir: TempDir,
    argv: String,
    child: Child,
    stderr: Lines,
    progress: Lines,
    hung: Arc<AtomicBool>,
    exit: Option<Exit>,
}

/// How a streamer ended.
#[derive(Debug, Clone)]
pub struct Exit {
    role: Role,
    pub status: ExitStatus,
    pub progress: Vec<String>,
    pub stderr: String,
}

impl Streamer {
    pub fn capture() -> Launch {
        let launch = Launch::new(vec!["capture"], Role::Capture);
        match std::env::var(BUFFER) {
            Ok(size) => launch.args(["--buffer", &size]),
            Err(_) => launch,
        }
    }

    pub fn extract() -> Launch {
        Launch::new(vec!["extract"], Role::Serve)
    }

    pub fn extract_serve() -> Launch {
        Launch::new(vec!["extract", "--serve"], Role::Serve)
    }

    pub fn list() -> Launch {
        Launch::new(vec!["list"], Role::Serve)
    }

    pub fn serve() -> Launch {
        Launch::new(vec!["serve"], Role::Serve)
    }

    pub fn images_dir(&self) -> &Path {
        &self.images_dir
    }

    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// Waits until it listens, and connects.
    pub fn criu(&self) -> Criu {
        self.wait_for_line("socket-init");
        Criu::connect(&self.images_dir, self.role)
    }

    /// Connects without progress lines to wait for, unless it ends before it listens.
    pub fn criu_unless_it_ends(&self) -> Option<Criu> {
        let mut criu = None;
        wait_until("a socket", || {
            criu = Criu::try_connect(&self.images_dir, self.role).ok();
            criu.is_some() || !self.is_running()
        });
        criu
    }

    /// Waits until it listens, or has ended.
    pub fn listens(&self) -> bool {
        let wait = |wanted: fn(&str) -> bool| self.progress.wait_for(HANG_TIMEOUT, wanted);
        wait(|line| line == "socket-init").is_some()
    }

    pub fn wait_for_line(&self, line: &str) {
        self.wait_for(&format!("the progress line {line}"), |found| found == line);
    }

    pub fn wait_for_stats(&self) -> String {
        self.wait_for("the statistics", |line| line.starts_with('{'))
    }

    fn wait_for(&self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        self.progress
            .wait_for(HANG_TIMEOUT, wanted)
            .unwrap_or_else(|| panic!("{what} did not come"))
    }

    /// Waits for a line on standard error that contains `text`.
    pub fn wait_for_stderr(&self, text: &str) -> String {
        self.stderr
            .wait_for(HANG_TIMEOUT, |line| line.contains(text))
            .unwrap_or_else(|| panic!("nothing about {text:?} on standard error"))
    }

    pub fn progress_lines(&self) -> Vec<String> {
        self.progress.text().lines().map(str::to_owned).collect()
    }

    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// A handle for a thread that is to send it a signal.
    pub fn pidfd(&self) -> OwnedFd {
        self.child.pidfd().expect("duplicate a pidfd")
    }

    pub fn signal(&self, signal: Signal) {
        self.child.signal(signal).expect("signal the streamer");
    }

    /// Whether it is still running after that time.
    pub fn outlasts(&self, time: Duration) -> bool {
        self.exit.is_none() && !self.child.wait_for_end(time)
    }

    pub fn is_running(&self) -> bool {
        self.exit.is_none() && !self.child.wait_for_end(Duration::ZERO)
    }

    /// A field of `/proc/PID/status` in KiB, such as `VmRSS` or `VmHWM`.
    pub fn memory_kib(&self, field: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid()))
            .expect("read the process's status");
        let line = status
            .lines()
            .find(|line| line.starts_with(&format!("{field}:")));
        let value = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        value.unwrap_or_else(|| panic!("no {field} in {status}"))
    }

    /// What the image takes of the machine's memory, in KiB: the process's own, and what its pipes
    /// hold.
    pub fn image_kib(&self) -> u64 {
        let pipes = self.descriptors("pipe:");
        let queued = pipes.values().filter_map(|path| {
            let mut options = fs::File::options();
            let pipe = options.read(true).custom_flags(libc::O_NONBLOCK).open(path);
            pipe.ok().map(|pipe| child::queued(&pipe) as u64)
        });
        self.memory_kib("VmRSS") + (queued.sum::<u64>() >> 10)
    }

    /// A path in /proc for each of its files of a kind, such as `pipe:`.
    pub fn descriptors(&self, kind: &str) -> BTreeMap<PathBuf, PathBuf> {
        let paths = self.proc("fd").map(|entry| entry.unwrap().path());
        paths
            .filter_map(|path| Some((fs::read_link(&path).ok()?, path)))
            .filter(|(target, _)| target.to_string_lossy().starts_with(kind))
            .collect()
    }

    pub fn open_fds(&self) -> usize {
        self.proc("fd").count()
    }

    pub fn threads(&self) -> usize {
        self.proc("task").count()
    }

    fn proc(&self, dir: &str) -> fs::ReadDir {
        fs::read_dir(format!("/proc/{}/{dir}", self.pid())).expect("list a process's directory")
    }

    /// Its end. One that comes only through the watchdog fails the test.
    pub fn wait(&mut self) -> Exit {
        if let Some(exit) = &self.exit {
            return exit.clone();
        }
        let status = self.child.reap().expect("wait for the streamer");
        self.stderr.wait_for_end(HANG_TIMEOUT);
        self.progress.wait_for_end(HANG_TIMEOUT);
        let exit = Exit {
            role: self.role,
            status,
            progress: self.progress_lines(),
            stderr: self.stderr(),
        };
        self.exit = Some(exit.clone());
        assert!(
            !self.hung.load(Ordering::SeqCst),
            "the streamer hung and was killed"
        );
        exit
    }

    pub fn expect_success(&mut self) -> Exit {
        let exit = self.wait();
        exit.expect_success();
        exit
    }

    /// Exit status 1 and an error that contains every one of `words`.
    pub fn expect_failure(&mut self, words: &[&str]) -> Exit {
        let exit = self.wait();
        exit.expect_failure(words);
        exit
    }

    /// The same before anything was promised: no line of progress.
    pub fn expect_refusal(&mut self, words: &[&str]) {
        self.wait().expect_refusal(words);
    }

    fn report(&self) -> String {
        let status = match &self.exit {
            Some(exit) => exit.status.to_string(),
            None if self.is_running() => "still running".into(),
            None => "ended, not waited for".into(),
        };
        format!(
            "--- {}\n--- status: {status}, hung: {:?}\n--- progress:\n{}--- standard error:\n{}---",
            self.argv,
            self.hung,
            self.progress.text(),
            self.stderr.text()
        )
    }
}

impl Exit {
    #[track_caller]
    pub fn expect_success(&self) {
        assert!(self.status.success(), "{}: {}", self.status, self.stderr);
    }

    /// A failure before anything was promised: no line of progress.
    #[track_caller]
    pub fn expect_refusal(&self, words: &[&str]) {
        self.expect_failure(words);
        assert_eq!(self.progress, [""; 0], "{}", self.stderr);
    }

    /// Exit status 1 and an error in the promised form that contains every one of `words`. The
    /// statistics of a capture tell of a whole image.
    #[track_caller]
    pub fn expect_failure(&self, words: &[&str]) {
        assert_eq!(self.status.code(), Some(1), "{}", self.stderr);
        let tells_of_an_image = self.progress.iter().any(|line| line.starts_with('{'));
        assert!(
            !tells_of_an_image || self.role == Role::Serve,
            "{:?}",
            self.progress
        );
        let error = self.error();
        for word in words {
            assert!(error.contains(word), "no {word:?} in: {error}");
        }
    }

    /// The error line: `criu-image-streamer Error: <what>: <why>`.
    #[track_caller]
    pub fn error(&self) -> &str {
        let is_error = |line: &&str| line.starts_with("criu-image-streamer Error: ");
        let errors: Vec<_> = self.stderr.lines().filter(is_error).collect();
        let [error] = errors[..] else {
            panic!("not one line with an error:\n{}", self.stderr)
        };
        error
    }
}

impl Drop for Streamer {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.report());
        }
        if self.exit.is_none() {
            let _ended_already = self.child.signal(Signal::SIGKILL);
            let _nothing_to_tell = self.child.reap();
        }
    }
}
