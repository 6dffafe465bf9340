//! Captures: a real CRIU dumps an application to commands of several kinds.

use crate::frozen::frozen_s;
use crate::machine::Reserve;
use crate::meter::Meter;
use crate::report::{Figures, GB};
use crate::session::{self, Program};
use crate::{Bench, criu};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::fs;

#[derive(Clone)]
pub struct Scenario {
    pub name: String,
    mib: u64,
    shards: usize,
    /// The command behind each shard, with `{}` as its number.
    sink: String,
    ways: &'static [Way],
    original: bool,
    runs: usize,
    /// Processes beside it that do nothing but take processor time.
    beside: usize,
    pipe_size: Option<usize>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum Way {
    Plain,
    Index,
    Buffer,
}

impl Way {
    fn name(self) -> &'static str {
        match self {
            Self::Plain => "",
            Self::Index => " --index",
            Self::Buffer => " --buffer",
        }
    }
}

pub const CAT: &str = "cat >/dev/null";
pub const LZ4: &str = "lz4 -q -1 >/dev/null";

/// Takes 1 MiB a second.
const SLOW: &str = r#""$BENCH" --link 1048576 >/dev/null 2>&1"#;

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |name: String, mib, shards, sink: &str| Scenario {
        name,
        mib,
        shards,
        sink: sink.to_owned(),
        ways: &[Way::Plain],
        original: true,
        runs: 5,
        beside: 0,
        pipe_size: None,
    };
    let first_else =
        |first: &str, others: &str| format!("if [ {{}} = 1 ]; then {first}; else {others}; fi");
    let mut all = vec![];
    for (command, sink) in [("cat", CAT), ("lz4", LZ4)] {
        for shards in [1, 2, 4, 8] {
            let name = format!("capture/{shards}-shards-{command}");
            let ways = &[Way::Plain, Way::Buffer];
            all.push(Scenario {
                ways,
                ..scenario(name, 1024, shards, sink)
            });
        }
    }
    all.push(Scenario {
        pipe_size: Some(4 << 20),
        ..scenario("capture/4-shards-cat-4MiB-pipes".into(), 1024, 4, CAT)
    });
    all.push(Scenario {
        beside: 2,
        ..scenario("capture/4-shards-cat-busy".into(), 1024, 4, CAT)
    });
    let short = |name: &str, sink: &str| scenario(format!("capture/{name}"), 256, 4, sink);
    all.push(short("256MiB", CAT));
    let stalled = first_else(&format!("sleep 5; {CAT}"), CAT);
    all.push(short("256MiB-1-stalled-for-5-s", &stalled));
    all.push(Scenario {
        // It would take a minute.
        original: false,
        ..short("256MiB-1-at-1-MiB-per-s", &first_else(SLOW, CAT))
    });

    let even = |name: String, mib, shards, sink: &str| Scenario {
        ways: &[Way::Plain, Way::Index, Way::Buffer],
        runs: 10,
        ..scenario(format!("even/{name}"), mib, shards, sink)
    };
    for (command, sink) in [("cat", CAT), ("lz4", LZ4)] {
        for shards in [2, 4, 8] {
            for beside in 0..=2 {
                let loops = ["", "-beside-1-loop", "-beside-2-loops"][beside];
                let name = format!("{command}-{shards}-shards{loops}");
                all.push(Scenario {
                    beside,
                    ..even(name, 400, shards, sink)
                });
            }
        }
        for late in ["0.3", "1"] {
            let sink = first_else(sink, &format!("sleep {late}; {sink}"));
            let name = format!("{command}-4-shards-3-start-{late}-s-late");
            all.push(even(name, 400, 4, &sink));
        }
        for shards in [16, 32] {
            let name = format!("{command}-{shards}-shards-of-100-MB");
            all.push(even(name, 96, shards, sink));
        }
    }

    let compressors = [
        ("lz4", "lz4 -q -1"),
        ("zstd-1", "zstd -q -1"),
        ("zstd-adapt", "zstd -q --adapt"),
        ("zstd-adapt-max-4", "zstd -q --adapt=max=4"),
    ];
    let links = [
        ("512-MiB-25-MB-per-s", 512, 25e6, 2),
        ("1-GiB-250-MB-per-s", 1024, 250e6, 3),
        ("1-GiB-no-link", 1024, 1e12, 3),
    ];
    for (link, mib, bytes_per_s, runs) in links {
        for (name, command) in compressors {
            let speed = bytes_per_s / 2.0;
            let sink =
                format!(r#"{command} | "$BENCH" --link {speed} >/dev/null 2>shards/bytes-{{}}"#);
            all.push(Scenario {
                original: false,
                runs,
                ..scenario(format!("link/{link}-{name}"), mib, 2, &sink)
            });
        }
    }
    all
}

/// How uneven shards may be: usually, and at most.
pub fn evenness_bounds(scenario: &str) -> (f64, f64) {
    if scenario.contains("late") || scenario.contains("100-MB") {
        (1.15, 1.3)
    } else {
        (1.08, 1.3)
    }
}

const SCRIPT: &str = r#"
fds= sinks=
for ((shard = 1; shard <= SHARDS; shard++)); do
    mkfifo shards/$shard
    bash -o pipefail -c "${SINK//\{\}/$shard}" <shards/$shard & sinks+=" $!"
done
# A command must not hold the other shards' pipes.
for ((shard = 1; shard <= SHARDS; shard++)); do
    exec {fd}>shards/$shard; fds+=,$fd
done
options="--shard-fds ${fds#,}"
[ -z "${INDEX:-}" ] || { exec {fd}>"$INDEX"; fds+=,$fd; options+=" --index-fd $fd"; }
[ -z "${BUFFER:-}" ] || options+=" --buffer $BUFFER"
{ time $START "$STREAMER" --images-dir images $options --progress-fd 3 capture 3>ready 2>streamer.log; } 2>times & streamer=$!
exec 4<ready
for fd in ${fds//,/ }; do exec {fd}>&-; done
grep -q -m1 socket-init <&4
echo began $EPOCHREALTIME
# It stays stopped until all is written: what it wrote to before would be torn.
criu dump --stream --leave-stopped --images-dir images --tree $PID
# Where it has ended already, nothing is to be seen.
process=$(cat "/proc/$streamer/task/$streamer/children" 2>/dev/null) || true
awk '/^VmHWM/ { print "rss_kib", $2 }' /proc/${process% }/status 2>/dev/null || true
wait $streamer
for sink in $sinks; do wait $sink; done
echo written $EPOCHREALTIME
kill -CONT -- -$PID
cat <&4 >progress
awk 'END { print "cpu_s", $1 + $2 }' times
cat shards/bytes-* 2>/dev/null | awk '{ sum += $1 } END { if (NR) print "stored", sum }' || true
"#;

/// The streamer's statistics.
#[derive(Deserialize)]
struct Statistics {
    shards: Vec<ShardStatistics>,
}

#[derive(Deserialize)]
struct ShardStatistics {
    size: f64,
}

pub fn measure(scenario: &Scenario, bench: &mut Bench) -> Result<()> {
    let bytes = bench.options.bytes(scenario.mib);
    let machine = session::boot(bench)?;
    let application = session::start(&machine, bytes, 1);
    // How even shards are hardly hangs on it, and it takes seconds.
    let is_timed = scenario.ways.contains(&Way::Buffer) && scenario.name.starts_with("capture/");
    let mut reserve = is_timed.then(|| Reserve::new(bytes));
    let mut ways = vec![];
    for program in &bench.programs {
        for &way in scenario.ways {
            let is_possible = scenario.original && way == Way::Plain;
            if !program.is_original() || is_possible {
                ways.push((
                    format!("{}{}", program.name, way.name()),
                    (program.clone(), way),
                ));
            }
        }
    }
    bench.in_turns(&scenario.name, scenario.runs, ways, |(program, way)| {
        if let (Some(reserve), Way::Buffer) = (&mut reserve, way) {
            reserve.let_go();
        }
        let capture = Capture {
            shards: scenario.shards,
            sink: &scenario.sink,
            index: (*way == Way::Index).then_some("/dev/null"),
            // Larger than the image, which has more than the memory that was asked for.
            buffer: (*way == Way::Buffer).then_some(bytes * 5 / 4 + (16 << 20)),
            beside: scenario.beside,
            pipe_size: scenario.pipe_size,
        };
        let figures = capture.run(program, &machine, &application.pid, &Meter::start());
        if let (Some(reserve), Way::Buffer) = (&mut reserve, way) {
            reserve.take();
        }
        figures
    })
}

/// One capture.
pub struct Capture<'a> {
    pub shards: usize,
    pub sink: &'a str,
    /// The index's file.
    pub index: Option<&'a str>,
    pub buffer: Option<u64>,
    pub beside: usize,
    pub pipe_size: Option<usize>,
}

impl Capture<'_> {
    pub fn run(
        &self,
        program: &Program,
        machine: &criu::Machine,
        pid: &str,
        meter: &Meter,
    ) -> Result<Figures> {
        let text = |number: Option<String>| number.unwrap_or_default();
        let variables = vec![
            program.variable(),
            ("PID", pid.to_owned()),
            ("SHARDS", self.shards.to_string()),
            ("SINK", self.sink.to_owned()),
            ("INDEX", text(self.index.map(str::to_owned))),
            ("BUFFER", text(self.buffer.map(|size| size.to_string()))),
            ("BESIDE", self.beside.to_string()),
            (
                "PIPE_SIZE",
                text(self.pipe_size.map(|size| size.to_string())),
            ),
        ];
        let raw = session::run(machine, meter, variables, SCRIPT)?;
        let progress = fs::read_to_string(machine.path("progress"))?;
        let statistics = progress.lines().find(|line| line.starts_with('{'));
        let statistics: Statistics =
            serde_json::from_str(statistics.context("no statistics of the streamer")?)?;
        let all_sizes = statistics.shards.iter().map(|shard| shard.size);
        let bytes: f64 = all_sizes.clone().sum();
        let sizes: Vec<f64> = all_sizes.take(self.shards).collect();
        let mean = sizes.iter().sum::<f64>() / sizes.len() as f64;
        let frozen_s = frozen_s(&machine.path("images"))?;
        let mut figures = Figures::from([
            ("bytes".into(), bytes),
            ("frozen_s".into(), frozen_s),
            ("gb_per_s".into(), bytes / GB / frozen_s),
            ("written_s".into(), raw["written"] - raw["began"]),
            ("cpu_s_per_gb".into(), raw["cpu_s"] / (bytes / GB)),
            (
                "largest_over_mean".into(),
                sizes.iter().copied().fold(0.0, f64::max) / mean,
            ),
        ]);
        if let Some(all) = raw.get("all_cpu_s") {
            figures.insert("all_cpu_s".into(), *all);
            figures.insert("all_cpu_s_per_gb".into(), all / (bytes / GB));
        }
        if let Some(kib) = raw.get("rss_kib") {
            figures.insert("rss_mb".into(), kib * 1024.0 / 1e6);
        }
        if let Some(stored) = raw.get("stored") {
            figures.insert("stored_mb".into(), stored / 1e6);
        }
        Ok(figures)
    }
}
