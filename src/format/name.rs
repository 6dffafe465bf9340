//! The names of image files.
//!
//! A name from a stream is hostile until it has been parsed: only a single path component becomes
//! an [`ImageName`], so that joining one to a directory never leads out of it.

use std::fmt;

/// The longest name that Linux file systems take (`NAME_MAX`), in bytes.
pub const LONGEST_NAME: usize = 255;

/// The name of a file in an image: one path component that is safe to join to a directory.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ImageName(Box<str>);

/// Why a name cannot be that of an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadName {
    Empty,
    Dots,
    Slash,
    Nul,
    TooLong,
}

impl fmt::Display for BadName {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(match self {
            BadName::Empty => "it is empty",
            BadName::Dots => "`.` and `..` are directories",
            BadName::Slash => "it contains `/`",
            BadName::Nul => "it contains a NUL byte",
            BadName::TooLong => "it is longer than 255 bytes",
        })
    }
}

impl std::error::Error for BadName {}

impl ImageName {
    /// Checks a name that came from outside.
    ///
    /// # Errors
    /// When it is not a single path component that names a file.
    pub fn new(name: &str) -> Result<Self, BadName> {
        match name {
            "" => Err(BadName::Empty),
            "." | ".." => Err(BadName::Dots),
            _ if name.contains('/') => Err(BadName::Slash),
            _ if name.contains('\0') => Err(BadName::Nul),
            _ if name.len() > LONGEST_NAME => Err(BadName::TooLong),
            _ => Ok(Self(name.into())),
        }
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
        for (name, why) in [
            ("", BadName::Empty),
            ("..", BadName::Dots),
            ("../x", BadName::Slash),
            ("/x", BadName::Slash),
            ("a\0b", BadName::Nul),
        ] {
            assert_eq!(ImageName::new(name), Err(why), "{name:?}");
        }
        assert_eq!(ImageName::new(&"x".repeat(256)), Err(BadName::TooLong));
        assert!(ImageName::new(&"x".repeat(255)).is_ok());
    }
}
