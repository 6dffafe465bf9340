//! Restores: a real CRIU restores an application from the image that a real capture made.
//!
//! The same memory is captured twice, without an index and with one. The first image is received
//! before CRIU starts, by this program and by the original; the second is served while it arrives.

use crate::Bench;
use crate::capture::Capture;
use crate::machine::Reserve;
use crate::meter::Meter;
use crate::report::{Figures, GB};
use crate::session::{self, Program};
use anyhow::Result;

#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    mib: u64,
    processes: u64,
    /// How a shard gets into its file, and out of it.
    commands: (&'static str, &'static str),
    /// The downloads are measured alone as well.
    alone: bool,
    pipe_size: Option<usize>,
    /// `ulimit -n`.
    open_files: Option<u32>,
    /// CRIU leaves the memory to the streamer as well, where it can do that.
    lazy: bool,
    /// The application touches pages at random from its first moment on.
    touches: bool,
}

const SHARDS: usize = 4;

const CAT: (&str, &str) = ("cat >", "cat ");
const LZ4: (&str, &str) = ("lz4 -q -1 >", "lz4 -dc <");
const DOWNLOAD: (&str, &str) = ("cat >", r#""$BENCH" --link 125000000 2>/dev/null <"#);

pub const AT_500_MB_PER_S: &str = "restore/1-GiB-at-500-MB-per-s";

pub fn scenarios() -> Vec<Scenario> {
    let scenario = |name, mib, commands| Scenario {
        name,
        mib,
        processes: 1,
        commands,
        alone: false,
        pipe_size: None,
        open_files: None,
        lazy: true,
        touches: false,
    };
    let plain = scenario("restore/2-GiB-cat", 2048, CAT);
    vec![
        plain,
        scenario("restore/2-GiB-lz4", 2048, LZ4),
        scenario("restore/1-GiB-cat", 1024, CAT),
        scenario("restore/4-GiB-cat", 4096, CAT),
        Scenario {
            name: "restore/4-GiB-of-16-processes-cat",
            mib: 4096,
            processes: 16,
            ..plain
        },
        Scenario {
            name: "touches/2-GiB-cat",
            touches: true,
            ..plain
        },
        Scenario {
            alone: true,
            ..scenario(AT_500_MB_PER_S, 1024, DOWNLOAD)
        },
        Scenario {
            name: "restore/2-GiB-of-16-processes-cat",
            processes: 16,
            ..plain
        },
        Scenario {
            name: "restore/2-GiB-cat-4MiB-pipes",
            lazy: false,
            pipe_size: Some(4 << 20),
            ..plain
        },
        Scenario {
            // More than is needed for anything but keeping pages in pipes.
            name: "restore/2-GiB-cat-256-descriptors",
            lazy: false,
            open_files: Some(256),
            ..plain
        },
    ]
}

#[derive(Clone)]
struct Way {
    /// None: the download alone.
    program: Option<Program>,
    index: bool,
    lazy: bool,
}

pub const ALONE: &str = "download alone";
pub const ALL_FIRST: &str = "streamer, all first";
pub const WHILE_IT_ARRIVES: &str = "streamer, while it arrives";

const SCRIPT: &str = r#"
for n in $NAMES; do exec {fd}< <(eval "$FETCH$n"); fds+=,$fd; done
options="--shard-fds ${fds#,}"
[ -z "$INDEX" ] || { exec {fd}< <(eval "$FETCH$INDEX"); fds+=,$fd; options+=" --index-fd $fd"; }
limit_files=
[ -z "$OPEN_FILES" ] || limit_files="prlimit --nofile=$OPEN_FILES"
{ time $limit_files $START "$STREAMER" --images-dir images $options $LAZY --progress-fd 3 serve 3>ready 2>streamer.log; } 2>times & streamer=$!
exec 4<ready
for fd in ${fds//,/ }; do exec {fd}<&-; done
grep -q -m1 socket-init <&4
echo listens $EPOCHREALTIME
criu restore --stream --images-dir images --restore-detached $LAZY
echo running $EPOCHREALTIME
wait $streamer
echo in_place $EPOCHREALTIME
awk 'END { print "cpu_s", $1 + $2 }' times
"#;

const DOWNLOAD_ALONE: &str = r#"
for n in $NAMES; do eval "$FETCH$n" >/dev/null & downloads+=" $!"; done
for download in $downloads; do wait $download; done
echo running $EPOCHREALTIME
"#;

pub fn measure(scenario: &Scenario, bench: &mut Bench) -> Result<()> {
    let memory = bench.options.bytes(scenario.mib);
    let machine = session::boot(bench)?;
    let application = if scenario.touches {
        machine.start(&format!("touch={} pause=1", memory >> 20))
    } else {
        session::start(&machine, memory, scenario.processes)
    };
    let before = application.state();
    let (store, fetch) = scenario.commands;
    let mut bytes = 0.0;
    for (image, index) in [("plain", None), ("indexed", Some("indexed-index"))] {
        let capture = Capture {
            shards: SHARDS,
            sink: &format!("{store}{image}-{{}}"),
            index,
            buffer: None,
            beside: 0,
            pipe_size: None,
        };
        eprintln!("{}: the image", scenario.name);
        // CRIU restores an application to its cgroup, unless this was CRIU's as well.
        let meter = Meter::default();
        let figures = capture.run(&bench.programs[0], &machine, &application.pid, &meter)?;
        bytes = figures["bytes"];
    }
    if scenario.commands == LZ4 {
        application
            .run("lz4 -q -1 indexed-index x && mv x indexed-index")
            .success();
    }
    let end = || {
        application.run("kill -KILL -- -$PID").success();
        application.is_gone();
    };
    end();
    application.run("rm -f application.touches").success();
    let mut reserve = Reserve::new(memory);
    let mut ways = vec![];
    if scenario.alone {
        let way = Way {
            program: None,
            index: false,
            lazy: false,
        };
        ways.push((ALONE.to_owned(), way));
    }
    for program in &bench.programs {
        let lazy = scenario.lazy && program.has_option("--lazy-pages")?;
        for (index, lazy, what, is_possible) in [
            (false, false, "all first", true),
            (true, false, "while it arrives", !program.is_original()),
            (false, true, "lazy pages", lazy),
            (true, true, "lazy pages, index", lazy),
        ] {
            if is_possible {
                let way = Way {
                    program: Some(program.clone()),
                    index,
                    lazy,
                };
                ways.push((format!("{}, {what}", program.name), way));
            }
        }
    }
    bench.in_turns(scenario.name, 5, ways, |way| {
        let script = match way.program {
            None => DOWNLOAD_ALONE,
            Some(_) => SCRIPT,
        };
        let (image, index) = match way.index {
            false => ("plain", ""),
            true => ("indexed", "indexed-index"),
        };
        let names: Vec<_> = (1..=SHARDS)
            .map(|shard| format!("{image}-{shard}"))
            .collect();
        let text = |number: Option<String>| number.unwrap_or_default();
        let mut variables = vec![
            ("PID", application.pid.clone()),
            ("NAMES", names.join(" ")),
            ("INDEX", index.to_owned()),
            ("LAZY", text(way.lazy.then(|| "--lazy-pages".to_owned()))),
            ("FETCH", fetch.to_owned()),
            (
                "OPEN_FILES",
                text(scenario.open_files.map(|n| n.to_string())),
            ),
            ("PIPE_SIZE", text(scenario.pipe_size.map(|n| n.to_string()))),
        ];
        variables.extend(way.program.iter().map(Program::variable));
        reserve.let_go();
        let script = format!("fds= downloads=\necho began $EPOCHREALTIME\n{script}");
        let meter = Meter::start();
        let mut raw = session::run(&machine, &meter, variables, &script)?;
        if scenario.touches {
            let script = "until [ -s application.touches ]; do sleep 0.1; done; cat application.touches; rm application.touches";
            let touches = application.run(script).success().stdout();
            for (name, ms) in ["late_ms", "latest_ms"].iter().zip(touches.split(' ')) {
                raw.insert((*name).to_owned(), ms.trim().parse()?);
            }
        }
        if raw.contains_key("listens") {
            session::goes_on_from(&application, before)?;
            end();
        }
        reserve.take();
        Ok(figures(&raw, bytes))
    })
}

fn figures(raw: &Figures, bytes: f64) -> Figures {
    let since_began = |name: &str| raw.get(name).map(|at| at - raw["began"]);
    let value = |name: &str| raw.get(name).copied();
    let listens_s = since_began("listens");
    let running_s = since_began("running");
    let figures = [
        ("listens_s", listens_s),
        ("running_s", running_s),
        ("in_place_s", since_began("in_place")),
        ("late_ms", value("late_ms")),
        ("latest_ms", value("latest_ms")),
        (
            "criu_s",
            listens_s.and_then(|listens| Some(running_s? - listens)),
        ),
        ("cpu_s_per_gb", value("cpu_s").map(|cpu| cpu / (bytes / GB))),
        (
            "all_cpu_s_per_gb",
            value("all_cpu_s").map(|cpu| cpu / (bytes / GB)),
        ),
        (
            "over_image_mib",
            value("peak_bytes").map(|peak| (peak - bytes) / f64::from(1 << 20)),
        ),
    ];
    let known = figures.into_iter();
    known
        .filter_map(|(name, value)| Some((name.to_owned(), value?)))
        .collect()
}
