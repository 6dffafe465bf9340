//! Prefaults the buffer's memory on another thread.
//!
//! The kernel gives new memory its pages one by one, and clears them, while the source's pipe is
//! locked, so that CRIU waits as well. A real CRIU that hands over 1 GiB had the application frozen
//! for 0.63 to 1.3 s so, and for 0.30 to 0.34 s where another thread has the pages put behind the
//! memory that is needed next (2026-11-25, two cores, CRIU and streamer before all other
//! processes). The first of it is there before CRIU comes.
//! Where that thread does not keep pace, the one that copies takes memory as it is.

use crossbeam_channel::{Receiver, Sender, unbounded};

use crate::os::memory::HUGE_PAGE;
use crate::store::{Arena, Block};

/// Bytes populated at a time.
const BLOCK: usize = HUGE_PAGE;

/// Bytes kept ready. What is there before CRIU comes costs the application nothing.
const MOST: usize = 256 << 20;

/// The thread that populates blocks, and those that are ready.
pub(super) struct Prefault {
    blocks: Sender<Block>,
    ready: Receiver<Block>,
    most: usize,
}

impl Prefault {
    /// For a buffer of `size` bytes. `None` where there can be no thread.
    pub(super) fn start(size: usize) -> Option<Self> {
        let (blocks, unpopulated) = unbounded::<Block>();
        let (populated, ready) = unbounded();
        let populate = move || {
            for mut block in unpopulated {
                block.populate();
                if populated.send(block).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("buffer".into());
        thread.spawn(populate).ok()?;
        Some(Self {
            blocks,
            ready,
            most: (size / 4).min(MOST) / BLOCK,
        })
    }

    /// Has more memory of the arena's populated, where there is room for this number of bytes.
    pub(super) fn ask(&self, arena: &mut Arena, room: usize) {
        let asked = self.blocks.len() + self.ready.len();
        for _ in 0..(room / BLOCK).min(self.most.saturating_sub(asked)) {
            // Where there is no memory, the one that copies reports it.
            let Ok(block) = arena.reserve(BLOCK) else {
                return;
            };
            let _ = self.blocks.send(block);
        }
    }

    /// The next block, if one is ready.
    pub(super) fn take(&self) -> Option<Block> {
        self.ready.try_recv().ok()
    }
}
