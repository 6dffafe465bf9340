//! Images to restore, as files in memory, one for each shard.

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
    /// Page files of equal size, so many bytes in all.
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

pub struct Image {
    pub content: Content,
    pub shards: Vec<PathBuf>,
}

impl Image {
    /// Writes the shards into `dir`. The data goes to the shards in turn, and a file's markers to where its data is.
    pub fn build(dir: &Path, content: Content, shards: usize) -> Result<Self> {
        let paths: Vec<_> = (0..shards)
            .map(|number| dir.join(format!("shard-{number}")))
            .collect();
        let mut writers = vec![];
        for path in &paths {
            writers.push(BufWriter::new(File::create(path)?));
        }
        let memory = PageMemory::filled(64 << 20, Pages::Small)?;
        let mut position = 0;
        let mut turn = 0;
        let mut seq = 0;
        let mut next_seq = || {
            seq += 1;
            seq - 1
        };
        for (name, mut left) in content.files() {
            let mut shard = &mut writers[turn % shards];
            shard.write_all(&Shard::new().filename(next_seq(), &name).bytes)?;
            while left > 0 {
                let chunk = left.min(CHUNK).min((memory.len() - position) as u64);
                shard = &mut writers[turn % shards];
                let marker = Shard::new().data_marker(next_seq(), chunk as u32);
                shard.write_all(&marker.bytes)?;
                shard.write_all(&memory[position..position + chunk as usize])?;
                position = (position + chunk as usize) % memory.len();
                left -= chunk;
                turn += 1;
            }
            shard.write_all(&Shard::new().file_eof(next_seq()).bytes)?;
        }
        let last = &mut writers[turn % shards];
        last.write_all(&Shard::new().image_eof(next_seq()).bytes)?;
        for writer in &mut writers {
            writer.flush()?;
        }
        let shards = paths;
        Ok(Self { content, shards })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        for shard in &self.shards {
            let _ = fs::remove_file(shard);
        }
    }
}
