//! What becomes of a streamer that is nobody's child: who has started it, and how it ended.
//!
//! A file in the images directory tells. Its first line names the CRIU that has started the
//! streamer, so that no other run's outcome is taken for this one's, and the second one is the
//! streamer's PID. A line `memory-copied` lets who has started it go on before its end. The
//! streamer holds the file's lock for as long as it runs, and writes the last lines when all is
//! over. The kernel releases the lock however the streamer ends: a free lock and no end mean that
//! it was killed.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::progress::Milestone;

/// The end of a streamer that has done all it had to.
const SUCCESS: &str = "succeeded";

/// Bytes of the file that are looked at: a reason has some hundred.
const MOST: u64 = 64 << 10;

/// Between two attempts to take the lock: a lock cannot be waited for with a limit.
const NAP: Duration = Duration::from_millis(10);

/// How long another one may hold the lock for a look at the file.
const PATIENCE: Duration = Duration::from_secs(1);

/// Between two looks at whether to go on waiting.
const LOOK: Duration = Duration::from_secs(1);

/// The file, open.
pub(crate) struct Outcome(File);

impl Outcome {
    /// Begins anew: a streamer that `starter` has started is about to run. The lock is held until
    /// this, and all copies of it in other processes, are gone.
    ///
    /// # Errors
    /// When a streamer is running that has the same file.
    pub(crate) fn begin(directory: impl AsFd, name: &str, starter: &str) -> Result<Self> {
        let mut file = open(directory, name, OFlag::O_RDWR | OFlag::O_CREAT)?;
        let end = Instant::now() + PATIENCE;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) if Instant::now() < end => std::thread::sleep(NAP),
                Err(Errno::WOULDBLOCK) => bail!(
                    "a streamer that another CRIU has started is still at work here: wait for its end, or use another images directory"
                ),
                locked => break locked.context("locking it")?,
            }
        }
        file.set_len(0)?;
        writeln!(file, "{starter}")?;
        Ok(Self(file))
    }

    /// What `starter` has begun.
    ///
    /// # Errors
    /// When it has begun nothing.
    pub(crate) fn find(directory: impl AsFd, name: &str, starter: &str) -> Result<Self> {
        let mut outcome = match open(directory, name, OFlag::O_RDONLY) {
            Err(error) if error.downcast_ref() == Some(&nix::errno::Errno::ENOENT) => {
                bail!("{NOTHING_BEGUN}")
            }
            file => Self(file?),
        };
        let text = outcome.read()?;
        ensure!(text.lines().next() == Some(starter), "{NOTHING_BEGUN}");
        Ok(outcome)
    }

    /// The streamer is this process.
    pub(crate) fn is_of_this_process(&mut self) -> Result<()> {
        writeln!(self.0, "{}", std::process::id()).context("writing who it is")
    }

    /// The PID of the streamer, if it has begun.
    pub(crate) fn streamer(&mut self) -> Result<Option<u32>> {
        let text = self.read()?;
        Ok(text.lines().nth(1).and_then(|line| line.parse().ok()))
    }

    /// A copy that belongs to the streamer, for the line that lets its starter go on.
    pub(crate) fn copy(&self) -> Result<OwnedFd> {
        Ok(self.0.try_clone().context("copying a descriptor")?.into())
    }

    /// Waits until the streamer has ended, and fails with its reason if it has failed; or, if
    /// `may_go_on`, until it lets its starter go on. Now and then it looks whether `may_wait`, and
    /// fails as that does.
    pub(crate) fn wait(mut self, may_go_on: bool, may_wait: impl Fn() -> Result<()>) -> Result<()> {
        let mut look = Instant::now() + LOOK;
        loop {
            match flock(&self.0, FlockOperation::NonBlockingLockShared) {
                Ok(()) => return self.read_end(),
                Err(Errno::WOULDBLOCK | Errno::INTR) if may_go_on && self.lets_go_on()? => {
                    return Ok(());
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => {}
                Err(error) => return Err(error).context("waiting for the streamer's end"),
            }
            if Instant::now() >= look {
                may_wait()?;
                look = Instant::now() + LOOK;
            }
            std::thread::sleep(NAP);
        }
    }

    /// Whether the streamer, which has not ended, lets its starter go on.
    fn lets_go_on(&mut self) -> Result<bool> {
        let text = self.read()?;
        Ok(parts(&text).0)
    }

    /// Fails with the streamer's reason if it has failed. It must have ended.
    pub(crate) fn read_end(&mut self) -> Result<()> {
        let text = self.read()?;
        let (_, end) = parts(&text);
        match end.map(str::trim_end) {
            Some(SUCCESS) => Ok(()),
            None | Some("") => {
                bail!("the streamer was killed, or crashed: discard what there is of the image")
            }
            Some(reason) => bail!("{reason}"),
        }
    }

    /// Writes how the streamer has ended: the reason of its failure, if it has failed.
    pub(crate) fn end(&mut self, failure: Option<&str>) -> Result<()> {
        writeln!(self.0, "{}", failure.unwrap_or(SUCCESS)).context("writing how it ended")
    }

    fn read(&mut self) -> Result<String> {
        let mut text = Vec::new();
        self.0.rewind()?;
        (&self.0).take(MOST).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

/// Whether the starter may go on, and what the file says of the end.
fn parts(text: &str) -> (bool, Option<&str>) {
    let said = text.splitn(3, '\n').nth(2);
    let after = said.and_then(|said| said.strip_prefix(Milestone::MemoryCopied.line()));
    match after.and_then(|after| after.strip_prefix('\n')) {
        Some(end) => (true, Some(end)),
        None => (false, said),
    }
}

const NOTHING_BEGUN: &str = "this CRIU has not started the hook at `pre-stream`: start it with --stream, or without the hook";

/// Opens a file of ours. Others may be able to write to the images directory: a file of theirs
/// could tell of a success that never was, and a FIFO would be waited for.
fn open(directory: impl AsFd, name: &str, flags: OFlag) -> Result<File> {
    let flags = flags | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let file = File::from(openat(directory, name, flags, mode)?);
    let found = file.metadata().context("looking at it")?;
    ensure!(
        found.is_file()
            && found.uid() == nix::unistd::geteuid().as_raw()
            && found.nlink() == 1
            && found.mode() & 0o022 == 0,
        "it is no file of ours alone: remove it, and use an images directory that no one else can write to"
    );
    Ok(file)
}

/// Makes a file that takes what a streamer in the background says.
///
/// # Errors
/// Those of opening it.
pub(crate) fn log(directory: impl AsFd, name: &str) -> Result<OwnedFd> {
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_APPEND;
    let log = open(directory, name, flags)?;
    log.set_len(0).context("emptying it")?;
    Ok(log.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::fd::OwnedFd;
    use std::os::unix::fs::PermissionsExt;
    use tempfile::TempDir;

    fn directory() -> (TempDir, OwnedFd) {
        let directory = TempDir::new().unwrap();
        let fd = File::open(directory.path()).unwrap().into();
        (directory, fd)
    }

    fn begin(directory: &OwnedFd, starter: &str) -> Result<Outcome> {
        Outcome::begin(directory, "outcome", starter)
    }

    fn find(directory: &OwnedFd, starter: &str) -> Result<Outcome> {
        Outcome::find(directory, "outcome", starter)
    }

    #[test]
    fn how_a_streamer_ended_is_known_to_the_one_that_started_it() {
        let (_guard, directory) = directory();
        assert!(find(&directory, "CRIU 1 2").is_err());
        let mut outcome = begin(&directory, "CRIU 1 2").unwrap();
        assert!(begin(&directory, "CRIU 3 4").is_err());
        outcome.is_of_this_process().unwrap();
        let streamer = find(&directory, "CRIU 1 2").unwrap().streamer().unwrap();
        assert_eq!(streamer, Some(std::process::id()));
        outcome.end(None).unwrap();
        drop(outcome);
        find(&directory, "CRIU 1 2")
            .unwrap()
            .wait(false, || Ok(()))
            .unwrap();
        assert!(find(&directory, "CRIU 1 23").is_err());

        let mut outcome = begin(&directory, "CRIU 1 23").unwrap();
        assert!(find(&directory, "CRIU 1 2").is_err());
        outcome.is_of_this_process().unwrap();
        outcome.end(Some("reading a: no\nsecond line")).unwrap();
        drop(outcome);
        let failed = find(&directory, "CRIU 1 23")
            .unwrap()
            .wait(false, || Ok(()))
            .unwrap_err();
        assert_eq!(failed.to_string(), "reading a: no\nsecond line");
    }

    #[test]
    fn who_has_started_a_streamer_may_go_on_before_its_end_where_it_says_so() {
        let (_guard, directory) = directory();
        let mut outcome = begin(&directory, "CRIU 1 2").unwrap();
        outcome.is_of_this_process().unwrap();
        let mut copy = File::from(outcome.copy().unwrap());
        let wait = || {
            find(&directory, "CRIU 1 2")
                .unwrap()
                .wait(true, || bail!("not yet"))
        };
        assert_eq!(wait().unwrap_err().to_string(), "not yet");
        writeln!(copy, "memory-copied").unwrap();
        wait().unwrap();
        outcome.end(Some("a failure")).unwrap();
        drop((outcome, copy));
        assert_eq!(wait().unwrap_err().to_string(), "a failure");
    }

    #[test]
    fn files_that_others_have_a_hand_in_are_refused() {
        let (guard, directory) = directory();
        let path = guard.path().join("outcome");
        let refused = |what: &str| {
            for error in [
                begin(&directory, "CRIU 1 2").err(),
                find(&directory, "CRIU 1 2").err(),
                log(&directory, "outcome").err(),
            ] {
                let error = error
                    .unwrap_or_else(|| panic!("{what} was taken"))
                    .to_string();
                assert!(error.contains("no file of ours alone"), "{what}: {error}");
            }
        };
        std::fs::write(&path, "CRIU 1 2\n7\nsucceeded\n").unwrap();
        std::fs::hard_link(&path, guard.path().join("other")).unwrap();
        refused("a file with another name");
        std::fs::remove_file(guard.path().join("other")).unwrap();
        std::fs::set_permissions(&path, Permissions::from_mode(0o666)).unwrap();
        refused("a file that others may write to");
        std::fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        if nix::unistd::geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
            refused("another user's file");
        }
        assert_eq!(std::fs::read(&path).unwrap(), b"CRIU 1 2\n7\nsucceeded\n");
        std::fs::remove_file(&path).unwrap();
        nix::unistd::mkfifo(&path, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        // A FIFO without a reader cannot be opened for writing.
        assert!(log(&directory, "outcome").is_err());
        assert!(begin(&directory, "CRIU 1 2").is_err());
        assert!(find(&directory, "CRIU 1 2").is_err());
    }

    #[test]
    fn a_streamer_that_wrote_no_end_was_killed() {
        let (_guard, directory) = directory();
        begin(&directory, "CRIU 1 2")
            .unwrap()
            .is_of_this_process()
            .unwrap();
        let killed = find(&directory, "CRIU 1 2")
            .unwrap()
            .wait(false, || Ok(()))
            .unwrap_err();
        assert!(killed.to_string().contains("killed"), "{killed}");
    }
}
