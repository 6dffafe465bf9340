//! Changes the ports that the application listens on, in the image: `--tcp-listen-remap`.
//!
//! `files.img` is two magic numbers and then length-prefixed protobuf messages, one for each file:
//!
//! ```text
//! | 0x54564319 (u32 LE) | 0x56303138 (u32 LE) | length (u32 LE) | file_entry | length | …
//! file_entry   { …, isk = 4: inet_sk_entry { …, proto = 5, state = 6, src_port = 7, … }, … }
//! ```
//!
//! CRIU adds fields to these messages over time, and each must survive byte for byte. Decoding and
//! encoding again would lose fields that this program does not know. So the fields are walked, and
//! only `src_port` is written anew, with the lengths of the messages around it
//! (docs/protocol.md, section 4).

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use prost::encoding::{WireType, encode_key, encode_varint};

use crate::criu::messages::{Field, fields, last_varint, messages};

const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x38, 0x31, 0x30, 0x56];

/// The file that describes all open files.
pub(crate) const FILE: &str = "files.img";

const FILE_ENTRY_ISK: u32 = 4;
const ISK_PROTO: u32 = 5;
const ISK_STATE: u32 = 6;
const ISK_SRC_PORT: u32 = 7;

const IPPROTO_TCP: u64 = 6;

/// `TCP_LISTEN` in the kernel.
const LISTENING: u64 = 10;

/// One port to change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Remap {
    pub old: u16,
    pub new: u16,
}

impl FromStr for Remap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let port = |port: &str| {
            port.parse()
                .map_err(|_| format!("{port:?} is no TCP port: they go from 0 to 65535"))
        };
        let (old, new) = text
            .split_once(':')
            .ok_or_else(|| format!("{text:?} is not of the form old:new, such as 80:8080"))?;
        Ok(Self {
            old: port(old)?,
            new: port(new)?,
        })
    }
}

/// Changes the listening ports in the contents of `files.img`.
///
/// # Errors
/// When the file is not what it should be, a port belongs to no listening socket, or sockets that
/// listened on different ports would listen on the same one: CRIU lets sockets share a port, and
/// the kernel then gives each connection to one of them by chance.
pub fn remap(files_img: &[u8], remaps: &[Remap]) -> Result<Vec<u8>> {
    let mut result = MAGIC.to_vec();
    let mut listening = BTreeSet::new();
    for entry in messages(files_img, &MAGIC)? {
        let entry = map_entry(entry, remaps, &mut listening)
            .context("it holds something that is not protobuf")?;
        result.extend_from_slice(&u32::try_from(entry.len())?.to_le_bytes());
        result.extend_from_slice(&entry);
    }
    check_apart(&listening, remaps)?;
    if let Some(missing) = remaps.iter().find(|remap| !listening.contains(&remap.old)) {
        bail!(
            "no socket listens on TCP port {} in the image; ports listened on: {listening:?}",
            missing.old
        );
    }
    Ok(result)
}

/// Checks that no two ports become one. That the sockets may be of different addresses or network
/// namespaces is not looked at.
fn check_apart(listening: &BTreeSet<u16>, remaps: &[Remap]) -> Result<()> {
    let mut taken = BTreeMap::new();
    for &old in listening {
        let remap = remaps.iter().find(|remap| remap.old == old);
        let new = remap.map_or(old, |remap| remap.new);
        if let Some(other) = taken.insert(new, old) {
            bail!(
                "sockets that listen on TCP ports {other} and {old} in the image would both listen \
                 on port {new}, and each connection would go to one of them by chance: choose \
                 another new port, or change the other socket's port too"
            );
        }
    }
    Ok(())
}

/// Changes the ports of one entry, and notes on which ports it listens.
fn map_entry(entry: &[u8], remaps: &[Remap], listening: &mut BTreeSet<u16>) -> Result<Vec<u8>> {
    let mut result = Vec::with_capacity(entry.len() + 2);
    for field in fields(entry)? {
        let Some(isk) = field.bytes(FILE_ENTRY_ISK) else {
            result.extend_from_slice(field.raw);
            continue;
        };
        let isk = map_socket(&fields(isk)?, remaps, listening);
        encode_key(FILE_ENTRY_ISK, WireType::LengthDelimited, &mut result);
        encode_varint(isk.len() as u64, &mut result);
        result.extend_from_slice(&isk);
    }
    Ok(result)
}

/// Changes the port of a socket that listens on TCP.
fn map_socket(isk: &[Field], remaps: &[Remap], listening: &mut BTreeSet<u16>) -> Vec<u8> {
    let last = |number| last_varint(isk, number);
    let listens = (last(ISK_PROTO), last(ISK_STATE)) == (Some(IPPROTO_TCP), Some(LISTENING));
    let port = last(ISK_SRC_PORT).filter(|_| listens);
    let port = port.and_then(|port| u16::try_from(port).ok());
    listening.extend(port);
    let remap = remaps.iter().find(|remap| Some(remap.old) == port);
    let mut result = Vec::new();
    for field in isk {
        match remap.filter(|_| field.varint(ISK_SRC_PORT).is_some()) {
            Some(remap) => {
                encode_key(ISK_SRC_PORT, WireType::Varint, &mut result);
                encode_varint(u64::from(remap.new), &mut result);
            }
            None => result.extend_from_slice(field.raw),
        }
    }
    result
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
        bytes.extend_from_slice(&[0x9d, 0x06, 1, 2, 3, 4]); // field 99, fixed32: no CRIU has it
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
    fn a_port_without_a_listener_is_an_error_that_lists_the_others() {
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
