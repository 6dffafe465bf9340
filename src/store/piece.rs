//! The pieces of a file, front to back: memory, and pipes that hold pages.

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
        let data = FileData::copy_of(bytes, &mut Arena::new()).unwrap();
        data.into_pieces().next().expect("it is not empty")
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
            Piece::Pipe(held) => arena.fill(len, |buffer| held.read(buffer))?,
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
    /// Adds a piece. One in a pipe moves into the pipe of the last piece, as far as there is room.
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

    /// A copy of these bytes in memory.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn copy_of(mut bytes: &[u8], arena: &mut Arena) -> io::Result<Self> {
        let mut data = Self::default();
        while !bytes.is_empty() {
            let extent = arena.fill(bytes.len(), |buffer| {
                buffer.copy_from_slice(&bytes[..buffer.len()]);
                Ok(buffer.len())
            })?;
            bytes = &bytes[extent.len()..];
            data.push(Piece::Memory(extent))?;
        }
        Ok(data)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Bytes in all. Pipes may hold more than our addresses reach.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|piece| piece.len() as u64).sum()
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

    /// Drops the first `bytes`, which lie in memory, or the pipe at the front if it is empty.
    pub(crate) fn drop_front(&mut self, mut bytes: usize) {
        while let Some(front) = self.0.front_mut() {
            if let Piece::Memory(extent) = front {
                let part = bytes.min(extent.len());
                bytes -= part;
                drop(extent.split_front(part));
            }
            if front.len() > 0 {
                return;
            }
            self.0.pop_front();
        }
    }

    /// The pieces, front to back.
    pub(crate) fn into_pieces(self) -> impl Iterator<Item = Piece> {
        self.0.into_iter()
    }

    /// Copies all of it, and frees it.
    ///
    /// # Errors
    /// Those of `read`; none for pipes of ours.
    pub(crate) fn into_bytes(self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = vec![0; len];
        let mut rest = &mut *bytes;
        for piece in self.0 {
            let (front, behind) = rest.split_at_mut(piece.len());
            piece.read(front)?;
            rest = behind;
        }
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_come_out_as_they_went_in() {
        let bytes: Vec<u8> = (0..200_000u32).map(|number| number as u8).collect();
        let data = FileData::copy_of(&bytes, &mut Arena::new()).unwrap();
        // More than 32 bits of it can be counted, whatever an address has.
        let len: u64 = data.len();
        assert_eq!(len, 200_000);
        assert!(data.into_bytes().unwrap() == bytes);
    }
}
