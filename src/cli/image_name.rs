//! The name under which a store keeps an image: `$CRIU_IMAGE_NAME` for the commands.
//!
//! Containers have other names, directories and ids when they are restored, so only this name lets
//! a restore find the image. A capture through CRIU's hook leaves the name in the images directory,
//! which a container engine packs into its archive, and a restore reads it from there. The archive
//! may come from anyone, and the name stands in commands: it is nothing but letters, digits, `.`,
//! `_` and `-`.

use std::io::Write;
use std::os::fd::AsFd;
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result};

use super::options::{open, read_text};
use crate::report::outcome;

/// The file with the name in the images directory.
const FILE: &str = "streamer-capture.name";

/// The longest name, in bytes.
const MAX_NAME: usize = 128;

/// A name that has been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StoredAs(pub(crate) String);

impl FromStr for StoredAs {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let is_good = (1..=MAX_NAME).contains(&name.len())
            && !name.starts_with(['.', '-'])
            && name.bytes().all(is_plain);
        is_good.then(|| Self(name.to_owned())).ok_or_else(|| {
            format!(
                "a name of an image has up to {MAX_NAME} letters, digits, `.`, `_` and `-`, and begins with none of `.` and `-`"
            )
        })
    }
}

impl StoredAs {
    /// A name that no other image has.
    ///
    /// # Errors
    /// Without /proc.
    pub(crate) fn random() -> Result<Self> {
        let name = std::fs::read_to_string("/proc/sys/kernel/random/uuid")
            .context("making a name for the image")?;
        Ok(Self(name.trim().to_owned()))
    }

    /// Leaves the name in the images directory.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn leave(&self, directory: impl AsFd) -> Result<()> {
        let leave = || writeln!(outcome::create(directory, FILE)?, "{}", self.0);
        leave().context(FILE)
    }

    /// The name that a capture left in the images directory, if one did.
    ///
    /// # Errors
    /// When what is there is no file with a name.
    pub(crate) fn left(images_dir: &Path) -> Result<Option<Self>> {
        let Some(file) = open(&images_dir.join(FILE)).context(FILE)? else {
            return Ok(None);
        };
        let name = read_text(file, MAX_NAME as u64 + 1).context(FILE)?;
        let name = name.strip_suffix('\n').unwrap_or(&name);
        let name = name.parse().map_err(anyhow::Error::msg).context(FILE)?;
        Ok(Some(name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    use nix::sys::stat::Mode;

    #[test]
    fn a_restore_finds_the_name_that_a_capture_left() {
        let place = tempfile::TempDir::new().unwrap();
        let directory = File::open(place.path()).unwrap();
        assert_eq!(StoredAs::left(place.path()).unwrap(), None);
        for name in [StoredAs::random().unwrap(), StoredAs("app_1.2".into())] {
            assert_eq!(name.0.parse(), Ok(name.clone()));
            name.leave(&directory).unwrap();
            assert_eq!(StoredAs::left(place.path()).unwrap(), Some(name));
        }
    }

    /// The archive may come from anyone.
    #[test]
    fn a_hostile_name_is_refused() {
        let place = tempfile::TempDir::new().unwrap();
        let file = place.path().join(FILE);
        let huge = "a".repeat(10 << 20);
        let long = "a".repeat(MAX_NAME + 1);
        for name in [
            "",
            "\n",
            "..",
            ".a",
            "-a",
            "a/b",
            "/etc/shadow",
            "a\nb",
            "a\n\n",
            "a b",
            "a;id",
            "$(id)",
            "a\0",
            "\u{e9}",
            "*",
            &long,
            &huge,
        ] {
            std::fs::write(&file, name).unwrap();
            assert!(
                StoredAs::left(place.path()).is_err(),
                "{:?}",
                name.get(..10)
            );
        }
        std::fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/hostname", &file).unwrap();
        assert!(StoredAs::left(place.path()).is_err(), "a link");
        std::fs::remove_file(&file).unwrap();
        nix::unistd::mkfifo(&file, Mode::S_IRUSR | Mode::S_IWUSR).unwrap();
        assert!(StoredAs::left(place.path()).is_err(), "a FIFO");
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert!(StoredAs::left(place.path()).is_err(), "a directory");
    }
}
