//! Files on disk, none of which is in place before all of them are.
//!
//! A directory that looks like an image is taken for one, so the files are first written to a private directory beside their
//! destination, under numbers: no name from the stream is used in there. When the image is complete they are flushed to disk and
//! moved into place, `inventory.img` last, without which CRIU restores nothing. What they replace is set aside and
//! comes back if a move fails. If anything goes wrong before, the private directory goes, and nothing has changed.
//!
//! Moving does not follow a symbolic link that somebody planted at the destination but replaces it; all paths are
//! relative to the open directory. A directory in the way is an error.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, open, openat, renameat};
use nix::sys::stat::{Mode, SFlag, fstatat};
use nix::unistd::{fsync, syncfs};

use super::{Arena, Extent, Store};
use crate::notice;
use crate::pipe::{self, Moved, ReadEnd};
use crate::wire::ImageName;

/// CRIU reads this file first, and restores nothing without it.
const INVENTORY: &str = "inventory.img";

/// A directory that receives an image.
pub struct FsStore {
    images: OwnedFd,
    private: OwnedFd,
    private_path: PathBuf,
    next_number: u64,
    complete: BTreeMap<ImageName, u64>,
}

/// A file being written.
pub struct Numbered {
    file: File,
    number: u64,
}

impl FsStore {
    /// Prepares to receive an image into `images_dir`.
    ///
    /// # Errors
    /// When nothing can be written there.
    pub fn new(images_dir: &Path) -> Result<Self> {
        let private_path = images_dir.join(format!(".criu-image-streamer.{}", std::process::id()));
        create_private(&private_path)?;
        let opened = open_directory(images_dir)
            .and_then(|images| Ok((images, open_directory(&private_path)?)));
        let (images, private) = opened.inspect_err(|_| remove(&private_path))?;
        Ok(Self {
            images,
            private,
            private_path,
            next_number: 0,
            complete: BTreeMap::new(),
        })
    }

    /// Moves the files into place, when the image is complete.
    ///
    /// # Errors
    /// When they cannot be flushed or moved; what was there before is then there again.
    pub fn commit(self) -> Result<()> {
        syncfs(&self.images).context("flushing the image to disk")?;
        let mut moves = Moves {
            store: &self,
            done: Vec::new(),
        };
        match moves.run() {
            Ok(()) => Ok(()),
            Err(error) => {
                moves.undo();
                Err(error)
            }
        }
    }
}

impl Drop for FsStore {
    fn drop(&mut self) {
        remove(&self.private_path);
    }
}

fn remove(private: &Path) {
    if let Err(error) = std::fs::remove_dir_all(private) {
        notice::tell(format_args!(
            "removing {}: {error}; remove it yourself",
            private.display()
        ));
    }
}

fn create_private(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("creating the directory {}", path.display()))
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    open(
        path,
        OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC,
        Mode::empty(),
    )
    .with_context(|| format!("opening the directory {}", path.display()))
}

/// One file that was moved into place.
struct Move<'a> {
    name: &'a ImageName,
    number: u64,
    /// Something of that name was there, and is now set aside.
    replaced: bool,
    /// The new file is in place.
    placed: bool,
}

/// The moves of a commit, so far.
struct Moves<'a> {
    store: &'a FsStore,
    done: Vec<Move<'a>>,
}

impl<'a> Moves<'a> {
    fn run(&mut self) -> Result<()> {
        let store = self.store;
        let is_inventory = |name: &ImageName| name.as_str() == INVENTORY;
        let inventory = store.complete.iter().find(|(name, _)| is_inventory(name));
        if let Some((name, &number)) = inventory {
            self.set_aside(name, number)?;
        }
        for (name, &number) in store
            .complete
            .iter()
            .filter(|(name, _)| !is_inventory(name))
        {
            let index = self.set_aside(name, number)?;
            self.place(index)?;
        }
        if inventory.is_some() {
            fsync(&store.images).context("flushing the images directory to disk")?;
            self.place(0)?;
        }
        fsync(&store.images).context("flushing the images directory to disk")
    }

    /// Takes what has this name out of the way, if there is something.
    fn set_aside(&mut self, name: &'a ImageName, number: u64) -> Result<usize> {
        let images = &self.store.images;
        let replaced = match fstatat(images, name.as_str(), AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => false,
            Err(error) => {
                return Err(error).with_context(|| format!("looking for an earlier {name}"));
            }
            Ok(stat) => {
                let directory = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits())
                    == SFlag::S_IFDIR;
                ensure!(
                    !directory,
                    "--images-dir: a directory named {name} is in the way of the file: move it"
                );
                renameat(
                    images,
                    name.as_str(),
                    &self.store.private,
                    aside(number).as_str(),
                )
                .with_context(|| format!("setting the earlier {name} aside"))?;
                true
            }
        };
        self.done.push(Move {
            name,
            number,
            replaced,
            placed: false,
        });
        Ok(self.done.len() - 1)
    }

    fn place(&mut self, index: usize) -> Result<()> {
        let step = &mut self.done[index];
        let from = step.number.to_string();
        renameat(
            &self.store.private,
            from.as_str(),
            &self.store.images,
            step.name.as_str(),
        )
        .with_context(|| format!("moving {} into place", step.name))?;
        step.placed = true;
        Ok(())
    }

    /// Puts everything back, as far as that is possible; `inventory.img`, the first to go, is the last to come back.
    fn undo(&mut self) {
        let FsStore {
            images, private, ..
        } = self.store;
        for step in self.done.iter().rev() {
            let (name, number) = (step.name.as_str(), step.number.to_string());
            let mut result = Ok(());
            if step.placed {
                result = renameat(images, name, private, number.as_str());
            }
            if step.replaced {
                result = result.and(renameat(private, aside(step.number).as_str(), images, name));
            }
            if let Err(error) = result {
                notice::tell(format_args!(
                    "putting {} back as it was: {error}",
                    step.name
                ));
            }
        }
    }
}

/// What a replaced file is called while it is set aside for the file of this number.
fn aside(number: u64) -> String {
    format!("{number}.replaced")
}

impl Store for FsStore {
    type File = Numbered;

    const BUFFERS: bool = false;

    fn create(&mut self, name: &ImageName) -> Result<Numbered> {
        let number = self.next_number;
        self.next_number += 1;
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let fd = openat(
            &self.private,
            number.to_string().as_str(),
            flags,
            Mode::S_IRUSR | Mode::S_IWUSR,
        )
        .with_context(|| format!("creating {name} in {}", self.private_path.display()))?;
        Ok(Numbered {
            file: File::from(fd),
            number,
        })
    }

    fn takes_pipe(&self, _file: &Numbered) -> bool {
        true
    }

    fn splice(&mut self, file: &mut Numbered, from: &ReadEnd, len: usize) -> io::Result<Moved> {
        pipe::splice(from, file.file.as_fd(), len)
    }

    fn append(&mut self, file: &mut Numbered, data: Extent, arena: &mut Arena) -> io::Result<()> {
        file.file.write_all(arena.bytes(&data))?;
        arena.release(data);
        Ok(())
    }

    fn finish(&mut self, name: ImageName, file: Numbered, _arena: &mut Arena) -> Result<()> {
        if let Some(earlier) = self.complete.insert(name, file.number) {
            nix::unistd::unlinkat(
                &self.private,
                earlier.to_string().as_str(),
                nix::unistd::UnlinkatFlags::NoRemoveDir,
            )
            .context("removing the first of two files of one name")?;
        }
        Ok(())
    }
}
