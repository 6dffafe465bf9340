//! The tables, the JSON, and whether the project's bounds were met.

use crate::machine::{Machine, Temperature};
use crate::{arriving, capture, frozen, real_criu, restore};
use serde::Serialize;

#[derive(Serialize)]
pub struct Report {
    pub machine: Machine,
    pub capture: Vec<capture::Figures>,
    pub restore: Vec<restore::Figures>,
    pub extract: Option<restore::ExtractFigures>,
    pub arriving: Vec<arriving::Figures>,
    /// Why nothing was measured that takes a real CRIU.
    pub no_criu: Option<String>,
    pub frozen: Option<frozen::Figures>,
    pub real_criu: Option<real_criu::Figures>,
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
        bounds.extend(restore_bounds(&self.restore));
        if let Some(extract) = &self.extract {
            let seconds = extract.seconds / extract.cat_seconds;
            let cpu = extract.cpu_s / extract.cat_cpu_s;
            bounds.extend([
                Bound::at_most("extract: time, times `cat`'s", 1.1, seconds),
                Bound::at_most("extract: CPU time, times `cat`'s", 1.1, cpu),
            ]);
        }
        bounds.extend(self.arriving.iter().flat_map(arriving_bounds));
        if let Some(frozen) = &self.frozen {
            let times_cat = frozen.copied_s / frozen.cat_s;
            let what = format!("{}: time to memory-copied, times `cat`'s", frozen.scenario);
            bounds.push(Bound::at_most(what, 1.3, times_cat));
        }
        if let Some(real) = &self.real_criu {
            let times_directory = real.buffered_s / real.directory_s;
            let what = format!("{}: s frozen, times a directory's", real.scenario);
            bounds.push(Bound::at_most(what, 1.0, times_directory));
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
        self.print_arriving();
        if let Some(frozen) = &self.frozen {
            print_frozen(frozen);
        }
        if let Some(real) = &self.real_criu {
            println!(
                "\nfrozen: s, as told by a real CRIU that dumps {} MiB",
                real.bytes >> 20
            );
            println!(
                "{:<30} with a buffer {:.3}, without {:.3}, into a directory in memory {:.3}",
                real.scenario, real.buffered_s, real.unbuffered_s, real.directory_s
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
            "Restores find memory that was in use just before, so that no hypervisor's page faults are measured; those named cold find memory that a hypervisor has taken back."
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
        println!(
            "\nrestore: the streamer, the streamer that holds nothing in pipes, and the naive receiver"
        );
        println!(
            "{:<50} {:<9} {:>8} {:>9} {:>8} {:>8} {:>9} {:>8} {:>11}",
            "", "", "receive", "CPU s/GB", "", "", "all pro-", "serve", "memory over"
        );
        println!(
            "{:<50} {:<9} {:>8} {:>9} {:>8} {:>8} {:>9} {:>8} {:>11}",
            "scenario", "", "GB/s", "receiving", "serving", "both", "cesses", "GB/s", "image, MiB"
        );
        for row in &self.restore {
            let sides = [
                ("streamer", Some(&row.streamer)),
                ("in memory", row.in_memory.as_ref()),
                ("naive", Some(&row.naive)),
            ];
            for (program, side) in sides {
                let Some(side) = side else { continue };
                println!(
                    "{:<50} {:<9} {:>8.2} {:>9.3} {:>8.3} {:>8.3} {:>9.3} {:>8.2} {:>11}",
                    row.scenario,
                    program,
                    side.receive_gb_per_s,
                    side.receive_cpu_s_per_gb,
                    side.serve_cpu_s_per_gb,
                    side.cpu_s_per_gb,
                    side.all_cpu_s_per_gb,
                    side.serve_gb_per_s,
                    mib(side.peak_over_image_mib)
                );
            }
        }
        println!(
            "CPU: the receiver's, and of it, the producers and CRIU together. Memory: the most that the producers, the receiver and CRIU took together, over the image's size."
        );
    }

    fn print_arriving(&self) {
        if let Some(why) = &self.no_criu {
            println!("\nrestore with a real CRIU: not measured, as there is none ({why})");
        }
        if self.arriving.is_empty() {
            return;
        }
        println!(
            "\nrestore with a real CRIU, from 4 shards and an index: seconds from the first byte to the running application"
        );
        println!(
            "{:<24} {:>9} {:>9} {:>9} {:>9} {:>9} {:>23}",
            "", "download", "CRIU", "all first", "as it", "x the", "memory over image, MiB"
        );
        println!(
            "{:<24} {:>9} {:>9} {:>9} {:>9} {:>9} {:>11} {:>11}",
            "scenario", "alone", "alone", "then CRIU", "arrives", "longer", "all first", "arriving"
        );
        for row in &self.arriving {
            println!(
                "{:<24} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.2} {:>11} {:>11}",
                row.scenario,
                row.download_s,
                row.restore_s,
                row.without_index_s,
                row.with_index_s,
                row.with_index_s / row.longer_s(),
                mib(row.without_index_over_image_mib),
                mib(row.with_index_over_image_mib)
            );
        }
        println!(
            "Memory: the most that downloads, streamer, CRIU and application took together, over the image's size."
        );
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

fn mib(figure: Option<f64>) -> String {
    figure.map_or("unknown".to_owned(), |mib| format!("{mib:.1}"))
}

fn print_frozen(row: &frozen::Figures) {
    println!("\nfrozen: s until CRIU has handed over all, with a buffer and without");
    println!(
        "{:<30} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>11}",
        "", "", "memory-", "no", "", "reader,", "CPU", "RSS over"
    );
    println!(
        "{:<30} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>11}",
        "scenario", "CRIU's", "copied", "buffer", "cat", "huge p.", "s/GB", "image, MiB"
    );
    println!(
        "{:<30} {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>8.3} {:>9.3} {:>11.1}",
        row.scenario,
        row.criu_s,
        row.copied_s,
        row.unbuffered_s,
        row.cat_s,
        row.reader_s,
        row.cpu_s_per_gb,
        row.peak_rss_over_image_mib
    );
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

/// What a receiver of small files may take beside the image.
const OVER_IMAGE_MB: f64 = 4.0;

/// What all that takes part in a restore may take of the machine's memory beside the image.
const MEMORY_OVER_IMAGE_MIB: f64 = 64.0;

/// What it may cost more on cold memory.
const TIMES_WARM: f64 = 1.3;

fn restore_bounds(rows: &[restore::Figures]) -> Vec<Bound> {
    let mut bounds: Vec<_> = rows.iter().flat_map(bounds_of_row).collect();
    for cold in rows
        .iter()
        .filter(|row| row.memory == Temperature::Cold && !row.restricted)
    {
        let name = cold.scenario.trim_end_matches("-cold");
        let Some(warm) = rows.iter().find(|row| row.scenario == name) else {
            continue;
        };
        let (cold_side, warm_side) = (&cold.streamer, &warm.streamer);
        let of = |what: &str| format!("{}: {what}, times warm", cold.scenario);
        bounds.extend([
            Bound::at_most(
                of("receiving s/GB"),
                TIMES_WARM,
                warm_side.receive_gb_per_s / cold_side.receive_gb_per_s,
            ),
            Bound::at_most(
                of("receiving CPU s/GB"),
                TIMES_WARM,
                cold_side.receive_cpu_s_per_gb / warm_side.receive_cpu_s_per_gb,
            ),
            Bound::at_most(
                of("receiving and serving CPU s/GB"),
                TIMES_WARM,
                cold_side.cpu_s_per_gb / warm_side.cpu_s_per_gb,
            ),
        ]);
    }
    bounds
}

fn memory_bound(scenario: &str, over_image_mib: Option<f64>) -> Option<Bound> {
    let what = format!("{scenario}: memory over the image, MiB");
    over_image_mib.map(|mib| Bound::at_most(what, MEMORY_OVER_IMAGE_MIB, mib))
}

fn arriving_bounds(row: &arriving::Figures) -> Vec<Bound> {
    let of = |what: &str| format!("{}: {what}", row.scenario);
    let time = if row.scenario == arriving::AT_ONCE {
        let times = row.with_index_s / row.without_index_s;
        Bound::at_most(of("s with an index, times without"), 1.0, times)
    } else {
        let times = row.with_index_s / row.longer_s();
        let what = of("s, times the longer of download and CRIU's restore");
        Bound::at_most(what, 1.15, times)
    };
    let memory = memory_bound(row.scenario, row.with_index_over_image_mib);
    [time].into_iter().chain(memory).collect()
}

fn bounds_of_row(row: &restore::Figures) -> Vec<Bound> {
    let (ours, naive) = (&row.streamer, &row.naive);
    let of = |what: &str| format!("{}: {what}", row.scenario);
    if row.scenario.starts_with("restore/small-files") {
        let overhead = (ours.receive_peak_rss_over_image_mb - OVER_IMAGE_MB) * 1e6;
        return vec![
            Bound::at_most(of("s to serve"), 1.5, ours.serve_s),
            Bound::at_most(of("CPU s in all"), 1.0, ours.cpu_s),
            Bound::at_most(
                of("bytes of overhead for a file, beyond 4 MB"),
                150.0,
                (overhead / restore::SMALL_FILES as f64).max(0.0),
            ),
        ];
    }
    let times_naive = ours.receive_gb_per_s / naive.receive_gb_per_s;
    let cpu_times_naive = ours.cpu_s_per_gb / naive.cpu_s_per_gb;
    let memory = memory_bound(&row.scenario, ours.peak_over_image_mib);
    let mut bounds: Vec<_> = memory.into_iter().collect();
    if row.restricted {
        bounds.extend([
            Bound::at_least(of("receiving GB/s, times naive"), 1.0, times_naive),
            Bound::at_most(of("CPU s/GB, times naive"), 1.0, cpu_times_naive),
        ]);
        return bounds;
    }
    if row.scenario == "restore/4-shards-64KiB-blocks" {
        bounds.extend([
            Bound::at_least(of("receiving GB/s"), 4.0, ours.receive_gb_per_s),
            Bound::at_most(of("receiving CPU s/GB"), 0.06, ours.receive_cpu_s_per_gb),
            Bound::at_most(
                of("receiving and serving CPU s/GB"),
                0.15,
                ours.cpu_s_per_gb,
            ),
        ]);
    }
    if let Some(in_memory) = &row.in_memory
        && [
            "restore/4-shards-64KiB-blocks",
            "restore/4-shards-64KiB-blocks-cold",
        ]
        .contains(&row.scenario.as_str())
    {
        bounds.push(Bound::at_most(
            of("CPU s/GB of all processes, times in memory"),
            0.7,
            ours.all_cpu_s_per_gb / in_memory.all_cpu_s_per_gb,
        ));
    }
    if let Some(in_memory) = &row.in_memory {
        bounds.push(Bound::at_most(
            of("CPU s/GB in memory, times naive"),
            1.0,
            in_memory.cpu_s_per_gb / naive.cpu_s_per_gb,
        ));
    }
    bounds
}
