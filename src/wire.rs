//! The image format, without any I/O: frames, markers and the names of image files.
//!
//! `proto/image.proto` draws the layout. Everything in here may come from a hostile or damaged stream, so decoding returns
//! one error variant for each defect; the caller adds which shard it was and at which offset.

use std::fmt;

use prost::Message;

use crate::image_proto;
pub use crate::image_proto::marker::Body;

/// A frame's length field, in bytes.
pub const LENGTH: usize = 4;

/// The largest frame that can be a marker, in bytes (PROTOCOL.md, section 2).
pub const LARGEST_FRAME: usize = 10 << 10;

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

/// One marker: its place in the image and what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    pub seq: u64,
    pub body: MarkerBody,
}

/// What a marker says, checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MarkerBody {
    /// The following markers are about this file.
    File(ImageName),
    /// So many bytes of the current file follow in the same shard.
    Data(u32),
    /// The current file is complete.
    FileEnd,
    /// The image is complete.
    ImageEnd,
}

/// Why bytes are not a marker.
#[derive(Debug)]
pub enum BadMarker {
    TooLarge(usize),
    NotProtobuf(prost::DecodeError),
    NoBody,
    NotTrue(&'static str),
    Name(String, BadName),
}

impl fmt::Display for BadMarker {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            BadMarker::TooLarge(size) => {
                write!(
                    f,
                    "a frame of {size} bytes is no marker (the largest has {LARGEST_FRAME}): is this a shard of an image, decompressed and decrypted?"
                )
            }
            BadMarker::NotProtobuf(error) => write!(f, "a frame that is no marker: {error}"),
            BadMarker::NoBody => f.write_str("a marker that says nothing"),
            BadMarker::NotTrue(field) => write!(f, "a marker whose {field} is not true"),
            BadMarker::Name(name, why) => write!(
                f,
                "an image file cannot be named {:?}: {why}",
                shortened(name)
            ),
        }
    }
}

impl std::error::Error for BadMarker {}

/// The start of a name, so that a hostile one does not fill the terminal.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// The length of the frame that `bytes` starts with, once its length field is there.
///
/// # Errors
/// When it is too large for a marker.
pub fn frame_length(bytes: &[u8]) -> Result<Option<usize>, BadMarker> {
    let Some(field) = bytes.first_chunk::<LENGTH>() else {
        return Ok(None);
    };
    let length = u32::from_le_bytes(*field) as usize;
    if length > LARGEST_FRAME {
        Err(BadMarker::TooLarge(length))
    } else {
        Ok(Some(length))
    }
}

/// Takes one marker off the front of `bytes`, with the number of bytes that it and its length field take; `None` while
/// more bytes are needed.
///
/// # Errors
/// When the bytes are not a marker.
pub fn decode(bytes: &[u8]) -> Result<Option<(Marker, usize)>, BadMarker> {
    let Some(length) = frame_length(bytes)? else {
        return Ok(None);
    };
    let Some(frame) = bytes.get(LENGTH..LENGTH + length) else {
        return Ok(None);
    };
    let marker = image_proto::Marker::decode(frame).map_err(BadMarker::NotProtobuf)?;
    let body = match marker.body {
        None => return Err(BadMarker::NoBody),
        Some(Body::Filename(name)) => match ImageName::new(&name) {
            Ok(name) => MarkerBody::File(name),
            Err(why) => return Err(BadMarker::Name(name, why)),
        },
        Some(Body::FileData(size)) => MarkerBody::Data(size),
        Some(Body::FileEof(true)) => MarkerBody::FileEnd,
        Some(Body::ImageEof(true)) => MarkerBody::ImageEnd,
        Some(Body::FileEof(false)) => return Err(BadMarker::NotTrue("file_eof")),
        Some(Body::ImageEof(false)) => return Err(BadMarker::NotTrue("image_eof")),
    };
    Ok(Some((
        Marker {
            seq: marker.seq,
            body,
        },
        LENGTH + length,
    )))
}

/// Appends one framed marker to `buffer`.
pub fn encode(seq: u64, body: Body, buffer: &mut Vec<u8>) {
    let marker = image_proto::Marker {
        seq,
        body: Some(body),
    };
    // A marker holds at most one name of 255 bytes: its length fits in a u32.
    let length = marker.encoded_len() as u32;
    buffer.extend_from_slice(&length.to_le_bytes());
    marker
        .encode(buffer)
        .expect("a Vec takes whatever is written to it");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed(seq: u64, body: Body) -> Vec<u8> {
        let mut bytes = Vec::new();
        encode(seq, body, &mut bytes);
        bytes
    }

    #[test]
    fn a_marker_comes_back_as_it_was_written() {
        let bytes = framed(7, Body::FileData(70_000));
        let (marker, size) = decode(&bytes).unwrap().unwrap();
        assert_eq!(
            marker,
            Marker {
                seq: 7,
                body: MarkerBody::Data(70_000)
            }
        );
        assert_eq!(size, bytes.len());
    }

    #[test]
    fn a_part_of_a_marker_is_not_decoded_yet() {
        let bytes = framed(300, Body::Filename("pages-1.img".into()));
        for cut in 0..bytes.len() {
            assert!(decode(&bytes[..cut]).unwrap().is_none(), "cut at {cut}");
        }
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let mut bytes = framed(1, Body::FileEof(true));
        bytes.extend_from_slice(&[0x9a, 0x06, 2, b'h', b'i']); // field 99, two bytes
        let length = (bytes.len() - LENGTH) as u32;
        bytes[..LENGTH].copy_from_slice(&length.to_le_bytes());
        assert_eq!(decode(&bytes).unwrap().unwrap().0.body, MarkerBody::FileEnd);
    }

    #[test]
    fn every_defect_has_its_own_error() {
        let too_large = (LARGEST_FRAME as u32 + 1).to_le_bytes();
        assert!(matches!(decode(&too_large), Err(BadMarker::TooLarge(_))));
        assert!(matches!(
            decode(&[2, 0, 0, 0, 0xff, 0xff]),
            Err(BadMarker::NotProtobuf(_))
        ));
        assert!(matches!(decode(&[0, 0, 0, 0]), Err(BadMarker::NoBody)));
        assert!(matches!(
            decode(&framed(0, Body::FileEof(false))),
            Err(BadMarker::NotTrue(_))
        ));
        assert!(matches!(
            decode(&framed(0, Body::ImageEof(false))),
            Err(BadMarker::NotTrue(_))
        ));
        for (name, why) in [
            ("", BadName::Empty),
            ("..", BadName::Dots),
            ("../x", BadName::Slash),
            ("a\0b", BadName::Nul),
        ] {
            let bytes = framed(0, Body::Filename(name.into()));
            assert!(
                matches!(decode(&bytes), Err(BadMarker::Name(_, found)) if found == why),
                "{name:?}"
            );
        }
        assert_eq!(ImageName::new(&"x".repeat(256)), Err(BadName::TooLong));
        assert!(ImageName::new(&"x".repeat(255)).is_ok());
    }
}
