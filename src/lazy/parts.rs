//! Which pages a process still lacks: from addresses, which the process changes (`mremap`), to
//! places in its pages file, which stay the same. Each place is missing at one address at most.

use std::collections::BTreeMap;
use std::ops::Range;

/// Memory that lies together, at an address and in the file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The missing pages of one process, by either order.
#[derive(Debug, Clone, Default)]
pub(super) struct Missing {
    by_address: BTreeMap<u64, Part>,
    /// The addresses of the same parts.
    by_offset: BTreeMap<u64, u64>,
}

impl Missing {
    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    pub(super) fn insert(&mut self, part: Part) {
        if part.len > 0 {
            self.by_address.insert(part.address, part);
            self.by_offset.insert(part.offset, part.address);
        }
    }

    /// The place of what is missing at an address.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let (_, part) = self.by_address.range(..=address).next_back()?;
        let within = address - part.address;
        (within < part.len).then(|| part.offset + within)
    }

    /// The first part that is missing of these places.
    pub(super) fn first_of(&self, places: &Range<u64>) -> Option<Part> {
        let (_, address) = self.by_offset.range(..places.end).next_back()?;
        let mut found = None;
        let mut part = self.by_address[address];
        // Parts overlap the places from the end to the beginning of them.
        while part.offset + part.len > places.start {
            found = Some(part);
            let Some((_, address)) = self.by_offset.range(..part.offset).next_back() else {
                break;
            };
            part = self.by_address[address];
        }
        found.map(|part| {
            let start = part.offset.max(places.start);
            Part {
                address: part.address + (start - part.offset),
                offset: start,
                len: (part.offset + part.len).min(places.end) - start,
            }
        })
    }

    /// Takes out what is missing at these addresses.
    pub(super) fn take(&mut self, addresses: &Range<u64>) -> Vec<Part> {
        let mut taken = Vec::new();
        while let Some((_, &part)) = self.by_address.range(..addresses.end).next_back()
            && part.address + part.len > addresses.start
        {
            let start = part.address.max(addresses.start);
            let end = (part.address + part.len).min(addresses.end);
            taken.push(self.cut(part, start..end));
        }
        taken
    }

    /// Notes that these places are not missing any more, wherever they were.
    pub(super) fn filled(&mut self, places: &Range<u64>) {
        while let Some(part) = self.first_of(places) {
            let whole = self.by_address.range(..=part.address).next_back();
            let whole = *whole.expect("it is a part of one").1;
            self.cut(whole, part.address..part.address + part.len);
        }
    }

    /// Takes these addresses out of a part.
    fn cut(&mut self, whole: Part, addresses: Range<u64>) -> Part {
        self.by_address.remove(&whole.address);
        self.by_offset.remove(&whole.offset);
        let part = |addresses: Range<u64>| Part {
            address: addresses.start,
            offset: whole.offset + (addresses.start - whole.address),
            len: addresses.end - addresses.start,
        };
        self.insert(part(whole.address..addresses.start));
        self.insert(part(addresses.end..whole.address + whole.len));
        part(addresses)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(address: u64, offset: u64, len: u64) -> Part {
        Part {
            address,
            offset,
            len,
        }
    }

    fn missing(parts: &[Part]) -> Missing {
        let mut missing = Missing::default();
        parts.iter().for_each(|&part| missing.insert(part));
        missing
    }

    #[test]
    fn parts_are_found_by_address_and_by_place() {
        let missing = missing(&[part(100, 0, 20), part(300, 20, 10), part(200, 30, 5)]);
        assert_eq!(missing.offset_of(119), Some(19));
        assert_eq!(missing.offset_of(120), None);
        assert_eq!(missing.offset_of(304), Some(24));
        assert_eq!(missing.first_of(&(10..25)), Some(part(110, 10, 10)));
        assert_eq!(missing.first_of(&(25..26)), Some(part(305, 25, 1)));
        assert_eq!(missing.first_of(&(35..90)), None);
    }

    #[test]
    fn what_is_moved_keeps_its_place() {
        let mut missing = missing(&[part(100, 0, 20), part(300, 20, 10)]);
        for part in missing.take(&(110..305)) {
            missing.insert(Part {
                address: part.address + 1000,
                ..part
            });
        }
        assert_eq!(missing.offset_of(109), Some(9));
        assert_eq!(missing.offset_of(110), None);
        assert_eq!(missing.offset_of(1110), Some(10));
        assert_eq!(missing.offset_of(1304), Some(24));
        assert_eq!(missing.offset_of(305), Some(25));
        missing.filled(&(5..28));
        assert_eq!(missing.first_of(&(0..30)), Some(part(100, 0, 5)));
        missing.filled(&(0..5));
        assert_eq!(missing.first_of(&(0..30)), Some(part(308, 28, 2)));
        missing.filled(&(0..100));
        assert!(missing.is_empty());
    }

    #[test]
    fn random_changes_are_those_of_a_simple_model() {
        let mut seed = 1u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % below
        };
        for _ in 0..200 {
            let mut missing = missing(&[part(0, 0, 40), part(60, 40, 40)]);
            let mut model: Vec<Option<u64>> = vec![None; 400];
            (0..40).for_each(|n| model[n as usize] = Some(n));
            (40..80).for_each(|n| model[n as usize + 20] = Some(n));
            for _ in 0..30 {
                let (from, len) = (random(150), random(30));
                match random(3) {
                    0 => {
                        missing.take(&(from..from + len));
                        (from..from + len).for_each(|n| model[n as usize] = None);
                    }
                    1 => {
                        missing.filled(&(from..from + len));
                        for place in &mut model {
                            *place = place.filter(|place| !(from..from + len).contains(place));
                        }
                    }
                    _ => {
                        let to = 200 + random(150);
                        let parts = missing.take(&(from..from + len));
                        missing.take(&(to..to + len));
                        let moved: Vec<_> = (from..from + len)
                            .map(|n| model[n as usize].take())
                            .collect();
                        for (n, place) in (to..).zip(moved) {
                            model[n as usize] = place;
                        }
                        for part in parts {
                            let address = part.address - from + to;
                            missing.insert(Part { address, ..part });
                        }
                    }
                }
                for (address, place) in (0..).zip(&model) {
                    assert_eq!(missing.offset_of(address), *place, "{address}");
                }
            }
        }
    }
}
