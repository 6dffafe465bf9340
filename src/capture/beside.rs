//! Image files that appear in the images directory during a capture: they are not in the image.
//!
//! A CRIU that was started without `--stream`, a page server with the same directory, or a plugin
//! that knows nothing of streams writes them. A restore from the stream would miss them.
//!
//! The directory may be /tmp, with thousands of files. Only names that end as CRIU's do are looked
//! at, and only files that are new or have changed are opened. CRIU's own `stats-dump` and
//! `irmap-cache`, its logs and the sockets have other names.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::dir::Dir;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};

use crate::criu::files::{COMMON_MAGIC, INVENTORY, INVENTORY_MAGIC};
use crate::report;

/// What the names of the files of the plugin for AMD's GPUs begin with. They have no magic, and its
/// older versions never send them to a streamer.
const AMDGPU: &[u8] = b"amdgpu-";

/// Which file stands under a name: its inode, and when it was written and changed last.
type Identity = (u64, i64, i64, i64, i64);

/// The image files that were there before, which are left alone.
pub(super) struct Beside {
    directory: Option<OwnedFd>,
    before: HashMap<CString, Identity>,
}

impl Beside {
    /// Looks at the images directory before CRIU comes. The directory is kept open, since its path
    /// may be gone in the end.
    pub(super) fn look(images_dir: &Path) -> Self {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let looked = open(images_dir, flags, Mode::empty())
            .context("opening it")
            .and_then(|directory| Ok((image_files(&directory)?, directory)));
        match looked {
            Ok((before, directory)) => Self {
                directory: Some(directory),
                before,
            },
            Err(error) => {
                report::warn(format_args!(
                    "--images-dir {}: image files that CRIU writes there instead of streaming them will not be noticed: {error:#}",
                    images_dir.display()
                ));
                Self {
                    directory: None,
                    before: HashMap::new(),
                }
            }
        }
    }

    /// # Errors
    /// When an image file has appeared since.
    pub(super) fn check(&self) -> Result<()> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        let now = image_files(directory).context("looking for image files beside the stream")?;
        for (name, identity) in now {
            if self.before.get(&name) != Some(&identity) && is_of_criu(directory, &name) {
                bail!(
                    "capturing the image: {} appeared in --images-dir beside the stream, and is not in the image: a page server, a plugin that cannot stream, or a CRIU without --stream wrote it; the image is incomplete: discard it",
                    name.to_string_lossy()
                );
            }
        }
        Ok(())
    }
}

/// The regular files of a directory whose names end as CRIU's do.
fn image_files(directory: &OwnedFd) -> Result<HashMap<CString, Identity>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries = Dir::openat(directory, ".", flags, Mode::empty()).context("listing it")?;
    let mut files = HashMap::new();
    for entry in entries.iter() {
        let entry = entry.context("listing it")?;
        let name = entry.file_name();
        if !name.to_bytes().ends_with(b".img") {
            continue;
        }
        // A file that is gone by now is none of the image's.
        let Ok(stat) = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW) else {
            continue;
        };
        if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT == SFlag::S_IFREG {
            files.insert(name.to_owned(), identity(&stat));
        }
    }
    Ok(files)
}

fn identity(stat: &FileStat) -> Identity {
    (
        stat.st_ino,
        stat.st_mtime,
        stat.st_mtime_nsec,
        stat.st_ctime,
        stat.st_ctime_nsec,
    )
}

/// Whether a file begins as CRIU's image files do.
fn is_of_criu(directory: &OwnedFd, name: &CStr) -> bool {
    if name.to_bytes().starts_with(AMDGPU) {
        return true;
    }
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let mut magic = [0; size_of::<u32>()];
    let read = openat(directory, name, flags, Mode::empty())
        .map_err(std::io::Error::from)
        .and_then(|file| std::fs::File::from(file).read_exact(&mut magic));
    let magic = u32::from_le_bytes(magic);
    let is_inventory = name.to_bytes() == INVENTORY.as_bytes();
    read.is_ok() && (magic == COMMON_MAGIC || (is_inventory && magic == INVENTORY_MAGIC))
}
