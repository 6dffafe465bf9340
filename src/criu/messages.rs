//! The messages of CRIU's image files, and their fields, byte for byte.
//!
//! CRIU adds fields to its messages over time. Decoding and encoding again would lose fields that
//! this program does not know, so the fields are walked where they stand.

use anyhow::{Context, Result, ensure};
use prost::encoding::{DecodeContext, WireType, decode_key, decode_varint, skip_field};

/// The messages of a file that begins with this magic, each behind its length, a little-endian
/// `u32`.
///
/// # Errors
/// When it does not begin so, or is cut off.
pub(crate) fn messages<'a>(file: &'a [u8], magic: &[u8]) -> Result<Vec<&'a [u8]>> {
    let mut rest = file
        .strip_prefix(magic)
        .context("it does not start like such a file")?;
    let mut messages = Vec::new();
    while !rest.is_empty() {
        let (length, behind) = rest.split_first_chunk().context("it is cut off")?;
        let length = u32::from_le_bytes(*length) as usize;
        let (message, behind) = behind.split_at_checked(length).context("it is cut off")?;
        messages.push(message);
        rest = behind;
    }
    Ok(messages)
}

/// The number in a field: the last one, as protobuf has it.
pub(crate) fn last_varint(fields: &[Field], number: u32) -> Option<u64> {
    fields.iter().rev().find_map(|field| field.varint(number))
}

/// One field of a protobuf message.
pub(crate) struct Field<'a> {
    number: u32,
    wire_type: WireType,
    pub(crate) value: &'a [u8],
    /// The field as it stands in the message, with its key.
    pub(crate) raw: &'a [u8],
}

impl<'a> Field<'a> {
    fn is(&self, number: u32, wire_type: WireType) -> bool {
        (self.number, self.wire_type) == (number, wire_type)
    }

    /// The value, if the field is this one and a number.
    pub(crate) fn varint(&self, number: u32) -> Option<u64> {
        let is_it = self.is(number, WireType::Varint);
        is_it.then(|| decode_varint(&mut &*self.value).ok())?
    }

    /// The value, if the field is this one and a message.
    pub(crate) fn bytes(&self, number: u32) -> Option<&'a [u8]> {
        let mut value = self.value;
        let is_it = self.is(number, WireType::LengthDelimited);
        (is_it && decode_varint(&mut value).is_ok()).then_some(value)
    }
}

/// The fields of a message, in the order in which they stand there.
///
/// # Errors
/// When it is not protobuf.
pub(crate) fn fields(mut message: &[u8]) -> Result<Vec<Field<'_>>> {
    let mut fields = Vec::new();
    while !message.is_empty() {
        let raw = message;
        let (number, wire_type) = decode_key(&mut message)?;
        ensure!(wire_type != WireType::StartGroup, "it has a group");
        let value = message;
        skip_field(wire_type, number, &mut message, DecodeContext::default())?;
        fields.push(Field {
            number,
            wire_type,
            value: &value[..value.len() - message.len()],
            raw: &raw[..raw.len() - message.len()],
        });
    }
    Ok(fields)
}
