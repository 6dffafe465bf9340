//! What a file is made of, front to back: memory, and pipes that hold pages.

use std::collections::VecDeque;
use std::fs::File;
use std::io;

use super::held_pipe::HeldPipe;
use super::{Arena, Extent};
use crate::os::pipe::{Moved, slot};

/// Some of a file's data. It owns itself: dropped, it is given back to the kernel.
#[derive(Debug)]
pub enum Piece {
    Memory(Extent),
    Pipe(HeldPiece),
}

/// Data in a pipe of ours.
#[derive(Debug)]
pub struct HeldPiece(pub(super) HeldPipe);

impl HeldPiece {
    /// Moves all of it to the end of a file.
    ///
    /// # Errors
    /// When the file cannot take it.
    pub(super) fn write_to(&mut self, file: &File) -> io::Result<()> {
        while self.0.len() > 0 {
            match self.0.send(file, usize::MAX)? {
                Moved::Bytes(_) => {}
                Moved::WouldBlock | Moved::End => return Err(io::ErrorKind::WriteZero.into()),
            }
        }
        Ok(())
    }
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

    pub(crate) fn held(held: HeldPipe) -> Self {
        Piece::Pipe(HeldPiece(held))
    }

    pub(crate) fn len(&self) -> usize {
        match self {
            Piece::Memory(extent) => extent.len(),
            Piece::Pipe(HeldPiece(held)) => held.len(),
        }
    }
}

/// The contents of a file. Most files are one extent, which lies in the entry itself: with its
/// name, a small file costs less than 150 bytes beside its contents.
#[derive(Debug, Default)]
pub struct Contents(Pieces);

#[derive(Debug, Default)]
enum Pieces {
    #[default]
    None,
    One(Extent),
    Many(VecDeque<Piece>),
}

impl Contents {
    /// Adds a piece. What a pipe holds is moved into that of the last piece where there is room.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn push(&mut self, piece: Piece) -> io::Result<()> {
        let pieces = match std::mem::take(&mut self.0) {
            Pieces::None => match piece {
                Piece::Memory(extent) => {
                    self.0 = Pieces::One(extent);
                    return Ok(());
                }
                Piece::Pipe(_) => VecDeque::new(),
            },
            Pieces::One(first) => VecDeque::from([Piece::Memory(first)]),
            Pieces::Many(pieces) => pieces,
        };
        let pieces = self.0.insert(pieces);
        let mut piece = piece;
        if let (Piece::Pipe(HeldPiece(next)), Some(Piece::Pipe(HeldPiece(last)))) =
            (&mut piece, pieces.back_mut())
            && last.may_absorb(next)
        {
            last.absorb(next, usize::MAX)?;
            if next.len() == 0 {
                return Ok(());
            }
        }
        pieces.push_back(piece);
        Ok(())
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self.0, Pieces::None)
    }

    /// Bytes in all.
    pub(crate) fn len(&self) -> usize {
        match &self.0 {
            Pieces::None => 0,
            Pieces::One(extent) => extent.len(),
            Pieces::Many(pieces) => pieces.iter().map(Piece::len).sum(),
        }
    }

    /// The extents at the front, up to the first pipe.
    pub(crate) fn memory(&self) -> impl Iterator<Item = &Extent> {
        let (one, many) = match &self.0 {
            Pieces::None => (None, None),
            Pieces::One(extent) => (Some(extent), None),
            Pieces::Many(pieces) => (None, Some(pieces)),
        };
        let many = many.into_iter().flatten().map_while(|piece| match piece {
            Piece::Memory(extent) => Some(extent),
            Piece::Pipe(_) => None,
        });
        one.into_iter().chain(many)
    }

    /// The pipe at the front, if one is there. What the pipes behind it hold is moved into it, up
    /// to `slots` slots in all.
    ///
    /// # Errors
    /// Those of `splice`; none for pipes of ours.
    pub(crate) fn front_pipe(&mut self, slots: usize) -> io::Result<Option<&mut HeldPipe>> {
        let Pieces::Many(pieces) = &mut self.0 else {
            return Ok(None);
        };
        while let [
            Some(Piece::Pipe(HeldPiece(front))),
            Some(Piece::Pipe(HeldPiece(next))),
        ] = first_two(pieces)
            && front.len() < slots * slot()
        {
            front.grow(slots)?;
            front.absorb(next, usize::MAX)?;
            if next.len() > 0 {
                break;
            }
            pieces.remove(1);
        }
        Ok(match pieces.front_mut() {
            Some(Piece::Pipe(HeldPiece(held))) => Some(held),
            Some(Piece::Memory(_)) | None => None,
        })
    }

    /// Drops the pipe at the front if it was emptied, unless those behind it are to be moved into
    /// it.
    pub(crate) fn drop_emptied_pipe(&mut self) {
        if let Pieces::Many(pieces) = &mut self.0
            && let [Some(Piece::Pipe(HeldPiece(front))), next] = first_two(pieces)
            && front.len() == 0
            && !matches!(next, Some(Piece::Pipe(_)))
        {
            self.drop_piece();
        }
    }

    /// Drops the first `bytes`, which lie in memory.
    pub(crate) fn drop_front(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let front = match &mut self.0 {
                Pieces::None => return,
                Pieces::One(extent) => extent,
                Pieces::Many(pieces) => match pieces.front_mut() {
                    Some(Piece::Memory(extent)) => extent,
                    Some(Piece::Pipe(_)) | None => return,
                },
            };
            if bytes < front.len() {
                drop(front.split_front(bytes));
                return;
            }
            bytes -= front.len();
            self.drop_piece();
        }
    }

    fn drop_piece(&mut self) {
        match &mut self.0 {
            Pieces::Many(pieces) if pieces.len() > 1 => drop(pieces.pop_front()),
            _ => self.0 = Pieces::None,
        }
    }

    /// The pieces, front to back.
    pub(super) fn into_pieces(self) -> impl Iterator<Item = Piece> {
        let (one, many) = match self.0 {
            Pieces::None => (None, VecDeque::new()),
            Pieces::One(extent) => (Some(Piece::Memory(extent)), VecDeque::new()),
            Pieces::Many(pieces) => (None, pieces),
        };
        one.into_iter().chain(many)
    }

    /// Copies what pipes hold to memory.
    ///
    /// # Errors
    /// `ENOMEM`.
    pub(crate) fn into_memory(self, arena: &mut Arena) -> io::Result<Self> {
        let Pieces::Many(pieces) = self.0 else {
            return Ok(self);
        };
        let mut copied = Self::default();
        for piece in pieces {
            match piece {
                Piece::Memory(_) => copied.push(piece)?,
                Piece::Pipe(HeldPiece(mut held)) => {
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

fn first_two(pieces: &mut VecDeque<Piece>) -> [Option<&mut Piece>; 2] {
    let mut pieces = pieces.iter_mut();
    [pieces.next(), pieces.next()]
}

impl Pieces {
    /// Takes the place of what is here.
    fn insert(&mut self, pieces: VecDeque<Piece>) -> &mut VecDeque<Piece> {
        *self = Pieces::Many(pieces);
        match self {
            Pieces::Many(pieces) => pieces,
            Pieces::None | Pieces::One(_) => unreachable!("it was put there above"),
        }
    }
}
