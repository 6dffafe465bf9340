//! Serves an image from memory to CRIU, which treats it as a directory of files.
//!
//! CRIU opens a file and closes it unread, opens another before the first is finished, hands one to
//! a child process, opens one twice, and does so from several processes. So requests are answered
//! at once, whatever the state of earlier files, and any number of files is under way at the same
//! time, each moving whenever its own reader makes room.
//!
//! A file's memory goes back to the kernel as soon as the pipe holds references to its pages, since
//! CRIU copies what it reads: keeping it would take twice the memory. [`Catalog`] says which files
//! are kept for being asked for again. Asking for another one again is answered with "does not
//! exist", and the program then fails naming it.

use anyhow::{Context, Error, Result, bail, ensure};

use crate::criu::files;
use crate::criu::{Clients, Connection, Listener, Message};
use crate::format::ImageName;
use crate::lazy::LazyMemory;
use crate::os::pipe::WriteEnd;
use crate::os::poller::{Event, Interest, Wait, Watched};
use crate::pace::Activity;
use crate::report;
use crate::store::catalog::{Catalog, LARGEST_KEPT, Lookup};
use crate::store::transfer::{Transfer, Transfers};
use crate::supervision::Supervisor;

/// System calls made for one client before events are looked at again. CRIU waits for our answer to
/// its request, and then for the file, so that a second call would find nothing.
const TURN: usize = 1;

/// Answers CRIU, and sends it files.
pub(crate) struct Server<'a> {
    supervisor: &'a Supervisor,
    /// With --lazy-pages.
    lazy: Option<LazyMemory>,
    clients: Clients,
    transfers: Transfers,
    /// The first file that was asked for again, and is gone.
    refused: Option<ImageName>,
}

/// Warns of files that CRIU will not restore, whatever is served.
pub(crate) fn warn_of_losses(files: &Catalog) {
    let is_lost =
        |name: &&ImageName| files::is_nftables(name.as_str()) && files.holds_something(name);
    for name in files.names().filter(is_lost) {
        report::warn(format_args!(
            "{name} holds firewall rules, and `criu restore --stream` restores none of them (CRIU \
             asks a pipe for its size): where the application needs them, use `extract` and a \
             plain `criu restore` instead"
        ));
    }
}

impl<'a> Server<'a> {
    /// Serves the CRIU that connects to `listener`, until it has gone.
    pub(crate) fn new(
        listener: Listener,
        lazy: Option<LazyMemory>,
        supervisor: &'a Supervisor,
    ) -> Result<Self> {
        // It ends when it has restored everything; its connection shows what it still wants.
        supervisor.let_caller_end();
        let poller = supervisor.poller();
        if let Some(lazy) = &lazy {
            let changed = &lazy.filling.changed;
            poller
                .add(changed, Watched::Memory, 0, Interest::Readable)
                .context("preparing to wait for the application's memory")?;
        }
        Ok(Self {
            supervisor,
            lazy,
            clients: Clients::of(listener, usize::MAX, poller)?,
            transfers: Transfers::new(Watched::Transfer),
            refused: None,
        })
    }

    /// True if all clients have come and gone, and have everything they wanted.
    pub(crate) fn is_done(&self) -> bool {
        self.clients.all_gone() && self.transfers.is_empty()
    }

    /// Everything that must stay open until the reason of a failure is reported.
    pub(crate) fn into_open(self) -> (Clients, Transfers) {
        (self.clients, self.transfers)
    }

    /// The files whose readers wait for something that has not come yet.
    pub(crate) fn starving(&self) -> impl Iterator<Item = &ImageName> {
        let starving = self.transfers.iter().filter(|it| it.is_starving());
        starving.map(|it| &it.name)
    }

    /// Acts on events, answers, and sends what is here of `files`.
    ///
    /// # Errors
    /// When CRIU breaks the protocol, or asked for nothing, and when a signal came.
    pub(crate) fn step(&mut self, files: &mut Catalog, events: &[Event]) -> Result<Activity> {
        self.handle(files, events)?;
        let grace_ends = self.clients.check_grace()?;
        if self.clients.all_gone() {
            self.clients.stop_listening();
        }
        if !self.clients.have_asked() {
            self.check_to_come(grace_ends.is_some())?;
        }
        for transfer in self.transfers.iter_mut().filter(|it| it.is_open()) {
            transfer.add(files.take_more(&transfer.name))?;
        }
        let sent = self.transfers.send(self.supervisor.poller())?;
        // CRIU may close a pipe early, which is no error.
        for name in &sent.left_by_readers {
            files.forget(name);
        }
        let idle = Activity::Idle(Wait::Forever.or_until(grace_ends));
        Ok(sent.activity().unwrap_or(idle))
    }

    /// The reason behind an error that shows what CRIU does: CRIU's own, if it has left.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match self.clients.have_left() {
            true => self.supervisor.explain_by_criu(error),
            false => error,
        }
    }

    /// Fails if the CRIU that was to come has ended: it cannot end well without our answers.
    fn check_to_come(&self, has_grace: bool) -> Result<()> {
        if let Some(command) = self.supervisor.ended_criu() {
            bail!(
                "waiting for CRIU: {command} ended well without having connected: is it `criu \
                 restore --stream`, in the foreground, with the same --images-dir?"
            );
        }
        ensure!(
            has_grace || !self.supervisor.caller_has_ended(),
            "waiting for CRIU: it has ended without having connected; see CRIU's log: if it did not find the socket, the path of its --images-dir is too long for one"
        );
        Ok(())
    }

    /// # Errors
    /// When a file was asked for that had been sent and freed.
    pub(crate) fn check_refused(&self) -> Result<()> {
        if let Some(name) = &self.refused {
            bail!(
                "serving {name}: CRIU asked for it after it had been sent and freed; files of over \
                 {LARGEST_KEPT} bytes are served once"
            );
        }
        Ok(())
    }

    /// True if the application has all of its memory, and without --lazy-pages.
    ///
    /// # Errors
    /// When it has lost some of it, and was killed.
    pub(crate) fn memory_is_in_place(&self) -> Result<bool> {
        let lazy = self.lazy.as_ref();
        lazy.map_or(Ok(true), |lazy| lazy.filling.is_in_place())
    }

    fn handle(&mut self, files: &mut Catalog, events: &[Event]) -> Result<()> {
        for event in events {
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Listener => self.clients.accept(self.supervisor.poller())?,
                Watched::Client => self.answer(files, event.id)?,
                Watched::Memory => drop(self.memory_is_in_place()?),
                Watched::Transfer => self.transfers.made_room(event.id, event.hung_up),
                _ => {}
            }
        }
        Ok(())
    }

    /// Answers what a client asks, and starts the files that it sent pipes for.
    fn answer(&mut self, files: &mut Catalog, client: u64) -> Result<()> {
        let Server {
            lazy,
            clients,
            transfers,
            refused,
            ..
        } = self;
        let mut prepared = Ok(());
        let answered = clients.next_requests(
            client,
            TURN,
            |connection: &mut Connection, message| match message {
                Message::Request(name) => {
                    if prepared.is_ok() {
                        prepared = prepare(lazy.as_mut(), connection, &name);
                    }
                    if prepared.is_err() {
                        return Ok(false);
                    }
                    let file = present(files, refused, &name);
                    let is_absent = file.is_none();
                    connection.reply(file)?;
                    // A peer that then sends something else than a pipe is not CRIU, and harms no
                    // one.
                    Ok(is_absent)
                }
                Message::Pipe(name, fd) => {
                    let pipe = WriteEnd::new(fd).with_context(|| {
                        format!("{} sent something wrong for {name}", connection.peer)
                    })?;
                    // Only now: a peer that leaves in between, or sends no pipe, takes nothing with
                    // it.
                    let mut take = || {
                        let taken = files.take(&name)?;
                        taken.context("two clients asked for it at a time, and it can be sent once")
                    };
                    let taken = take().with_context(|| format!("serving {name}"))?;
                    transfers.start(Transfer::new(name, pipe, taken)?);
                    Ok(true)
                }
            },
        );
        prepared.and(answered)
    }
}

/// Prepares for the memory that the CRIU of this connection leaves to be filled in, if it does.
fn prepare(lazy: Option<&mut LazyMemory>, connection: &Connection, file: &str) -> Result<()> {
    if let Some(lazy) = lazy {
        return lazy.before_file(connection.pid, file);
    }
    // Only its command line shows it, if at all; later it looks for its daemon, and fails.
    ensure!(
        file != files::INVENTORY || !connection.command_line.has_lazy_pages(),
        "`criu restore` runs with --lazy-pages: give `serve` the same option"
    );
    Ok(())
}

/// The name of a file that can be sent.
fn present(files: &Catalog, refused: &mut Option<ImageName>, name: &str) -> Option<ImageName> {
    let name = ImageName::new(name).ok()?;
    match files.look_up(&name) {
        Lookup::Present => Some(name),
        Lookup::Absent => None,
        Lookup::Gone => {
            report::warn(format_args!(
                "{name} was asked for again, but it has been sent and freed"
            ));
            refused.get_or_insert(name);
            None
        }
    }
}
