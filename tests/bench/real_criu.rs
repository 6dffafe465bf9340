//! How long a real CRIU freezes an application: by a dump into a directory in memory, and through
//! the streamer to `lz4`, with a buffer and without one.
//!
//! The figure is CRIU's own, from its statistics.

use crate::Options;
use crate::criu::{Application, Machine};
use crate::machine::{Memory, Temperature, WorkDir};
use crate::statistics::median_of;
use anyhow::{Context, Result, ensure};
use prost::Message;
use serde::Serialize;
use std::{fs, path::Path};

pub const SCENARIO: &str = "frozen/real-criu-4-shards-lz4";

#[derive(Serialize)]
pub struct Figures {
    pub scenario: String,
    pub runs: usize,
    pub bytes: u64,
    pub buffered_s: f64,
    pub unbuffered_s: f64,
    pub directory_s: f64,
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

/// For how many seconds the dump that left its statistics there had the application frozen.
fn frozen_s(images_dir: &Path) -> Result<f64> {
    // Two magic numbers and the length of the one message.
    const HEAD: usize = 12;
    let bytes = fs::read(images_dir.join("stats-dump")).context("CRIU left no statistics")?;
    let message = bytes.get(HEAD..).context("CRIU's statistics are short")?;
    let dump = Statistics::decode(message)?.dump;
    let dump = dump.context("CRIU's statistics are not of a dump")?;
    Ok(f64::from(dump.frozen_time) / 1e6)
}

const TO_DIRECTORY: &str = r#"
rm -rf images; mkdir images
criu dump --leave-running --tree $PID --images-dir images
"#;

const STREAM: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
setpriv --bounding-set=-sys_resource "$STREAMER" --images-dir images --num-shards 4 --shard-cmd 'lz4 -q >/dev/null' \
    --progress-fd 3 capture $BUFFER 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu dump --leave-running --tree $PID --images-dir images --stream
wait $streamer
"#;

#[derive(Clone, Copy)]
enum Way {
    Directory,
    Stream { buffer: Option<u64> },
}

/// `Err` says why there is no CRIU.
pub fn measure(
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Result<Figures, String>> {
    let machine = match Machine::try_new_in(&work_dir.subdirectory("machine")?) {
        Ok(machine) => machine,
        Err(why) => return Ok(Err(why)),
    };
    let bytes = options.size_bytes();
    let application = machine.start(&format!("memory={}", bytes >> 20));
    application.goes_on();
    let mut memory = Memory::new(Temperature::Warm, bytes)?;
    let ways = [
        Way::Directory,
        Way::Stream {
            buffer: Some(2 * bytes),
        },
        Way::Stream { buffer: None },
    ];
    let mut figures = [const { vec![] }; 3];
    for round in 1..=options.runs() {
        said(&format!("{SCENARIO} {round}/{}", options.runs()));
        for (way, figures) in ways.iter().zip(&mut figures) {
            memory.prepare();
            dump(*way, options, &machine, &application).context(SCENARIO)?;
            figures.push(frozen_s(&machine.path("images"))?);
            fs::remove_dir_all(machine.path("images"))?;
            memory.finish()?;
        }
    }
    application.goes_on();
    let [directory_s, buffered_s, unbuffered_s] =
        figures.map(|figures| median_of(figures.into_iter()));
    Ok(Ok(Figures {
        scenario: SCENARIO.to_owned(),
        runs: options.runs(),
        bytes,
        buffered_s,
        unbuffered_s,
        directory_s,
    }))
}

fn dump(
    way: Way,
    options: &Options,
    machine: &Machine,
    application: &Application<'_>,
) -> Result<()> {
    let (script, buffer) = match way {
        Way::Directory => (TO_DIRECTORY, None),
        Way::Stream { buffer } => (STREAM, buffer),
    };
    let streamer = fs::canonicalize(&options.streamer)?;
    let variables = [
        ("PID", application.pid.as_str()),
        ("STREAMER", streamer.to_str().context("Odd path")?),
        (
            "BUFFER",
            &buffer.map_or(String::new(), |bytes| format!("--buffer {bytes}")),
        ),
        // At the verbosity of the tests, CRIU's log would be measured as well.
        ("CRIU_CONFIG_FILE", "/dev/null"),
    ];
    let ran = machine.run_with(&variables, script);
    ensure!(ran.succeeded(), "{}", ran.describe());
    Ok(())
}
