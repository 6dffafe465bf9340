//! What stands at the other end of a shard on restore: the shard's stream, written into the pipe
//! block by block.
//!
//! The data comes out of a buffer that is in the processor's cache, like that of a decompressor.
//! From a file of the shard's size every byte would come from memory, and on two cores the
//! producers, not the receivers, would be what is measured: at 0.4 CPU s/GB they cost more than the
//! streamer.

use crate::image::{Content, Piece, chunk_data, streams};
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, IoSlice, Write},
    os::fd::AsFd,
};

#[derive(Serialize, Deserialize)]
pub struct Producer {
    pub content: Content,
    pub shards: usize,
    pub shard: usize,
    /// Bytes given to the pipe at a time.
    pub block: usize,
}

impl Producer {
    pub fn play(self) -> Result<()> {
        let data = chunk_data()?;
        let stream = streams(self.content, self.shards)?.swap_remove(self.shard);
        // Not io::Stdout: its line buffer would cut the blocks.
        let mut pipe = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        let mut block = vec![];
        let mut left = self.block;
        for piece in &stream {
            let mut bytes = match piece {
                Piece::Bytes(bytes) => bytes.as_slice(),
                Piece::Data(len) => &data[..*len],
            };
            while !bytes.is_empty() {
                let (front, rest) = bytes.split_at(bytes.len().min(left));
                block.push(IoSlice::new(front));
                left -= front.len();
                bytes = rest;
                if left == 0 {
                    write_all(&mut pipe, &mut block)?;
                    block.clear();
                    left = self.block;
                }
            }
        }
        write_all(&mut pipe, &mut block)
    }
}

fn write_all(pipe: &mut File, mut block: &mut [IoSlice]) -> Result<()> {
    while !block.is_empty() {
        let written = pipe.write_vectored(block)?;
        IoSlice::advance_slices(&mut block, written);
    }
    Ok(())
}
