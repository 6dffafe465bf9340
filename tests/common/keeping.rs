//! Where `serve` keeps the pages of an image. Limits decide, so that a test chooses a limit.

use super::child::Limit;
use super::streamer::{Launch, Streamer};

/// Descriptors that the streamer leaves for everything else before it holds data in pipes.
const OTHER_DESCRIPTORS: u64 = 512;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeping {
    /// In pipes that hold the pages in which they arrived: all but small chunks. Without
    /// privileges it is [`Keeping::Memory`].
    Pipes,
    /// In memory, as with few descriptors.
    Memory,
    /// In so few pipes that only some of it is held, and in memory.
    Both,
}

/// What starts the streamer in a script.
const SERVE: &str = "criu-image-streamer ";

impl Keeping {
    pub const ALL: [Self; 3] = [Self::Pipes, Self::Memory, Self::Both];

    /// Pipes of [`Keeping::Both`].
    pub const FEW_PIPES: u64 = 3;

    /// Another one for each number, all in turn.
    pub fn in_turn(number: usize) -> Self {
        Self::ALL[number % Self::ALL.len()]
    }

    fn open_files(self) -> Option<u64> {
        match self {
            Self::Pipes => None,
            Self::Memory => Some(OTHER_DESCRIPTORS / 2),
            Self::Both => Some(OTHER_DESCRIPTORS + Self::FEW_PIPES),
        }
    }

    /// A `serve` that keeps the image so.
    pub fn serve(self) -> Launch {
        let launch = Streamer::serve();
        match self.open_files() {
            None => launch,
            Some(count) => launch.limit(Limit::OpenFiles(count)),
        }
    }

    /// A script whose one command of the streamer is a `serve`, changed to keep the image so.
    pub fn in_script(self, script: &str) -> String {
        let Some(count) = self.open_files() else {
            return script.to_owned();
        };
        let limited =
            format!(r#"bash -c 'ulimit -n {count}; exec "$0" "$@"' criu-image-streamer "#);
        assert_eq!(script.matches(SERVE).count(), 1, "no serve in {script}");
        script.replace(SERVE, &limited)
    }
}
