//! What stands at the other end of a shard on restore: a finished shard, written into the pipe block by block.

use crate::memory::PageMemory;
use anyhow::Result;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{self, Write},
    os::fd::AsFd,
    path::PathBuf,
};

#[derive(Serialize, Deserialize)]
pub struct Producer {
    pub shard: PathBuf,
    pub block: usize,
}

impl Producer {
    pub fn play(self) -> Result<()> {
        let shard = PageMemory::of_file(&File::open(&self.shard)?)?;
        // Not io::Stdout: its line buffer would cut the blocks.
        let mut pipe = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        for block in shard.chunks(self.block) {
            pipe.write_all(block)?;
        }
        Ok(())
    }
}
