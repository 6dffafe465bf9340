//! How long an application is frozen under CRIU's hook: with a buffer and without one, beside a
//! dump into a directory in memory.
//!
//! The figure is CRIU's own, from its statistics.

use crate::Bench;
use crate::machine::Reserve;
use crate::meter::Meter;
use crate::report::Figures;
use crate::session;
use anyhow::{Context, Result};
use prost::Message;
use std::{fs, path::Path};

pub struct Scenario {
    pub name: &'static str,
    mib: u64,
    sink: &'static str,
}

pub const TO_LINK: &str = "frozen/1-GiB-lz4-250-MB-per-s";

pub const SCENARIOS: [Scenario; 3] = [
    Scenario {
        name: "frozen/512-MiB-lz4",
        mib: 512,
        sink: "lz4 -q -1 >/dev/null",
    },
    Scenario {
        name: "frozen/2-GiB-lz4",
        mib: 2048,
        sink: "lz4 -q -1 >/dev/null",
    },
    Scenario {
        name: TO_LINK,
        mib: 1024,
        sink: r#"lz4 -q -1 | "$BENCH" --link 62500000 >/dev/null"#,
    },
];

pub const DIRECTORY: &str = "directory";
pub const BUFFERED: &str = "streamer --buffer";
pub const PLAIN: &str = "streamer";

const TO_DIRECTORY: &str = r#"
echo began $EPOCHREALTIME
criu dump --leave-running --tree $PID --images-dir images
echo written $EPOCHREALTIME
"#;

const BY_HOOK: &str = r#"
rm -rf options; mkdir options
printf '%s\n' '--num-shards 4' "--shard-cmd $SINK" "$BUFFER" >options/streamer-capture.options
export CRIU_IMAGE_STREAMER_OPTIONS=$PWD/options
echo began $EPOCHREALTIME
criu dump --stream --action-script "$STREAMER" --leave-running --tree $PID --images-dir images
until grep -sqx succeeded images/streamer-capture.outcome; do sleep 0.01; done
echo written $EPOCHREALTIME
"#;

pub fn measure(scenario: &Scenario, bench: &mut Bench) -> Result<()> {
    let bytes = bench.options.bytes(scenario.mib);
    let machine = session::boot(bench)?;
    let application = session::start(&machine, bytes, 1);
    let mut reserve = Reserve::new(bytes);
    let buffer = format!(
        "--buffer {}\n--go-on-when-copied",
        bytes * 5 / 4 + (16 << 20)
    );
    let mut ways = vec![(DIRECTORY.to_owned(), (None, TO_DIRECTORY, String::new()))];
    for program in bench
        .programs
        .iter()
        .filter(|program| !program.is_original())
    {
        for (name, buffer) in [(" --buffer", &buffer), ("", &String::new())] {
            let way = (Some(program.clone()), BY_HOOK, buffer.clone());
            ways.push((format!("{}{name}", program.name), way));
        }
    }
    bench.in_turns(scenario.name, 5, ways, |(program, script, buffer)| {
        let mut variables = vec![
            ("PID", application.pid.clone()),
            ("SINK", scenario.sink.to_owned()),
            ("BUFFER", buffer.clone()),
        ];
        variables.extend(program.iter().map(session::Program::variable));
        reserve.let_go();
        let raw = session::run(&machine, &Meter::start(), variables, script)?;
        let frozen_s = frozen_s(&machine.path("images"))?;
        fs::remove_dir_all(machine.path("images"))?;
        reserve.take();
        Ok(Figures::from([
            ("frozen_s".into(), frozen_s),
            ("written_s".into(), raw["written"] - raw["began"]),
        ]))
    })
}

/// The part of CRIU's `stats-dump` that counts here (`stats_entry`).
#[derive(Message)]
struct Statistics {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatistics>,
}

/// CRIU's `dump_stats_entry`. Times are in microseconds.
#[derive(Message)]
struct DumpStatistics {
    #[prost(uint32, tag = "2")]
    frozen_time: u32,
}

/// The seconds for which the dump that left its statistics there had the application frozen.
pub fn frozen_s(images_dir: &Path) -> Result<f64> {
    // Two magic numbers and the length of the one message.
    const HEAD: usize = 12;
    let bytes = fs::read(images_dir.join("stats-dump")).context("CRIU left no statistics")?;
    let message = bytes.get(HEAD..).context("CRIU's statistics are short")?;
    let dump = Statistics::decode(message)?.dump;
    let dump = dump.context("CRIU's statistics are not of a dump")?;
    Ok(f64::from(dump.frozen_time) / 1e6)
}
