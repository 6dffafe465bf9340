//! Files on disk, none of which is in place before all of them are.
//!
//! A directory that looks like an image is taken for one, so the files are first written to a
//! private directory beside their destination, under numbers: no name from the stream is used in
//! there. When the image is complete they are flushed to disk and moved into place, `inventory.img`
//! last, without which CRIU restores nothing. Files that they replace are set aside, and come back
//! if a move fails. If anything goes wrong before, the private directory goes, and nothing has
//! changed.
//!
//! CRIU opens optional files by name, and would take an earlier image's for the new image's. So
//! they are set aside in the same way: afterwards the directory holds the new image's files and no
//! other of CRIU's. Files that CRIU does not open when it restores stay: logs, sockets, statistics
//! (`stats-dump`), a `parent` link, a user's files.
//!
//! A streamer that is killed leaves its private directory, which the next one removes: a lock on
//! the images directory shows that no streamer uses it.
//!
//! Moving does not follow a planted symbolic link at the destination but replaces it;
//! all paths are relative to the open directory. A directory in the way is an error.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};
use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat, mkdirat};
use nix::unistd::{UnlinkatFlags, syncfs, unlinkat};
use rustix::fs::FlockOperation;

use super::{Ahead, Piece, Store};
use crate::criu::files::{self, INVENTORY};
use crate::format::ImageName;
use crate::os::descriptor::flush;
use crate::report;
use crate::supervision::Supervisor;

/// The start of a private directory's name; the number of the process follows.
const PRIVATE: &str = ".criu-image-streamer.";

/// Files flushed at a time. Each flush empties the disk's cache, for which the kernel joins
/// flushes that wait: 50,000 files took 1.6 s, and one after another 137 s (ext4, 2026-11-29).
const FLUSHERS: usize = 8;

/// The history of an images directory, which decides the mode of the files in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DirOrigin {
    /// It was made for this image: its files are for their owner alone.
    Made,
    /// It was there: its maker decides who may enter. As with CRIU's own files, the umask
    /// decides who may read its files, as the root of a user namespace must be able to.
    Found,
}

impl DirOrigin {
    fn file_mode(self) -> Mode {
        let owner = Mode::S_IRUSR | Mode::S_IWUSR;
        match self {
            DirOrigin::Made => owner,
            DirOrigin::Found => owner | Mode::S_IRGRP | Mode::S_IROTH,
        }
    }
}

/// A directory that receives an image.
pub struct DiskStore {
    images: Images,
    origin: DirOrigin,
    private: OwnedFd,
    private_name: String,
    next_number: u64,
    complete: BTreeMap<ImageName, u64>,
    /// The private directory holds what could not be put back.
    keep_private: bool,
}

/// A file being written.
pub struct StagedFile {
    file: File,
    number: u64,
}

impl DiskStore {
    /// Prepares to receive an image into `images_dir`, and removes what a streamer that was killed
    /// left there. `origin` says where the directory comes from.
    ///
    /// # Errors
    /// When nothing can be written there, and when another streamer does so.
    pub fn new(images_dir: &Path, origin: DirOrigin) -> Result<Self> {
        let images = Images::open(images_dir)?;
        images.remove_stale();
        let private_name = format!("{PRIVATE}{}", std::process::id());
        let private = mkdirat(&images, private_name.as_str(), Mode::S_IRWXU)
            .and_then(|()| openat(&images, private_name.as_str(), DIRECTORY, Mode::empty()))
            .with_context(|| format!("creating {private_name} in {}", images_dir.display()))?;
        Ok(Self {
            images,
            origin,
            private,
            private_name,
            next_number: 0,
            complete: BTreeMap::new(),
            keep_private: false,
        })
    }

    /// The names of the files that are complete.
    pub fn names(&self) -> impl Iterator<Item = &ImageName> {
        self.complete.keys()
    }

    /// Moves the files into place, when the image is complete.
    ///
    /// # Errors
    /// When they cannot be flushed or moved, or a signal came before; what was there before is then
    /// there again.
    pub fn commit(mut self, supervisor: &Supervisor) -> Result<()> {
        syncfs(&self.images).context("flushing the image to disk")?;
        supervisor.check()?;
        self.flush_each()?;
        supervisor.check()?;
        let mut moves = self.moves().context("looking for an earlier image")?;
        let result = self.carry_out(&mut moves);
        if result.is_err() {
            self.keep_private = !self.undo(&moves);
        }
        result
    }

    /// Fails if a file did not reach the disk. `syncfs` has written them all, but does not say that
    /// it failed on overlayfs, nor before Linux 5.8.
    fn flush_each(&self) -> Result<()> {
        let flush_file = |&(name, number): &(&ImageName, &u64)| {
            let (path, flags) = (number.to_string(), OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC);
            openat(&self.private, path.as_str(), flags, Mode::empty())
                .and_then(flush)
                .with_context(|| format!("flushing {name} to disk"))
        };
        let files: Vec<_> = self.complete.iter().collect();
        let share = files.len().div_ceil(FLUSHERS).max(1);
        thread::scope(|scope| {
            let mut flushers = Vec::new();
            for files in files.chunks(share) {
                flushers.push(scope.spawn(move || files.iter().try_for_each(flush_file)));
            }
            let mut flushers = flushers.into_iter();
            flushers.try_for_each(|flusher| flusher.join().expect("it does not panic"))
        })
    }
}

impl Drop for DiskStore {
    fn drop(&mut self) {
        if self.keep_private {
            // Under another name, as the next streamer would remove it.
            let kept = format!("not-put-back.{}", std::process::id());
            let (images, name) = (&self.images, self.private_name.as_str());
            let _ = renameat(images, name, images, kept.as_str());
            report::warn(format_args!(
                "what could not be put back is in {kept} in the images directory"
            ));
        } else if let Err(error) = self.images.remove(&self.private_name) {
            let name = &self.private_name;
            report::warn(format_args!("removing {name}: {error}; remove it yourself"));
        }
    }
}

const DIRECTORY: OFlag = OFlag::O_RDONLY
    .union(OFlag::O_DIRECTORY)
    .union(OFlag::O_NOFOLLOW)
    .union(OFlag::O_CLOEXEC);

/// The images directory, locked against other streamers that extract into it.
struct Images {
    directory: OwnedFd,
    /// Some network file systems have no locks.
    is_locked: bool,
}

impl Images {
    fn open(path: &Path) -> Result<Self> {
        let follow = DIRECTORY.difference(OFlag::O_NOFOLLOW);
        let directory = open(path, follow, Mode::empty())
            .with_context(|| format!("opening the directory {}", path.display()))?;
        let lock = rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive);
        ensure!(
            lock != Err(rustix::io::Errno::WOULDBLOCK),
            "another streamer extracts into {}: wait for its end or choose another --images-dir",
            path.display()
        );
        let is_locked = lock.is_ok();
        Ok(Self {
            directory,
            is_locked,
        })
    }

    /// Removes private directories whose streamers are gone: all of them, as we have the lock.
    fn remove_stale(&self) {
        if !self.is_locked {
            return;
        }
        let ours = nix::unistd::geteuid().as_raw();
        for name in names(self.as_fd(), ".").unwrap_or_default() {
            let Some(name) = name.to_str().ok().filter(|name| name.starts_with(PRIVATE)) else {
                continue;
            };
            let is_stale = fstatat(self, name, AtFlags::AT_SYMLINK_NOFOLLOW)
                .is_ok_and(|stat| file_type(&stat) == SFlag::S_IFDIR && stat.st_uid == ours);
            if is_stale && let Err(error) = self.remove(name) {
                report::warn(format_args!(
                    "removing {name}, which a streamer that was killed has left: {error}"
                ));
            }
        }
    }

    /// True if CRIU may open the file of this name when it restores: a regular file, or a link,
    /// which it follows.
    fn is_criu_file(&self, name: &ImageName) -> bool {
        let Ok(stat) = fstatat(self, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) else {
            return false;
        };
        match file_type(&stat) {
            SFlag::S_IFLNK => files::kind(name.as_str()).is_some(),
            SFlag::S_IFREG => {
                files::is_image_file(name.as_str())
                    && files::is_criu_file(name.as_str(), &self.start_of(name))
            }
            _ => false,
        }
    }

    /// The first bytes of a file; none if it cannot be read.
    fn start_of(&self, name: &ImageName) -> Vec<u8> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mut start = Vec::new();
        if let Ok(fd) = openat(self, name.as_str(), flags, Mode::empty()) {
            let mut file = File::from(fd).take(files::MAGIC_LENGTH as u64);
            // A file that cannot be read is not known to be CRIU's.
            let _ = file.read_to_end(&mut start);
        }
        start
    }

    /// Removes a private directory, in which there are only files.
    fn remove(&self, private: &str) -> nix::Result<()> {
        let directory = openat(self, private, DIRECTORY, Mode::empty())?;
        for name in names(self.as_fd(), private)? {
            unlinkat(&directory, name.as_c_str(), UnlinkatFlags::NoRemoveDir)?;
        }
        unlinkat(self, private, UnlinkatFlags::RemoveDir)
    }
}

impl AsFd for Images {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

/// The names in a directory.
fn names(at: BorrowedFd, directory: &str) -> nix::Result<Vec<CString>> {
    let mut directory = Dir::openat(at, directory, DIRECTORY, Mode::empty())?;
    let entries = directory
        .iter()
        .map(|entry| Ok(entry?.file_name().to_owned()));
    let is_inside = |name: &CString| !matches!(name.to_bytes(), b"." | b"..");
    entries
        .filter(|name| name.as_ref().map_or(true, is_inside))
        .collect()
}

fn file_type(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
}

/// One name in the images directory that changes hands.
struct Move {
    name: ImageName,
    /// Of the new file, or, if there is none, a number that no file has.
    number: u64,
    is_new: bool,
    /// Something of that name was there, and is now set aside.
    replaced: bool,
    /// The new file is in place.
    placed: bool,
}

fn is_inventory(name: &ImageName) -> bool {
    name.as_str() == INVENTORY
}

impl DiskStore {
    /// The moves of a commit: of the new files, and of CRIU's files of an earlier image that the
    /// new one does not have.
    fn moves(&self) -> nix::Result<Vec<Move>> {
        let step = |name, number, is_new| Move {
            name,
            number,
            is_new,
            replaced: false,
            placed: false,
        };
        let new = self.complete.iter();
        let mut moves: Vec<_> = new
            .map(|(name, &number)| step(name.clone(), number, true))
            .collect();
        // External files alone are no image, and leave an earlier one as it is.
        if self.names().any(|name| files::is_image_file(name.as_str())) {
            let names = names(self.images.as_fd(), ".")?.into_iter();
            let leftovers = names
                .filter_map(|name| ImageName::new(name.to_str().ok()?).ok())
                .filter(|name| !self.complete.contains_key(name) && self.images.is_criu_file(name));
            let numbered = leftovers.zip(self.next_number..);
            moves.extend(numbered.map(|(name, number)| step(name, number, false)));
        }
        // An inventory is the first to go, and the last to come.
        moves.sort_by_key(|step| !is_inventory(&step.name));
        Ok(moves)
    }

    fn carry_out(&self, moves: &mut [Move]) -> Result<()> {
        let flush = || flush(&self.images).context("flushing the images directory to disk");
        for step in &mut *moves {
            self.set_aside(step)?;
            if is_inventory(&step.name) {
                flush()?;
            }
        }
        for step in moves.iter_mut().rev() {
            if is_inventory(&step.name) {
                flush()?;
            }
            if step.is_new {
                self.place(step)?;
            }
        }
        flush()
    }

    /// Moves an earlier file of this name out of the way.
    fn set_aside(&self, step: &mut Move) -> Result<()> {
        let name = &step.name;
        match fstatat(&self.images, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => return Ok(()),
            Err(error) => {
                return Err(error).with_context(|| format!("looking for an earlier {name}"));
            }
            Ok(stat) => ensure!(
                file_type(&stat) != SFlag::S_IFDIR,
                "--images-dir: a directory named {name} is in the way of the file: move it"
            ),
        }
        let aside = aside(step.number);
        renameat(&self.images, name.as_str(), &self.private, aside.as_str())
            .with_context(|| format!("setting the earlier {name} aside"))?;
        step.replaced = true;
        Ok(())
    }

    fn place(&self, step: &mut Move) -> Result<()> {
        let (number, name) = (step.number.to_string(), &step.name);
        renameat(&self.private, number.as_str(), &self.images, name.as_str())
            .with_context(|| format!("moving {name} into place"))?;
        step.placed = true;
        Ok(())
    }

    /// Puts everything back, `inventory.img` last, and only if nothing is missing. Returns false
    /// if something is.
    fn undo(&self, moves: &[Move]) -> bool {
        let (images, private) = (&self.images, &self.private);
        let mut all = true;
        for step in moves.iter().rev() {
            if is_inventory(&step.name) && !all {
                return false;
            }
            let (name, number) = (step.name.as_str(), step.number.to_string());
            let mut result = Ok(());
            if step.placed {
                result = renameat(images, name, private, number.as_str());
            }
            if step.replaced {
                result = result.and(renameat(private, aside(step.number).as_str(), images, name));
            }
            if let Err(error) = result {
                all = false;
                report::warn(format_args!("putting {name} back as it was: {error}"));
            }
        }
        all
    }
}

/// The name of a replaced file while it is set aside for the file of this number.
fn aside(number: u64) -> String {
    format!("{number}.replaced")
}

impl Store for DiskStore {
    type File = StagedFile;

    const AHEAD: Ahead = Ahead::Shard;

    fn create(&mut self, name: &ImageName) -> Result<StagedFile> {
        let number = self.next_number;
        self.next_number += 1;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let (path, mode) = (number.to_string(), self.origin.file_mode());
        let fd = openat(&self.private, path.as_str(), flags, mode)
            .with_context(|| format!("creating {name} in --images-dir"))?;
        let file = File::from(fd);
        Ok(StagedFile { file, number })
    }

    fn append(&mut self, file: &mut StagedFile, piece: Piece) -> Result<()> {
        match piece {
            Piece::Memory(extent) => file.file.write_all(extent.bytes())?,
            Piece::Pipe(mut held) => held.write_to(&file.file)?,
        }
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: StagedFile) -> Result<()> {
        nix::unistd::close(file.file).with_context(|| format!("closing {name}"))?;
        if let Some(earlier) = self.complete.insert(name, file.number) {
            let (name, flags) = (earlier.to_string(), UnlinkatFlags::NoRemoveDir);
            unlinkat(&self.private, name.as_str(), flags)
                .context("removing the first of two files of one name")?;
        }
        Ok(())
    }
}
