//! A restore that runs at once: `serve --lazy-pages` (docs/protocol.md, section 6).
//!
//! CRIU reads only the few pages that cannot wait, and the application runs. All others are filled
//! in from our memory, by several threads, those first that a process waits for: this is CRIU's
//! lazy-pages daemon (`criu/uffd.c`), and nothing in CRIU needs to be changed for it.
//!
//! ```text
//! lay_out   the image, whole and proved, in two: what CRIU reads, and what is filled in
//! socket    CRIU's lazy-pages.socket, from its first request on
//! events    the thread that hears CRIU, and each restored process through its userfaultfd
//! fillers   the threads that fill
//! guardian  the process that kills the application if we end before all is in place
//! ```
//!
//! **No application runs on with pages that it has lost.** Whatever fails, the application is
//! killed, and only then is a userfaultfd closed. See [`guardian`] and [`memory`].

mod events;
mod fillers;
mod guardian;
mod memory;
mod missing;
mod pagemap;
mod pages;
mod socket;
mod userfaultfd;

use std::collections::{BTreeMap, HashSet};
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Error, Result, bail, ensure};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::format::ImageName;
use crate::report;
use crate::report::meter::Counter;
use crate::store::Arena;
use crate::store::catalog::Catalog;
use events::Events;
use fillers::Work;
use guardian::Guardian;
use pagemap::Pagemap;
use pages::PagesFile;
use socket::Socket;

/// More threads than this fill no faster.
const MOST_FILLERS: usize = 8;

/// The image's memory, by the number of the process.
type Files = BTreeMap<i32, Arc<PagesFile>>;

/// The memory of the application that is restored. Dropped before all of it is in place, it kills
/// the application.
pub(crate) struct LazyMemory {
    guardian: Arc<Guardian>,
    files: Files,
    filled: Counter,
    /// From CRIU's first request to its first pagemap.
    socket: Option<Socket>,
    /// From then on.
    shared: Option<Arc<Shared>>,
    changed: Arc<EventFd>,
}

/// What the threads share.
struct Shared {
    guardian: Arc<Guardian>,
    files: Files,
    work: Work,
    /// All is in place, or why not.
    outcome: OnceLock<Result<(), String>>,
    /// Becomes readable when the outcome is known.
    changed: Arc<EventFd>,
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
            guardian: Arc::new(guardian),
            files: Files::new(),
            filled: filled.clone(),
            socket: None,
            shared: None,
            changed: Arc::new(changed),
        })
    }

    /// Divides an image that has proved whole.
    ///
    /// # Errors
    /// When CRIU would not have written such pagemaps.
    pub(crate) fn lay_out(&mut self, catalog: &mut Catalog) -> Result<()> {
        let (mut seen, mut arena) = (HashSet::new(), Arena::new());
        let names: Vec<_> = catalog.names().cloned().collect();
        for name in names {
            if let Some(pid) = process_of(name.as_str())
                && let Some(file) = divide(catalog, &name, &mut seen, &mut arena)
                    .with_context(|| format!("--lazy-pages: {name}"))?
            {
                self.files.insert(pid, Arc::new(file));
            }
        }
        Ok(())
    }

    /// CRIU asks for a file.
    ///
    /// # Errors
    /// When it was not told to restore lazily.
    pub(crate) fn before_file(&mut self, criu: i32, name: &str) -> Result<()> {
        if self.shared.is_some() {
            return Ok(());
        }
        // It is in its working directory when it asks for its first file, and has connected to its
        // daemon when it asks for a pagemap.
        if self.socket.is_none() {
            self.socket = Some(Socket::bind(criu)?);
        }
        if process_of(name).is_some()
            && let Some(socket) = self.socket.take()
        {
            self.start(criu, &socket)?;
        }
        Ok(())
    }

    fn start(&mut self, criu: i32, socket: &Socket) -> Result<()> {
        let connection = socket.accept()?;
        let criu = guardian::process(criu).context("watching CRIU")?;
        let files = std::mem::take(&mut self.files);
        let shared = Arc::new(Shared {
            guardian: Arc::clone(&self.guardian),
            work: Work::new(files.values(), self.filled.clone()),
            files,
            outcome: OnceLock::new(),
            changed: Arc::clone(&self.changed),
        });
        self.shared = Some(Arc::clone(&shared));
        let (faults, to_answer) = crossbeam_channel::unbounded();
        spawn("events", &shared, |shared| {
            Events::hear(shared, criu, connection, faults)
        })?;
        spawn("faults", &shared, move |shared| {
            shared.work.answer(&to_answer, || shared.all_filled())
        })
    }

    /// Whether all memory is in place, and nothing depends on us any more.
    ///
    /// # Errors
    /// When that failed. The application is dead then.
    pub(crate) fn is_in_place(&self) -> Result<bool> {
        // What it has told is looked at below.
        let _ = self.changed.read();
        match self.outcome() {
            Some(Err(why)) => bail!("{why}"),
            outcome => Ok(outcome.is_some()),
        }
    }

    fn outcome(&self) -> Option<&Result<(), String>> {
        self.shared.as_ref().and_then(|shared| shared.outcome.get())
    }
}

/// Becomes readable when the memory is in place, or that failed.
impl AsFd for LazyMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.changed.as_fd()
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        if !matches!(self.outcome(), Some(Ok(()))) {
            self.guardian.record().kill_all();
        }
        // The threads have nothing to do any more, or fail, which changes nothing.
        if let Some(shared) = &self.shared {
            let _ = shared
                .outcome
                .set(Err("nobody waits for it any more".into()));
        }
        self.guardian.end();
    }
}

impl Shared {
    /// Everything was filled in.
    fn all_filled(&self) {
        // One that forks until its descriptor is closed has children that lack nothing.
        match self.files.values().try_for_each(|file| file.close()) {
            Ok(()) => self.conclude(Ok(())),
            Err(error) => self.fail(error),
        }
    }

    fn conclude(&self, outcome: Result<(), String>) {
        if self.outcome.set(outcome).is_ok() {
            let _ = self.changed.write(1);
        }
    }

    /// Kills the application, unless it has all of its memory.
    fn fail(&self, error: Error) {
        if self.outcome.get().is_none() {
            self.guardian.record().kill_all();
            self.conclude(Err(format!(
                "filling the application's memory: {error:#}; it was killed"
            )));
        }
    }
}

/// How many threads fill.
fn fillers() -> usize {
    thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(MOST_FILLERS)
}

/// Starts a thread, whose failure is the application's end.
fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    work: impl FnOnce(Arc<Shared>) -> Result<()> + Send + 'static,
) -> Result<()> {
    let shared = Arc::clone(shared);
    let run = move || {
        if let Err(error) = work(Arc::clone(&shared)) {
            shared.fail(error);
        }
    };
    let thread = thread::Builder::new().name(name.into()).spawn(run);
    thread.map(drop).context("starting a thread")
}

/// The process of a pagemap; `None` for any other file.
fn process_of(name: &str) -> Option<i32> {
    let number = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    number.parse().ok()
}

/// Divides the pages file of a process; `None` if CRIU is to read all of it.
fn divide(
    catalog: &mut Catalog,
    name: &ImageName,
    seen: &mut HashSet<ImageName>,
    arena: &mut Arena,
) -> Result<Option<PagesFile>> {
    let mut bytes = catalog.read(name)?.context("it is not here")?;
    let pagemap = Pagemap::parse(&bytes).context("it is damaged")?;
    let pages = ImageName::new(&format!("pages-{}.img", pagemap.pages))?;
    ensure!(
        seen.insert(pages.clone()),
        "another pagemap has the same {pages}"
    );
    let fits = catalog.size(&pages).unwrap_or(0) == pagemap.size();
    if pagemap.unknown_flags || !fits {
        let why = match fits {
            true => "has a flag that is unknown",
            false => "does not fit its pages file",
        };
        report::warn(format_args!(
            "--lazy-pages: {name} {why}: CRIU reads all pages of this process before it goes on"
        ));
        pagemap.make_ordinary(&mut bytes);
        catalog.write(name.clone(), &bytes)?;
        return Ok(None);
    }
    let Some(contents) = catalog.remove(&pages) else {
        return Ok(None);
    };
    let (file, eager) = PagesFile::divide(pagemap.stretches, contents, arena)
        .with_context(|| format!("dividing {pages}"))?;
    catalog.insert(pages, eager);
    Ok(Some(file))
}
