//! What a file is made of, front to back.

use std::collections::VecDeque;

use super::Extent;

/// The contents of a file. Most files are one extent, which lies in the entry itself: with its name,
/// a small file costs less than 150 bytes beside its contents.
#[derive(Debug, Default)]
pub enum Contents {
    #[default]
    Empty,
    One(Extent),
    Many(VecDeque<Extent>),
}

impl Contents {
    pub(crate) fn push(&mut self, extent: Extent) {
        *self = match std::mem::take(self) {
            Contents::Empty => Contents::One(extent),
            Contents::One(first) => Contents::Many(VecDeque::from([first, extent])),
            Contents::Many(mut extents) => {
                extents.push_back(extent);
                Contents::Many(extents)
            }
        };
    }

    pub fn extents(&self) -> impl Iterator<Item = &Extent> {
        let (one, many) = match self {
            Contents::Empty => (None, None),
            Contents::One(extent) => (Some(extent), None),
            Contents::Many(extents) => (None, Some(extents)),
        };
        one.into_iter().chain(many.into_iter().flatten())
    }

    /// Bytes in all.
    pub(crate) fn size(&self) -> usize {
        self.extents().map(Extent::len).sum()
    }

    pub(crate) fn is_empty(&self) -> bool {
        matches!(self, Contents::Empty)
    }

    /// Gives back the first `bytes`.
    pub(crate) fn drop_front(&mut self, mut bytes: usize) {
        while bytes > 0 {
            let front = match self {
                Contents::Empty => return,
                Contents::One(extent) => extent,
                Contents::Many(extents) => extents.front_mut().expect("it has several"),
            };
            if bytes < front.len() {
                drop(front.split_front(bytes));
                return;
            }
            bytes -= front.len();
            match self {
                Contents::Many(extents) if extents.len() > 1 => drop(extents.pop_front()),
                _ => *self = Contents::Empty,
            }
        }
    }
}
