//! What a file is made of, front to back: memory, and pipes that hold pages.

use std::collections::VecDeque;
use std::io;

use super::held_pipe::HeldPipe;
use super::{Arena, Extent};

/// Some of a file's data. It owns itself: dropped, it is given back to the kernel.
#[derive(Debug)]
pub enum Piece {
    Memory(Extent),
    Pipe(HeldPipe),
}

impl Piece {
    /// A piece in memory of its own, for tests.
    #[cfg(test)]
    pub(crate) fn in_memory(bytes: &[u8]) -> Self {
        let mut arena = Arena::new();
        let mut block = arena.reserve(bytes.len()).unwrap();
        block.unfilled().copy_from_slice(bytes);
        block.filled(bytes.len());
        Piece::Memory(arena.seal(block))
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Piece::Memory(extent) => extent.len(),
            Piece::Pipe(held) => held.len(),
        }
    }

    /// Cuts off the first `len` bytes, which are copied where they lie in a pipe.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn split_front(&mut self, len: usize, arena: &mut Arena) -> io::Result<Self> {
        Ok(Piece::Memory(match self {
            Piece::Memory(extent) => extent.split_front(len),
            Piece::Pipe(held) => {
                let mut block = arena.reserve(len)?;
                let bytes = held.read(block.unfilled())?;
                block.filled(bytes);
                arena.seal(block)
            }
        }))
    }

    /// Copies all of it to a buffer of its size, and frees it.
    ///
    /// # Errors
    /// Those of `read`; none for pipes of ours.
    pub(crate) fn read(self, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Piece::Memory(extent) => buffer.copy_from_slice(extent.bytes()),
            Piece::Pipe(mut held) => {
                let mut done = 0;
                while done < buffer.len() {
                    done += held.read(&mut buffer[done..])?;
                }
            }
        }
        Ok(())
    }
}

/// A file's data, or a part of it: its pieces, front to back.
#[derive(Debug, Default)]
pub struct FileData(VecDeque<Piece>);

impl FileData {
    /// Adds a piece. What a pipe holds is moved into that of the last piece while there is room.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn push(&mut self, mut piece: Piece) -> io::Result<()> {
        if let (Piece::Pipe(next), Some(Piece::Pipe(last))) = (&mut piece, self.0.back_mut()) {
            last.append(next)?;
            if next.len() == 0 {
                return Ok(());
            }
        }
        if self.0.is_empty() {
            // Most files are one piece.
            self.0.reserve_exact(1);
        }
        self.0.push_back(piece);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        self.0.iter().map(Piece::len).sum()
    }

    /// The extents at the front, up to the first pipe.
    pub(crate) fn memory(&self) -> impl Iterator<Item = &Extent> {
        self.0.iter().map_while(|piece| match piece {
            Piece::Memory(extent) => Some(extent),
            Piece::Pipe(_) => None,
        })
    }

    /// The pipe at the front, if one is there, with as much as its reader may take at a time.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn front_pipe(&mut self) -> io::Result<Option<&mut HeldPipe>> {
        let mut pieces = self.0.iter_mut();
        if let (Some(Piece::Pipe(front)), Some(Piece::Pipe(next))) = (pieces.next(), pieces.next())
        {
            front.append(next)?;
            if next.len() == 0 {
                self.0.remove(1);
            }
        }
        Ok(match self.0.front_mut() {
            Some(Piece::Pipe(held)) => Some(held),
            Some(Piece::Memory(_)) | None => None,
        })
    }

    /// Drops the pipe at the front.
    pub(crate) fn drop_front_pipe(&mut self) {
        self.0.pop_front();
    }

    /// Drops the first `bytes`, which lie in memory.
    pub(crate) fn drop_front(&mut self, mut bytes: usize) {
        while bytes > 0
            && let Some(Piece::Memory(front)) = self.0.front_mut()
        {
            let part = bytes.min(front.len());
            bytes -= part;
            drop(front.split_front(part));
            if front.is_empty() {
                self.0.pop_front();
            }
        }
    }

    /// The pieces, front to back.
    pub(crate) fn into_pieces(self) -> impl Iterator<Item = Piece> {
        self.0.into_iter()
    }

    /// Copies what pipes hold to memory.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn into_memory(self, arena: &mut Arena) -> io::Result<Self> {
        let mut copied = Self::default();
        for piece in self.0 {
            match piece {
                Piece::Memory(_) => copied.push(piece)?,
                Piece::Pipe(mut held) => {
                    while held.len() > 0 {
                        let mut block = arena.reserve(held.len())?;
                        let bytes = held.read(block.unfilled())?;
                        block.filled(bytes);
                        copied.push(Piece::Memory(arena.seal(block)))?;
                    }
                }
            }
        }
        Ok(copied)
    }
}
