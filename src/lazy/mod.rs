//! A restore that runs at once: `serve --lazy-pages` (docs/protocol.md, section 6).
//!
//! CRIU reads only the few pages that cannot wait, and the application runs. All others are filled
//! in from our memory, by several threads, those first that a process waits for: this is CRIU's
//! lazy-pages daemon (`criu/uffd.c`), and nothing in CRIU needs to be changed for it.
//!
//! ```text
//! lay_out   divides the image, whole and proved, into pages for CRIU and pages to fill in
//! socket    CRIU's lazy-pages.socket, from its first request on
//! events    the thread that hears CRIU, and each restored process through its userfaultfd
//! pages     the data that other threads fill in, and the memories that it goes to
//! guardian  the process that kills the application if we end before all is in place
//! ```
//!
//! **No application runs on with pages that it has lost.** Whatever fails, the application is
//! killed, and only then is a userfaultfd closed. See [`guardian`] and [`memory`].

mod events;
mod guardian;
mod memory;
mod pagemap;
mod pages;
mod parts;
mod socket;
mod userfaultfd;

use std::collections::BTreeMap;
use std::num::NonZero;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;

use anyhow::{Context, Error, Result, bail};
use crossbeam_channel::Receiver;
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::format::ImageName;
use crate::report;
use crate::report::meter::Counter;

use crate::store::catalog::Catalog;
use crate::store::{Arena, FileData};
use events::Events;
use guardian::Guardian;
use memory::Memory;
use pagemap::Pagemap;
use pages::PagesFile;
use socket::Socket;

/// More threads than this fill no faster.
const MOST_FILLERS: usize = 8;

/// A page that a process waits for.
type Fault = (Arc<Memory>, u64);

/// The memory of the application that is restored. Dropped before all of it is in place, it kills
/// the application.
pub(crate) struct LazyMemory {
    shared: Arc<Shared>,
    /// From CRIU's first request to its first pagemap.
    socket: Option<Socket>,
    has_started: bool,
}

/// All that the threads share.
struct Shared {
    guardian: Guardian,
    /// The image's memory, by the number of the process.
    files: BTreeMap<i32, Arc<PagesFile>>,
    /// For processes without memory in the image.
    nothing: Arc<PagesFile>,
    /// All units, in the order in which they are filled.
    units: Vec<(Arc<PagesFile>, usize)>,
    /// The next unit.
    next: AtomicUsize,
    /// The number of units that are filled.
    done: AtomicUsize,
    /// Bytes that are in place.
    filled: Counter,
    /// Set when all is in place, or with the reason why it never will be.
    outcome: OnceLock<Result<(), String>>,
    /// Readable when the outcome is known.
    changed: EventFd,
}

impl LazyMemory {
    /// Starts the guardian: there must be no other threads. `filled` counts what is in place.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(crate) fn new(filled: &Counter) -> Result<Self> {
        let guardian = Guardian::start()?;
        let (nothing, _) = PagesFile::divide(&[], FileData::default(), &mut Arena::new())?;
        let shared = Shared {
            guardian,
            files: BTreeMap::new(),
            nothing: Arc::new(nothing),
            units: Vec::new(),
            next: AtomicUsize::new(0),
            done: AtomicUsize::new(0),
            filled: filled.clone(),
            outcome: OnceLock::new(),
            changed: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        };
        Ok(Self {
            shared: Arc::new(shared),
            socket: None,
            has_started: false,
        })
    }

    /// Divides an image that has proved whole.
    ///
    /// # Errors
    /// When a pagemap is none that CRIU writes.
    pub(crate) fn lay_out(&mut self, catalog: &mut Catalog) -> Result<()> {
        let shared = Arc::get_mut(&mut self.shared).context("it was begun")?;
        let mut arena = Arena::new();
        let names: Vec<_> = catalog.names().cloned().collect();
        for name in names {
            if let Some(pid) = process_of(name.as_str())
                && let Some(file) = divide(catalog, &name, &mut arena)
                    .with_context(|| format!("--lazy-pages: {name}"))?
            {
                shared.files.insert(pid, Arc::new(file));
            }
        }
        for file in [&shared.nothing].into_iter().chain(shared.files.values()) {
            let units = (0..file.units()).map(|unit| (Arc::clone(file), unit));
            shared.units.extend(units);
        }
        Ok(())
    }

    /// Prepares for a request of CRIU's for a file.
    ///
    /// # Errors
    /// When CRIU runs without --lazy-pages.
    pub(crate) fn before_file(&mut self, criu: i32, name: &str) -> Result<()> {
        if self.has_started {
            return Ok(());
        }
        // CRIU is in its working directory when it asks for its first file, and has connected to
        // its daemon when it asks for a pagemap.
        if self.socket.is_none() {
            self.socket = Some(Socket::bind(criu)?);
        }
        if process_of(name).is_some()
            && let Some(socket) = self.socket.take()
        {
            let connection = socket.accept()?;
            self.has_started = true;
            let criu = guardian::process(criu).context("watching CRIU")?;
            let (faults, to_answer) = crossbeam_channel::unbounded();
            spawn("events", &self.shared, |shared| {
                Events::hear(shared, criu, connection, faults)
            })?;
            spawn("faults", &self.shared, move |shared| {
                shared.answer(&to_answer)
            })?;
        }
        Ok(())
    }

    /// True if all memory is in place, and nothing depends on us any more.
    ///
    /// # Errors
    /// When filling failed, and the application was killed.
    pub(crate) fn is_in_place(&self) -> Result<bool> {
        // The outcome is looked at below.
        let _ = self.shared.changed.read();
        match self.shared.outcome.get() {
            Some(Err(why)) => bail!("{why}"),
            outcome => Ok(outcome.is_some()),
        }
    }
}

/// Readable when all memory is in place, or filling has failed.
impl AsFd for LazyMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.changed.as_fd()
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        // Threads that still run have nothing to do any more, or fail, which changes nothing.
        self.shared.fail(Error::msg("nobody waits for it any more"));
        self.shared.guardian.end();
    }
}

impl Shared {
    /// Answers faults, for as long as any can come.
    fn answer(&self, faults: &Receiver<Fault>) -> Result<()> {
        let mut buffer = Vec::new();
        for (memory, address) in faults {
            if let Some(offset) = memory.answer(address)? {
                self.fill(&memory.pages, memory.pages.unit_at(offset), &mut buffer)?;
            }
        }
        Ok(())
    }

    /// Fills all units, once all processes are restored.
    fn fill_in_order(&self) -> Result<()> {
        let mut buffer = Vec::new();
        while let Some((file, unit)) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.fill(file, *unit, &mut buffer)?;
        }
        Ok(())
    }

    fn fill(&self, file: &PagesFile, unit: usize, buffer: &mut Vec<u8>) -> Result<()> {
        if let Some(bytes) = file.fill(unit, buffer)? {
            self.filled.add(bytes as u64);
            if self.done.fetch_add(1, Ordering::AcqRel) + 1 == self.units.len() {
                self.conclude(Ok(()));
            }
        }
        Ok(())
    }

    fn conclude(&self, outcome: Result<(), String>) {
        if self.outcome.set(outcome).is_ok() {
            let _ = self.changed.write(1);
        }
    }

    /// Kills the application, unless it has all of its memory.
    fn fail(&self, error: Error) {
        if self.outcome.get().is_none() {
            self.guardian.kill_all();
            self.conclude(Err(format!(
                "filling the application's memory: {error:#}; it was killed"
            )));
        }
    }
}

/// The number of threads that fill.
fn fillers() -> usize {
    thread::available_parallelism()
        .map_or(1, NonZero::get)
        .min(MOST_FILLERS)
}

/// Starts a thread, whose failure is the application's end.
fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    work: impl FnOnce(&Arc<Shared>) -> Result<()> + Send + 'static,
) -> Result<()> {
    let shared = Arc::clone(shared);
    let run = move || {
        if let Err(error) = work(&shared) {
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
fn divide(catalog: &mut Catalog, name: &ImageName, arena: &mut Arena) -> Result<Option<PagesFile>> {
    let mut bytes = catalog.read(name)?.context("it is not here")?;
    let pagemap = Pagemap::parse(&bytes).context("it is damaged")?;
    let pages = ImageName::new(&format!("pages-{}.img", pagemap.pages))?;
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
    let (file, eager) = PagesFile::divide(&pagemap.stretches, contents, arena)
        .with_context(|| format!("dividing {pages}"))?;
    catalog.insert(pages, eager);
    Ok(Some(file))
}
