//! Puts in order what arrives out of order.
//!
//! Shards run ahead of each other: one waits in a compressor's block, another in the network. What
//! comes before its turn waits here.

use std::collections::BTreeMap;

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

/// What comes next in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another part of the same marker's data.
    Part,
    /// Another marker.
    Marker,
}

/// The place was passed, or something waits there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct AlreadyTaken;

/// The place whose turn it is, and what waits for later ones.
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
    pub(crate) fn insert(&mut self, place: Place, what: T) -> Result<(), AlreadyTaken> {
        if place < self.next || self.waiting.contains_key(&place) {
            return Err(AlreadyTaken);
        }
        self.waiting.insert(place, what);
        Ok(())
    }

    /// Takes what waits at the place whose turn it is.
    pub(crate) fn pop(&mut self) -> Option<T> {
        self.waiting.remove(&self.next)
    }

    /// Takes the first of all that waits.
    pub(crate) fn pop_first(&mut self) -> Option<(Place, T)> {
        self.waiting.pop_first()
    }

    /// The turn passes on. `None`: there are no more places.
    #[must_use]
    pub(crate) fn pass(&mut self, next: Next) -> Option<()> {
        self.next = match next {
            Next::Part => Place {
                seq: self.next.seq,
                part: self.next.part.checked_add(1)?,
            },
            Next::Marker => Place::of(self.next.seq.checked_add(1)?),
        };
        Some(())
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
            order.pass(next).unwrap();
        }
        assert_eq!(order.next(), Place::of(3));
        assert_eq!((order.pop(), order.pop_first()), (None, None));
    }

    #[test]
    fn a_place_is_taken_once() {
        let mut order = Order::new();
        order.insert(Place::of(1), 'a').unwrap();
        assert_eq!(order.insert(Place::of(1), 'b'), Err(AlreadyTaken));
        order.pass(Next::Marker).unwrap();
        assert_eq!(order.insert(Place::of(0), 'c'), Err(AlreadyTaken));
        assert_eq!(order.pop(), Some('a'));
    }

    #[test]
    fn there_is_an_end_to_counting() {
        let mut order = Order::<()>::new();
        order.next = Place::of(u64::MAX);
        assert_eq!(order.pass(Next::Marker), None);
    }
}
