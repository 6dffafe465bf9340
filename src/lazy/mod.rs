//! A restore that runs at once: `serve --lazy-pages` (docs/protocol.md, section 6).
//!
//! CRIU reads only the few pages that cannot wait, and the application runs. All others are filled
//! in from our memory, by several threads, those first that a process waits for: this is CRIU's
//! lazy-pages daemon (`criu/uffd.c`), and nothing in CRIU needs to be changed for it.
//!
//! ```text
//! lay_out   the image, whole and proved, in two: what CRIU reads, and what is filled in
//! answer    CRIU has connected: its lazy-pages.socket is there from then on
//! ear       the thread that hears CRIU, and each restored process through its userfaultfd
//! fillers   the threads that fill
//! guardian  the process that kills the application if we end before all is in place
//! ```
//!
//! **No application runs on with pages that it has lost.** Whatever fails, the application is
//! killed, and only then is a userfaultfd closed. See [`guardian`] and [`memory`].

mod fillers;
mod guardian;
mod listen;
mod memory;
mod missing;
mod pagemap;
mod pages;
mod socket;
mod userfaultfd;

use std::collections::{BTreeMap, HashSet};
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::format::ImageName;
use crate::os::pipe::uninterrupted;
use crate::report;
use crate::report::meter::Counter;
use crate::store::Arena;
use crate::store::catalog::Catalog;
use fillers::Work;
use guardian::Guardian;
use listen::Ear;
use pagemap::Pagemap;
use pages::PagesFile;
use socket::{Connection, Socket};

/// More threads than this fill no faster.
const MOST_FILLERS: usize = 8;

/// The image's memory, by the number of the process.
type Files = BTreeMap<i32, Arc<PagesFile>>;

/// How far it is.
#[derive(Debug)]
enum Outcome {
    Filling,
    InPlace,
    Failed(Option<Error>),
}

/// What the threads share.
struct Shared {
    guardian: Guardian,
    socket: Socket,
    files: Files,
    work: Work,
    outcome: Mutex<Outcome>,
    /// Becomes readable when the outcome is known.
    changed: Arc<EventFd>,
    /// Becomes readable when the threads are to end.
    end: EventFd,
    is_connected: Mutex<bool>,
}

/// The memory of the application that is being restored.
pub(crate) struct LazyMemory {
    /// Until CRIU has connected.
    prepared: Option<Prepared>,
    running: Option<Running>,
    changed: Arc<EventFd>,
}

struct Prepared {
    guardian: Guardian,
    files: Files,
    filled: Counter,
}

struct Running {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl LazyMemory {
    /// Starts the guardian: there must be no other threads. `filled` counts what is in place.
    ///
    /// # Errors
    /// When the kernel does not let us.
    pub(crate) fn new(filled: &Counter) -> Result<Self> {
        let guardian = Guardian::start()?;
        let changed = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        Ok(Self {
            prepared: Some(Prepared {
                guardian,
                files: Files::new(),
                filled: filled.clone(),
            }),
            running: None,
            changed: Arc::new(changed),
        })
    }

    /// Divides an image that has proved whole.
    ///
    /// # Errors
    /// When CRIU would not have written such pagemaps.
    pub(crate) fn lay_out(&mut self, catalog: &mut Catalog) -> Result<()> {
        if let Some(prepared) = &mut self.prepared {
            prepared.files = lay_out(catalog)?;
        }
        Ok(())
    }

    /// CRIU asks for a file.
    ///
    /// # Errors
    /// When it was not told to restore lazily.
    pub(crate) fn before_file(&mut self, criu: u32, name: &str) -> Result<()> {
        if let Some(prepared) = self.prepared.take() {
            // It is in its working directory when it asks for the first file.
            let running = Running::start(prepared, criu, Arc::clone(&self.changed));
            self.running = Some(running.context("--lazy-pages")?);
        }
        if let Some(running) = &self.running
            && process_of(name).is_some()
        {
            running.shared.check_connected()?;
        }
        Ok(())
    }

    /// Whether all memory is in place, and nothing depends on us any more.
    ///
    /// # Errors
    /// When that failed. The application is dead then.
    pub(crate) fn is_in_place(&self) -> Result<bool> {
        let Some(running) = &self.running else {
            return Ok(false);
        };
        // What it has told is looked at below.
        let _ = self.changed.read();
        match &mut *running.shared.outcome() {
            Outcome::Filling => Ok(false),
            Outcome::InPlace => Ok(true),
            Outcome::Failed(error) => Err(error
                .take()
                .unwrap_or_else(|| anyhow!("filling the application's memory"))),
        }
    }
}

/// Becomes readable when the memory is in place, or that failed.
impl AsFd for LazyMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }
}

impl Running {
    fn start(prepared: Prepared, criu: u32, changed: Arc<EventFd>) -> Result<Self> {
        let Prepared {
            guardian,
            files,
            filled,
        } = prepared;
        let process = guardian::process(criu as i32).context("watching CRIU")?;
        let shared = Arc::new(Shared {
            guardian,
            socket: Socket::bind(criu)?,
            work: Work::new(files.values(), filled),
            files,
            outcome: Mutex::new(Outcome::Filling),
            changed,
            end: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
            is_connected: Mutex::new(false),
        });
        let fillers = thread::available_parallelism().map_or(1, NonZero::get);
        let mut running = Self {
            shared,
            threads: Vec::new(),
        };
        running.spawn("ear", |shared| Ear::new(shared, process)?.hear())?;
        running.spawn("faults", |shared| {
            shared.work.answer_faults(|| shared.all_filled())
        })?;
        for _ in 0..fillers.min(MOST_FILLERS) {
            running.spawn("filler", |shared| {
                shared.work.fill_in_order(|| shared.all_filled())
            })?;
        }
        Ok(running)
    }

    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce(&Shared) -> Result<()> + Send + 'static,
    ) -> Result<()> {
        let shared = Arc::clone(&self.shared);
        let run = move || {
            if let Err(error) = work(&shared) {
                shared.fail(error);
            }
        };
        let thread = thread::Builder::new().name(name.into()).spawn(run);
        self.threads.push(thread.context("starting a thread")?);
        Ok(())
    }
}

/// Before all is in place this kills the application.
impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(*self.shared.outcome(), Outcome::InPlace) {
            self.shared.guardian.kill_application();
        }
        self.shared.work.end();
        // It counts up from 0 once.
        let _ = self.shared.end.write(1);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Shared {
    fn outcome(&self) -> MutexGuard<'_, Outcome> {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn conclude(&self, outcome: Outcome) {
        *self.outcome() = outcome;
        let _ = self.changed.write(1);
    }

    /// Everything was filled in.
    fn all_filled(&self) {
        // One that forks until its descriptor is closed has children that lack nothing.
        match self.files.values().try_for_each(|file| file.close()) {
            Ok(()) => self.conclude(Outcome::InPlace),
            Err(error) => self.fail(error),
        }
    }

    /// Kills the application.
    fn fail(&self, error: Error) {
        self.guardian.kill_application();
        self.work.end();
        let error = error.context("filling the application's memory: it was killed");
        if matches!(*self.outcome(), Outcome::Filling) {
            self.conclude(Outcome::Failed(Some(error)));
        }
    }

    /// CRIU's connection, once there is one.
    fn accept(&self) -> Result<Option<Connection>> {
        let mut is_connected = self
            .is_connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let connection = self.socket.accept()?;
        *is_connected |= connection.is_some();
        Ok(connection)
    }

    /// # Errors
    /// When CRIU, which restores processes, has not come for its lazy-pages daemon.
    fn check_connected(&self) -> Result<()> {
        let is_connected = self
            .is_connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let mut fds = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        let mut waits = || uninterrupted(|| poll(&mut fds, PollTimeout::ZERO));
        ensure!(
            *is_connected || waits()? > 0,
            "--lazy-pages: `criu restore` runs without its own --lazy-pages, and would not get the \
             application's memory: give both the option, or neither"
        );
        Ok(())
    }
}

/// The process of a pagemap; `None` for any other file.
fn process_of(name: &str) -> Option<i32> {
    let number = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    number.parse().ok()
}

/// Divides the pages files of all processes in the catalog.
fn lay_out(catalog: &mut Catalog) -> Result<Files> {
    let mut files = Files::new();
    let mut seen = HashSet::new();
    let mut arena = Arena::new();
    let names: Vec<_> = catalog.names().cloned().collect();
    for (name, pid) in names
        .iter()
        .filter_map(|name| Some((name, process_of(name.as_str())?)))
    {
        let mut bytes = catalog.read(name)?.context("reading a pagemap")?;
        let pagemap =
            Pagemap::parse(&bytes).with_context(|| format!("--lazy-pages: {name} is damaged"))?;
        let pages = ImageName::new(&format!("pages-{}.img", pagemap.pages))?;
        if !seen.insert(pages.clone()) {
            bail!("--lazy-pages: {name} has the same {pages} as another pagemap");
        }
        let size = catalog.size(&pages).unwrap_or(0);
        if pagemap.unknown_flags || pagemap.size() != size {
            let why = match pagemap.unknown_flags {
                true => "has a flag that is unknown",
                false => "does not fit its pages file",
            };
            report::warn(format_args!(
                "--lazy-pages: {name} {why}: CRIU reads all pages of this process before it goes on"
            ));
            pagemap.make_ordinary(&mut bytes);
            catalog.write(name.clone(), &bytes)?;
            continue;
        }
        let Some(contents) = catalog.remove(&pages) else {
            continue;
        };
        let (file, eager) = PagesFile::divide(pagemap.stretches, contents, &mut arena)
            .with_context(|| format!("--lazy-pages: dividing {pages}"))?;
        catalog.insert(pages, eager);
        files.insert(pid, Arc::new(file));
    }
    Ok(files)
}
