//! `serve`: from the shards into memory, and from there to `criu restore --stream`.
//!
//! There is one loop. It receives until CRIU may connect, and then receives and serves until both
//! are done. Without an index CRIU may connect when all of the image is here, so that nothing is
//! left to be received; with one, as soon as its files are known.

use anyhow::{Context, Result, anyhow};

use super::{Session, create_images_dir};
use crate::cli::Plan;
use crate::criu::{Listener, Role};
use crate::format::ImageName;
use crate::lazy::{Guardian, LazyMemory};
use crate::listen_ports::{self, Remap};
use crate::os::descriptor::Direction;
use crate::os::poller::{Event, Wait};
use crate::pace::{Activity, Pace};
use crate::receive::{Assembly, Image, Indexed, Receiver};
use crate::report;
use crate::report::bar::ProgressBar;
use crate::report::milestone;
use crate::report::progress::Stats;
use crate::report::times::Waiting;
use crate::serve::{self, Server};
use crate::store::catalog::Catalog;
use crate::supervision::{Failure, Supervisor};

pub(super) fn run(plan: Plan, mut session: Session) -> Result<(), Failure> {
    create_images_dir(&plan.images_dir)?;
    plan.check_socket(Role::Serve)?;
    Listener::check(&plan.images_dir, &Role::Serve.socket_name())?;
    // With lazy pages the bar ends with the restore, and has said this.
    let is_left_to_say = plan.args.progress_bar && !plan.args.lazy_pages;
    let served = match plan.args.index {
        true => Restore::<Indexed>::run(plan, &mut session),
        false => Restore::<Assembly<Catalog>>::run(plan, &mut session),
    };
    let stats = session.supervisor.conclude(served)?;
    if is_left_to_say {
        report::tell(stats.times.last().sentences(&session.labels).trim_end());
    }
    session.keep_statistics(&stats);
    Ok(())
}

/// A restore under way.
struct Restore<'a, I> {
    plan: Plan,
    session: &'a Session,
    supervisor: &'a Supervisor,
    bar: Option<ProgressBar>,
    /// With --lazy-pages, until CRIU may connect.
    guardian: Option<Guardian>,
    receiver: Receiver<'a, I>,
    /// Once CRIU may connect.
    server: Option<Server<'a>>,
    /// It is certain which files there are.
    is_known: bool,
    /// The image has proved whole.
    is_proven: bool,
}

impl<'a, I: Image<Store = Catalog> + 'static> Restore<'a, I> {
    fn run(mut plan: Plan, session: &'a mut Session) -> Result<Stats, Failure> {
        let (shards, files) = session.open(&mut plan)?;
        let (bar, guardian) = (session.bar.take(), session.guardian.take());
        let (session, supervisor) = (&*session, &session.supervisor);
        let store = Catalog::new();
        let mut restore = Self {
            plan,
            session,
            supervisor,
            bar,
            guardian,
            receiver: Receiver::new(shards, files, store, &session.counters, supervisor)?,
            server: None,
            is_known: false,
            is_proven: false,
        };
        let result = restore.receive_and_serve();
        let stats = restore.receiver.stats();
        let server = restore.server.map(Server::into_open);
        let open = (restore.receiver.into_open(), server);
        result.map_or_else(|error| Err(Failure::new(error, open)), |()| Ok(stats))
    }

    fn receive_and_serve(&mut self) -> Result<()> {
        let mut pace = Pace::new();
        let (mut events, mut wait) = (Vec::new(), Wait::Now);
        while !self.is_done()? {
            self.supervisor
                .poller()
                .wait(wait, &mut events)
                .context("waiting for the shards and CRIU")?;
            if wait != Wait::Now && !self.is_proven {
                self.supervisor.check()?;
            }
            let received = self.receive(&events)?;
            self.judge()?;
            if self.server.is_none() && self.may_connect()? {
                self.let_criu_connect()?;
            }
            let served = match &mut self.server {
                Some(server) => {
                    let served = server.step(self.receiver.store(), &events);
                    served.map_err(|error| server.explain(error))?
                }
                None => Activity::Idle(Wait::Forever),
            };
            self.keep_time(received);
            wait = match (received, served) {
                (Activity::Idle(shards), Activity::Idle(criu)) => shards.min(criu),
                (Activity::Idle(_), busy) | (busy, _) => pace.after(busy),
            };
            wait = wait.or_until(self.supervisor.look_again());
        }
        self.server.iter().try_for_each(Server::check_refused)
    }

    /// Counts the time until the next round as a wait, if it is one.
    fn keep_time(&mut self, received: Activity) {
        let waiting = match &self.server {
            _ if !matches!(received, Activity::Idle(_)) => Waiting::No,
            Some(server) if server.is_done() => Waiting::No,
            Some(server) if server.starving().next().is_none() => Waiting::ForCriu,
            _ => Waiting::ForShards,
        };
        self.receiver.keep_time(waiting);
    }

    /// Receives everything, or, while memory is short, the data that waiting readers need, and that
    /// must be here before CRIU may connect.
    fn receive(&mut self, events: &[Event]) -> Result<Activity> {
        let needed = || match &self.server {
            Some(server) => server.starving().cloned().collect(),
            None if self.plan.args.tcp_listen_remap.is_empty() => Vec::new(),
            None => ImageName::new(listen_ports::FILE).into_iter().collect(),
        };
        self.receiver.step(events, needed)
    }

    /// Finds out which files there are, and whether the image is whole.
    fn judge(&mut self) -> Result<()> {
        if !self.is_known && self.receiver.knows_files()? {
            self.is_known = true;
            let files = self.receiver.store();
            self.session.check_whole(files.names())?;
            serve::warn_of_losses(files);
            // A command of one that is not there would wait for it for ever.
            self.receiver.image.store().check_all_begun()?;
        }
        // Before CRIU has come, external files are a part of what is received.
        let may_prove = self.server.is_some()
            || !self.receiver.is_sending() && self.supervisor.have_pumps_written()?;
        // The commands had ended before this looks at what they have written.
        if !self.is_proven
            && may_prove
            && self.receiver.is_whole()?
            && self.supervisor.commands_have_succeeded(|_| true)
        {
            // What a pump could not read looks like an end.
            self.supervisor.check()?;
            self.supervisor.release_orphans()?;
            self.receiver.image.finish()?;
            self.is_proven = true;
            // The statistics say that nothing is left that could fail before CRIU comes.
            self.remap_ports()?;
            self.plan.progress.stats(&self.receiver.stats());
            if !self.plan.args.lazy_pages {
                self.end_bar();
            }
        }
        Ok(())
    }

    fn end_bar(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.conclude(&self.receiver.stats());
        }
    }

    /// True if everything is here that must be before CRIU may connect: files that the commands of
    /// external files unpack; image files of which something must be known by then; and all of the
    /// image, if it has no pages that CRIU must wait for.
    fn may_connect(&mut self) -> Result<bool> {
        if !self.is_known || !self.supervisor.commands_have_succeeded(|it| it.has_file()) {
            return Ok(false);
        }
        // An image that has not proved whole must not run, and with lazy pages CRIU waits for few.
        let is_prepared = !self.plan.args.lazy_pages
            && (self.plan.args.tcp_listen_remap.is_empty()
                || self.receiver.store().is_whole(listen_ports::FILE));
        Ok(self.is_proven || is_prepared && self.receiver.image.keeps_back())
    }

    fn let_criu_connect(&mut self) -> Result<()> {
        self.remap_ports()?;
        let lazy = self.guardian.take().map(|guardian| {
            let filled = &self.session.counters.filled;
            LazyMemory::lay_out(self.receiver.store(), guardian, filled)
        });
        let listener = Listener::bind(&self.plan.images_dir, &Role::Serve.socket_name())?;
        self.server = Some(Server::new(listener, lazy.transpose()?, self.supervisor)?);
        self.receiver.start_serving();
        self.plan.progress.reached(milestone::SOCKET_INIT);
        if self.plan.args.progress_bar && self.plan.criu.is_none() {
            report::warn("CRIU can connect: run `criu restore --stream`");
        }
        self.supervisor
            .start_criu(self.plan.criu.as_ref(), Direction::In)
    }

    /// True if CRIU, the readers of external files and the application have everything they want.
    ///
    /// # Errors
    /// When CRIU has left before the image has proved whole.
    fn is_done(&mut self) -> Result<bool> {
        let Some(server) = self.server.as_ref().filter(|server| server.is_done()) else {
            return Ok(false);
        };
        if !self.is_proven {
            return Err(server.explain(anyhow!(
                "serving: CRIU went away before all of the image had come, so the restore failed: \
                 see CRIU's log"
            )));
        }
        if self.receiver.is_sending() || !server.memory_is_in_place()? {
            return Ok(false);
        }
        if self.plan.args.lazy_pages {
            self.plan.progress.reached(milestone::MEMORY_IN_PLACE);
            self.end_bar();
        }
        Ok(true)
    }

    /// Changes the ports that the application listens on, unless that was done before.
    fn remap_ports(&mut self) -> Result<()> {
        match std::mem::take(&mut self.plan.args.tcp_listen_remap) {
            none if none.is_empty() => Ok(()),
            remaps => {
                change_files_img(self.receiver.store(), &remaps).context("--tcp-listen-remap")
            }
        }
    }
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
