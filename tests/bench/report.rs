//! The figures, as tables in Markdown and as JSON, and whether the project's bounds were met.

use crate::machine::Machine;
use crate::restore::ALL_FIRST;
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::{Path, PathBuf},
};

/// One run's.
pub type Figures = BTreeMap<String, f64>;

/// As in "GB/s".
pub const GB: f64 = 1e9;

/// One way of doing what a scenario does.
#[derive(Serialize, Deserialize)]
pub struct Row {
    scenario: String,
    way: String,
    runs: usize,
    /// Of all runs, in their order: those of the same number are a pair.
    figures: BTreeMap<String, Vec<f64>>,
}

#[derive(Serialize, Deserialize)]
pub struct Report {
    machine: Machine,
    rows: Vec<Row>,
    #[serde(skip)]
    path: Option<PathBuf>,
}

/// Bytes of memory that may be in use beside the image.
const MEMORY_OVER_IMAGE_MIB: f64 = 64.0;

struct Table {
    /// Of the scenarios in it.
    prefix: &'static str,
    title: &'static str,
    columns: &'static [Column],
}

struct Column {
    head: &'static str,
    figure: &'static str,
    digits: usize,
    of: fn(&[f64]) -> f64,
}

fn middle(values: &[f64]) -> f64 {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    (values[(values.len() - 1) / 2] + values[values.len() / 2]) / 2.0
}

fn largest(values: &[f64]) -> f64 {
    values.iter().copied().fold(f64::MIN, f64::max)
}

const fn median(head: &'static str, figure: &'static str, digits: usize) -> Column {
    Column {
        head,
        figure,
        digits,
        of: middle,
    }
}

const fn worst(head: &'static str, figure: &'static str, digits: usize) -> Column {
    Column {
        head,
        figure,
        digits,
        of: largest,
    }
}

const TABLES: &[Table] = &[
    Table {
        prefix: "capture/",
        title: "Capture: CRIU's side, and until the last command has ended",
        columns: &[
            median("frozen, s", "frozen_s", 2),
            median("GB/s", "gb_per_s", 2),
            median("all written, s", "written_s", 2),
            median("streamer, CPU s/GB", "cpu_s_per_gb", 3),
            median("all, CPU s/GB", "all_cpu_s_per_gb", 2),
            median("streamer's memory, MB", "rss_mb", 1),
            median("largest shard over mean", "largest_over_mean", 2),
        ],
    },
    Table {
        prefix: "even/",
        title: "Largest shard over the mean",
        columns: &[
            median("median", "largest_over_mean", 2),
            worst("worst", "largest_over_mean", 2),
            median("frozen, s", "frozen_s", 2),
            median("all written, s", "written_s", 2),
        ],
    },
    Table {
        prefix: "link/",
        title: "Compressors over links",
        columns: &[
            median("frozen, s", "frozen_s", 2),
            median("all written, s", "written_s", 2),
            median("all, CPU s", "all_cpu_s", 2),
            median("MB stored", "stored_mb", 0),
        ],
    },
    Table {
        prefix: "frozen/",
        title: "Frozen, under CRIU's hook, as CRIU says",
        columns: &[
            median("frozen, s", "frozen_s", 2),
            worst("longest", "frozen_s", 2),
            median("all written, s", "written_s", 2),
        ],
    },
    Table {
        prefix: "restore/",
        title: "Restore: from the first byte to the running application",
        columns: &[
            median("CRIU can connect, s", "listens_s", 2),
            median("running, s", "running_s", 2),
            median("all in place, s", "in_place_s", 2),
            median("CRIU, s", "criu_s", 2),
            median("streamer, CPU s/GB", "cpu_s_per_gb", 2),
            median("all, CPU s/GB", "all_cpu_s_per_gb", 2),
            median("memory over image, MiB", "over_image_mib", 0),
        ],
    },
    Table {
        prefix: "touches/",
        title: "The first 20,000 accesses to pages at random",
        columns: &[
            median("running, s", "running_s", 2),
            median("all in place, s", "in_place_s", 2),
            median("99th percentile, ms", "late_ms", 3),
            median("slowest, ms", "latest_ms", 1),
        ],
    },
];

impl Report {
    /// With the rows that the file has already, if any.
    pub fn open(path: Option<&Path>, machine: Machine) -> Result<Self> {
        let rows = match path.filter(|path| path.exists()) {
            Some(path) => serde_json::from_reader::<_, Self>(File::open(path)?)?.rows,
            None => vec![],
        };
        Ok(Self {
            machine,
            rows,
            path: path.map(Path::to_owned),
        })
    }

    /// Adds a row, in place of an earlier one of the same scenario and way.
    pub fn add(&mut self, scenario: &str, way: &str, runs: &[Figures]) -> Result<()> {
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for (name, &value) in runs.iter().flatten() {
            values.entry(name.clone()).or_default().push(value);
        }
        let row = Row {
            scenario: scenario.to_owned(),
            way: way.to_owned(),
            runs: runs.len(),
            figures: values,
        };
        if let Some(table) = TABLES.iter().find(|t| scenario.starts_with(t.prefix)) {
            let cells = table.columns.iter();
            let cells: Vec<_> = cells
                .map(|column| format!("{} {}", column.head, row.cell(column)))
                .collect();
            eprintln!("  {way}: {}", cells.join("; "));
        }
        let same = |old: &Row| old.scenario == scenario && old.way == way;
        match self.rows.iter_mut().find(|old| same(old)) {
            Some(old) => *old = row,
            None => self.rows.push(row),
        }
        if let Some(path) = &self.path {
            let unfinished = path.with_extension("new");
            serde_json::to_writer_pretty(File::create(&unfinished)?, self)?;
            fs::rename(&unfinished, path).with_context(|| path.display().to_string())?;
        }
        Ok(())
    }

    /// The median of a figure, if that was measured.
    pub fn median(&self, scenario: &str, way: &str, figure: &str) -> Option<f64> {
        self.values(scenario, way, figure).map(middle)
    }

    fn values(&self, scenario: &str, way: &str, figure: &str) -> Option<&[f64]> {
        let row = (self.rows.iter()).find(|row| row.scenario == scenario && row.way == way)?;
        row.figures.get(figure).map(Vec::as_slice)
    }

    pub fn print(&self) {
        self.machine.print();
        println!("Medians. GB = 10^9 bytes. CPU = user and system.");
        for table in TABLES {
            let rows = self.rows.iter();
            let rows: Vec<_> = rows
                .filter(|row| row.scenario.starts_with(table.prefix))
                .collect();
            if !rows.is_empty() {
                table.print(&rows);
            }
        }
        println!("\nBounds:\n");
        for row in self
            .rows
            .iter()
            .filter(|row| row.way.starts_with("streamer"))
        {
            for (what, at_most, measured) in self.bounds(row) {
                let Some(measured) = measured else { continue };
                let verdict = if measured <= at_most { "ok" } else { "NOT MET" };
                let Row { scenario, way, .. } = row;
                println!(
                    "{verdict:>8}  {scenario}, {way}: {what}: {measured:.2}, at most {at_most}"
                );
            }
        }
    }

    /// The project's promises about a row: what, at most how much, and how much it is.
    fn bounds(&self, row: &Row) -> Vec<(&'static str, f64, Option<f64>)> {
        let of = |figure: &str, of: fn(&[f64]) -> f64| Some(of(row.figures.get(figure)?));
        let times = |figure: &str, way: &str| {
            Some(of(figure, middle)? / self.median(&row.scenario, way, figure)?)
        };
        let is_buffered = row.way.ends_with("--buffer");
        match row.scenario.split('/').next() {
            Some("capture") if is_buffered => {
                let plain = row.way.trim_end_matches(" --buffer");
                let written = times("written_s", plain);
                vec![("until all is written, times without", 1.15, written)]
            }
            Some("even") => {
                let (usual, most) = crate::capture::evenness_bounds(&row.scenario);
                let figure = "largest_over_mean";
                vec![
                    ("median", usual, of(figure, middle)),
                    ("worst", most, of(figure, largest)),
                ]
            }
            Some("frozen") if is_buffered => {
                let frozen = times("frozen_s", "directory");
                vec![("frozen, times a dump into a directory", 1.0, frozen)]
            }
            Some("restore") => {
                let over = of("over_image_mib", middle);
                let mut bounds = vec![("memory over the image, MiB", MEMORY_OVER_IMAGE_MIB, over)];
                if row.way.contains("lazy") {
                    let pairs = self.worst_pair(row);
                    bounds.push(("in place, times CRIU's own reading, worst pair", 0.6, pairs));
                }
                bounds
            }
            _ => vec![],
        }
    }

    /// From when CRIU can connect until all memory is in place, times what CRIU takes to read it.
    fn worst_pair(&self, lazy: &Row) -> Option<f64> {
        let in_place_s = lazy.figures.get("in_place_s")?;
        let took_s = in_place_s.iter().zip(lazy.figures.get("listens_s")?);
        let criu_s = self.values(&lazy.scenario, ALL_FIRST, "criu_s")?;
        let pairs = took_s.zip(criu_s);
        pairs
            .map(|((in_place, listens), criu)| (in_place - listens) / criu)
            .reduce(f64::max)
    }
}

impl Row {
    fn cell(&self, column: &Column) -> String {
        let values = self.figures.get(column.figure);
        values.map_or("–".to_owned(), |values| {
            format!("{:.*}", column.digits, (column.of)(values))
        })
    }
}

impl Table {
    fn print(&self, rows: &[&Row]) {
        println!("\n### {}\n", self.title);
        let heads = self.columns.iter().map(|column| column.head.to_owned());
        let mut lines = vec![
            ["scenario", "by", "runs"]
                .map(str::to_owned)
                .into_iter()
                .chain(heads)
                .collect::<Vec<_>>(),
        ];
        for row in rows {
            let name = row.scenario[self.prefix.len()..].to_owned();
            let cells = self.columns.iter().map(|column| row.cell(column));
            let start = [name, row.way.clone(), row.runs.to_string()];
            lines.push(start.into_iter().chain(cells).collect());
        }
        let width = |column: usize| {
            let cells = lines.iter().map(|line| line[column].chars().count());
            cells.max().unwrap_or_default()
        };
        let widths: Vec<_> = (0..lines[0].len()).map(width).collect();
        for (number, line) in lines.iter().enumerate() {
            let cells = line.iter().zip(&widths);
            let cells: Vec<_> = cells
                .map(|(cell, &width)| format!("{cell:width$}"))
                .collect();
            println!("| {} |", cells.join(" | "));
            if number == 0 {
                let rules: Vec<_> = widths.iter().map(|&width| "-".repeat(width)).collect();
                println!("| {} |", rules.join(" | "));
            }
        }
    }
}
