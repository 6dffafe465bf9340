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

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

use super::{Connection, Listener, Message, Receipt};
use crate::format::ImageName;
use crate::os::poller::{Interest, Poller, Watched};
use crate::os::process::{arguments_in, command_line_of};
use crate::report;

/// The time to go on listening after a client that asked for nothing has left.
const RECONNECT_TIMEOUT: Duration = Duration::from_secs(2);

/// CRIU's task, as far as its command line showed it when it connected. Under RPC, in another PID
/// namespace, and once CRIU has ended it shows nothing; nothing is assumed then.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct AskedFor {
    /// cpuinfo.img alone.
    pub cpuinfo: bool,
    /// The option with which the application's memory stays out of the stream.
    pub memory_elsewhere: Option<&'static str>,
    /// A restore whose memory is filled in afterwards.
    pub lazy_pages: bool,
}

/// CRIU's options with which the application's memory stays out of the stream.
const MEMORY_ELSEWHERE: [&str; 3] = ["--lazy-pages", "--page-server", "--prev-images-dir"];

/// Bytes of an option that distinguish it from all others.
const MIN_OPTION: usize = "--lazy".len();

impl AskedFor {
    fn of(connection: &Connection) -> Self {
        let peer = getsockopt(connection, PeerCredentials).ok();
        Self::by(&peer.map_or_else(Vec::new, |peer| command_line_of(peer.pid() as u32)))
    }

    /// CRIU takes the beginning of an option for the option.
    fn by(command_line: &[u8]) -> Self {
        let option = |argument: &[u8]| {
            let name = argument.split(|&byte| byte == b'=').next()?;
            let is_meant = |option: &&&str| option.as_bytes().starts_with(name);
            let option = MEMORY_ELSEWHERE.iter().find(is_meant);
            option.copied().filter(|_| name.len() >= MIN_OPTION)
        };
        Self {
            cpuinfo: arguments_in(command_line).any(|argument| argument == b"cpuinfo"),
            memory_elsewhere: arguments_in(command_line).find_map(option),
            lazy_pages: arguments_in(command_line).any(|it| it.starts_with(b"--lazy")),
        }
    }
}

struct Client {
    connection: Connection,
    /// The file that it asked for and has not sent a descriptor for yet.
    requested: Option<ImageName>,
    has_spoken: bool,
    asked_for: AskedFor,
}

impl Client {
    fn is_between_requests(&self) -> bool {
        self.requested.is_none() && !self.connection.is_within_message()
    }

    /// Answers what has come, in up to `turn` system calls.
    fn hear(
        &mut self,
        turn: usize,
        has_spoken: &mut bool,
        answer: &mut impl FnMut(&mut Connection, &mut Option<ImageName>, Message) -> Result<bool>,
    ) -> Result<Receipt> {
        for _ in 0..turn {
            let receipt = self.connection.receive()?;
            while let Some(message) = self.connection.next_message()? {
                *has_spoken |= answer(&mut self.connection, &mut self.requested, message)?;
            }
            if receipt != Receipt::Something {
                return Ok(receipt);
            }
        }
        Ok(Receipt::Something)
    }
}

/// All clients, each with what it asked for last.
pub struct Clients {
    clients: HashMap<u64, Client>,
    next_id: u64,
    /// How many may ask for files.
    most: usize,
    /// How many have asked for files, and how many of these are connected.
    spoken: usize,
    speaking: usize,
    /// When the wait for another client is over, and why.
    give_up: Option<(Instant, &'static str)>,
}

impl Clients {
    /// No client yet; up to this number may ask for files.
    pub fn up_to(most: usize) -> Self {
        Self {
            clients: HashMap::new(),
            next_id: 0,
            most,
            spoken: 0,
            speaking: 0,
            give_up: None,
        }
    }

    /// Accepts the clients that wait at the listener, and watches each under its id.
    ///
    /// # Errors
    /// When a connection cannot be accepted or watched.
    pub(crate) fn accept(&mut self, listener: &Listener, poller: &Poller) -> Result<()> {
        while let Some(connection) = listener.accept()? {
            self.next_id += 1;
            let (kind, id) = (Watched::Client, self.next_id);
            poller
                .add(&connection, kind, id, Interest::Readable)
                .context("preparing to wait for CRIU's requests")?;
            self.give_up = None;
            let client = Client {
                asked_for: AskedFor::of(&connection),
                connection,
                requested: None,
                has_spoken: false,
            };
            self.clients.insert(id, client);
        }
        Ok(())
    }

    /// The task of a client; nothing of one that has left.
    pub fn asked_for(&self, id: u64) -> AskedFor {
        let client = self.clients.get(&id);
        client.map_or_else(AskedFor::default, |client| client.asked_for)
    }

    /// No client is connected.
    pub(crate) fn are_gone(&self) -> bool {
        self.clients.is_empty()
    }

    /// A client has connected.
    pub(crate) fn have_come(&self) -> bool {
        self.next_id > 0
    }

    /// Clients have asked for files, and all of these are gone.
    pub fn all_gone(&self) -> bool {
        self.spoken > 0 && self.speaking == 0
    }

    /// The command that runs CRIU, which has `ended`, if no client has asked for a file. One may
    /// still wait at the listener.
    pub fn missed_by<'c>(&self, ended: Option<&'c str>) -> Option<&'c str> {
        ended.filter(|_| self.spoken == 0)
    }

    /// All clients have disconnected.
    pub fn have_left(&self) -> bool {
        self.have_come() && self.are_gone()
    }

    /// Ends all conversations: nothing more is to come.
    pub fn dismiss(&mut self) {
        self.clients.clear();
        self.speaking = 0;
    }

    /// Takes the connection of a client that has asked for no file, to go on with it elsewhere.
    pub(crate) fn take(&mut self, id: u64, poller: &Poller) -> Option<OwnedFd> {
        let client = self.clients.remove(&id)?;
        poller.remove(&client.connection);
        Some(client.connection.into())
    }

    /// Closes the connections that have asked for no file.
    pub fn close_idle(&mut self) {
        self.clients.retain(|_, client| client.has_spoken);
    }

    /// When the wait for another client is over, if one has left without a word.
    pub fn grace_ends(&self) -> Option<Instant> {
        self.give_up.map(|(end, _)| end)
    }

    /// # Errors
    /// When the wait for another client is over.
    pub fn check_grace(&self) -> Result<()> {
        match self.give_up {
            Some((end, why)) if end <= Instant::now() => bail!("waiting for CRIU: {why}"),
            _ => Ok(()),
        }
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
        mut answer: impl FnMut(&mut Connection, &mut Option<ImageName>, Message) -> Result<bool>,
    ) -> Result<()> {
        let Some(client) = self.clients.get_mut(&id) else {
            return Ok(());
        };
        let mut has_spoken = client.has_spoken;
        let heard = client.hear(turn, &mut has_spoken, &mut answer);
        if has_spoken && !client.has_spoken {
            client.has_spoken = true;
            self.spoken += 1;
            self.speaking += 1;
            ensure!(
                self.spoken <= self.most,
                "{} sends files too: two dumps in one image would mix their files; give each its own streamer",
                client.connection.peer()
            );
        }
        let is_between = client.is_between_requests();
        let error = match heard {
            Ok(Receipt::Closed) if is_between || !has_spoken => None,
            Ok(Receipt::Closed) => Some(anyhow!(
                "{} went away in the middle of a request: it was killed, or crashed",
                client.connection.peer()
            )),
            Ok(_) => return Ok(()),
            Err(error) => Some(error),
        };
        self.remove(id);
        match error {
            Some(error) if has_spoken => return Err(error),
            Some(error) => report::warn(format_args!("dropped a client: {error:#}")),
            // Another client that is connected may be CRIU, at work before its first file.
            None if self.are_gone() && self.spoken == 0 => self.give_up_after_grace(
                "it connected and went away without asking for any file; see CRIU's log",
            ),
            None => {}
        }
        Ok(())
    }

    /// The CRIU that was to come has ended. It may have connected just before.
    pub fn criu_has_ended(&mut self) {
        if self.spoken == 0 && self.give_up.is_none() {
            self.give_up_after_grace(
                "it has ended without having connected; see CRIU's log: if it did not find the socket, the path of its --images-dir is too long for one",
            );
        }
    }

    fn give_up_after_grace(&mut self, why: &'static str) {
        self.give_up = Some((Instant::now() + RECONNECT_TIMEOUT, why));
    }

    fn remove(&mut self, id: u64) {
        let gone = self.clients.remove(&id);
        self.speaking -= usize::from(gone.is_some_and(|client| client.has_spoken));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_line_tells_what_criu_was_asked_for() {
        let asked_for = |line: &str| AskedFor::by(line.replace(' ', "\0").as_bytes());
        assert!(asked_for("criu cpuinfo dump --stream").cpuinfo);
        assert!(asked_for("criu restore --stream --lazy-pages").lazy_pages);
        for (line, option) in [
            ("criu dump --lazy-pages --stream", "--lazy-pages"),
            ("criu dump --stream --lazy", "--lazy-pages"),
            ("criu dump --stream --page-server", "--page-server"),
            ("criu dump --prev-images-dir=a", "--prev-images-dir"),
        ] {
            assert_eq!(asked_for(line).memory_elsewhere, Some(option), "{line}");
        }
        for line in ["", "criu dump --stream -t 7 --", "criu swrk 3"] {
            assert_eq!(asked_for(line), AskedFor::default(), "{line:?}");
        }
    }
}
