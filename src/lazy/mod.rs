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
//! filling   the threads that fill in, and how it ends
//! pages     the data of a process
//! memory    the memories that it goes to: that of the process, and those of forked children
//! guardian  the process that kills the application if we end before all is in place
//! ```
//!
//! **No application runs on with pages that it has lost.** Whatever fails, the application is
//! killed, and only then is a userfaultfd closed. See [`guardian`] and [`memory`].

mod events;
mod filling;
mod guardian;
mod memory;
mod pagemap;
mod pages;
mod parts;
mod socket;
mod userfaultfd;

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::{Context, Error, Result, ensure};

use crate::criu::Listener;
use crate::format::ImageName;
use crate::os::process;
use crate::report;
use crate::report::meter::Counter;
use crate::store::catalog::Catalog;
use crate::store::{Arena, FileData};
use events::Events;
use filling::Filling;
pub(crate) use guardian::Guardian;
use pagemap::Pagemap;
use pages::PagesFile;
use socket::Connection;

/// The memory of the application that is restored. Dropped before all of it is in place, it kills
/// the application.
pub(crate) struct LazyMemory {
    pub(crate) filling: Arc<Filling>,
    /// From CRIU's first request to its first pagemap.
    socket: Option<Listener>,
    has_started: bool,
}

impl LazyMemory {
    /// Divides an image that has proved whole. `filled` counts what is in place.
    ///
    /// # Errors
    /// When a pagemap is none that CRIU writes.
    pub(crate) fn lay_out(
        catalog: &mut Catalog,
        guardian: Guardian,
        filled: &Counter,
    ) -> Result<Self> {
        let (mut files, mut arena) = (BTreeMap::new(), Arena::new());
        let names: Vec<_> = catalog.names().cloned().collect();
        for name in names {
            if let Some(pid) = process_of(name.as_str()) {
                let file = divide(catalog, &name, &mut arena)
                    .with_context(|| format!("--lazy-pages: {name}"))?;
                files.insert(pid, file);
            }
        }
        ensure!(!files.is_empty(), "--lazy-pages: the image has no pagemap");
        Ok(Self {
            filling: Filling::new(guardian, files, filled.clone())?,
            socket: None,
            has_started: false,
        })
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
            self.socket = Some(socket::listen(criu)?);
        }
        if process_of(name).is_some()
            && let Some(socket) = self.socket.take()
        {
            let connection = Connection::accept(&socket)?;
            self.has_started = true;
            self.filling.guardian.add(connection.0.try_clone()?)?;
            let criu = process::open(criu).context("watching CRIU")?;
            let hear = |filling: &Arc<_>| Events::hear(filling, criu, connection);
            self.filling.spawn("events", hear)?;
        }
        Ok(())
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        // Threads that still run have nothing to do any more, or fail, which changes nothing.
        self.filling
            .fail(Error::msg("nobody waits for it any more"));
        self.filling.guardian.end();
    }
}

/// The process of a pagemap; `None` for any other file.
fn process_of(name: &str) -> Option<i32> {
    let number = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    number.parse().ok()
}

/// Divides the pages file of a process. Where its pagemap is not understood, CRIU is to read all of
/// it.
fn divide(catalog: &mut Catalog, name: &ImageName, arena: &mut Arena) -> Result<PagesFile> {
    let mut bytes = catalog.read(name)?.context("it is not here")?;
    let pagemap = Pagemap::parse(&bytes).context("it is damaged")?;
    let pages = ImageName::new(&format!("pages-{}.img", pagemap.pages))?;
    let contents = catalog.remove(&pages).unwrap_or_default();
    if pagemap.unknown_flags || contents.len() != pagemap.size() {
        report::warn(format_args!(
            "--lazy-pages: {name} has an unknown flag, or does not fit {pages}: CRIU reads all \
             pages of this process before it goes on"
        ));
        pagemap.make_ordinary(&mut bytes);
        catalog.insert(pages, contents);
        catalog.write(name.clone(), &bytes)?;
        return Ok(PagesFile::divide(&[], FileData::default(), arena)?.0);
    }
    let (file, eager) = PagesFile::divide(&pagemap.stretches, contents, arena)
        .with_context(|| format!("dividing {pages}"))?;
    catalog.insert(pages, eager);
    Ok(file)
}
