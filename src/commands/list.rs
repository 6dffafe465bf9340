//! `list`: from the shards to nowhere, to know what is in an image, and that it is whole.
//!
//! Nothing is listed before that is certain: a script that reads the list and not the exit status
//! must not take a broken image for a whole one.

use std::io;

use anyhow::{Context, Error};

use super::Session;
use crate::cli::Plan;
use crate::report;
use crate::store::listing::Listing;
use crate::supervision::Failure;

pub(super) fn run(mut plan: Plan, mut session: Session) -> Result<(), Failure> {
    let (files, stats) = session.receive(&mut plan, Listing::default())?;
    session.check_whole(files.names())?;
    session.report(&mut plan.progress, &stats);
    if let Some(output) = plan.listing {
        // For as long as the reader takes, as a pager waits for its user.
        let go_on = || session.supervisor.check();
        let printed = report::write_patiently(output, &files.lines(), go_on);
        let kind = |error: &Error| error.downcast_ref().map(io::Error::kind);
        match printed {
            // A reader such as `head` has seen enough, and the image is whole.
            Err(error) if kind(&error) == Some(io::ErrorKind::BrokenPipe) => {}
            printed => printed.context("writing to standard output")?,
        }
    }
    Ok(())
}
