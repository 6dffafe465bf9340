//! Image files that appear in the images directory during a capture: they are not in the image.
//!
//! A CRIU that was started without `--stream`, a page server with the same directory, or a plugin
//! that knows nothing of streams writes them. A restore from the stream would miss them.
//!
//! The directory may be /tmp, with thousands of files. Only names that end as CRIU's do are looked
//! at, and only files that are new or have changed are opened. CRIU's own `stats-dump` and
//! `irmap-cache`, its logs and the sockets have other names.
//!
//! Until CRIU sends its first file, they are told of as soon as they are written: a CRIU without
//! `--stream` never connects, and would be waited for without end. A file is created before its
//! magic is in it, which CRIU keeps in a buffer for a while, so that each write is looked at, and
//! the closing. Afterwards it is enough to look in the end.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use anyhow::{Context, Error, Result, anyhow, bail};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};

use crate::criu::files::{COMMON_MAGIC, INVENTORY, INVENTORY_MAGIC};
use crate::report;

/// What the names of the files of the plugin for AMD's GPUs begin with. They have no magic, and its
/// older versions never send them to a streamer.
const AMDGPU: &[u8] = b"amdgpu-";

/// Which file stands under a name: its inode, and when it was written and changed last.
type Identity = (u64, i64, i64, i64, i64);

/// The image files that were there before, which are left alone.
pub(super) struct StrayFiles {
    directory: Option<OwnedFd>,
    before: HashMap<CString, Identity>,
    /// Tells what is written there, while CRIU is waited for. `None` also where the kernel has no
    /// watch for us: its users have a limited number.
    watch: Option<Inotify>,
}

impl StrayFiles {
    /// Looks at the images directory before CRIU comes. The directory is kept open, since its path
    /// may be gone in the end.
    pub(super) fn look(images_dir: &Path) -> Self {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let looked = open(images_dir, flags, Mode::empty())
            .context("opening it")
            .and_then(|directory| {
                let watch = watch(&directory).ok();
                Ok((image_files(&directory)?, directory, watch))
            });
        match looked {
            Ok((before, directory, watch)) => Self {
                directory: Some(directory),
                before,
                watch,
            },
            Err(error) => {
                report::warn(format_args!(
                    "--images-dir {}: image files that CRIU writes there instead of streaming them will not be noticed: {error:#}",
                    images_dir.display()
                ));
                Self {
                    directory: None,
                    before: HashMap::new(),
                    watch: None,
                }
            }
        }
    }

    /// What becomes readable when [`StrayFiles::check_written`] has something to look at.
    pub(super) fn watch(&self) -> Option<&Inotify> {
        self.watch.as_ref()
    }

    /// CRIU streams: from now on it is enough to look in the end.
    pub(super) fn unwatch(&mut self) {
        self.watch = None;
    }

    /// Looks at what was written since the last time.
    ///
    /// # Errors
    /// As [`StrayFiles::check_unconnected`].
    pub(super) fn check_written(&self) -> Result<()> {
        let (Some(directory), Some(watch)) = (&self.directory, &self.watch) else {
            return Ok(());
        };
        let events = match watch.read_events() {
            Ok(events) => events,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(()),
            Err(error) => return Err(error).context("watching --images-dir"),
        };
        for InotifyEvent { mask, name, .. } in events {
            if mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                self.check_unconnected()?;
            }
            let name = name.and_then(|name| CString::new(name.into_vec()).ok());
            if let Some(name) = name
                && let Some(identity) = image_file(directory, &name)
                && self.is_new(directory, &name, identity)
            {
                return Err(forgotten_stream(&name));
            }
        }
        Ok(())
    }

    /// # Errors
    /// When an image file has appeared since, although no CRIU has connected.
    pub(super) fn check_unconnected(&self) -> Result<()> {
        match self.appeared()? {
            Some(name) => Err(forgotten_stream(&name)),
            None => Ok(()),
        }
    }

    /// Why nothing came of a command that has ended well.
    pub(super) fn why_missed(&self, command: &str) -> Error {
        let why = self.check_unconnected().err().unwrap_or_else(|| {
            anyhow!("is it `criu dump --stream`, in the foreground, with the same --images-dir?")
        });
        why.context(format!(
            "waiting for CRIU: {command} ended well without having connected"
        ))
    }

    /// # Errors
    /// When an image file has appeared since.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(name) = self.appeared()? {
            bail!(
                "capturing the image: {} appeared in --images-dir stray_files the stream, and is not in the image: a page server, a plugin that cannot stream, or a CRIU without --stream wrote it; the image is incomplete: discard it",
                name.to_string_lossy()
            );
        }
        Ok(())
    }

    /// An image file that was not there before.
    fn appeared(&self) -> Result<Option<CString>> {
        let Some(directory) = &self.directory else {
            return Ok(None);
        };
        let now =
            image_files(directory).context("looking for image files stray_files the stream")?;
        let mut now = now.into_iter();
        let new = now.find(|(name, identity)| self.is_new(directory, name, *identity));
        Ok(new.map(|(name, _)| name))
    }

    fn is_new(&self, directory: &OwnedFd, name: &CStr, identity: Identity) -> bool {
        self.before.get(name) != Some(&identity) && is_of_criu(directory, name)
    }
}

/// The error for an image file that a CRIU wrote which did not connect.
fn forgotten_stream(name: &CStr) -> Error {
    anyhow!(
        "waiting for CRIU: it writes its files, such as {}, into --images-dir and does not connect: --stream was probably forgotten; its dump goes on without the streamer, to that directory",
        name.to_string_lossy()
    )
}

/// Watches what is written to the files of a directory, whose path may lead elsewhere by now.
fn watch(directory: &OwnedFd) -> nix::Result<Inotify> {
    let watch = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
    let path = format!("/proc/self/fd/{}", directory.as_raw_fd());
    let written = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_CLOSE_WRITE;
    watch.add_watch(path.as_str(), written | AddWatchFlags::IN_ONLYDIR)?;
    Ok(watch)
}

/// The regular files of a directory whose names end as CRIU's do.
fn image_files(directory: &OwnedFd) -> Result<HashMap<CString, Identity>> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let mut entries = Dir::openat(directory, ".", flags, Mode::empty()).context("listing it")?;
    let mut files = HashMap::new();
    for entry in entries.iter() {
        let entry = entry.context("listing it")?;
        let name = entry.file_name();
        if let Some(identity) = image_file(directory, name) {
            files.insert(name.to_owned(), identity);
        }
    }
    Ok(files)
}

/// A regular file whose name ends as CRIU's do. One that is gone by now is none of the image's.
fn image_file(directory: &OwnedFd, name: &CStr) -> Option<Identity> {
    if !name.to_bytes().ends_with(b".img") {
        return None;
    }
    let stat = fstatat(directory, name, AtFlags::AT_SYMLINK_NOFOLLOW).ok()?;
    let kind = SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT;
    (kind == SFlag::S_IFREG).then(|| identity(&stat))
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
