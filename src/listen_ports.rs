//! Changes the ports that the application listens on, in the image: `--tcp-listen-remap`.
//!
//! `files.img` is two magic numbers and then length-prefixed protobuf messages, one for each open file:
//!
//! ```text
//! | 0x54564319 (u32 LE) | 0x56303138 (u32 LE) | length (u32 LE) | file_entry | length | file_entry | …
//! file_entry   { …, isk = 4: inet_sk_entry { …, proto = 5, state = 6, src_port = 7, … }, … }
//! ```
//!
//! CRIU adds fields to these messages over time, and each of them has to survive byte for byte. So the messages are not decoded
//! and encoded again, which would lose what this program has never heard of: the fields are walked, and only the bytes of
//! `src_port` are replaced, with the lengths around them.

use std::collections::BTreeSet;

use anyhow::{Context, Result, bail, ensure};

const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56];

/// The file that describes all open files.
pub const FILE: &str = "files.img";

const FILE_ENTRY_ISK: u64 = 4;
const ISK_PROTO: u64 = 5;
const ISK_STATE: u64 = 6;
const ISK_SRC_PORT: u64 = 7;

const IPPROTO_TCP: u64 = 6;

/// `TCP_LISTEN` in the kernel.
const LISTENING: u64 = 10;

/// One port to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remap {
    pub old: u16,
    pub new: u16,
}

/// Changes the listening ports in the contents of `files.img`.
///
/// # Errors
/// When the file is not what it should be, or a port belongs to no listening socket.
pub fn remap(files_img: &[u8], remaps: &[Remap]) -> Result<Vec<u8>> {
    ensure!(
        files_img.starts_with(&MAGIC),
        "it does not start like a {FILE}"
    );
    let mut result = MAGIC.to_vec();
    let mut ports = BTreeSet::new();
    let mut changed = BTreeSet::new();
    let mut left = &files_img[MAGIC.len()..];
    while !left.is_empty() {
        let (length, rest) = left.split_first_chunk().context("it is cut off")?;
        let length = u32::from_le_bytes(*length) as usize;
        let (entry, rest) = rest.split_at_checked(length).context("it is cut off")?;
        let mut patch = |port: u16| {
            ports.insert(port);
            let remap = remaps.iter().find(|remap| remap.old == port)?;
            changed.insert(port);
            Some(remap.new)
        };
        let entry = map_field(entry, FILE_ENTRY_ISK, |isk| map_socket(isk, &mut patch))?;
        result.extend_from_slice(&u32::try_from(entry.len())?.to_le_bytes());
        result.extend_from_slice(&entry);
        left = rest;
    }
    if let Some(missing) = remaps.iter().find(|remap| !changed.contains(&remap.old)) {
        let ports = ports
            .iter()
            .map(u16::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        let ports = if ports.is_empty() {
            "none".to_owned()
        } else {
            ports
        };
        bail!(
            "no socket listens on TCP port {} in the image; ports listened on: {ports}",
            missing.old
        );
    }
    Ok(result)
}

/// Changes the port of one socket, if it is one that listens.
fn map_socket(isk: &[u8], patch: &mut impl FnMut(u16) -> Option<u16>) -> Result<Vec<u8>> {
    let (mut proto, mut state, mut port) = (0, 0, None);
    for field in Fields(isk) {
        match field? {
            Field {
                number: ISK_PROTO,
                value: Value::Varint(value),
                ..
            } => proto = value,
            Field {
                number: ISK_STATE,
                value: Value::Varint(value),
                ..
            } => state = value,
            Field {
                number: ISK_SRC_PORT,
                value: Value::Varint(value),
                ..
            } => port = u16::try_from(value).ok(),
            _ => {}
        }
    }
    let Some(new) = port
        .filter(|_| (proto, state) == (IPPROTO_TCP, LISTENING))
        .and_then(patch)
    else {
        return Ok(isk.to_vec());
    };
    let mut result = Vec::with_capacity(isk.len() + 2);
    for field in Fields(isk) {
        let field = field?;
        if field.number == ISK_SRC_PORT && matches!(field.value, Value::Varint(_)) {
            prost::encoding::encode_varint(ISK_SRC_PORT << 3, &mut result);
            prost::encoding::encode_varint(u64::from(new), &mut result);
        } else {
            result.extend_from_slice(field.raw);
        }
    }
    Ok(result)
}

/// Copies a message, with each length-delimited field of this number replaced by what `map` makes of it.
fn map_field(
    message: &[u8],
    number: u64,
    mut map: impl FnMut(&[u8]) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let mut result = Vec::with_capacity(message.len() + 2);
    for field in Fields(message) {
        match field? {
            Field {
                number: found,
                value: Value::Bytes(bytes),
                raw,
            } if found == number => {
                let mapped = map(bytes)?;
                if mapped == bytes {
                    result.extend_from_slice(raw);
                    continue;
                }
                const LENGTH_DELIMITED: u64 = 2;
                prost::encoding::encode_varint(number << 3 | LENGTH_DELIMITED, &mut result);
                prost::encoding::encode_varint(mapped.len() as u64, &mut result);
                result.extend_from_slice(&mapped);
            }
            field => result.extend_from_slice(field.raw),
        }
    }
    Ok(result)
}

/// One field of a protobuf message.
struct Field<'a> {
    number: u64,
    value: Value<'a>,
    /// The field as it stands in the message, tag and all.
    raw: &'a [u8],
}

enum Value<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
    Fixed,
}

/// The fields of a message, in the order in which they stand there.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn split(&self) -> Result<(Field<'a>, &'a [u8])> {
        let message = self.0;
        let mut rest = message;
        let tag = prost::encoding::decode_varint(&mut rest)?;
        let value = match tag & 7 {
            0 => Value::Varint(prost::encoding::decode_varint(&mut rest)?),
            1 => {
                rest = rest.get(8..).context("a field is cut off")?;
                Value::Fixed
            }
            2 => {
                let length = usize::try_from(prost::encoding::decode_varint(&mut rest)?)?;
                let (bytes, after) = rest
                    .split_at_checked(length)
                    .context("a field is cut off")?;
                rest = after;
                Value::Bytes(bytes)
            }
            5 => {
                rest = rest.get(4..).context("a field is cut off")?;
                Value::Fixed
            }
            other => bail!("a field has the unknown wire type {other}"),
        };
        let raw = &message[..message.len() - rest.len()];
        Ok((
            Field {
                number: tag >> 3,
                value,
                raw,
            },
            rest,
        ))
    }
}

impl<'a> Iterator for Fields<'a> {
    type Item = Result<Field<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        match self.split() {
            Ok((field, rest)) => {
                self.0 = rest;
                Some(Ok(field))
            }
            Err(error) => {
                self.0 = &[];
                Some(Err(error.context("it holds something that is not protobuf")))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(fields: &[(u64, u64)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(number, value) in fields {
            prost::encoding::encode_varint(number << 3, &mut bytes);
            prost::encoding::encode_varint(value, &mut bytes);
        }
        bytes
    }

    fn entry(isk: &[u8]) -> Vec<u8> {
        let mut bytes = message(&[(1, 9), (2, 3)]);
        bytes.extend_from_slice(&[4 << 3 | 2, isk.len() as u8]);
        bytes.extend_from_slice(isk);
        bytes.extend_from_slice(&[0x9d, 0x06, 1, 2, 3, 4]); // field 99, fixed32: unknown to everybody
        bytes
    }

    fn file(entries: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        for entry in entries {
            bytes.extend_from_slice(&(entry.len() as u32).to_le_bytes());
            bytes.extend_from_slice(entry);
        }
        bytes
    }

    const HTTP: Remap = Remap { old: 80, new: 8080 };

    #[test]
    fn only_the_port_of_a_listening_tcp_socket_changes() {
        let listening = |port| entry(&message(&[(5, 6), (6, 10), (7, port), (8, 0), (77, 5)]));
        let connected = entry(&message(&[(5, 6), (6, 1), (7, 80)]));
        let udp = entry(&message(&[(5, 17), (6, 10), (7, 80)]));
        let before = file(&[
            listening(80),
            connected.clone(),
            udp.clone(),
            listening(443),
        ]);
        let after = file(&[listening(8080), connected, udp, listening(443)]);
        assert_eq!(remap(&before, &[HTTP]).unwrap(), after);
    }

    #[test]
    fn a_port_that_nobody_listens_on_is_an_error_that_lists_the_others() {
        let before = file(&[entry(&message(&[(5, 6), (6, 10), (7, 443)]))]);
        let error = remap(&before, &[HTTP]).unwrap_err().to_string();
        assert!(error.contains("80") && error.contains("443"), "{error}");
    }

    #[test]
    fn a_damaged_file_is_an_error() {
        let whole = file(&[entry(&message(&[(5, 6), (6, 10), (7, 80)]))]);
        for cut in (0..whole.len()).filter(|&cut| cut != MAGIC.len()) {
            assert!(remap(&whole[..cut], &[HTTP]).is_err(), "cut at {cut}");
        }
        let mut wild = whole.clone();
        let last = wild.len() - 7;
        wild[last] = 0xff;
        let _ = remap(&wild, &[HTTP]);
    }
}
