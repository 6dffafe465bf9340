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

use std::collections::{BTreeSet, HashMap};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};

use crate::criu::files;
use crate::criu::{Clients, Connection, Listener, Message};
use crate::format::ImageName;
use crate::os::pipe::WriteEnd;
use crate::os::poller::{Event, Interest, Wait, Watched};
use crate::pace::{Activity, Pace};
use crate::report;
use crate::store::catalog::{Catalog, LARGEST_KEPT, Lookup, Taken};
use crate::store::transfer::{Progress, Transfer};
use crate::supervision::{Failure, Supervisor};

/// System calls made for one client before events are looked at again. CRIU waits for our answer to
/// its request, and then for the file, so that a second call would find nothing.
const TURN: usize = 1;

/// Retry interval in case an edge-triggered event was missed.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// A file on its way to CRIU.
struct Sending {
    name: ImageName,
    transfer: Transfer,
}

/// Answers CRIU, and sends it files.
pub(crate) struct Server<'a> {
    supervisor: &'a Supervisor,
    /// Until CRIU has come.
    listener: Option<Listener>,
    clients: Clients<ImageName>,
    /// CRIU has ended well, and had not connected.
    is_missed: bool,
    transfers: HashMap<u64, Sending>,
    /// Transfers whose pipes may have room.
    busy: Vec<u64>,
    next_transfer: u64,
    /// The files that were asked for again, and are gone.
    refused: BTreeSet<ImageName>,
    /// When all transfers are tried again.
    try_again: Instant,
    /// Bytes that were sent, or were not wanted, and are not kept for another time.
    freed: u64,
}

/// Says what CRIU will not restore of these files, whatever is served.
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

/// Serves `files` until CRIU has come and gone.
///
/// # Errors
/// When a file was asked for that had been sent and freed, and when CRIU asked for nothing.
pub(crate) fn serve(
    listener: Listener,
    mut files: Catalog,
    supervisor: &Supervisor,
) -> Result<(), Failure> {
    let mut server = Server::new(listener, supervisor)?;
    let mut pace = Pace::new();
    let (mut events, mut wait) = (Vec::new(), Wait::Now);
    while !server.is_done() {
        let waited = supervisor.poller().wait(wait, &mut events);
        let served = waited
            .context("waiting for CRIU")
            .and_then(|()| server.step(&mut files, &events));
        match served {
            Ok(activity) => wait = pace.after(activity),
            Err(error) => return Err(Failure::new(error, (server.clients, server.transfers))),
        }
    }
    Ok(server.conclude()?)
}

impl<'a> Server<'a> {
    /// Serves the CRIU that connects to `listener`, until it has gone.
    pub(crate) fn new(listener: Listener, supervisor: &'a Supervisor) -> Result<Self> {
        // It ends when it has restored everything; what it still wants, its connection tells.
        supervisor.let_caller_end();
        supervisor
            .poller()
            .add(&listener, Watched::Listener, 0, Interest::Readable)
            .context("preparing to wait for CRIU")?;
        Ok(Self {
            supervisor,
            listener: Some(listener),
            clients: Clients::any(),
            is_missed: false,
            transfers: HashMap::new(),
            busy: Vec::new(),
            next_transfer: 0,
            refused: BTreeSet::new(),
            try_again: Instant::now(),
            freed: 0,
        })
    }

    /// Whether all clients have come and gone, and have all they wanted.
    pub(crate) fn is_done(&self) -> bool {
        self.clients.all_gone() && self.transfers.is_empty()
    }

    /// Bytes that were sent, or were not wanted, and are not kept for another time.
    pub(crate) fn freed(&self) -> u64 {
        self.freed
    }

    /// The files whose readers wait for something that has not come yet.
    pub(crate) fn starving(&self) -> impl Iterator<Item = &ImageName> {
        let transfers = self.transfers.values();
        let starving =
            transfers.filter(|sending| sending.transfer.is_open() && sending.transfer.left() == 0);
        starving.map(|sending| &sending.name)
    }

    /// Acts on events, answers, and sends what is here of `files`.
    ///
    /// # Errors
    /// When CRIU breaks the protocol, or asked for nothing, and when a signal came.
    pub(crate) fn step(&mut self, files: &mut Catalog, events: &[Event]) -> Result<Activity> {
        self.advance(files, events)
            .map_err(|error| self.explain(error))
    }

    /// The reason behind an error, which is CRIU's if it has left.
    pub(crate) fn explain(&self, error: Error) -> Error {
        match self.clients.have_left() {
            true => self.supervisor.explain_by_criu(error),
            false => error,
        }
    }

    fn advance(&mut self, files: &mut Catalog, events: &[Event]) -> Result<Activity> {
        if self.is_missed
            && events.is_empty()
            && let Some(command) = self.clients.missed_by(self.supervisor.ended_criu())
        {
            bail!(
                "waiting for CRIU: {command} ended well without having connected: is it `criu \
                 restore --stream`, in the foreground, with the same --images-dir?"
            );
        }
        self.handle(files, events)?;
        let now = Instant::now();
        if now >= self.try_again {
            self.try_again = now + TRY_AGAIN;
            self.busy.extend(self.transfers.keys());
        }
        if self.supervisor.caller_has_ended() {
            self.clients.criu_has_ended();
        }
        self.clients.check_grace()?;
        if self.clients.all_gone() {
            self.listener = None;
            self.clients.close_idle();
        }
        self.take_more(files)?;
        let (sent, room) = self.send(files)?;
        let missed = self.clients.missed_by(self.supervisor.ended_criu());
        self.is_missed = missed.is_some();
        if sent > 0 {
            let (sent, room) = (sent as u64, room as u64);
            return Ok(Activity::Emptied { sent, room });
        }
        if self.is_missed {
            return Ok(Activity::Idle(Wait::Now));
        }
        let again = (!self.transfers.is_empty()).then_some(self.try_again);
        let wait = Wait::Forever.or_until(again);
        Ok(Activity::Idle(wait.or_until(self.clients.grace_ends())))
    }

    /// Gives transfers what has come of their files since.
    fn take_more(&mut self, files: &mut Catalog) -> Result<()> {
        for (&id, sending) in &mut self.transfers {
            if !sending.transfer.is_open() {
                continue;
            }
            let (more, is_whole) = files.take_more(&sending.name);
            if is_whole {
                sending.transfer.close();
            }
            if is_whole || !more.is_empty() {
                sending.transfer.add_all(more)?;
                self.busy.push(id);
            }
        }
        Ok(())
    }

    /// # Errors
    /// When a file was asked for that had been sent and freed.
    pub(crate) fn conclude(self) -> Result<()> {
        if !self.refused.is_empty() {
            let names: Vec<_> = self.refused.iter().map(ImageName::to_string).collect();
            bail!(
                "serving {}: CRIU asked for it after it had been sent and freed; files of over \
                 {LARGEST_KEPT} bytes are served once",
                names.join(", ")
            );
        }
        Ok(())
    }

    fn handle(&mut self, files: &mut Catalog, events: &[Event]) -> Result<()> {
        for event in events {
            match event.kind {
                Watched::Interrupt | Watched::Caller => self.supervisor.check()?,
                Watched::Listener => {
                    if let Some(listener) = &self.listener {
                        self.clients.accept(listener, self.supervisor.poller())?;
                    }
                }
                Watched::Client => self.answer(files, event.id)?,
                Watched::Transfer => {
                    if event.hung_up
                        && let Some(sending) = self.transfers.get_mut(&event.id)
                    {
                        sending.transfer.hang_up();
                    }
                    if !self.busy.contains(&event.id) {
                        self.busy.push(event.id);
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Answers what a client asks, and starts the files that it sent pipes for.
    fn answer(&mut self, files: &mut Catalog, client: u64) -> Result<()> {
        let Server {
            clients, refused, ..
        } = self;
        let mut opened = Vec::new();
        let answered = clients.next_requests(
            client,
            TURN,
            |connection: &mut Connection, requested: &mut Option<ImageName>, message| match message
            {
                Message::Request(name) => {
                    *requested = present(files, refused, &name);
                    connection.reply(requested.is_some())?;
                    // A peer that then sends something else than a pipe is not CRIU, and harms no
                    // one.
                    Ok(requested.is_none())
                }
                Message::Descriptor(fd) => {
                    let name = requested
                        .take()
                        .context("a descriptor came without a name")?;
                    let (pipe, slots) = WriteEnd::measured(fd).with_context(|| {
                        format!("{} sent something wrong for {name}", connection.peer())
                    })?;
                    // Only now: a peer that leaves in between, or sends no pipe, takes nothing with
                    // it.
                    let taken = files
                        .take(&name)
                        .with_context(|| format!("serving {name}"))?;
                    let taken = taken.with_context(|| {
                        format!(
                            "serving {name}: two clients asked for it at a time, and it can be sent \
                             once"
                        )
                    })?;
                    let transfer = match taken {
                        Taken::Whole(cursor) => Transfer::new(pipe, slots, cursor),
                        Taken::Beginning(contents) => Transfer::open(pipe, slots, contents),
                    };
                    opened.push(Sending { name, transfer });
                    Ok(true)
                }
            },
        );
        for sending in opened {
            self.start(files, sending)?;
        }
        answered
    }

    /// Sends the first part of a file, which for most is all of it, and has the rest follow as its
    /// reader makes room.
    fn start(&mut self, files: &mut Catalog, mut sending: Sending) -> Result<()> {
        let (progress, freed) = sending.send(files)?;
        self.freed += freed;
        if matches!(progress, Progress::Done | Progress::ReaderGone) {
            return Ok(());
        }
        let id = self.next_transfer;
        self.next_transfer += 1;
        self.supervisor
            .poller()
            .add(
                sending.transfer.pipe(),
                Watched::Transfer,
                id,
                Interest::WritableEdge,
            )
            .context("preparing to wait for a file's reader")?;
        self.transfers.insert(id, sending);
        Ok(())
    }

    /// Lets every transfer that may have room send. Tells how many slots were filled, and how many
    /// the pipes have that took something.
    fn send(&mut self, files: &mut Catalog) -> Result<(usize, usize)> {
        let (mut filled, mut room) = (0, 0);
        for id in std::mem::take(&mut self.busy) {
            let Some(sending) = self.transfers.get_mut(&id) else {
                continue;
            };
            let (progress, freed) = sending.send(files)?;
            self.freed += freed;
            match progress {
                Progress::Done | Progress::ReaderGone => drop(self.transfers.remove(&id)),
                Progress::Waiting => {}
                Progress::Partial { slots } => {
                    filled += slots;
                    room += if slots > 0 {
                        sending.transfer.slots()
                    } else {
                        0
                    };
                }
            }
        }
        Ok((filled, room))
    }
}

impl Sending {
    /// Sends what the pipe takes, and tells how many bytes are freed by that. CRIU may close the
    /// pipe early, which is no error.
    fn send(&mut self, files: &mut Catalog) -> Result<(Progress, u64)> {
        let (before, is_kept) = (self.transfer.left(), self.transfer.is_kept());
        let progress = self
            .transfer
            .send()
            .with_context(|| format!("serving {}", self.name))?;
        if progress == Progress::ReaderGone {
            files.forget(&self.name);
        }
        let sent = (before - self.transfer.left()) as u64;
        Ok((progress, if is_kept { 0 } else { sent }))
    }
}

/// The name of a file that can be sent.
fn present(files: &Catalog, refused: &mut BTreeSet<ImageName>, name: &str) -> Option<ImageName> {
    let name = ImageName::new(name).ok()?;
    match files.look_up(&name) {
        Lookup::Present => Some(name),
        Lookup::Absent => None,
        Lookup::Gone => {
            report::warn(format_args!(
                "{name} was asked for again, but it has been sent and freed"
            ));
            refused.insert(name);
            None
        }
    }
}
