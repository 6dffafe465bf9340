//! A picture of a restore's and a freeze's timelines, drawn from the benchmark's figures.

use crate::frozen::{BUFFERED, DIRECTORY, PLAIN, TO_LINK};
use crate::report::Report;
use crate::restore::{ALL_FIRST, ALONE, AT_500_MB_PER_S, WHILE_IT_ARRIVES};
use anyhow::{Context, Result};
use std::{fmt::Write, fs, path::Path};

/// A part of a lane, from one second to another.
struct Bar {
    from_s: f64,
    to_s: f64,
    colour: &'static str,
    text: &'static str,
}

fn bar(from_s: f64, to_s: f64, colour: &'static str, text: &'static str) -> Bar {
    Bar {
        from_s,
        to_s,
        colour,
        text,
    }
}

struct Lane {
    name: &'static str,
    bars: Vec<Bar>,
    /// The words for the end of the bar with this number.
    mark: (usize, String),
}

const DOWNLOAD: &str = "#9db8d2";
const CRIU: &str = "#e8a33d";
const FROZEN: &str = "#c8553d";
const UPLOAD: &str = "#9db8d2";

pub fn draw(report: &Report, path: &Path) -> Result<()> {
    let (restore, frozen) = (restore(report), frozen(report));
    let figures = restore.zip(frozen);
    let (restore, frozen) = figures.with_context(|| {
        format!("the timelines need the figures of {AT_500_MB_PER_S} and {TO_LINK}")
    })?;
    fs::write(path, picture(&restore, &frozen)?).with_context(|| path.display().to_string())
}

fn restore(report: &Report) -> Option<[Lane; 2]> {
    let figure = |way, name| report.median(AT_500_MB_PER_S, way, name);
    let download_s = figure(ALONE, "running_s")?;
    let (listens_s, running_s) = (
        figure(ALL_FIRST, "listens_s")?,
        figure(ALL_FIRST, "running_s")?,
    );
    let starts_s = figure(WHILE_IT_ARRIVES, "listens_s")?;
    let arriving_s = figure(WHILE_IT_ARRIVES, "running_s")?;
    let running = |at: f64| (1, format!("running after {at:.1} s"));
    Some([
        Lane {
            name: "all of it, then CRIU",
            bars: vec![
                bar(0.0, listens_s, DOWNLOAD, "download"),
                bar(listens_s, running_s, CRIU, "CRIU"),
            ],
            mark: running(running_s),
        },
        Lane {
            name: "while it arrives",
            bars: vec![
                bar(0.0, download_s, DOWNLOAD, "download"),
                bar(starts_s, arriving_s, CRIU, "CRIU"),
            ],
            mark: running(arriving_s),
        },
    ])
}

fn frozen(report: &Report) -> Option<[Lane; 3]> {
    let figure = |way, name| report.median(TO_LINK, way, name);
    let lane = |name, way| -> Option<Lane> {
        let (frozen_s, written_s) = (figure(way, "frozen_s")?, figure(way, "written_s")?);
        let mut bars = vec![bar(0.0, frozen_s, FROZEN, "frozen")];
        if way != DIRECTORY {
            bars.push(bar(0.0, written_s, UPLOAD, "upload"));
        }
        Some(Lane {
            name,
            bars,
            mark: (0, format!("goes on after {frozen_s:.1} s")),
        })
    };
    Some([
        lane("into tmpfs, no upload", DIRECTORY)?,
        lane("without a buffer", PLAIN)?,
        lane("with --buffer", BUFFERED)?,
    ])
}

const LEFT: f64 = 190.0;
const WIDTH: f64 = 860.0;
const LANE: f64 = 54.0;

fn picture(restore: &[Lane], frozen: &[Lane]) -> Result<String> {
    let lanes = restore.iter().chain(frozen);
    let longest = lanes.flat_map(|lane| lane.bars.iter().map(|bar| bar.to_s));
    let longest = longest.fold(0.0, f64::max);
    let scale = (WIDTH - LEFT - 160.0) / longest;
    let mut body = String::new();
    let mut y = 10.0;
    let parts = [
        ("Restore of 1 GiB that downloads at 500 MB/s", restore),
        ("Dump of 1 GiB, lz4, to an upload at 250 MB/s", frozen),
    ];
    for (title, lanes) in parts {
        y += 24.0;
        writeln!(body, r#"<text x="12" y="{y}" class="title">{title}</text>"#)?;
        y += 14.0;
        for lane in lanes {
            draw_lane(&mut body, lane, y, scale)?;
            y += LANE;
        }
        y += 6.0;
    }
    let mut ticks = String::new();
    for second in 0..=longest as u32 {
        let x = LEFT + f64::from(second) * scale;
        writeln!(
            ticks,
            r##"<path d="M{x:.1} 30V{y:.0}" stroke="#ddd"/><text x="{x:.1}" y="{:.0}" text-anchor="middle">{second} s</text>"##,
            y + 14.0
        )?;
    }
    let height = y + 24.0;
    Ok(format!(
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH:.0} {height:.0}" font-family="sans-serif" font-size="13" fill="#222">
<!-- Drawn by `make bench` from its figures. -->
<style>.title {{ font-weight: bold; font-size: 15px }}</style>
<rect width="{WIDTH:.0}" height="{height:.0}" fill="#fff"/>
{ticks}{body}</svg>
"##
    ))
}

fn draw_lane(body: &mut String, lane: &Lane, y: f64, scale: f64) -> Result<()> {
    let height = (LANE - 14.0) / 2.0;
    writeln!(
        body,
        r#"<text x="{:.0}" y="{:.1}" text-anchor="end">{}</text>"#,
        LEFT - 10.0,
        y + height + 4.0,
        lane.name
    )?;
    for (row, bar) in lane.bars.iter().enumerate() {
        let top = y + row as f64 * height;
        let x = LEFT + bar.from_s * scale;
        let width = (bar.to_s - bar.from_s) * scale;
        writeln!(
            body,
            r#"<rect x="{x:.1}" y="{top:.1}" width="{width:.1}" height="{:.1}" fill="{}"/>"#,
            height - 1.0,
            bar.colour
        )?;
        if width > 50.0 {
            writeln!(
                body,
                r#"<text x="{:.1}" y="{:.1}">{}</text>"#,
                x + 6.0,
                top + height - 6.0,
                bar.text
            )?;
        }
    }
    let (row, text) = &lane.mark;
    let end = LEFT + lane.bars[*row].to_s * scale;
    writeln!(
        body,
        r##"<path d="M{end:.1} {y:.1}v{:.1}" stroke="#222" stroke-width="2"/><text x="{:.1}" y="{:.1}">{text}</text>"##,
        2.0 * height,
        end + 8.0,
        y + (*row + 1) as f64 * height - 6.0
    )?;
    Ok(())
}
