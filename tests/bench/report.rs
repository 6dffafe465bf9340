//! The tables, the JSON, and whether the project's bounds were met.

use crate::machine::Machine;
use crate::{capture, restore};
use serde::Serialize;

#[derive(Serialize)]
pub struct Report {
    pub machine: Machine,
    pub capture: Vec<capture::Figures>,
    pub restore: Vec<restore::Figures>,
    pub extract: Option<restore::ExtractFigures>,
    pub bounds: Vec<Bound>,
}

/// What the project promises of a figure.
#[derive(Serialize)]
pub struct Bound {
    pub what: String,
    pub relation: &'static str,
    pub bound: f64,
    pub measured: f64,
    pub met: bool,
}

impl Bound {
    fn at_most(what: impl Into<String>, bound: f64, measured: f64) -> Self {
        Self {
            what: what.into(),
            relation: "at most",
            bound,
            measured,
            met: measured <= bound,
        }
    }

    fn at_least(what: impl Into<String>, bound: f64, measured: f64) -> Self {
        Self {
            what: what.into(),
            relation: "at least",
            bound,
            measured,
            met: measured >= bound,
        }
    }
}

impl Report {
    /// Judges what was measured. Bounds on scenarios that did not run are left out.
    pub fn judge(&mut self) {
        let mut bounds = capture_bounds(&self.capture);
        bounds.extend(self.restore.iter().flat_map(restore_bounds));
        if let Some(extract) = &self.extract {
            let seconds = extract.seconds / extract.cat_seconds;
            let cpu = extract.cpu_s / extract.cat_cpu_s;
            bounds.extend([
                Bound::at_most("extract: time, times `cat`'s", 1.1, seconds),
                Bound::at_most("extract: CPU time, times `cat`'s", 1.1, cpu),
            ]);
        }
        self.bounds = bounds;
    }

    pub fn print(&self) {
        self.print_machine();
        if !self.capture.is_empty() {
            self.print_capture();
        }
        if !self.restore.is_empty() {
            self.print_restore();
        }
        if let Some(extract) = &self.extract {
            println!("\nextract of {} MiB to memory", extract.bytes >> 20);
            println!(
                "  {:.3} s, {:.3} CPU s, peak RSS {:.2} MB; cat: {:.3} s, {:.3} CPU s",
                extract.seconds,
                extract.cpu_s,
                extract.peak_rss_mb,
                extract.cat_seconds,
                extract.cat_cpu_s
            );
        }
        self.print_bounds();
    }

    fn print_machine(&self) {
        let machine = &self.machine;
        println!(
            "{}: {} cores ({}), {} memory, Linux {}",
            machine.date, machine.cores, machine.cpu, machine.memory, machine.kernel
        );
        println!(
            "pipe-max-size {}, pipe-user-pages-soft {}, transparent huge pages {}, load {}",
            machine.pipe_max_size,
            machine.pipe_user_pages_soft,
            machine.transparent_huge_pages,
            machine.load_before
        );
        println!(
            "Restores find memory that was in use just before, so that no hypervisor's page faults are measured."
        );
        println!("Medians. GB = 10^9 bytes. CPU = the streamer's, user + system.");
    }

    fn print_capture(&self) {
        println!("\ncapture: the streamer beside the same writer that feeds the sinks directly");
        println!(
            "{:<42} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>7} {:>8}",
            "", "GB/s", "direct", "wall", "to sinks", "wall", "CPU", "CPU", "RSS", "largest"
        );
        println!(
            "{:<42} {:>8} {:>8} {:>8} {:>8} {:>9} {:>8} {:>8} {:>7} {:>8}",
            "scenario",
            "CRIU's",
            "GB/s",
            "x direct",
            "GB/s",
            "x direct",
            "s",
            "s/GB",
            "MB",
            "x mean"
        );
        for row in &self.capture {
            let optional = |value: Option<f64>| value.map_or("-".to_owned(), |v| format!("{v:.2}"));
            println!(
                "{:<42} {:>8.2} {:>8.2} {:>8.2} {:>8} {:>9} {:>8.4} {:>8.4} {:>7.2} {:>8.3}",
                row.scenario,
                row.gb_per_s,
                row.direct_gb_per_s,
                row.wall_multiple_of_direct,
                optional(row.sinks_gb_per_s),
                optional(row.sinks_wall_multiple_of_direct),
                row.cpu_s,
                row.cpu_s_per_gb,
                row.peak_rss_mb,
                row.largest_over_mean
            );
        }
    }

    fn print_restore(&self) {
        println!("\nrestore: the streamer beside the naive receiver");
        println!(
            "{:<34} {:<9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>13}",
            "", "", "receive", "CPU", "serve", "serve", "CPU", "CPU all", "CPU all", "RSS over"
        );
        println!(
            "{:<34} {:<9} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8} {:>13}",
            "scenario", "", "GB/s", "s/GB", "s", "GB/s", "s/GB", "s", "s/GB", "image, MB"
        );
        for row in &self.restore {
            for (program, side) in [("streamer", &row.streamer), ("naive", &row.naive)] {
                println!(
                    "{:<34} {:<9} {:>8.2} {:>8.3} {:>8.3} {:>8.2} {:>8.3} {:>8.3} {:>8.3} {:>6.2} {:>6.2}",
                    row.scenario,
                    program,
                    side.receive_gb_per_s,
                    side.receive_cpu_s_per_gb,
                    side.serve_s,
                    side.serve_gb_per_s,
                    side.serve_cpu_s_per_gb,
                    side.cpu_s,
                    side.cpu_s_per_gb,
                    side.receive_peak_rss_over_image_mb,
                    side.peak_rss_over_image_mb
                );
            }
        }
        println!("RSS: the peak while receiving, and at all.");
    }

    fn print_bounds(&self) {
        println!("\nbounds");
        for bound in &self.bounds {
            println!(
                "  {:<7} {}: {} {}, measured {:.4}",
                if bound.met { "ok" } else { "NOT MET" },
                bound.what,
                bound.relation,
                bound.bound,
                bound.measured
            );
        }
    }
}

fn capture_bounds(rows: &[capture::Figures]) -> Vec<Bound> {
    let row = |name: &str| {
        rows.iter()
            .find(|row| row.scenario == format!("capture/{name}"))
    };
    let mut bounds = vec![];
    if let Some(plain) = row("4-shards") {
        let of_direct = plain.gb_per_s / plain.direct_gb_per_s;
        bounds.extend([
            Bound::at_most("capture, 4 shards: CPU s/GB", 0.04, plain.cpu_s_per_gb),
            Bound::at_least("capture, 4 shards: GB/s, times direct", 0.5, of_direct),
        ]);
    }
    let slow_pairs = [
        ("4-shards", "4-shards-slow-1"),
        ("4-shards-256MiB", "4-shards-256MiB-slow-1"),
    ];
    for (plain, slow) in slow_pairs {
        if let (Some(plain), Some(slow)) = (row(plain), row(slow)) {
            bounds.push(Bound::at_least(
                format!("{}: GB/s, times {}", slow.scenario, plain.scenario),
                0.8,
                slow.gb_per_s / plain.gb_per_s,
            ));
        }
    }
    if let (Some(plain), Some(stalled)) = (row("4-shards-256MiB"), row("4-shards-256MiB-stalled-1"))
    {
        bounds.push(Bound::at_most(
            format!("{}: time, times {}", stalled.scenario, plain.scenario),
            1.5,
            stalled.criu_s / plain.criu_s,
        ));
    }
    for name in ["small-files-1-shard", "small-files-4-shards"] {
        if let Some(small) = row(name) {
            let what = format!("{}: CPU s", small.scenario);
            bounds.push(Bound::at_most(what, 0.5, small.cpu_s));
        }
    }
    for name in [
        "4-shards",
        "4-shards-lz4",
        "4-shards-busy",
        "4-shards-lz4-busy",
    ] {
        if let Some(even) = row(name) {
            let what = format!("{}: largest shard, times the mean", even.scenario);
            bounds.push(Bound::at_most(what, 1.1, even.largest_over_mean));
        }
    }
    if let Some(largest) = (rows.iter()).max_by(|a, b| a.peak_rss_mb.total_cmp(&b.peak_rss_mb)) {
        let what = format!("peak RSS of any capture, MB ({})", largest.scenario);
        bounds.push(Bound::at_most(what, 3.0, largest.peak_rss_mb));
    }
    bounds
}

/// What a receiver may take beside the image.
const OVER_IMAGE_MB: f64 = 4.0;

fn restore_bounds(row: &restore::Figures) -> Vec<Bound> {
    let (ours, naive) = (&row.streamer, &row.naive);
    let mut bounds = vec![];
    let of = |what: &str| format!("{}: {what}", row.scenario);
    if row.scenario.starts_with("restore/4-shards-") {
        bounds.push(Bound::at_most(
            of("CPU s/GB, times naive"),
            0.4,
            ours.cpu_s_per_gb / naive.cpu_s_per_gb,
        ));
        // Four lz4 share the cores with the receiver, and take most of them.
        if !row.scenario.ends_with("-lz4") {
            bounds.push(Bound::at_least(
                of("receiving GB/s, times naive"),
                2.0,
                ours.receive_gb_per_s / naive.receive_gb_per_s,
            ));
        }
    }
    if row.scenario.starts_with("restore/small-files") {
        bounds.push(Bound::at_most(of("s to serve"), 1.5, ours.serve_s));
        bounds.push(Bound::at_most(of("CPU s in all"), 1.0, ours.cpu_s));
        let overhead = (ours.receive_peak_rss_over_image_mb - OVER_IMAGE_MB) * 1e6;
        bounds.push(Bound::at_most(
            of("bytes of overhead for a file, beyond 4 MB"),
            150.0,
            (overhead / restore::SMALL_FILES as f64).max(0.0),
        ));
    } else {
        bounds.push(Bound::at_most(
            of("peak RSS over the image while receiving, MB"),
            OVER_IMAGE_MB,
            ours.receive_peak_rss_over_image_mb,
        ));
    }
    bounds
}
