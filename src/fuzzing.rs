//! The readers of foreign bytes, as functions of bytes, for the fuzz targets. All else is private,
//! so that the compiler finds unused code.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Result, anyhow};

pub use crate::criu::proto::ImgStreamerRequestEntry;
use crate::criu::{Connection, Message};
use crate::format::ImageName;
pub use crate::format::proto::{Marker, marker};
use crate::listen_ports::{self, Remap};
use crate::os::pipe::ReadEnd;
use crate::receive;
use crate::report::meter::Counters;
use crate::store::Store;
use crate::store::catalog::Catalog;
use crate::store::disk::{DirOrigin, DiskStore};
use crate::supervision::Supervisor;

/// Receives an image from pipes. To `images_dir`, or else to memory, whose files are returned.
///
/// # Errors
/// When it is no whole image.
pub fn marker_stream(
    shards: Vec<OwnedFd>,
    images_dir: Option<&Path>,
) -> Result<BTreeMap<String, Vec<u8>>> {
    thread_local! {
        static SUPERVISOR: &'static Supervisor =
            Box::leak(Box::new(Supervisor::catch().expect("signals can be caught")));
    }
    let supervisor = SUPERVISOR.with(|supervisor| *supervisor);
    if let Some(images_dir) = images_dir {
        let store = DiskStore::new(images_dir, DirOrigin::Found)?;
        receive(shards, store, supervisor)?.commit(supervisor)?;
        return Ok(BTreeMap::new());
    }
    let mut files = receive(shards, Catalog::new(), supervisor)?;
    let names: Vec<_> = files.names().cloned().collect();
    let mut read = |name: ImageName| {
        let bytes = files.read(&name)?.unwrap_or_default();
        Ok((name.as_str().to_owned(), bytes))
    };
    names.into_iter().map(&mut read).collect()
}

fn receive<S: Store + 'static>(
    shards: Vec<OwnedFd>,
    store: S,
    supervisor: &Supervisor,
) -> Result<S> {
    let counters = Counters::new(shards.len());
    let pipe = |(number, fd)| Ok((ReadEnd::new(fd)?, format!("shard {number}")));
    let pipes = shards.into_iter().enumerate().map(pipe);
    let pipes = pipes.collect::<Result<_>>()?;
    receive::receive(pipes, Vec::new(), store, &counters, supervisor)
        .map(|(store, _)| store)
        .map_err(|failure| anyhow!("{:#}", failure.error()))
}

/// CRIU's side of a conversation, whose bytes come from a socket.
pub struct CriuMessages(Connection);

impl CriuMessages {
    pub fn new(socket: OwnedFd) -> Self {
        Self(Connection::new(socket.into()).expect("it is a UNIX socket"))
    }

    /// Appends the names that were requested since the last call. Each request is answered, as on
    /// restore, with what `exists` says; without it, as on dump, it comes with a descriptor.
    ///
    /// # Errors
    /// When the bytes are not CRIU's.
    pub fn hear(
        &mut self,
        exists: Option<fn(&str) -> bool>,
        requests: &mut Vec<String>,
    ) -> Result<()> {
        let file = || ImageName::new("file").expect("it is a name");
        self.0.hear(usize::MAX, |connection, message| {
            let Message::Request(name) = message else {
                return Ok(());
            };
            match exists {
                Some(exists) => connection.reply(exists(&name).then(file))?,
                None => connection.expect_pipe(file()),
            }
            requests.push(name);
            Ok(())
        })?;
        Ok(())
    }
}

/// `files.img` with another port.
///
/// # Errors
/// When it is no such file, or nothing listens on the old port, or something on the new one.
pub fn files_img(bytes: &[u8], old: u16, new: u16) -> Result<Vec<u8>> {
    listen_ports::remap(bytes, &[Remap { old, new }])
}
