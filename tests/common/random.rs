//! Reproducible randomness: a failing seed printed by a test is all that is needed to run it again.

use std::ops::Range;
use std::sync::OnceLock;
use std::thread;

static POOL: OnceLock<Vec<u8>> = OnceLock::new();

/// SplitMix64: one addition and three xor-shift-multiplies for each number.
pub struct Random {
    state: u64,
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which must not be 0.
    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    /// True once in `n` times.
    pub fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, choices: &'a [T]) -> &'a T {
        &choices[self.below(choices.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// A stretch of a pool that is made once, as making megabytes anew for each file would take
    /// longer than moving them.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let pool = POOL.get_or_init(Self::pool);
        let from = self.below(pool.len());
        let mut bytes = Vec::with_capacity(len);
        let mut rest = &pool[from..];
        while bytes.len() < len {
            let taken = rest.len().min(len - bytes.len());
            bytes.extend_from_slice(&rest[..taken]);
            rest = pool;
        }
        bytes
    }

    fn pool() -> Vec<u8> {
        // Not a multiple of a page, so that no two pages of a file are alike.
        const NUMBERS: usize = (4 << 20) / 8 + 13;
        let mut random = Self::new(0);
        (0..NUMBERS)
            .flat_map(|_| random.next().to_le_bytes())
            .collect()
    }
}

/// Runs a round with each seed, and names the seed of a round that fails.
pub fn for_each_seed(seeds: Range<u64>, mut round: impl FnMut(u64)) {
    struct Round(u64);
    impl Drop for Round {
        fn drop(&mut self) {
            if thread::panicking() {
                eprintln!("the round with seed {} failed", self.0);
            }
        }
    }
    for seed in seeds {
        let _named_if_it_fails = Round(seed);
        round(seed);
    }
}

/// `len` bytes that depend on `seed`.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    Random::new(seed).bytes(len)
}
