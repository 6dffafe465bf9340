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
        let mut data = FileData::copy_of(bytes, &mut Arena::new()).unwrap();
        data.0.pop_front().expect("it is not empty")
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Piece::Memory(extent) => extent.len(),
            Piece::Pipe(held) => held.len(),
        }
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

    /// Bytes of the first pieces that have at least `wanted` together, or of all.
    pub(crate) fn front_len(&self, wanted: u64) -> u64 {
        let mut len = 0;
        for piece in &self.0 {
            len += piece.len() as u64;
            if len >= wanted {
                break;
            }
        }
        len
    }

    /// Cuts off the first `len` bytes. Of a pipe that is cut, the front is copied.
    ///
    /// # Errors
    /// `ENOMEM`, and where there is less.
    pub(crate) fn split_front(&mut self, mut len: u64, arena: &mut Arena) -> io::Result<Self> {
        let mut front = Self::default();
        while len > 0 {
            let first = self.0.front_mut().ok_or(io::ErrorKind::UnexpectedEof)?;
            let part = (first.len() as u64).min(len) as usize;
            let piece = match first {
                whole if whole.len() == part => self.0.pop_front().expect("it is the first"),
                Piece::Memory(extent) => Piece::Memory(extent.split_front(part)),
                Piece::Pipe(held) => Piece::Memory(arena.fill(part, |it| held.read(it))?),
            };
            len -= piece.len() as u64;
            front.push(piece)?;
        }
        Ok(front)
    }

    /// Adds other data.
    ///
    /// # Errors
    /// Those of [`FileData::push`].
    pub(crate) fn append(&mut self, other: Self) -> io::Result<()> {
        other.0.into_iter().try_for_each(|piece| self.push(piece))
    }

    /// Copies the first bytes to a buffer, and frees them. Returns how many: all that there is room
    /// for.
    ///
    /// # Errors
    /// Those of `read`; none for pipes of ours.
    pub(crate) fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len()
            && let Some(front) = self.0.front_mut()
        {
            let rest = &mut buffer[done..];
            done += match front {
                Piece::Memory(extent) => {
                    let part = extent.split_front(extent.len().min(rest.len()));
                    rest[..part.len()].copy_from_slice(part.bytes());
                    part.len()
                }
                Piece::Pipe(held) => held.read(rest)?,
            };
            self.drop_front(0);
        }
        Ok(done)
    }

    /// Copies all of it, and frees it.
    ///
    /// # Errors
    /// Those of `read`; none for pipes of ours.
    pub(crate) fn into_bytes(mut self) -> io::Result<Vec<u8>> {
        let len = usize::try_from(self.len()).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut bytes = vec![0; len];
        self.read(&mut bytes)?;
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
