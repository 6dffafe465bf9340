//! Streams CRIU checkpoint images between CRIU and ordinary UNIX pipes.
//!
//! The modules in the order in which the data passes through them:
//!
//! * capture: [`criu`] (the socket, with [`clients`]) → [`capture`] (sources, balancer, shards)
//! * restore: [`extract`] (shards, reassembly) → [`store`] (memory, disk, external files) → [`serve`]
//!
//! [`wire`] is the image format, [`pipe`] and [`poller`] are what all of them stand on, [`cli`] is where it starts.

pub mod capture;
pub mod cli;
pub mod clients;
pub mod criu;
pub mod extract;
pub mod interrupt;
pub mod notice;
pub mod pipe;
pub mod poller;
pub mod progress;
pub mod serve;
pub mod store;
pub mod tcp_listen_remap;
pub mod wire;

/// The protobuf messages of `proto/image.proto`.
pub mod image_proto {
    include!(concat!(env!("OUT_DIR"), "/image.rs"));
}

/// The protobuf messages of `proto/criu.proto`.
pub mod criu_proto {
    include!(concat!(env!("OUT_DIR"), "/criu.rs"));
}

use std::fs::DirBuilder;
use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use capture::Capture;
use cli::{Action, Plan};
use criu::{Listener, Role};
use interrupt::{Interrupted, Interrupts};
use pipe::{ReadEnd, WriteEnd};
use progress::Milestone;
use store::Arena;
use store::fs::FsStore;
use store::mem::MemStore;
use store::overlay::Overlay;
use tcp_listen_remap::Remap;
use wire::ImageName;

/// Does what the command line says.
///
/// # Errors
/// Whenever not all of it worked.
pub fn run() -> Result<()> {
    match cli::parse()? {
        Err(text) => {
            // Whoever pipes this into `head` has seen enough.
            let _ = writeln!(std::io::stdout(), "{text}");
            Ok(())
        }
        Ok(args) => execute(Plan::new(args)?),
    }
}

/// The exit status for an error: 128 and the number of the signal that ended the program, otherwise 1.
pub fn exit_status(error: &anyhow::Error) -> ExitCode {
    let of_cause =
        |cause: &(dyn std::error::Error + 'static)| match cause.downcast_ref::<std::io::Error>() {
            Some(error) => error
                .get_ref()
                .and_then(|inner| inner.downcast_ref::<Interrupted>())
                .copied(),
            None => cause.downcast_ref::<Interrupted>().copied(),
        };
    match error.chain().find_map(of_cause) {
        Some(Interrupted(signal)) => ExitCode::from(128 + signal as u8),
        None => ExitCode::FAILURE,
    }
}

fn execute(plan: Plan) -> Result<()> {
    let interrupts = Interrupts::catch().context("preparing for signals")?;
    raise_descriptor_limit();
    create_images_dir(&plan.images_dir)?;
    match plan.action {
        Action::Capture => {
            let listener = Listener::bind(&plan.images_dir, Role::Capture)?;
            let shards = plan
                .shards
                .into_iter()
                .map(|(fd, label)| Ok((WriteEnd::new(fd)?, label)));
            let external_files = plan
                .external_files
                .into_iter()
                .map(|(name, fd)| Ok((name, ReadEnd::new(fd)?)));
            Capture {
                listener,
                shards: shards.collect::<Result<_>>()?,
                external_files: external_files.collect::<Result<_>>()?,
                progress: plan.progress,
                criu_clients: plan.criu_clients,
            }
            .run(&interrupts)
        }
        Action::Extract => {
            let mut progress = plan.progress;
            let (shards, external_files) = ends(plan.shards, plan.external_files)?;
            let store = Overlay::new(FsStore::new(&plan.images_dir)?, external_files, &interrupts);
            let (store, stats) = extract::receive(shards, store, &mut Arena::new(), &interrupts)?;
            store.into_below()?.commit()?;
            progress.stats(&stats);
            Ok(())
        }
        Action::Serve(remaps) => {
            Listener::check(&plan.images_dir, Role::Serve)?;
            let mut progress = plan.progress;
            let (shards, external_files) = ends(plan.shards, plan.external_files)?;
            let mut arena = Arena::new();
            let store = Overlay::new(MemStore::new(), external_files, &interrupts);
            let (store, stats) = extract::receive(shards, store, &mut arena, &interrupts)?;
            let mut files = store.into_below()?;
            remap_ports(&mut files, &mut arena, &remaps)?;
            progress.stats(&stats);
            let listener = Listener::bind(&plan.images_dir, Role::Serve)?;
            progress.reached(Milestone::SocketInit);
            serve::serve(listener, files, arena, plan.criu_clients, &interrupts)
        }
    }
}

/// An image is its owner's memory: a directory made for it is for nobody else.
fn create_images_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(path)
        .with_context(|| format!("--images-dir: creating {}", path.display()))
}

type Shards = Vec<(ReadEnd, String)>;
type ExternalFiles = Vec<(ImageName, WriteEnd)>;

/// The ends of pipes that a restore uses.
fn ends(
    shards: Vec<(std::os::fd::OwnedFd, String)>,
    external_files: Vec<(ImageName, std::os::fd::OwnedFd)>,
) -> Result<(Shards, ExternalFiles)> {
    let shards = shards
        .into_iter()
        .map(|(fd, label)| Ok((ReadEnd::new(fd)?, label)))
        .collect::<Result<_>>()?;
    let external_files = external_files
        .into_iter()
        .map(|(name, fd)| {
            let pipe = WriteEnd::new(fd)?
                .nonblocking()
                .with_context(|| format!("preparing to hand out {name}"))?;
            Ok((name, pipe))
        })
        .collect::<Result<_>>()?;
    Ok((shards, external_files))
}

fn remap_ports(files: &mut MemStore, arena: &mut Arena, remaps: &[Remap]) -> Result<()> {
    if remaps.is_empty() {
        return Ok(());
    }
    let mut change = || {
        let name = ImageName::new(tcp_listen_remap::FILE)?;
        let before = files
            .read(&name, arena)
            .with_context(|| format!("the image has no {name}"))?;
        let after =
            tcp_listen_remap::remap(&before, remaps).with_context(|| format!("changing {name}"))?;
        files
            .write(name, &after, arena)
            .context("keeping the changed file in memory")
    };
    change().context("--tcp-listen-remap")
}

/// CRIU has many files open at once, and each is a descriptor here: use all that the hard limit allows.
fn raise_descriptor_limit() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // If it is refused, the soft limit has to do.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}
