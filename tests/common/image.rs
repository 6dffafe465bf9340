//! The image format (docs/protocol.md, section 2), written down a second time, as simply as
//! possible.
//!
//! A file that is named again after its end is a new version and replaces the first. One that is
//! named again before its end goes on. Everything else that is not exactly the format is an error
//! that says where.

use std::collections::BTreeMap;
use std::fmt;

/// A frame over this is not a marker.
pub const MAX_MARKER: usize = 10 * 1024;

pub type Files = BTreeMap<String, Vec<u8>>;

/// Files of these names and contents.
pub fn files<C: Into<Vec<u8>>, const N: usize>(files: [(&str, C); N]) -> Files {
    let named = files.map(|(name, content)| (name.to_owned(), content.into()));
    named.into()
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    Filename(String),
    /// The number of bytes that follow.
    FileData(u32),
    FileEof,
    ImageEof,
}

/// A marker and the bytes behind it, as they stand in a shard.
#[derive(Clone)]
pub struct Entry {
    pub shard: usize,
    pub offset: usize,
    pub seq: u64,
    pub body: Body,
    pub data: Vec<u8>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} (seq {}, shard {}, offset {})",
            self.body, self.seq, self.shard, self.offset
        )
    }
}

/// The files of a whole image.
pub fn decode(shards: &[Vec<u8>]) -> Result<Files, String> {
    replay(&markers(shards)?)
}

/// All markers of all shards in `seq` order, which must be without gaps.
pub fn markers(shards: &[Vec<u8>]) -> Result<Vec<Entry>, String> {
    let mut entries = Vec::new();
    for (shard, bytes) in shards.iter().enumerate() {
        let own = split(shard, bytes).map_err(|why| format!("shard {shard}: {why}"))?;
        if let Some(pair) = own.windows(2).find(|pair| pair[0].seq >= pair[1].seq) {
            return Err(format!(
                "order within a shard: {:?} before {:?}",
                pair[0], pair[1]
            ));
        }
        entries.extend(own);
    }
    entries.sort_by_key(|entry| entry.seq);
    for (expected, entry) in entries.iter().enumerate() {
        if entry.seq != expected as u64 {
            return Err(format!("expected seq {expected}, found {entry:?}"));
        }
    }
    Ok(entries)
}

/// The markers of one shard in the order in which they stand there.
pub fn split(shard: usize, bytes: &[u8]) -> Result<Vec<Entry>, String> {
    let (entries, rest) = split_complete(shard, bytes);
    rest.map_or(Ok(entries), Err)
}

/// The same for a shard that may be cut: all markers that are complete, and what is wrong behind
/// them.
pub fn split_complete(shard: usize, bytes: &[u8]) -> (Vec<Entry>, Option<String>) {
    let mut entries = Vec::new();
    let mut offset = 0;
    while offset < bytes.len() {
        match take_entry(shard, offset, &bytes[offset..]) {
            Ok((entry, size)) => {
                entries.push(entry);
                offset += size;
            }
            Err(why) => return (entries, Some(format!("{why} at offset {offset}"))),
        }
    }
    (entries, None)
}

fn take_entry(shard: usize, offset: usize, bytes: &[u8]) -> Result<(Entry, usize), String> {
    let (len, rest) = bytes.split_first_chunk().ok_or("cut in the length")?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > MAX_MARKER {
        return Err(format!("frame of {len} bytes"));
    }
    let (message, rest) = rest.split_at_checked(len).ok_or("cut in the marker")?;
    let (seq, body) = parse_marker(message)?;
    let size = if let Body::FileData(size) = body {
        size as usize
    } else {
        0
    };
    let (data, rest) = rest.split_at_checked(size).ok_or("cut in the data")?;
    let entry = Entry {
        shard,
        offset,
        seq,
        body,
        data: data.to_vec(),
    };
    Ok((entry, bytes.len() - rest.len()))
}

fn replay(entries: &[Entry]) -> Result<Files, String> {
    let mut ended = Files::new();
    let mut open = Files::new();
    let mut current: Option<&str> = None;
    let Some((last, entries)) = entries.split_last() else {
        return Err("an image without any marker".into());
    };
    for entry in entries {
        match &entry.body {
            Body::Filename(name) => {
                open.entry(name.clone()).or_default();
                current = Some(name);
            }
            Body::FileData(_) => {
                let name = current.ok_or(format!("data of no file: {entry:?}"))?;
                open.get_mut(name).unwrap().extend_from_slice(&entry.data);
            }
            Body::FileEof => {
                let name = current.take().ok_or(format!("end of no file: {entry:?}"))?;
                ended.insert(name.to_owned(), open.remove(name).unwrap());
            }
            Body::ImageEof => return Err(format!("not the last marker: {entry:?}")),
        }
    }
    match (&last.body, open.keys().next()) {
        (Body::ImageEof, None) => Ok(ended),
        (Body::ImageEof, Some(name)) => Err(format!("the image ended before its file {name}")),
        _ => Err(format!("the image has no end: its last marker is {last:?}")),
    }
}

fn parse_marker(mut message: &[u8]) -> Result<(u64, Body), String> {
    let (mut seq, mut body) = (0, None);
    while !message.is_empty() {
        let key = take_varint(&mut message)?;
        match (key >> 3, key & 7) {
            (1, 0) => seq = take_varint(&mut message)?,
            (2, 2) => {
                let name = take_bytes(&mut message)?.to_vec();
                body = Some(Body::Filename(
                    String::from_utf8(name).map_err(|e| e.to_string())?,
                ));
            }
            (3, 0) => {
                body = Some(Body::FileData(
                    take_varint(&mut message)?
                        .try_into()
                        .map_err(|_| "size over u32")?,
                ))
            }
            (4, 0) if take_varint(&mut message)? != 0 => body = Some(Body::FileEof),
            (5, 0) if take_varint(&mut message)? != 0 => body = Some(Body::ImageEof),
            (1..=5, wire_type) => {
                return Err(format!("field of wire type {wire_type} with a wrong value"));
            }
            // A reader ignores what it does not know.
            (_, 0) => drop(take_varint(&mut message)?),
            (_, 1) => drop(take(&mut message, 8)?),
            (_, 2) => drop(take_bytes(&mut message)?),
            (_, 5) => drop(take(&mut message, 4)?),
            (field, wire_type) => return Err(format!("field {field} of wire type {wire_type}")),
        }
    }
    Ok((seq, body.ok_or("marker without a body")?))
}

fn take_varint(message: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = message.split_first().ok_or("cut in a number")?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err("number over 64 bits".into())
}

fn take_bytes<'a>(message: &mut &'a [u8]) -> Result<&'a [u8], String> {
    let len = take_varint(message)? as usize;
    take(message, len)
}

fn take<'a>(message: &mut &'a [u8], len: usize) -> Result<&'a [u8], String> {
    let (bytes, rest) = message.split_at_checked(len).ok_or("cut in a field")?;
    *message = rest;
    Ok(bytes)
}

pub fn put_varint(message: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        message.push(value as u8 | 0x80);
        value >>= 7;
    }
    message.push(value as u8);
}

/// Builds one shard, marker by marker, right or wrong.
#[derive(Default, Clone)]
pub struct Shard {
    pub bytes: Vec<u8>,
}

impl Shard {
    pub fn new() -> Self {
        Self::default()
    }

    pub fn filename(self, seq: u64, name: &str) -> Self {
        self.filename_bytes(seq, name.as_bytes())
    }

    /// A name that need not be UTF-8.
    pub fn filename_bytes(self, seq: u64, name: &[u8]) -> Self {
        let mut body = vec![2 << 3 | 2];
        put_varint(&mut body, name.len() as u64);
        body.extend_from_slice(name);
        self.marker(seq, &body)
    }

    pub fn data(self, seq: u64, data: &[u8]) -> Self {
        self.data_marker(seq, data.len() as u32).raw(data)
    }

    /// Only the marker: the bytes do not follow by themselves.
    pub fn data_marker(self, seq: u64, len: u32) -> Self {
        let mut body = vec![3 << 3];
        put_varint(&mut body, u64::from(len));
        self.marker(seq, &body)
    }

    pub fn file_eof(self, seq: u64) -> Self {
        self.marker(seq, &[4 << 3, 1])
    }

    pub fn image_eof(self, seq: u64) -> Self {
        self.marker(seq, &[5 << 3, 1])
    }

    /// The end of an image that may be restored: `inventory.img`, and the image's end behind it.
    pub fn inventory_and_end(self, seq: u64) -> Self {
        self.filename(seq, "inventory.img")
            .data(seq + 1, INVENTORY)
            .file_eof(seq + 2)
            .image_eof(seq + 3)
    }

    /// A frame with that `seq` and those bytes of protobuf. As protobuf has it, a `seq` of 0 is
    /// left out.
    pub fn marker(self, seq: u64, body: &[u8]) -> Self {
        let mut message = Vec::new();
        if seq != 0 {
            message.push(1 << 3);
            put_varint(&mut message, seq);
        }
        message.extend_from_slice(body);
        self.raw(&super::criu::frame(&message))
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }
}

/// An image of `files` in `count` shards: each file in data markers of at most `chunk` bytes, each
/// marker in the next shard in turn.
pub fn encode<'a>(
    files: impl IntoIterator<Item = (&'a str, &'a [u8])>,
    count: usize,
    chunk: usize,
) -> Vec<Vec<u8>> {
    let mut shards = vec![Shard::new(); count];
    let mut seq = 0;
    let mut put = |add: &dyn Fn(Shard, u64) -> Shard| {
        let shard = &mut shards[seq as usize % count];
        *shard = add(std::mem::take(shard), seq);
        seq += 1;
    };
    for (name, content) in files {
        put(&|shard, seq| shard.filename(seq, name));
        for data in content.chunks(chunk) {
            put(&|shard, seq| shard.data(seq, data));
        }
        put(&|shard, seq| shard.file_eof(seq));
    }
    put(&|shard, seq| shard.image_eof(seq));
    shards.into_iter().map(|shard| shard.bytes).collect()
}

/// Has the first marker of each shard say that the process of this number captured it.
pub fn captured_by(shards: &mut [Vec<u8>], pid: u8) {
    for shard in shards.iter_mut().filter(|shard| !shard.is_empty()) {
        let length = u32::from_le_bytes(*shard.first_chunk().unwrap());
        let field = [0xaa, 0x06, 2, 3 << 3, pid];
        let end = 4 + length as usize;
        shard.splice(end..end, field);
        shard[..4].copy_from_slice(&(length + field.len() as u32).to_le_bytes());
    }
}

/// What `inventory.img` holds where its contents do not matter.
pub const INVENTORY: &[u8] = b"inventory";

/// The smallest image, in one shard: `inventory.img`, which holds `inventory`.
pub fn inventory() -> Vec<Vec<u8>> {
    encode([("inventory.img", INVENTORY)], 1, 100)
}

/// [`encode`] for a map of files, with an `inventory.img` if it has none: an image without one is
/// refused.
pub fn encode_files(files: &Files, count: usize, chunk: usize) -> Vec<Vec<u8>> {
    let inventory = ("inventory.img", INVENTORY);
    let missing = !files.contains_key(inventory.0);
    let files = files
        .iter()
        .map(|(name, content)| (name.as_str(), content.as_slice()));
    encode(files.chain(missing.then_some(inventory)), count, chunk)
}
