//! `--statistics`: all that is known about a transfer, as JSON, for programs.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use super::notice::warn;
use super::progress::{ShardStats, Stats};
use super::times::Times;

/// The file, which is made before the transfer begins.
pub(crate) struct StatisticsFile(File);

#[derive(Serialize)]
struct Statistics<'a> {
    files: u64,
    shards: Vec<Shard<'a>>,
    phases: &'a Times,
}

#[derive(Serialize)]
struct Shard<'a> {
    name: &'a str,
    #[serde(flatten)]
    stats: ShardStats,
}

impl StatisticsFile {
    /// # Errors
    /// When the file cannot be made.
    pub(crate) fn create(path: &Path) -> Result<Self> {
        let file = File::create(path);
        let file = file.with_context(|| format!("--statistics: creating {}", path.display()))?;
        Ok(Self(file))
    }

    /// Writes them. A disk that is full then is told of, and harms no image.
    pub(crate) fn write(mut self, files: u64, labels: &[String], stats: &Stats) {
        let shards = labels.iter().zip(&stats.shards);
        let statistics = Statistics {
            files,
            shards: shards.map(|(name, &stats)| Shard { name, stats }).collect(),
            phases: &stats.times,
        };
        let text = serde_json::to_string_pretty(&statistics).expect("plain numbers make JSON");
        if let Err(error) = writeln!(self.0, "{text}") {
            warn(format_args!("--statistics: writing the file: {error}"));
        }
    }
}
