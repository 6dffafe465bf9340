//! Puts the parts of an image in order.
//!
//! Shards run ahead of each other: one waits in a compressor's block, another in the network. A
//! part that comes early waits here.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

/// A place in the image: the marker's position, and which part of its data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub(crate) seq: u64,
    pub(crate) part: u32,
}

impl Place {
    /// The place of a marker, and of the first part of its data.
    pub(crate) fn of(seq: u64) -> Self {
        Self { seq, part: 0 }
    }
}

/// The kind of step that comes next in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another part of the same marker's data.
    Part,
    /// Another marker.
    Marker,
}

/// The part of an image that is to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reading {
    All,
    /// No data behind a marker that comes after this one. Shards that stand there rest.
    UpTo(Option<u64>),
}

impl Reading {
    /// True if data at this place is left in its shard.
    pub(super) fn leaves(self, place: Option<Place>) -> bool {
        match (self, place) {
            (Reading::UpTo(last), Some(place)) => last.is_none_or(|last| place.seq > last),
            (Reading::All, _) | (_, None) => false,
        }
    }
}

/// The place whose turn it is, and the parts that wait for later ones.
#[derive(Debug)]
pub(crate) struct Order<T> {
    next: Place,
    waiting: BTreeMap<Place, T>,
}

impl<T> Order<T> {
    pub(crate) fn new() -> Self {
        Self {
            next: Place::default(),
            waiting: BTreeMap::new(),
        }
    }

    /// The place whose turn it is.
    pub(crate) fn next(&self) -> Place {
        self.next
    }

    /// Has something wait for its turn.
    ///
    /// # Errors
    /// When this place has had its turn, or is taken.
    pub(crate) fn insert(&mut self, place: Place, what: T) -> Result<()> {
        ensure!(
            place >= self.next && !self.waiting.contains_key(&place),
            "marker {} comes a second time",
            place.seq
        );
        self.waiting.insert(place, what);
        Ok(())
    }

    /// Takes the part that waits at the place whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.waiting.remove(&self.next)
    }

    /// Takes the first part that waits.
    pub(crate) fn pop_first(&mut self) -> Option<(Place, T)> {
        self.waiting.pop_first()
    }

    /// The turn passes on. One part at a time, it gets to no end of numbers.
    pub(crate) fn pass(&mut self, next: Next) {
        self.next = match next {
            Next::Part => Place {
                part: self.next.part + 1,
                ..self.next
            },
            Next::Marker => Place::of(self.next.seq + 1),
        };
    }

    /// The turn passes on to this marker, if it is behind.
    pub(crate) fn pass_to(&mut self, seq: u64) {
        self.next = self.next.max(Place::of(seq));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_comes_in_its_turn() {
        let mut order = Order::new();
        let part = |seq, part| Place { seq, part };
        for place in [part(2, 0), part(1, 1), part(1, 0), part(0, 0)] {
            order.insert(place, place).unwrap();
        }
        for next in [Next::Marker, Next::Part, Next::Marker, Next::Marker] {
            assert_eq!(order.pop(), Some(order.next()));
            order.pass(next);
        }
        assert_eq!(order.next(), Place::of(3));
        assert_eq!((order.pop(), order.pop_first()), (None, None));
    }

    #[test]
    fn a_place_is_taken_once() {
        let mut order = Order::new();
        order.insert(Place::of(1), 'a').unwrap();
        let error = order.insert(Place::of(1), 'b').unwrap_err();
        assert_eq!(error.to_string(), "marker 1 comes a second time");
        order.pass(Next::Marker);
        let error = order.insert(Place::of(0), 'c').unwrap_err();
        assert_eq!(error.to_string(), "marker 0 comes a second time");
        assert_eq!(order.pop(), Some('a'));
    }
}
