//! `hook`: CRIU's action script, which starts the streamer and waits for it.
//!
//! CRIU's actions, and the hook's at each (docs/protocol.md, section 1, has the facts):
//!
//! ```text
//! dump         pre-stream    start `capture`, return when the socket listens
//!              …             CRIU connects, freezes the application, sends its files
//!              post-dump     return when the streamer has ended, with its status; or when it has
//!                            copied the memory, if the options say so
//! restore      pre-stream    start `serve`, return when the socket listens
//!              …             CRIU connects, restores
//! any other action           nothing
//! ```
//!
//! **Dump.** At `post-dump` everything is written and nothing runs. If the script fails there, CRIU
//! lets the application go on, and fails. So CRIU kills the application, or lets it write to its
//! memory again (`--leave-running`), only after every shard command has succeeded. The call itself
//! means to `capture` that CRIU has closed all files: one that is missing or still open by then is
//! missing for good. `capture` fails if CRIU ends before, since the application then runs while its
//! pages are still in pipes. With a buffer and
//! `--go-on-when-copied` that is when the application's memory is copied: it may then be written to
//! again, and the upload goes on in the background.
//!
//! **Restore.** Nothing is left to wait for. `serve` lets CRIU connect when the whole image is
//! here; an image with an index it lets CRIU finish when it is. A `serve` that fails after that
//! closes CRIU's connection. And it cannot have ended before `post-resume`, when the application
//! runs already: CRIU closes the connection just before.
//!
//! **Without arguments.** CRIU starts an action script with no arguments (`execvp` of one name), so
//! this program takes itself for the hook when it has none, and the action is in its environment.
//!
//! **In the background.** The streamer goes on in a process and a session of its own when the
//! script returns, with nothing open of what CRIU or another script has left to it: a reader of
//! CRIU's output sees its end. A log in the images directory has the output of the streamer and of
//! its commands; see [`outcome`] for how it ends.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use anyhow::{Context, Result, bail, ensure};

use crate::cli::{Args, Plan, StoredAs};
use crate::criu::hook_caller::{self, Caller};
use crate::criu::{Listener, Role};
use crate::os::process;
use crate::report;
use crate::report::milestone;
use crate::report::outcome::{self, Hook, NO_ANSWER};
use crate::report::progress::Progress;
use crate::supervision::Failure;

/// Names the directory of the files of options.
const OPTIONS_DIR: &str = "CRIU_IMAGE_STREAMER_OPTIONS";

/// Their directory where that names none: an engine's CRIU has no environment of its user's.
const DEFAULT_OPTIONS_DIR: &str = "/etc/criu-image-streamer";

/// How the names of files end that begin with `streamer-capture` or `streamer-serve`: the options,
/// what the streamer in the background says, and how it ended.
const OPTIONS: &str = ".options";
const LOG: &str = ".log";
const OUTCOME: &str = ".outcome";

/// Does what is to do at CRIU's present action.
pub(crate) fn run() -> Result<(), Failure> {
    process::close_range(0);
    let action = hook_caller::action().context(
        "hook: CRIU starts it: criu dump --stream --action-script criu-image-streamer …",
    )?;
    match action.to_str() {
        Some("pre-stream") => Ok(start()?),
        Some("post-dump") => Ok(wait()?),
        _ => Ok(()),
    }
}

/// Starts the streamer that CRIU wants, and returns when CRIU can connect.
fn start() -> Result<()> {
    let caller = Caller::find()?;
    let images_dir = caller.images_dir.clone();
    let directory = caller.directory.try_clone()?;
    let options_dir = options_dir();
    let role = role_of(&caller, &options_dir);
    // One that is still at work has its log and its outcome here.
    let of_role = *role.as_ref().unwrap_or(&Role::Capture);
    Listener::check(&images_dir, &of_role.socket_name())?;
    let [log, outcome] = [LOG, OUTCOME].map(|suffix| of_role.file_name(suffix));
    let path_of = |name: &str| images_dir.join(name).display().to_string();
    outcome::remove(&directory, &outcome).with_context(|| path_of(&outcome))?;
    let log = outcome::create(&directory, &log).with_context(|| path_of(&log))?;
    // An engine shows nothing of what CRIU's scripts say, and CRIU has no log yet.
    let plan = role.and_then(|role| prepare(&caller, &options_dir, role));
    let mut plan = plan.inspect_err(|error| report::error(&log, error))?;
    if plan.args.buffer.is_some() && !plan.args.go_on_when_copied {
        report::warn(
            "hook: --buffer has no use without --go-on-when-copied: CRIU waits until the image is written, and the copy only takes memory and time",
        );
    }
    let (progress, reports) = std::io::pipe().context("making a pipe")?;
    let hook = Hook(Rc::new(RefCell::new(OwnedFd::from(reports).into())));
    plan.progress = Progress::new(Some(log.try_clone()?.into()), Some(hook.clone()));
    plan.caller = Some(caller);
    process::go_on_in_background(log.into(), move || {
        let ended = super::run(plan);
        let reason = ended.as_ref().err().map(|it| format!("{:#}", it.error()));
        let end = reason.as_deref().unwrap_or(outcome::SUCCESS);
        // Before CRIU loses its pipes: whoever sees that finds the reason.
        if let Err(error) = outcome::leave(&directory, &outcome, end) {
            report::warn(format_args!("{outcome}: {error:#}"));
        }
        hook.tell(end);
        ended.map_or_else(super::exit_status, |()| 0)
    })?;
    outcome::hear(progress, Some(milestone::SOCKET_INIT))
}

/// Waits until the streamer has ended, or lets CRIU go on, and fails if it has failed. A CRIU that
/// is about to kill the application does not go on before the end: both it and its image might be
/// lost then.
fn wait() -> Result<()> {
    let caller = Caller::find()?;
    let lets_live = caller.command_line.lets_live();
    let enough = lets_live.then_some(milestone::MEMORY_COPIED);
    let streamer = caller.call().context(NO_ANSWER)?;
    outcome::hear(streamer, enough)
}

/// The directory of the files with options. An images directory is none: what an engine has
/// unpacked there from an archive would run as root.
fn options_dir() -> PathBuf {
    let given = std::env::var_os(OPTIONS_DIR).filter(|path| !path.is_empty());
    given.map_or_else(|| DEFAULT_OPTIONS_DIR.into(), PathBuf::from)
}

/// CRIU's present task. A capture where CRIU restores could overwrite the very image that is
/// to be restored: it is started only where a command line says so.
fn role_of(caller: &Caller, options_dir: &Path) -> Result<Role> {
    let has_options = |role: Role| options_dir.join(role.file_name(OPTIONS)).exists();
    match caller.command_line.role() {
        Some(role) => Ok(role),
        None if has_options(Role::Serve) && !has_options(Role::Capture) => Ok(Role::Serve),
        None => bail!(
            "nothing tells whether CRIU dumps or restores: neither its command line nor that of the program which has started it has a word for it, such as dump, checkpoint or restore"
        ),
    }
}

/// Makes the plan that the options ask for, with the name of the image.
fn prepare(caller: &Caller, options_dir: &Path, role: Role) -> Result<Plan> {
    // It would not ask how the streamer ended.
    ensure!(
        !caller.command_line.takes_no_dump(),
        "CRIU runs no action script when a pre-dump or cpuinfo.img is written, so nothing would tell whether it was: stream it without the hook"
    );
    let images_dir = &caller.images_dir;
    let options = options_dir.join(role.file_name(OPTIONS));
    let mut args = read_options(&options, role, images_dir)?;
    match role {
        Role::Capture => {
            ensure!(
                !caller.is_driven || !args.goes_on_into(images_dir),
                "--go-on-when-copied: an engine packs the images directory as soon as it goes on, and what is still on its way there would be missing: let the commands take the image elsewhere"
            );
            let name = args.image_name.map_or_else(StoredAs::random, Ok)?;
            name.leave(&caller.directory)?;
            args.image_name = Some(name);
        }
        Role::Serve if args.image_name.is_none() => args.image_name = StoredAs::left(images_dir)?,
        Role::Serve => {}
    }
    Plan::new(args).with_context(|| options.display().to_string())
}

fn read_options(options: &Path, role: Role, images_dir: &Path) -> Result<Args> {
    if !options.exists() {
        let stray = images_dir.join(role.file_name(OPTIONS));
        let stray = match stray.exists() {
            true => format!(
                "; {} is not read, because whoever makes an image can leave such a file: move it, if it is yours",
                stray.display()
            ),
            false => String::new(),
        };
        bail!(
            "there are no options, one a line, such as --shard-cmd lz4 >/tmp/app.lz4: write them to {}; the directory is the one that {OPTIONS_DIR} names in CRIU's environment, or else {DEFAULT_OPTIONS_DIR}{stray}",
            options.display()
        );
    }
    Args::from_file(options, role.name(), images_dir)
}
