//! Serves an image from memory to CRIU, which treats it as a directory of files.
//!
//! CRIU opens a file and closes it unread, opens another before the first is finished, hands one to a child process, opens one twice, and
//! does so from several processes. So requests are answered at once, whatever the state of earlier files, and any
//! number of files is under way at the same time, each moving whenever its own reader makes room.
//!
//! **Freed while sent.** A file's memory goes back to the kernel extent by extent as soon as the pipe holds references to
//! its pages, since CRIU copies what it reads: keeping it would take twice the memory.
//!
//! **Asked for again.** Some CRIUs read a small file twice. Files of up to [`LARGEST_KEPT`] are therefore kept when sent, as long as
//! they come to no more than [`MOST_KEPT`] together. CRIU's files other than memory pages weigh far less: some hundred bytes to a
//! few KiB for each task, mapping list and descriptor table; a pagemap takes about 20 bytes for each stretch of memory. What
//! was sent and not kept is gone: asking for it again is answered with "does not exist", and the program then fails naming it.

mod transfer;

use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::criu::{Clients, Connection, Listener, Message};
use crate::format::ImageName;
use crate::os::pipe::WriteEnd;
use crate::os::poller::{Event, Interest, Kind, Poller, Wait};
use crate::pace::Pace;
use crate::report::notice;
use crate::store::Arena;
use crate::store::mem::{Contents, MemStore};
use crate::supervision::signals::Interrupts;
use transfer::{Part, Rest, Sent, Transfer};

/// The largest file that can be asked for more than once, in bytes.
pub const LARGEST_KEPT: usize = 1 << 20;

/// What is kept in all for being asked for again, in bytes.
pub const MOST_KEPT: usize = 16 << 20;

/// System calls made for one client before events are looked at again. CRIU waits for our answer to its request, and then
/// for the file, so that a second one would find nothing.
const TURN: usize = 1;

/// How long after the last event every transfer is tried again. A pipe that took a part of what it was offered is full, and its
/// reader's next event is waited for; should it be something else for once that ended the call, the call is to fail, and not we to
/// wait for ever.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Files whose names start like this hold the application's memory: large, and read once.
const PAGES: &str = "pages-";

enum File {
    /// Nobody asked for it yet.
    Fresh(Contents),
    /// Sent at least once, and kept.
    Kept(Rc<Contents>),
    /// Sent, and gone.
    Gone,
}

/// What a client asked for and has not sent a pipe for yet.
struct Requested {
    name: ImageName,
    /// Where it is among the files.
    index: usize,
}

/// What is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Watched {
    Interrupt,
    Listener,
    Client,
    Transfer,
}

impl Kind for Watched {
    const ALL: &'static [Self] = &[
        Self::Interrupt,
        Self::Listener,
        Self::Client,
        Self::Transfer,
    ];
}

struct Server<'a> {
    poller: Poller<Watched>,
    interrupts: &'a Interrupts,
    /// Until nobody is waited for any more.
    listener: Option<Listener>,
    clients: Clients<Requested>,
    /// Sorted by name.
    files: Vec<(ImageName, File)>,
    arena: Arena,
    kept: usize,
    transfers: HashMap<u64, Transfer>,
    /// Transfers whose pipes may have room.
    busy: Vec<u64>,
    next_transfer: u64,
    refused: HashSet<ImageName>,
}

/// Serves `files`, whose memory is in `arena`, until `criu_clients` clients have come and all are gone.
///
/// # Errors
/// When a file was asked for that had been sent and freed, and when CRIU asked for nothing.
pub fn serve(
    listener: Listener,
    files: MemStore,
    mut arena: Arena,
    criu_clients: usize,
    interrupts: &Interrupts,
) -> Result<()> {
    let poller = Poller::new().context("preparing to wait for events")?;
    poller
        .add(interrupts, Watched::Interrupt, 0, Interest::Readable)
        .context("preparing to wait for signals")?;
    poller
        .add(&listener, Watched::Listener, 0, Interest::Readable)
        .context("preparing to wait for CRIU")?;
    let files = files
        .into_files(&mut arena)
        .into_iter()
        .map(|(name, contents)| (name, File::Fresh(contents)))
        .collect();
    Server {
        poller,
        interrupts,
        listener: Some(listener),
        clients: Clients::new(criu_clients),
        files,
        arena,
        kept: 0,
        transfers: HashMap::new(),
        busy: Vec::new(),
        next_transfer: 0,
        refused: HashSet::new(),
    }
    .run()
}

impl Server<'_> {
    fn run(mut self) -> Result<()> {
        let mut events = Vec::new();
        let mut pace = Pace::new();
        let mut wait = Wait::Forever;
        while !(self.clients.all_gone() && self.transfers.is_empty()) {
            self.poller
                .wait(wait, &mut events)
                .context("waiting for CRIU")?;
            self.handle(&events)?;
            if events.is_empty() && wait != Wait::Now {
                self.busy.extend(self.transfers.keys());
            }
            self.clients.check_grace()?;
            if self.clients.all_gone() {
                self.listener = None;
                self.clients.close_idle();
            }
            let (sent, room) = self.send()?;
            wait = if sent.slots > 0 {
                pace.nap_until_emptied(sent.slots as u64, room, sent.waited);
                Wait::Now
            } else {
                let again = (!self.transfers.is_empty()).then(|| Instant::now() + TRY_AGAIN);
                Wait::Forever
                    .or_until(again)
                    .or_until(self.clients.grace_ends())
            };
        }
        if !self.refused.is_empty() {
            let mut names: Vec<_> = self.refused.iter().map(ImageName::to_string).collect();
            names.sort();
            bail!(
                "serving {}: CRIU asked for it after it had been sent and freed; files of over {LARGEST_KEPT} bytes are served once",
                names.join(", ")
            );
        }
        Ok(())
    }

    fn handle(&mut self, events: &[Event<Watched>]) -> Result<()> {
        for event in events {
            match event.kind {
                Watched::Interrupt => self.interrupts.check()?,
                Watched::Listener => {
                    if let Some(listener) = &self.listener {
                        self.clients
                            .accept(listener, &self.poller, Watched::Client)?;
                    }
                }
                Watched::Client => self.hear(event.id)?,
                Watched::Transfer => {
                    if !self.busy.contains(&event.id) {
                        self.busy.push(event.id);
                    }
                }
            }
        }
        Ok(())
    }

    fn hear(&mut self, id: u64) -> Result<()> {
        let Server {
            clients,
            files,
            kept,
            refused,
            ..
        } = self;
        let mut opened = Vec::new();
        let heard = clients.next_requests(
            id,
            TURN,
            |connection: &mut Connection, requested: &mut Option<Requested>, message| {
                match message {
                    Message::Request(name) => {
                        let found = ImageName::new(&name).ok().and_then(|name| {
                            let index =
                                files.binary_search_by(|(found, _)| found.cmp(&name)).ok()?;
                            if matches!(files[index].1, File::Gone) {
                                refused.insert(name.clone());
                                notice::tell(format_args!(
                                    "{name} was asked for again, but it has been sent and freed"
                                ));
                                return None;
                            }
                            Some(Requested { name, index })
                        });
                        connection.reply(found.is_some())?;
                        *requested = found;
                        // A peer that then sends something else than a pipe is not CRIU, and harms nobody.
                        Ok(requested.is_none())
                    }
                    Message::Descriptor(fd) => {
                        let Requested { name, index } = requested
                            .take()
                            .context("a descriptor came without a name")?;
                        let (pipe, slots) = WriteEnd::measured(fd).with_context(|| {
                            format!("{} sent something wrong for {name}", connection.peer())
                        })?;
                        // Only now: a peer that leaves in between, or sends no pipe, takes nothing with it.
                        let rest = take(&mut files[index].1, &name, kept).with_context(|| {
                            format!("serving {name}: two clients asked for it at a time, and it can be sent once")
                        })?;
                        opened.push(Transfer::new(name, pipe, slots, rest));
                        Ok(true)
                    }
                }
            },
        );
        for transfer in opened {
            self.start(transfer)?;
        }
        heard
    }

    /// Sends the first part of a file, which for most is all of it, and has the rest follow as its reader makes room.
    fn start(&mut self, mut transfer: Transfer) -> Result<()> {
        if transfer.send(&mut self.arena)? == Sent::All {
            return Ok(());
        }
        let id = self.next_transfer;
        self.next_transfer += 1;
        self.poller
            .add(
                transfer.pipe(),
                Watched::Transfer,
                id,
                Interest::WritableEdge,
            )
            .context("preparing to wait for a file's reader")?;
        self.transfers.insert(id, transfer);
        Ok(())
    }

    /// Lets every transfer that may have room send. Tells what moved in all, and how many slots the pipes have that took some.
    fn send(&mut self) -> Result<(Part, u64)> {
        let (mut sent, mut room) = (Part::default(), 0);
        for id in std::mem::take(&mut self.busy) {
            let Some(transfer) = self.transfers.get_mut(&id) else {
                continue;
            };
            match transfer.send(&mut self.arena)? {
                Sent::All => {
                    self.transfers.remove(&id);
                }
                Sent::Part(part) => {
                    sent.slots += part.slots;
                    sent.waited = sent.waited.max(part.waited);
                    if part.slots > 0 {
                        room += transfer.slots() as u64;
                    }
                }
            }
        }
        Ok((sent, room))
    }
}

/// Takes a file's contents for sending; `None` if they are gone. Small ones stay for the next time.
fn take(file: &mut File, name: &ImageName, kept: &mut usize) -> Option<Rest> {
    match std::mem::replace(file, File::Gone) {
        File::Gone => None,
        File::Kept(contents) => {
            *file = File::Kept(Rc::clone(&contents));
            Some(Rest::kept(contents))
        }
        File::Fresh(contents) => {
            let size = contents.len();
            let keep = size <= LARGEST_KEPT
                && *kept + size <= MOST_KEPT
                && !name.as_str().starts_with(PAGES);
            if !keep {
                return Some(Rest::once(contents));
            }
            *kept += size;
            let contents = Rc::new(contents);
            *file = File::Kept(Rc::clone(&contents));
            Some(Rest::kept(contents))
        }
    }
}
