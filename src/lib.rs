//! Streams CRIU checkpoint images between CRIU and ordinary UNIX pipes.
//!
//! The modules in the order in which the data passes through them:
//!
//! * capture: [`criu`] (the socket, with [`clients`]) → [`capture`] (sources, balancer, shards)
//! * restore: [`extract`] (shards, reassembly) → [`store`] (memory, disk, external files) → [`serve`]
//!
//! [`wire`] is the image format, [`pipe`] and [`poller`] are what all of them stand on, [`endpoints`] is what the pipes lead to, [`cli`] is where it starts.

pub mod capture;
pub mod cli;
pub mod criu;
pub mod format;
pub mod listen_ports;
pub mod os;
pub mod pace;
pub mod receive;
pub mod report;
pub mod serve;
pub mod store;
pub mod supervision;

use std::fs::DirBuilder;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use capture::{Capture, Drain};
use cli::{Action, Plan, Shards};
use criu::{Listener, Role};
use format::ImageName;
use listen_ports::Remap;
use report::bar::{Journey, ProgressBar};
use report::meter::Counters;
use report::notice;
use report::progress::{Milestone, Progress, Stats};
use store::catalog::Catalog;
use store::disk::DiskStore;
use store::{Arena, Store};
use supervision::Endpoints;
use supervision::signals::{self, Interrupted, Interrupts};

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
    match signals::signal_behind(error) {
        Some(Interrupted(signal)) => ExitCode::from(128 + signal as u8),
        None => ExitCode::FAILURE,
    }
}

fn execute(plan: Plan) -> Result<()> {
    let interrupts = Interrupts::catch().context("preparing for signals")?;
    raise_descriptor_limit();
    create_images_dir(&plan.images_dir)?;
    let endpoints = Endpoints::new(&interrupts);
    let mut progress = plan.progress;
    let journey = match plan.action {
        Action::Capture => Journey::Captured,
        Action::Extract | Action::Serve(_) => Journey::Received,
    };
    let labels = plan.shards.labels();
    let counters = Counters::new(labels.len());
    let bar = plan
        .progress_bar
        .then(|| ProgressBar::start(journey, labels, counters.clone()));
    let report = |progress: &mut Progress, stats: &Stats| {
        progress.stats(stats);
        if let Some(bar) = bar {
            bar.conclude(stats);
        }
    };
    match plan.action {
        Action::Capture => {
            let listener = Listener::bind(&plan.images_dir, Role::Capture)?;
            let external_files = plan.external_files.into_iter().map(|(name, fd)| {
                let pipe = endpoints.source(fd, name.as_str())?;
                Ok((name, pipe))
            });
            let external_files = external_files.collect::<Result<_>>()?;
            let shards = match plan.shards {
                Shards::Descriptors(fds) => fds
                    .into_iter()
                    .map(|(fd, label)| Ok((endpoints.sink(fd, &label)?, label)))
                    .collect::<Result<_>>()?,
                Shards::Commands(commands) => endpoints.start_readers(commands)?,
            };
            let captured = Capture {
                listener,
                shards,
                external_files,
                progress: &mut progress,
                criu_clients: plan.criu_clients,
                drain: if endpoints.has_commands() {
                    Drain::Completely
                } else {
                    Drain::Briefly
                },
                counters,
            }
            .run(&interrupts);
            let stats = endpoints.conclude(captured, &interrupts)?;
            report(&mut progress, &stats);
            Ok(())
        }
        Action::Extract => {
            let store = DiskStore::new(&plan.images_dir)?;
            let received = receive(
                plan.shards,
                plan.external_files,
                store,
                &mut Arena::new(),
                &counters,
                endpoints,
                &interrupts,
            );
            let (store, stats) = received?;
            store.commit(&interrupts)?;
            report(&mut progress, &stats);
            Ok(())
        }
        Action::Serve(remaps) => {
            Listener::check(&plan.images_dir, Role::Serve)?;
            let mut arena = Arena::new();
            let received = receive(
                plan.shards,
                plan.external_files,
                Catalog::new(),
                &mut arena,
                &counters,
                endpoints,
                &interrupts,
            );
            let (mut files, stats) = received?;
            remap_ports(&mut files, &mut arena, &remaps)?;
            report(&mut progress, &stats);
            let listener = Listener::bind(&plan.images_dir, Role::Serve)?;
            progress.reached(Milestone::SocketInit);
            if plan.progress_bar {
                notice::tell("the image is in memory: run `criu restore --stream`");
            }
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

/// Receives an image, and everything that it depends on has ended well when this returns.
fn receive<S: Store>(
    shards: Shards,
    external_files: Vec<(ImageName, OwnedFd)>,
    store: S,
    arena: &mut Arena,
    counters: &Counters,
    endpoints: Endpoints,
    interrupts: &Interrupts,
) -> Result<(S, Stats)> {
    let external_files = external_files.into_iter().map(|(name, fd)| {
        let pipe = endpoints.sink(fd, name.as_str())?;
        Ok((name, pipe))
    });
    let external_files = external_files.collect::<Result<Vec<_>>>()?;
    let shards = match shards {
        Shards::Descriptors(fds) => fds
            .into_iter()
            .map(|(fd, label)| Ok((endpoints.source(fd, &label)?, label)))
            .collect::<Result<_>>()?,
        Shards::Commands(commands) => endpoints.start_writers(commands)?,
    };
    let received = receive::receive(shards, external_files, store, arena, counters, interrupts);
    endpoints.conclude(received, interrupts)
}

fn remap_ports(files: &mut Catalog, arena: &mut Arena, remaps: &[Remap]) -> Result<()> {
    if remaps.is_empty() {
        return Ok(());
    }
    let mut change = || {
        let name = ImageName::new(listen_ports::FILE)?;
        let before = files
            .read(&name, arena)
            .context("keeping it in memory")?
            .with_context(|| format!("the image has no {name}"))?;
        let after =
            listen_ports::remap(&before, remaps).with_context(|| format!("changing {name}"))?;
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
