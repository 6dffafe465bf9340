//! Image files that appear in the images directory during a capture: they are not in the image.
//!
//! A CRIU that was started without `--stream`, a page server with the same directory, or a plugin
//! that cannot stream writes them. A restore from the stream would miss them.
//!
//! The directory may be /tmp, with thousands of files. Only names that end as CRIU's do count, and
//! only files that are new or have been written since are opened. CRIU's own `stats-dump` and
//! `irmap-cache`, its logs and the sockets have other names.
//!
//! A CRIU without `--stream` never connects: until one does, the directory is listed every second.

use std::collections::HashMap;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, bail};

use crate::criu::files::{COMMON_MAGIC, INVENTORY, INVENTORY_MAGIC};
use crate::os::descriptor::path_in;
use crate::report;
use crate::report::outcome;

/// The beginning of the names of the AMD GPU plugin's files. They have no magic, and older versions
/// of the plugin never stream them.
const AMDGPU: &[u8] = b"amdgpu-";

/// The time between two listings while no CRIU has connected.
const LISTING_INTERVAL: Duration = Duration::from_secs(1);

/// A file that stands under a name: its inode, and when it was last written.
type Identity = (u64, i64, i64);

/// The image files that were there before the capture, which are left alone.
pub(super) struct StrayFiles {
    /// Kept open, as its path may be gone in the end. `None` if it cannot be listed.
    directory: Option<File>,
    before: HashMap<OsString, Identity>,
    next_listing: Instant,
}

impl StrayFiles {
    /// Lists the images directory before CRIU comes.
    pub(super) fn look(images_dir: &Path) -> Self {
        let listed = File::open(images_dir)
            .and_then(|directory| Ok((image_files(&directory)?, Some(directory))));
        let (before, directory) = listed.unwrap_or_else(|error| {
            report::warn(format_args!(
                "--images-dir {}: image files that CRIU writes there instead of streaming them will not be noticed: {error}",
                images_dir.display()
            ));
            Default::default()
        });
        Self {
            directory,
            before,
            next_listing: Instant::now() + LISTING_INTERVAL,
        }
    }

    /// # Errors
    /// When it is time to look, and an image file has appeared, although no CRIU has connected.
    pub(super) fn check_unconnected(&mut self) -> Result<()> {
        if Instant::now() < self.next_listing {
            return Ok(());
        }
        self.next_listing = Instant::now() + LISTING_INTERVAL;
        self.appeared()?
            .map_or(Ok(()), |name| Err(forgotten_stream(&name)))
    }

    /// Why a command has ended well without having connected.
    pub(super) fn why_missed(&self, command: &str) -> Error {
        let why = match self.appeared() {
            Err(error) => error,
            Ok(Some(name)) => forgotten_stream(&name),
            Ok(None) => anyhow!(
                "is it `criu dump --stream`, in the foreground, with the same --images-dir?"
            ),
        };
        why.context(format!(
            "waiting for CRIU: {command} ended well without having connected"
        ))
    }

    /// # Errors
    /// When an image file has appeared since.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(name) = self.appeared()? {
            bail!(
                "capturing the image: {} appeared in --images-dir beside the stream, and is not in the image: a page server, a plugin that cannot stream, or a CRIU without --stream wrote it; the image is incomplete: discard it",
                name.display()
            );
        }
        Ok(())
    }

    /// Leaves a copy of inventory.img, without which container engines see no checkpoint in the
    /// directory. It does not count as a file that has appeared.
    ///
    /// # Errors
    /// Those of writing it, and when an image file has appeared before.
    pub(super) fn leave_inventory(&mut self, inventory: &[u8]) -> Result<()> {
        self.check()?;
        let directory = self.directory.as_ref().context("opening --images-dir")?;
        let leave = || outcome::create(directory, INVENTORY)?.write_all(inventory);
        leave().with_context(|| format!("leaving {INVENTORY} in --images-dir"))?;
        self.before = image_files(directory).context("listing --images-dir")?;
        Ok(())
    }

    /// An image file that was not there before.
    fn appeared(&self) -> Result<Option<PathBuf>> {
        let Some(directory) = &self.directory else {
            return Ok(None);
        };
        let now = image_files(directory).context("listing --images-dir")?;
        let new = now.into_iter().find(|(name, identity)| {
            self.before.get(name) != Some(identity) && is_of_criu(directory, name)
        });
        Ok(new.map(|(name, _)| name.into()))
    }
}

/// The error for an image file of a CRIU that did not connect.
fn forgotten_stream(name: &Path) -> Error {
    anyhow!(
        "waiting for CRIU: it writes its files, such as {}, into --images-dir and does not connect: --stream was probably forgotten; its dump goes on without the streamer, to that directory",
        name.display()
    )
}

/// The regular files of a directory whose names end as CRIU's do.
fn image_files(directory: &File) -> io::Result<HashMap<OsString, Identity>> {
    let entries = fs::read_dir(path_in(directory, ""))?;
    let files = entries.filter_map(|entry| {
        let entry = entry.ok()?;
        if Path::new(&entry.file_name()).extension() != Some(OsStr::new("img")) {
            return None;
        }
        // One that is gone by now is none of the image's.
        let file = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        let identity = (file.ino(), file.mtime(), file.mtime_nsec());
        Some((entry.file_name(), identity))
    });
    Ok(files.collect())
}

/// True if a file begins as CRIU's image files do.
fn is_of_criu(directory: &File, name: &OsStr) -> bool {
    let mut magic = [0; size_of::<u32>()];
    let flags = libc::O_NONBLOCK | libc::O_NOFOLLOW;
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(path_in(directory, name));
    let is_read = file
        .and_then(|mut file| file.read_exact(&mut magic))
        .is_ok();
    let magic = u32::from_le_bytes(magic);
    let is_inventory = name == INVENTORY;
    let has_magic = magic == COMMON_MAGIC || (is_inventory && magic == INVENTORY_MAGIC);
    name.as_bytes().starts_with(AMDGPU) || (is_read && has_magic)
}
