//! `serve`: from the shards into memory, and from there to `criu restore --stream`.
//!
//! An image with an index is served while it arrives: receiving and serving take turns in one loop,
//! and each says how long it can wait.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};

use super::{ExternalFiles, Session, check_whole};
use crate::cli::Plan;
use crate::criu::{Listener, Role};
use crate::format::ImageName;
use crate::listen_ports::{self, Remap};
use crate::os::descriptor::Direction;
use crate::os::poller::Wait;
use crate::pace::{Activity, Pace};
use crate::receive::{Arriving, Reading};
use crate::report;
use crate::report::progress::{Milestone, Stats};
use crate::serve::{self, Server};
use crate::store::catalog::Catalog;
use crate::supervision::{Failure, Supervisor};

pub(super) fn run(plan: Plan, session: Session) -> Result<(), Failure> {
    Listener::check(&plan.images_dir, Role::Serve, plan.socket_path())?;
    if plan.has_index {
        return while_it_arrives(plan, session);
    }
    when_it_is_here(plan, session)
}

fn when_it_is_here(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    let external = ExternalFiles::of(&plan);
    let (mut files, stats) = session.receive(
        std::mem::take(&mut plan.shards),
        std::mem::take(&mut plan.external_files),
        Catalog::new(),
    )?;
    check_files(&files, external)?;
    remap_ports(&mut files, &plan.remaps)?;
    session.report(&mut plan.progress, &stats);
    let listener = Listener::bind(&plan.images_dir, Role::Serve, plan.socket_path())?;
    announce(&mut plan, &session.supervisor, "the image is in memory")?;
    let served = serve::serve(listener, files, &session.supervisor);
    session.supervisor.conclude(served)
}

/// Has CRIU come.
fn announce(plan: &mut Plan, supervisor: &Supervisor, what_is_here: &str) -> Result<()> {
    plan.progress.reached(Milestone::SocketInit);
    if plan.progress_bar && plan.criu.is_none() {
        report::warn(format_args!("{what_is_here}: run `criu restore --stream`"));
    }
    supervisor.start_criu(plan.criu.as_ref(), Direction::In)
}

fn while_it_arrives(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    let external = ExternalFiles::of(&plan);
    let (shards, external_files) = session.open(
        std::mem::take(&mut plan.shards),
        std::mem::take(&mut plan.external_files),
    )?;
    // When anything fails, this closes CRIU's connection and pipes at once.
    let served = serve_arriving(&mut plan, &mut session, external, shards, external_files);
    session.supervisor.conclude(served.map_err(Failure::from))
}

/// How long all shards may rest for `--hold-at-most` while the index does not go on.
const INDEX_PATIENCE: Duration = Duration::from_secs(1);

fn serve_arriving(
    plan: &mut Plan,
    session: &mut Session,
    external: ExternalFiles,
    shards: super::ShardPipes,
    external_files: super::FilePipes,
) -> Result<()> {
    let supervisor = &session.supervisor;
    let mut arriving = Arriving::new(shards, external_files, &session.counters, supervisor)?;
    let mut pace = Pace::new();
    prepare(plan, supervisor, external, &mut arriving, &mut pace)?;
    remap_ports(arriving.catalog(), &plan.remaps)?;
    let listener = Listener::bind(&plan.images_dir, Role::Serve, plan.socket_path())?;
    let mut server = Server::new(listener, supervisor)?;
    announce(plan, supervisor, "the image is on its way")?;
    let stats = pass_on(plan, supervisor, &mut arriving, &mut server, &mut pace)?;
    server.conclude()?;
    drop(arriving);
    if let Some(bar) = session.bar.take() {
        bar.conclude(&stats);
    }
    Ok(())
}

/// Receives what must be here before CRIU may connect: the index, with the files of which something
/// must be known by then; all of the image, if it has no pages that CRIU must wait for; and what
/// the commands of external files unpack.
fn prepare(
    plan: &Plan,
    supervisor: &Supervisor,
    external: ExternalFiles,
    arriving: &mut Arriving,
    pace: &mut Pace,
) -> Result<()> {
    let most = plan.hold_at_most.unwrap_or(u64::MAX);
    let is_prepared = |arriving: &mut Arriving| {
        let catalog = arriving.catalog();
        (plan.remaps.is_empty() || catalog.is_whole(listen_ports::FILE)) && arriving.keeps_back()
    };
    let may_connect = |arriving: &mut Arriving| -> Result<bool> {
        Ok(supervisor.file_commands_have_succeeded()
            && (is_prepared(arriving)
                || supervisor.commands_have_succeeded() && arriving.is_whole()?))
    };
    let (mut events, mut wait) = (Vec::new(), Wait::Now);
    let mut is_laid_out = false;
    let mut rests_since = None;
    let mut has_bent = false;
    while !is_laid_out || !may_connect(arriving)? {
        let holds_enough = arriving.kept() > most;
        // Who writes all shards may be unable to go on with the index before the others are read,
        // as a capture at the other end is.
        let bends =
            has_bent || rests_since.is_some_and(|since: Instant| since.elapsed() >= INDEX_PATIENCE);
        let reading = if holds_enough && !is_laid_out && !bends {
            Reading::UpTo(None)
        } else if holds_enough && is_laid_out && is_prepared(arriving) {
            arriving.wanted(std::iter::empty())
        } else {
            Reading::All
        };
        let until = wait.or_until(supervisor.look_again());
        // In the past from then on: what the shards have already brings no event.
        let until = until.or_until(rests_since.map(|since| since + INDEX_PATIENCE));
        supervisor
            .poller()
            .wait(until, &mut events)
            .context("waiting for the shards")?;
        let activity = arriving.step(&events, reading)?;
        let rests = reading == Reading::UpTo(None) && matches!(activity, Activity::Idle(_));
        rests_since = rests.then(|| rests_since.unwrap_or_else(Instant::now));
        // Once the limit has bent, it stays so until the index is here.
        has_bent |= bends;
        wait = pace.after(activity);
        supervisor.check()?;
        if !is_laid_out
            && let Some(index) = arriving.index()
            && supervisor.command_has_succeeded(index)
        {
            arriving.lay_out()?;
            check_files(arriving.catalog(), external)?;
            is_laid_out = true;
            wait = Wait::Now;
        }
    }
    Ok(())
}

/// Receives and serves, until CRIU and the readers of external files have all they want.
///
/// # Errors
/// When CRIU leaves before the image has proved whole, too.
fn pass_on(
    plan: &mut Plan,
    supervisor: &Supervisor,
    arriving: &mut Arriving,
    server: &mut Server,
    pace: &mut Pace,
) -> Result<Stats> {
    let most = plan.hold_at_most.unwrap_or(u64::MAX);
    let mut events = Vec::new();
    let to_read = |arriving: &mut Arriving, server: &Server| {
        let held = arriving.kept().saturating_sub(server.freed());
        match held > most {
            true => arriving.wanted(server.starving()),
            false => Reading::All,
        }
    };
    let mut proven = None;
    loop {
        let reading = to_read(arriving, server);
        let received = arriving.step(&events, reading)?;
        if proven.is_none() && arriving.is_whole()? {
            supervisor.check()?;
            // A command may have written more before it ended.
            if supervisor.commands_have_succeeded() && arriving.is_whole()? {
                supervisor.release_orphans()?;
                arriving.release()?;
                let stats = proven.insert(arriving.stats());
                plan.progress.stats(stats);
            }
        }
        let served = server.step(arriving.catalog(), &events)?;
        if server.is_done() {
            let Some(stats) = &proven else {
                return Err(server.explain(anyhow!(
                    "serving: CRIU went away before all of the image had come, so the restore \
                     failed: see CRIU's log"
                )));
            };
            if !arriving.is_sending() {
                return Ok(stats.clone());
            }
        }
        let wait = match (received, served) {
            (Activity::Idle(shards), Activity::Idle(criu)) => shards.or(criu),
            (Activity::Idle(_), busy) | (busy, _) => pace.after(busy),
        };
        // What CRIU has taken may have made room, or have it wait for what is left in a shard.
        let wants_more = to_read(arriving, server) != reading;
        let look_again = supervisor.look_again().filter(|_| proven.is_none());
        let wait = match wants_more {
            true => Wait::Now,
            false => wait.or_until(look_again),
        };
        supervisor
            .poller()
            .wait(wait, &mut events)
            .context("waiting for the shards and CRIU")?;
    }
}

/// Checks what the image consists of, and warns of what CRIU will not restore.
fn check_files(files: &Catalog, external: ExternalFiles) -> Result<()> {
    check_whole(files.names(), external)?;
    serve::warn_of_losses(files);
    Ok(())
}

fn remap_ports(files: &mut Catalog, remaps: &[Remap]) -> Result<()> {
    if remaps.is_empty() {
        return Ok(());
    }
    change_files_img(files, remaps).context("--tcp-listen-remap")
}

fn change_files_img(files: &mut Catalog, remaps: &[Remap]) -> Result<()> {
    let name = ImageName::new(listen_ports::FILE)?;
    let before = files
        .read(&name)
        .context("keeping it in memory")?
        .with_context(|| format!("the image has no {name}"))?;
    let after = listen_ports::remap(&before, remaps).with_context(|| format!("changing {name}"))?;
    files
        .write(name, &after)
        .context("keeping the changed file in memory")
}
