//! What a person sees while an image is on its way: `--progress-bar`.
//!
//! The transfer only counts; a thread of its own draws, so that drawing to a
//! slow terminal holds up nothing, and a transfer that stands still is seen to stand still. It goes to standard error, and never to
//! a descriptor that carries progress lines: programs read those.

use std::fmt::Write as _;
use std::io::{IsTerminal, stderr};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::report::meter::{Counter, Counters};
use crate::report::notice::{write_line, write_text};
use crate::report::progress::Stats;

/// Between two drawings on a terminal.
const REDRAW: Duration = Duration::from_millis(200);

/// Between two lines elsewhere.
const NEXT_LINE: Duration = Duration::from_secs(3);

/// Bytes of the drawing thread's stack.
const STACK: usize = 64 << 10;

/// Begins a line anew, and keeps one that is too long from going on in the next, where it would stay.
const REWIND: &str = "\r\x1b[K\x1b[?7l";
const UNWIND: &str = "\x1b[?7h";

/// Which way an image goes, for the words to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journey {
    Captured,
    Received,
}

/// The display. Dropped, it leaves an empty line for what comes next, such as an error.
pub struct ProgressBar {
    counters: Counters,
    journey: Journey,
    labels: Vec<String>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ProgressBar {
    /// Starts drawing. `labels` names the shards. A thread that cannot be had costs the display only.
    pub fn start(journey: Journey, labels: Vec<String>, counters: Counters) -> Self {
        let (stop, stopped) = mpsc::channel();
        let mut display = Display {
            counters: counters.clone(),
            journey,
            before: (Instant::now(), 0),
        };
        let draw = move || {
            let on_terminal = stderr().is_terminal();
            let interval = if on_terminal { REDRAW } else { NEXT_LINE };
            while stopped.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
                let line = display.line();
                // Nobody can be told that the display does not work.
                let _ = if on_terminal {
                    write_text(stderr(), &format!("{REWIND}{line}{UNWIND}"))
                } else {
                    write_line(stderr(), &line)
                };
            }
            if on_terminal {
                let _ = write_text(stderr(), &format!("{REWIND}{UNWIND}"));
            }
        };
        let thread = thread::Builder::new()
            .name("progress bar".into())
            .stack_size(STACK)
            .spawn(draw)
            .ok();
        Self {
            counters,
            journey,
            labels,
            stop: Some(stop),
            thread,
        }
    }

    /// Ends the display with a line for the image and one for each shard.
    pub fn conclude(mut self, stats: &Stats) {
        self.stop();
        let files = self.counters.files.get();
        let _ = write_text(stderr(), &summary(self.journey, files, &self.labels, stats));
    }

    fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It does not panic, and if it did, only the display would be gone.
            let _ = thread.join();
        }
    }
}

impl Drop for ProgressBar {
    fn drop(&mut self) {
        self.stop();
    }
}

struct Display {
    counters: Counters,
    journey: Journey,
    before: (Instant, u64),
}

impl Display {
    fn line(&mut self) -> String {
        let shards: Vec<_> = self.counters.shards.iter().map(Counter::get).collect();
        let bytes: u64 = shards.iter().sum();
        let (before, bytes_before) = std::mem::replace(&mut self.before, (Instant::now(), bytes));
        if bytes == 0 {
            return match self.journey {
                Journey::Captured => "waiting for CRIU: run `criu dump --stream`".into(),
                Journey::Received => "waiting for the image".into(),
            };
        }
        let mut line = format!(
            "{} files, {}, {}",
            self.counters.files.get(),
            size(bytes),
            speed(bytes - bytes_before, before.elapsed()),
        );
        if shards.len() > 1 {
            line.push_str(", shards");
            for share in shards {
                let _ = write!(line, " {}%", percent(share, bytes));
            }
        }
        line
    }
}

/// What passed, in lines that end the display.
fn summary(journey: Journey, files: u64, labels: &[String], stats: &Stats) -> String {
    let bytes = stats.shards.iter().map(|shard| shard.size).sum();
    let millis = stats
        .shards
        .iter()
        .map(|shard| shard.transfer_duration_millis);
    let duration = Duration::from_millis(millis.max().unwrap_or(0));
    let verb = match journey {
        Journey::Captured => "captured",
        Journey::Received => "received",
    };
    let mut text = format!(
        "{verb} {files} files, {} in {:.1} s, {}\n",
        size(bytes),
        duration.as_secs_f64(),
        speed(bytes, duration)
    );
    for (label, shard) in labels.iter().zip(&stats.shards) {
        let duration = Duration::from_millis(shard.transfer_duration_millis);
        let _ = writeln!(
            text,
            "  {label}: {} in {:.1} s, {}, {}% of the image",
            size(shard.size),
            duration.as_secs_f64(),
            speed(shard.size, duration),
            percent(shard.size, bytes)
        );
    }
    text
}

fn percent(part: u64, whole: u64) -> u64 {
    (u128::from(part) * 100 / u128::from(whole.max(1))) as u64
}

fn size(bytes: u64) -> String {
    match bytes {
        0..1_000 => format!("{bytes} bytes"),
        1_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.2} GB", bytes as f64 / 1e9),
    }
}

/// What takes less than a millisecond was measured too coarsely to divide by.
fn speed(bytes: u64, duration: Duration) -> String {
    let seconds = duration.max(Duration::from_millis(1)).as_secs_f64();
    format!("{}/s", size((bytes as f64 / seconds) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::progress::ShardStats;

    #[test]
    fn a_summary_has_a_readable_line_for_each_shard() {
        let stats = Stats {
            shards: vec![
                ShardStats {
                    size: 3_000_000_000,
                    transfer_duration_millis: 1500,
                },
                ShardStats {
                    size: 1_000_000_000,
                    transfer_duration_millis: 2000,
                },
            ],
        };
        let labels = ["shard fd 10".to_owned(), "shard command 2".to_owned()];
        assert_eq!(
            summary(Journey::Captured, 12, &labels, &stats),
            "captured 12 files, 4.00 GB in 2.0 s, 2.00 GB/s\n  \
             shard fd 10: 3.00 GB in 1.5 s, 2.00 GB/s, 75% of the image\n  \
             shard command 2: 1.00 GB in 2.0 s, 500.0 MB/s, 25% of the image\n"
        );
    }

    #[test]
    fn an_empty_image_is_summed_up_too() {
        let text = summary(Journey::Received, 0, &["a".into()], &Stats::default());
        assert_eq!(text, "received 0 files, 0 bytes in 0.0 s, 0 bytes/s\n");
    }

    #[test]
    fn sizes_have_the_unit_that_fits() {
        let sizes = [999, 1_000, 999_949, 1_000_000, 2_500_000_000].map(size);
        assert_eq!(
            sizes,
            ["999 bytes", "1.0 kB", "999.9 kB", "1.0 MB", "2.50 GB"]
        );
    }
}
