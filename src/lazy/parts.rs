//! Parts of a process's memory, such as those that it still lacks: by address, which the process
//! changes (`mremap`), and by place in its pages file, which stays. Each place has one address.

use std::collections::BTreeMap;
use std::ops::Range;

/// Memory that lies together, at an address and in the file, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    pub(super) address: u64,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// Parts that do not overlap, by either order.
#[derive(Debug, Clone, Default)]
pub(super) struct Parts {
    by_address: BTreeMap<u64, Part>,
    /// The addresses of the same parts.
    by_offset: BTreeMap<u64, u64>,
}

impl Part {
    /// A part that is nowhere in the file.
    pub(super) fn at(addresses: &Range<u64>) -> Self {
        Self {
            address: addresses.start,
            offset: addresses.start,
            len: addresses.end - addresses.start,
        }
    }

    pub(super) fn addresses(&self) -> Range<u64> {
        self.address..self.address + self.len
    }

    pub(super) fn places(&self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

impl Parts {
    pub(super) fn is_empty(&self) -> bool {
        self.by_address.is_empty()
    }

    /// In the order of their addresses.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Part> {
        self.by_address.values()
    }

    pub(super) fn insert(&mut self, part: Part) {
        if part.len > 0 {
            self.by_address.insert(part.address, part);
            self.by_offset.insert(part.offset, part.address);
        }
    }

    /// The place of an address.
    pub(super) fn offset_of(&self, address: u64) -> Option<u64> {
        let (_, part) = self.by_address.range(..=address).next_back()?;
        let within = address - part.address;
        (within < part.len).then(|| part.offset + within)
    }

    /// The first part that has some of these places, cut to them.
    pub(super) fn first_of(&self, places: &Range<u64>) -> Option<Part> {
        let before = self.by_offset.range(..places.start).next_back();
        let within = self.by_offset.range(places.clone());
        before.into_iter().chain(within).find_map(|(_, address)| {
            let part = self.by_address[address];
            let start = part.offset.max(places.start);
            let end = part.places().end.min(places.end);
            (start < end).then(|| Part {
                address: part.address + (start - part.offset),
                offset: start,
                len: end - start,
            })
        })
    }

    /// Takes out everything at these addresses.
    pub(super) fn take(&mut self, addresses: &Range<u64>) -> Vec<Part> {
        let mut taken = Vec::new();
        while let Some((_, &whole)) = self.by_address.range(..addresses.end).next_back()
            && whole.addresses().end > addresses.start
        {
            self.by_address.remove(&whole.address);
            self.by_offset.remove(&whole.offset);
            let part = |start: u64, end: u64| Part {
                address: start,
                offset: whole.offset + (start - whole.address),
                len: end.saturating_sub(start),
            };
            let start = whole.address.max(addresses.start);
            let end = whole.addresses().end.min(addresses.end);
            self.insert(part(whole.address, start));
            self.insert(part(end, whole.addresses().end));
            taken.push(part(start, end));
        }
        taken
    }

    /// Takes out everything with one of these places.
    pub(super) fn take_places(&mut self, places: &Range<u64>) {
        while let Some(part) = self.first_of(places) {
            self.take(&part.addresses());
        }
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

    fn missing(parts: &[Part]) -> Parts {
        let mut missing = Parts::default();
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
        missing.take_places(&(5..28));
        assert_eq!(missing.first_of(&(0..30)), Some(part(100, 0, 5)));
        missing.take_places(&(0..5));
        assert_eq!(missing.first_of(&(0..30)), Some(part(308, 28, 2)));
        missing.take_places(&(0..100));
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
                        missing.take_places(&(from..from + len));
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
