//! Images to restore: the streams of their shards, or files in memory with these.

use crate::common::image::Shard;
use crate::memory::{PageMemory, Pages};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
};

/// The size of the data chunks, much like those of our own captures.
const CHUNK: u64 = 512 << 10;

#[derive(Serialize, Deserialize, Clone, Copy)]
pub enum Content {
    /// Page files of equal size, `bytes` in all.
    Pages {
        files: usize,
        bytes: u64,
    },
    Small {
        count: usize,
        bytes: u64,
    },
}

impl Content {
    pub fn total_bytes(self) -> u64 {
        match self {
            Self::Pages { bytes, .. } => bytes,
            Self::Small { count, bytes } => count as u64 * bytes,
        }
    }

    pub fn files(self) -> Vec<(String, u64)> {
        let (prefix, count, bytes) = match self {
            Self::Pages { files, bytes } => ("pages", files, bytes / files as u64),
            Self::Small { count, bytes } => ("core", count, bytes),
        };
        (1..=count)
            .map(|number| (format!("{prefix}-{number}.img"), bytes))
            .chain([("inventory.img".to_owned(), 100)])
            .collect()
    }
}

/// A piece of a shard's stream.
pub enum Piece {
    /// Markers, and the data of small files between them.
    Bytes(Vec<u8>),
    /// The beginning of a large chunk's data, which is the same for every chunk.
    Data(usize),
}

/// The data of every large chunk.
pub fn chunk_data() -> Result<PageMemory> {
    PageMemory::filled(CHUNK as usize, Pages::Small)
}

/// The streams of all shards. The data goes to the shards in turn, and a file's markers to where
/// its data is.
pub fn streams(content: Content, shards: usize) -> Result<Vec<Vec<Piece>>> {
    let data = chunk_data()?;
    let mut streams: Vec<Vec<Piece>> = (0..shards).map(|_| vec![]).collect();
    let mut turn = 0;
    let mut seq = 0;
    let mut next_seq = || {
        seq += 1;
        seq - 1
    };
    for (name, mut left) in content.files() {
        let mut stream = &mut streams[turn % shards];
        put(stream, &Shard::new().filename(next_seq(), &name).bytes);
        while left > 0 {
            let chunk = left.min(CHUNK) as usize;
            stream = &mut streams[turn % shards];
            let marker = Shard::new().data_marker(next_seq(), chunk as u32);
            put(stream, &marker.bytes);
            if chunk < LARGE {
                put(stream, &data[..chunk]);
            } else {
                stream.push(Piece::Data(chunk));
            }
            left -= chunk as u64;
            turn += 1;
        }
        put(stream, &Shard::new().file_eof(next_seq()).bytes);
    }
    let last = &mut streams[turn % shards];
    put(last, &Shard::new().image_eof(next_seq()).bytes);
    Ok(streams)
}

/// A chunk that is not worth a copy in its stream, in bytes.
const LARGE: usize = 64 << 10;

fn put(stream: &mut Vec<Piece>, bytes: &[u8]) {
    match stream.last_mut() {
        Some(Piece::Bytes(last)) => last.extend_from_slice(bytes),
        _ => stream.push(Piece::Bytes(bytes.to_vec())),
    }
}

/// An image as files, one for each shard.
pub struct Image {
    pub shards: Vec<PathBuf>,
}

impl Image {
    /// Writes the shards into `dir`.
    pub fn build(dir: &Path, content: Content, shards: usize) -> Result<Self> {
        let data = chunk_data()?;
        let mut paths = vec![];
        for (number, stream) in streams(content, shards)?.into_iter().enumerate() {
            let path = dir.join(format!("shard-{number}"));
            let mut file = BufWriter::new(File::create(&path)?);
            for piece in stream {
                match piece {
                    Piece::Bytes(bytes) => file.write_all(&bytes)?,
                    Piece::Data(len) => file.write_all(&data[..len])?,
                }
            }
            file.flush()?;
            paths.push(path);
        }
        Ok(Self { shards: paths })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        for shard in &self.shards {
            let _ = fs::remove_file(shard);
        }
    }
}
