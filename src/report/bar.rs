//! The display for people while an image is on its way: `--progress-bar`.
//!
//! The transfer only counts. A thread of its own draws, so that a slow terminal holds up nothing,
//! and a transfer that stands still is seen to stand still. The display goes to standard error, and
//! never to a descriptor that carries progress lines, which programs read.

use std::fmt::Write as _;
use std::io::stderr;
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use indicatif::{ProgressBar as Line, ProgressStyle};

use super::meter::{Counter, Counters};
use super::notice::write_text;
use super::progress::Stats;
use crate::os::descriptor::Direction;

/// The interval between two drawings on a terminal.
const REDRAW_INTERVAL: Duration = Duration::from_millis(200);

/// The interval between two lines elsewhere.
const LINE_INTERVAL: Duration = Duration::from_secs(3);

/// The longest time that the end of the display may hold up the program.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// The display. Dropped, it leaves an empty line for what comes next, such as an error.
pub(crate) struct ProgressBar {
    statistics: Option<Sender<Stats>>,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

impl ProgressBar {
    /// Starts drawing. `labels` names the shards. Without a thread there is no display, and no
    /// failure.
    pub(crate) fn start(direction: Direction, labels: Vec<String>, counters: Counters) -> Self {
        let (statistics, at_the_end) = bounded(1);
        let (end, ended) = bounded(0);
        let display = move || {
            if let Some(stats) = draw(direction, &counters, &at_the_end) {
                let text = summary(direction, counters.files.get(), &labels, &stats);
                let _ = write_text(stderr(), &text);
            }
            drop(end);
        };
        // It is waited for by its channel: one that is stuck in a stopped terminal is left behind.
        let _ = thread::Builder::new()
            .name("progress bar".into())
            .spawn(display);
        Self {
            statistics: Some(statistics),
            ended,
        }
    }

    /// Ends the display with a line for the image and one for each shard.
    pub(crate) fn conclude(self, stats: &Stats) {
        if let Some(statistics) = &self.statistics {
            let _ = statistics.send(stats.clone());
        }
    }
}

impl Drop for ProgressBar {
    fn drop(&mut self) {
        drop(self.statistics.take());
        let _: Result<(), _> = self.ended.recv_timeout(END_TIMEOUT);
    }
}

/// Draws until the statistics come: one line again and again on a terminal, lines elsewhere.
fn draw(direction: Direction, counters: &Counters, statistics: &Receiver<Stats>) -> Option<Stats> {
    let style = ProgressStyle::with_template("{wide_msg}").expect("the template is well-formed");
    let line = Line::new_spinner().with_style(style);
    let interval = match line.is_hidden() {
        true => LINE_INTERVAL,
        false => REDRAW_INTERVAL,
    };
    let mut before = (Instant::now(), 0);
    loop {
        match statistics.recv_timeout(interval) {
            Err(RecvTimeoutError::Timeout) => {}
            ended => {
                line.finish_and_clear();
                return ended.ok();
            }
        }
        let text = text(direction, counters, &mut before);
        if line.is_hidden() {
            let _ = write_text(stderr(), &format!("{text}\n"));
        } else {
            line.set_message(text);
        }
    }
}

/// The line for the present state. `before` is the time of the last one, and the bytes by then.
fn text(direction: Direction, counters: &Counters, before: &mut (Instant, u64)) -> String {
    let shards: Vec<_> = counters.shards.iter().map(Counter::get).collect();
    let bytes: u64 = shards.iter().sum();
    let (then, bytes_then) = std::mem::replace(before, (Instant::now(), bytes));
    if bytes == 0 {
        return match direction {
            Direction::Out => "waiting for CRIU: run `criu dump --stream`".into(),
            Direction::In => "waiting for the image".into(),
        };
    }
    let filled = counters.filled.get();
    if filled > 0 {
        let filled = size(filled);
        return format!("the application runs; {filled} of its memory are in place");
    }
    let speed = speed(bytes - bytes_then, then.elapsed());
    let (files, size) = (counters.files.get(), size(bytes));
    let mut text = format!("{files} files, {size}, {speed}");
    if shards.len() > 1 {
        text.push_str(", shards");
        for share in shards {
            let _ = write!(text, " {}%", percent(share, bytes));
        }
    }
    if counters.copied.get() > 0 {
        text.push_str(", all of the memory is copied");
    }
    text
}

/// The totals, in lines that end the display.
fn summary(direction: Direction, files: u64, labels: &[String], stats: &Stats) -> String {
    let bytes = stats.shards.iter().map(|shard| shard.size).sum();
    let shards = stats.shards.iter();
    let millis = shards.map(|shard| shard.transfer_duration_millis).max();
    let verb = match direction {
        Direction::Out => "captured",
        Direction::In => "received",
    };
    let mut text = format!(
        "{verb} {files} files, {}\n",
        transfer(bytes, millis.unwrap_or(0))
    );
    for (label, shard) in labels.iter().zip(&stats.shards) {
        let transfer = transfer(shard.size, shard.transfer_duration_millis);
        let share = percent(shard.size, bytes);
        let _ = writeln!(text, "  {label}: {transfer}, {share}% of the image");
    }
    text.push_str(&stats.times.sentences(labels));
    text
}

fn transfer(bytes: u64, millis: u64) -> String {
    let duration = Duration::from_millis(millis);
    let (size, speed) = (size(bytes), speed(bytes, duration));
    format!("{size} in {:.1} s, {speed}", duration.as_secs_f64())
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

/// The speed. A duration of less than a millisecond was measured too coarsely to divide by.
fn speed(bytes: u64, duration: Duration) -> String {
    let seconds = duration.max(Duration::from_millis(1)).as_secs_f64();
    format!("{}/s", size((bytes as f64 / seconds) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::progress::ShardStats;
    use crate::report::times::Times;

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
            times: Times::default(),
        };
        let labels = ["shard fd 10".to_owned(), "shard command 2".to_owned()];
        assert_eq!(
            summary(Direction::Out, 12, &labels, &stats),
            "captured 12 files, 4.00 GB in 2.0 s, 2.00 GB/s\n  \
             shard fd 10: 3.00 GB in 1.5 s, 2.00 GB/s, 75% of the image\n  \
             shard command 2: 1.00 GB in 2.0 s, 500.0 MB/s, 25% of the image\n"
        );
    }

    #[test]
    fn a_line_tells_when_the_memory_is_copied() {
        let counters = Counters::new(1);
        counters.shards[0].add(5_000_000);
        let mut before = (Instant::now(), 0);
        let line = text(Direction::Out, &counters, &mut before);
        assert!(!line.contains("copied"), "{line}");
        counters.copied.add(1);
        let line = text(Direction::Out, &counters, &mut before);
        assert!(line.ends_with("all of the memory is copied"), "{line}");
    }

    #[test]
    fn a_line_tells_how_much_memory_is_in_place() {
        let counters = Counters::new(1);
        counters.shards[0].add(5_000_000);
        counters.filled.add(4_000_000);
        let line = text(Direction::In, &counters, &mut (Instant::now(), 0));
        assert_eq!(
            line,
            "the application runs; 4.0 MB of its memory are in place"
        );
    }

    #[test]
    fn an_empty_image_is_summed_up_too() {
        let text = summary(Direction::In, 0, &["a".into()], &Stats::default());
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
