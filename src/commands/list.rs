//! `list`: from the shards to nowhere, to know what is in an image, and that it is whole.
//!
//! Nothing is listed before that is certain: a script that reads the list and not the exit status
//! must not take a broken image for a whole one.

use std::io;
use std::os::fd::AsFd;

use anyhow::{Context, Result};

use super::Session;
use crate::cli::Plan;
use crate::report;
use crate::store::listing::Listing;
use crate::supervision::{Failure, Supervisor};

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    let (files, stats) = session.receive(&mut plan, Listing::default())?;
    session.check_whole(files.names())?;
    session.report(&mut plan.progress, &stats);
    if let Some(output) = plan.listing {
        print(output, &files.lines(), &session.supervisor).context("writing to standard output")?;
    }
    Ok(())
}

/// Writes for as long as the reader takes, as a pager waits for its user.
fn print(output: impl AsFd, lines: &str, supervisor: &Supervisor) -> Result<()> {
    let printed = report::write_patiently(output, lines, || supervisor.check());
    match printed
        .as_ref()
        .map_err(|error| error.downcast_ref().map(io::Error::kind))
    {
        // A reader such as `head` has seen enough, and the image is whole.
        Err(Some(io::ErrorKind::BrokenPipe)) => Ok(()),
        _ => printed,
    }
}
