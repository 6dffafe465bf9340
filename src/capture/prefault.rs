//! Prefaults the buffer's memory on another thread.
//!
//! The kernel gives new memory its pages one by one, and clears them, while the source's pipe is
//! locked, so that CRIU waits as well. A real CRIU that hands over 1 GiB had the application frozen
//! for 0.63 to 1.3 s so, and for 0.30 to 0.34 s where another thread has the pages put behind the
//! memory that is needed next (2026-11-25, two cores, CRIU and streamer before all other
//! processes). The first of it is there before CRIU comes.
//! Where that thread does not keep pace, the one that copies takes memory as it is.

use crossbeam_channel::{Receiver, Sender, TryRecvError, unbounded};

use crate::os::memory::HUGE_PAGE;
use crate::store::{Arena, Block};

/// Bytes populated at a time.
const BLOCK: usize = HUGE_PAGE;

/// Bytes kept ready. What is there before CRIU comes costs the application nothing.
const MOST: usize = 256 << 20;

/// Blocks that are ready, and the thread that makes them.
pub(super) struct Prefault {
    requests: Sender<()>,
    ready: Receiver<Block>,
    /// Blocks that were asked for and not taken.
    asked: usize,
    most: usize,
}

impl Prefault {
    /// For a buffer of `size` bytes, with memory that counts as that of `arena`, of which the first
    /// is asked for. `None` where there can be no thread.
    pub(super) fn start(arena: &Arena, size: usize) -> Option<Self> {
        let (requests, asked) = unbounded();
        let (finished, ready) = unbounded();
        let mut arena = arena.sibling();
        let populate = move || {
            for () in asked {
                let Ok(mut block) = arena.reserve(BLOCK) else {
                    return;
                };
                block.populate();
                if finished.send(block).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("buffer".into());
        thread.spawn(populate).ok()?;
        let mut prefault = Self {
            requests,
            ready,
            asked: 0,
            most: (size / 4).min(MOST) / BLOCK,
        };
        prefault.ask(size);
        Some(prefault)
    }

    /// Bytes that were asked for, and that the arena does not count yet, but for a block at most.
    pub(super) fn coming(&self) -> usize {
        self.asked.saturating_sub(self.ready.len()) * BLOCK
    }

    /// Asks for more, where there is room for this number of bytes.
    pub(super) fn ask(&mut self, room: usize) {
        let blocks = (room / BLOCK).min(self.most.saturating_sub(self.asked));
        for _ in 0..blocks {
            // Where the thread has ended, taking shows it.
            let _ = self.requests.send(());
        }
        self.asked += blocks;
    }

    /// The next block, if one is ready.
    pub(super) fn take(&mut self) -> Option<Block> {
        let taken = self.ready.try_recv();
        match taken {
            Ok(_) => self.asked -= 1,
            Err(TryRecvError::Empty) => {}
            // The thread found no memory, and has ended.
            Err(TryRecvError::Disconnected) => (self.asked, self.most) = (0, 0),
        }
        taken.ok()
    }
}
