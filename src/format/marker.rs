//! Markers: the frames that say what the bytes on a shard are.
//!
//! `proto/image.proto` draws the layout of a shard; docs/protocol.md, section 2, is its
//! specification.

use anyhow::{Context, Result, bail, ensure};
use prost::Message;

use super::{CapturingProcess, ImageName};

/// The protobuf messages of `proto/image.proto`.
pub mod proto {
    include!(concat!(env!("OUT_DIR"), "/image.rs"));
}

/// A frame's length field, in bytes.
pub const LENGTH: usize = 4;

/// The largest frame that can be a marker, in bytes (docs/protocol.md, section 2).
pub const LARGEST_FRAME: usize = 10 << 10;

/// Behind a padded marker, data begins at a multiple of this number of bytes of its shard.
pub const ALIGNMENT: usize = 4 << 10;

/// The tag of the field that pads a marker: number 102, bytes.
const PADDING_TAG: [u8; 2] = [0xb2, 0x06];

/// One marker: its place in the image, and its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Marker {
    pub seq: u64,
    pub body: Body,
    /// This is the first marker of an image, and its shard the index.
    pub is_index: bool,
    /// On the first marker of a shard: the process that captured the image.
    pub origin: Option<CapturingProcess>,
}

/// The content of a marker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The following markers are about this file.
    File(ImageName),
    /// This number of bytes of the current file follows in the same shard.
    Data(u32),
    /// The current file is complete.
    FileEnd,
    /// The image is complete.
    ImageEnd,
}

/// The start of a name, so that a hostile one does not fill the terminal.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

impl Marker {
    pub fn new(seq: u64, body: Body) -> Self {
        Self {
            seq,
            body,
            is_index: false,
            origin: None,
        }
    }

    /// Takes one marker off the front of `bytes`, with the number of bytes that it and its length
    /// field take; `None` while more bytes are needed.
    ///
    /// # Errors
    /// When the bytes are not a marker.
    pub fn decode(bytes: &[u8]) -> Result<Option<(Self, usize)>> {
        let Some(field) = bytes.first_chunk::<LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_le_bytes(*field) as usize;
        ensure!(
            length <= LARGEST_FRAME,
            "a frame of {length} bytes is no marker (the largest has {LARGEST_FRAME}): \
             is this a shard of an image, decompressed and decrypted?"
        );
        let Some(frame) = bytes.get(LENGTH..LENGTH + length) else {
            return Ok(None);
        };
        let marker = proto::Marker::decode(frame).context("a frame that is no marker")?;
        let body = match marker.body.context("a marker that says nothing")? {
            proto::marker::Body::Filename(name) => {
                let why = || format!("an image file cannot be named {:?}", shortened(&name));
                Body::File(ImageName::new(&name).with_context(why)?)
            }
            proto::marker::Body::FileData(size) => Body::Data(size),
            proto::marker::Body::FileEof(true) => Body::FileEnd,
            proto::marker::Body::ImageEof(true) => Body::ImageEnd,
            proto::marker::Body::FileEof(false) => bail!("a marker whose file_eof is not true"),
            proto::marker::Body::ImageEof(false) => bail!("a marker whose image_eof is not true"),
        };
        let marker = Self {
            seq: marker.seq,
            body,
            is_index: marker.index,
            origin: marker.origin,
        };
        Ok(Some((marker, LENGTH + length)))
    }

    /// Appends the marker, framed, to `buffer`.
    pub fn encode(self, buffer: &mut Vec<u8>) {
        let body = match self.body {
            Body::File(name) => proto::marker::Body::Filename(name.into()),
            Body::Data(size) => proto::marker::Body::FileData(size),
            Body::FileEnd => proto::marker::Body::FileEof(true),
            Body::ImageEnd => proto::marker::Body::ImageEof(true),
        };
        let marker = proto::Marker {
            seq: self.seq,
            body: Some(body),
            index: self.is_index,
            origin: self.origin,
        };
        // A marker holds at most one name of 255 bytes: its length fits in a u32.
        let length = marker.encoded_len() as u32;
        buffer.extend_from_slice(&length.to_le_bytes());
        marker
            .encode(buffer)
            .expect("a Vec takes all that is written to it");
    }
}

/// Pads the marker that ends `buffer`, and begins at `start` in it, so that it ends at a multiple
/// of [`ALIGNMENT`] of its shard, of which `before` bytes have been written before the buffer.
pub fn pad(buffer: &mut Vec<u8>, start: usize, before: u64) {
    const LENGTH_OF_PADDING: usize = 2;
    let head = PADDING_TAG.len() + LENGTH_OF_PADDING;
    let end = (before % ALIGNMENT as u64) as usize + buffer.len();
    if end.is_multiple_of(ALIGNMENT) {
        return;
    }
    let padding = (end + head).next_multiple_of(ALIGNMENT) - end - head;
    buffer.extend(PADDING_TAG);
    // In two bytes, however short it is.
    buffer.extend([padding as u8 | 0x80, (padding >> 7) as u8]);
    buffer.resize(buffer.len() + padding, 0);
    let length = (buffer.len() - start - LENGTH) as u32;
    buffer[start..start + LENGTH].copy_from_slice(&length.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_padded_marker_ends_where_it_should_and_says_the_same() {
        for before in 0..3 * ALIGNMENT as u64 {
            let mut buffer = vec![7; 100];
            let marker = Marker::new(before << 20, Body::Data(1 << 20));
            marker.clone().encode(&mut buffer);
            pad(&mut buffer, 100, before);
            let end = before + buffer.len() as u64;
            assert!(end.is_multiple_of(ALIGNMENT as u64), "{before}");
            let frame = &buffer[100..];
            assert!(frame.len() < ALIGNMENT + 32);
            let decoded = Marker::decode(frame).unwrap();
            assert_eq!(decoded, Some((marker, frame.len())));
        }
    }

    fn framed(seq: u64, body: Body) -> Vec<u8> {
        let mut bytes = Vec::new();
        Marker::new(seq, body).encode(&mut bytes);
        bytes
    }

    fn framed_proto(body: proto::marker::Body) -> Vec<u8> {
        let marker = proto::Marker {
            body: Some(body),
            ..Default::default()
        };
        let frame = marker.encode_to_vec();
        [&(frame.len() as u32).to_le_bytes(), frame.as_slice()].concat()
    }

    #[test]
    fn a_marker_comes_back_as_it_was_written() {
        let name = ImageName::new("pages-1.img").unwrap();
        for body in [
            Body::File(name),
            Body::Data(70_000),
            Body::FileEnd,
            Body::ImageEnd,
        ] {
            let bytes = framed(7, body.clone());
            let (marker, size) = Marker::decode(&bytes).unwrap().unwrap();
            assert_eq!(marker, Marker::new(7, body));
            assert_eq!(size, bytes.len());
        }
    }

    #[test]
    fn an_index_and_an_origin_come_back_as_they_were_written() {
        let marker = Marker {
            is_index: true,
            origin: CapturingProcess::own(),
            ..Marker::new(0, Body::FileEnd)
        };
        let mut bytes = Vec::new();
        marker.clone().encode(&mut bytes);
        assert!(marker.origin.is_some());
        assert_eq!(Marker::decode(&bytes).unwrap(), Some((marker, bytes.len())));
    }

    #[test]
    fn a_part_of_a_marker_is_not_decoded_yet() {
        let bytes = framed(300, Body::File(ImageName::new("pages-1.img").unwrap()));
        for cut in 0..bytes.len() {
            assert!(
                Marker::decode(&bytes[..cut]).unwrap().is_none(),
                "cut at {cut}"
            );
        }
    }

    #[test]
    fn unknown_fields_are_ignored() {
        let mut bytes = framed(1, Body::FileEnd);
        bytes.extend_from_slice(&[0x9a, 0x06, 2, b'h', b'i']); // field 99, two bytes
        let length = (bytes.len() - LENGTH) as u32;
        bytes[..LENGTH].copy_from_slice(&length.to_le_bytes());
        let (marker, _) = Marker::decode(&bytes).unwrap().unwrap();
        assert_eq!(marker.body, Body::FileEnd);
    }

    #[test]
    fn every_defect_has_its_own_error() {
        for (bytes, text) in [
            (
                (LARGEST_FRAME as u32 + 1).to_le_bytes().to_vec(),
                "a frame of 10241 bytes is no marker",
            ),
            (vec![2, 0, 0, 0, 0xff, 0xff], "a frame that is no marker"),
            (vec![0, 0, 0, 0], "a marker that says nothing"),
            (
                framed_proto(proto::marker::Body::FileEof(false)),
                "a marker whose file_eof is not true",
            ),
            (
                framed_proto(proto::marker::Body::ImageEof(false)),
                "a marker whose image_eof is not true",
            ),
            (
                framed_proto(proto::marker::Body::Filename("../x".into())),
                "an image file cannot be named \"../x\": it contains `/`",
            ),
        ] {
            let error = format!("{:#}", Marker::decode(&bytes).unwrap_err());
            assert!(error.starts_with(text), "{error}");
        }
    }
}
