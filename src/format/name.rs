//! The names of image files.
//!
//! A name from a stream is hostile until it has been parsed: only a single path component becomes
//! an [`ImageName`], so that joining one to a directory never leads out of it. Names of files that
//! are trusted beside an image are no part of one.

use std::fmt;

use anyhow::{Result, bail};

/// The longest name that Linux file systems take (`NAME_MAX`), in bytes.
pub const LONGEST_NAME: usize = 255;

/// Names that no file of an image has, and why. One that ends with `.` stands for all that begin
/// with it.
const RESERVED: &[(&str, &str)] = &[
    ("streamer-capture.", STREAMERS),
    ("streamer-serve.", STREAMERS),
    (".criu-image-streamer.", STREAMERS),
    ("not-put-back.", STREAMERS),
    ("parent", "it is CRIU's link to an earlier image"),
    ("stats-dump", CRIUS),
    ("stats-restore", CRIUS),
    ("irmap-cache", CRIUS),
    ("criu.log", LOG),
    ("dump.log", LOG),
    ("lazy-pages.log", LOG),
    ("page-server.log", LOG),
    ("pre-dump.log", LOG),
    ("restore.log", LOG),
];

const STREAMERS: &str = "the streamer has its sockets, options and logs under such names";
const CRIUS: &str = "CRIU keeps it beside its images, and never streams it";
const LOG: &str = "it is one of CRIU's logs";

/// The name of a file in an image: one path component that is safe to join to a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(Box<str>);

impl ImageName {
    /// Checks a name that came from outside.
    ///
    /// # Errors
    /// When it is not a single path component that names a file of an image.
    pub fn new(name: &str) -> Result<Self> {
        let is_reserved = |&&(reserved, _): &&(&str, _)| {
            name == reserved || reserved.ends_with('.') && name.starts_with(reserved)
        };
        let why = match name {
            "" => "it is empty",
            "." | ".." => "`.` and `..` are directories",
            _ if name.contains('/') => "it contains `/`",
            _ if name.contains('\0') => "it contains a NUL byte",
            _ if name.len() > LONGEST_NAME => "it is longer than 255 bytes",
            _ => match RESERVED.iter().find(is_reserved) {
                Some((_, why)) => why,
                None => return Ok(Self(name.into())),
            },
        };
        bail!(why)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.0.into()
    }
}

/// Shown with control characters escaped: names end up on terminals.
impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        self.0.escape_debug().fmt(f)
    }
}

impl fmt::Debug for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_single_path_component_is_a_name() {
        let error = |name: &str| ImageName::new(name).err().map(|why| why.to_string());
        for (name, why) in [
            ("", "it is empty"),
            ("..", "`.` and `..` are directories"),
            ("../x", "it contains `/`"),
            ("/x", "it contains `/`"),
            ("a\0b", "it contains a NUL byte"),
            (&"x".repeat(256), "it is longer than 255 bytes"),
        ] {
            assert_eq!(error(name).as_deref(), Some(why), "{name:?}");
        }
        for (reserved, why) in RESERVED {
            for name in [reserved.to_string(), format!("{reserved}x")] {
                let is_refused = error(&name).as_deref() == Some(why);
                assert_eq!(is_refused, name == *reserved || reserved.ends_with('.'));
            }
        }
        assert_eq!(error(&"x".repeat(255)), None);
    }
}
