//! The CRIU processes that are connected, and when the last of them is gone.
//!
//! Usually there is one, but several may be connected, each with its own requests. Only peers that
//! have asked for a file count: one that connects and says nothing can neither end a transfer nor
//! hold it up. When a peer leaves without having asked for anything, it was either not CRIU, or a
//! CRIU that failed before it opened its first file. Nothing distinguishes these, so another client
//! has [`RECONNECT_TIMEOUT`] to appear before the transfer is given up: a script whose CRIU failed
//! is not left waiting.
//!
//! On capture, a second client that sends files is an error: the files of two dumps have the same
//! names, and would become one image. On restore it does no harm.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use super::{CommandLine, Connection, Listener, Message};
use crate::os::poller::{Interest, Poller, Watched};
use crate::report;

/// The time to go on listening after a client that asked for nothing has left.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// All clients.
pub struct Clients {
    /// `None` once no client is waited for any more.
    listener: Option<Listener>,
    clients: HashMap<u64, Connection>,
    next_id: u64,
    /// How many may ask for files.
    most: usize,
    /// How many have asked for files.
    spoken: usize,
    /// When the wait for another client is over, if one has left without a word.
    grace_ends: Option<Instant>,
}

impl Clients {
    /// Waits at the listener for clients, of which up to this number may ask for files.
    ///
    /// # Errors
    /// When the listener cannot be watched.
    pub(crate) fn of(listener: Listener, most: usize, poller: &Poller) -> Result<Self> {
        poller
            .add(&listener, Watched::Listener, 0, Interest::Readable)
            .context("preparing to wait for CRIU")?;
        Ok(Self {
            listener: Some(listener),
            clients: HashMap::new(),
            next_id: 0,
            most,
            spoken: 0,
            grace_ends: None,
        })
    }

    /// Accepts the clients that wait at the listener, and watches each under its id.
    ///
    /// # Errors
    /// When a connection cannot be accepted or watched.
    pub(crate) fn accept(&mut self, poller: &Poller) -> Result<()> {
        while let Some(listener) = &self.listener
            && let Some(stream) = listener.accept()?
        {
            let connection = Connection::new(stream)?;
            self.next_id += 1;
            let (kind, id) = (Watched::Client, self.next_id);
            poller
                .add(&connection.stream, kind, id, Interest::Readable)
                .context("preparing to wait for CRIU's requests")?;
            self.grace_ends = None;
            self.clients.insert(id, connection);
        }
        Ok(())
    }

    /// The command line of a client, unless it has left.
    pub(crate) fn command_line(&self, id: u64) -> Option<&CommandLine> {
        self.clients.get(&id).map(|client| &client.command_line)
    }

    /// A client has connected.
    pub(crate) fn have_come(&self) -> bool {
        self.next_id > 0
    }

    /// A client has asked for a file.
    pub(crate) fn have_asked(&self) -> bool {
        self.spoken > 0
    }

    /// Clients have asked for files, and all of these are gone.
    pub fn all_gone(&self) -> bool {
        self.have_asked() && !self.clients.values().any(|client| client.has_spoken)
    }

    /// All clients have disconnected.
    pub fn have_left(&self) -> bool {
        self.have_come() && self.clients.is_empty()
    }

    /// Refuses all further clients, and keeps the socket's name from being taken by another
    /// streamer.
    pub(crate) fn refuse_others(&self, poller: &Poller) {
        if let Some(listener) = &self.listener {
            poller.remove(listener);
            listener.close();
        }
    }

    /// Waits for no client any more, and leaves the socket's name to another streamer.
    pub(crate) fn stop_listening(&mut self) {
        self.listener = None;
        self.dismiss();
    }

    /// Ends all conversations: nothing more is to come.
    pub fn dismiss(&mut self) {
        self.clients.clear();
    }

    /// Takes the connection of a client that has asked for no file, to go on with it elsewhere.
    pub(crate) fn take(&mut self, id: u64, poller: &Poller) -> Option<OwnedFd> {
        let client = self.clients.remove(&id)?;
        poller.remove(&client.stream);
        Some(client.stream.into())
    }

    /// When the wait for another client is over, if one has left without a word.
    ///
    /// # Errors
    /// When it is over.
    pub fn check_grace(&self) -> Result<Option<Instant>> {
        ensure!(
            self.grace_ends.is_none_or(|end| end > Instant::now()),
            "waiting for CRIU: it connected and went away without asking for any file; see CRIU's log"
        );
        Ok(self.grace_ends)
    }

    /// Takes what a client says, in up to `turn` system calls, and gives it to `answer`, which
    /// returns true if a file was opened by it. A client that breaks the protocol is dropped.
    ///
    /// # Errors
    /// When the client broke the protocol after it had opened files: what it took part in cannot be
    /// trusted. When it is one too many.
    pub fn next_requests(
        &mut self,
        id: u64,
        turn: usize,
        mut answer: impl FnMut(&mut Connection, Message) -> Result<bool>,
    ) -> Result<()> {
        let Some(client) = self.clients.get_mut(&id) else {
            return Ok(());
        };
        let had_spoken = client.has_spoken;
        let heard = client.hear(turn, |client, message| {
            client.has_spoken |= answer(client, message)?;
            Ok(())
        });
        let has_spoken = client.has_spoken;
        self.spoken += usize::from(has_spoken && !had_spoken);
        ensure!(
            self.spoken <= self.most,
            "{} sends files too: two dumps in one image would mix their files; give each its own streamer",
            client.peer
        );
        let error = match heard {
            Ok(true) if has_spoken && client.is_within_request() => Some(anyhow!(
                "{} went away in the middle of a request: it was killed, or crashed",
                client.peer
            )),
            Ok(true) => None,
            Ok(false) => return Ok(()),
            Err(error) => Some(error),
        };
        self.clients.remove(&id);
        match error {
            Some(error) if has_spoken => return Err(error),
            Some(error) => report::warn(format_args!("dropped a client: {error:#}")),
            // Another client that is connected may be CRIU, at work before its first file.
            None if self.have_left() && !self.have_asked() => {
                self.grace_ends = Some(Instant::now() + RECONNECT_TIMEOUT);
            }
            None => {}
        }
        Ok(())
    }
}
