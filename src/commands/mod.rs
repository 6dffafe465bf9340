//! The subcommands: each wires its parts, and reports. No other module knows all parts.

mod capture;
mod extract;
mod hook;
mod list;
mod serve;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::cli::{Command, Plan, StoredAs};
use crate::criu::files;
use crate::format::ImageName;
use crate::lazy::Guardian;
use crate::os::pipe::{ReadEnd, WriteEnd};
use crate::receive;
use crate::report;
use crate::report::bar::ProgressBar;
use crate::report::meter::Counters;
use crate::report::progress::{Progress, Stats};
use crate::report::statistics::StatisticsFile;
use crate::store::Store;
use crate::store::disk::DirOrigin;
use crate::supervision::{Ending, Failure, Pumped, Supervisor};

pub(crate) use hook::run as run_hook;

/// The shards of a restore, with what messages call them.
type ShardPipes = Vec<(ReadEnd, String)>;

/// The external files of a restore.
type FilePipes = Vec<(ImageName, WriteEnd)>;

/// The parts that all subcommands share.
struct Session {
    supervisor: Supervisor,
    counters: Counters,
    /// What messages call the shards.
    labels: Vec<String>,
    bar: Option<ProgressBar>,
    statistics: Option<StatisticsFile>,
    /// With --lazy-pages.
    guardian: Option<Guardian>,
    /// External files were asked for, which no store of CRIU's files sees.
    has_external_files: bool,
}

/// Carries out a plan.
pub(crate) fn run(plan: Plan) -> Result<(), Failure> {
    let mut supervisor = Supervisor::catch().context("preparing for signals")?;
    if let Some(caller) = &plan.caller {
        supervisor
            .watch(&caller.process)
            .context("preparing to watch CRIU")?;
    }
    let image_name = plan.args.image_name.as_ref();
    supervisor.name_image(image_name.map(|StoredAs(name)| name.clone()));
    // CRIU has many files open at once, and each is a descriptor here.
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE) {
        // If it is refused, the soft limit has to do.
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
    let labels: Vec<_> = plan.shards.iter().map(|(_, label)| label.clone()).collect();
    let counters = Counters::new(labels.len());
    let args = &plan.args;
    let guardian = || Guardian::start().context("--lazy-pages");
    let guardian = args.lazy_pages.then(guardian).transpose()?;
    let statistics = args.statistics.as_deref().map(StatisticsFile::create);
    let statistics = statistics.transpose()?;
    let direction = args.command.direction();
    let start_bar = || ProgressBar::start(direction, labels.clone(), counters.clone());
    let session = Session {
        supervisor,
        has_external_files: !plan.external_files.is_empty(),
        bar: args.progress_bar.then(start_bar),
        labels,
        statistics,
        counters,
        guardian,
    };
    match plan.args.command {
        Command::Capture => capture::run(plan, session),
        Command::Extract { .. } => extract::run(plan, session),
        Command::Serve => serve::run(plan, session),
        Command::List => list::run(plan, session),
        Command::Hook => unreachable!("it has no plan of its own"),
    }
}

impl Session {
    /// Receives an image. When this returns, all that it depends on has ended well.
    fn receive<S: Store + 'static>(
        &mut self,
        plan: &mut Plan,
        store: S,
    ) -> Result<(S, Stats), Failure> {
        let (shards, files) = self.open(plan)?;
        let received = receive::receive(shards, files, store, &self.counters, &self.supervisor);
        self.supervisor.conclude(received)
    }

    /// Our ends of the pipes of a restore.
    fn open(&mut self, plan: &mut Plan) -> Result<(ShardPipes, FilePipes)> {
        let supervisor = &mut self.supervisor;
        let mut files = Vec::new();
        for (name, end) in std::mem::take(&mut plan.external_files) {
            let pipe = supervisor.sink(end, name.as_str(), Pumped::ExternalFile)?;
            files.push((name, pipe));
        }
        let shards = std::mem::take(&mut plan.shards).into_iter();
        let shards =
            shards.map(|(end, label)| Ok((supervisor.source(end, &label, Pumped::Shard)?, label)));
        Ok((shards.collect::<Result<_>>()?, files))
    }

    /// Checks that an image of these files is something to restore from.
    fn check_whole<'a>(&self, names: impl Iterator<Item = &'a ImageName>) -> Result<()> {
        let names: Vec<_> = names.map(ImageName::as_str).collect();
        ensure!(
            !names.is_empty() || self.has_external_files,
            "checking the image: it holds no file"
        );
        files::check_whole(names.into_iter())
    }

    /// Reports the statistics, to programs and to people.
    fn report(&mut self, progress: &mut Progress, stats: &Stats) {
        progress.stats(stats);
        if let Some(bar) = self.bar.take() {
            bar.conclude(stats);
        }
        self.keep_statistics(stats);
    }

    fn keep_statistics(&mut self, stats: &Stats) {
        if let Some(file) = self.statistics.take() {
            file.write(self.counters.files.get(), &self.labels, stats);
        }
    }
}

/// Tells why the program failed, and only then lets go of what it had open. The exit status is 128
/// and the number of the signal that ended the program, or that of the command that runs CRIU if
/// only that has failed, otherwise 1.
pub fn exit_status(failure: Failure) -> u8 {
    let error = failure.error();
    report::error(std::io::stderr(), error);
    let status = Ending::behind(error).map_or(1, Ending::exit_status);
    drop(failure);
    status
}

/// An image is its owner's memory: a directory made for it is closed to other users.
fn create_images_dir(path: &Path) -> Result<DirOrigin> {
    let origin = match path.is_dir() {
        true => DirOrigin::Found,
        false => DirOrigin::Made,
    };
    DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(path)
        .with_context(|| format!("--images-dir: creating {}", path.display()))?;
    Ok(origin)
}
