//! From the first byte of a download to a running application, with a real CRIU.
//!
//! One image of one application, in shards and an index, is restored again and again: with all of
//! it given as plain shards, which are received before CRIU starts, and with the index, while they
//! arrive. The downloads are processes of their own, each at its share of the speed. Everything is
//! in memory, so that no disk is measured; the streamer is a program without CAP_SYS_RESOURCE, as
//! in the other figures.

use crate::Options;
use crate::criu::{Application, Machine, recipes};
use crate::download::Download;
use crate::machine::{Memory, Temperature, WorkDir};
use crate::peak::PeakWatch;
use crate::role::Role;
use crate::statistics::{median_of, over_image_mib};
use anyhow::{Context, Result, ensure};
use serde::Serialize;
use std::{env::current_exe, fs, path::Path};

const SHARDS: usize = 4;

#[derive(Clone, Copy)]
pub struct Scenario {
    pub name: &'static str,
    /// Of all downloads together, but for the index, which has as much as each of the others.
    bytes_per_s: Option<f64>,
}

pub const AT_ONCE: &str = "arriving/at-once";

pub const SCENARIOS: [Scenario; 2] = [
    Scenario {
        name: "arriving/500-MB-per-s",
        bytes_per_s: Some(500e6),
    },
    Scenario {
        name: AT_ONCE,
        bytes_per_s: None,
    },
];

/// Medians.
#[derive(Serialize)]
pub struct Figures {
    pub scenario: &'static str,
    pub runs: usize,
    /// The image's.
    pub bytes: u64,
    /// Of all shards, and nothing else.
    pub download_s: f64,
    /// From the start of CRIU to a running application, all of the image being there.
    pub restore_s: f64,
    /// From the first byte to a running application.
    pub without_index_s: f64,
    pub with_index_s: f64,
    /// The most memory of downloads, streamer, CRIU and application, over the image's size.
    pub without_index_over_image_mib: Option<f64>,
    pub with_index_over_image_mib: Option<f64>,
}

impl Figures {
    /// What takes longer, if nothing else is done.
    pub fn longer_s(&self) -> f64 {
        self.download_s.max(self.restore_s)
    }
}

const DOWNLOAD: &str = r#"
[ -z "$MEMBERS" ] || echo 0 >"$MEMBERS"
start=$EPOCHREALTIME
for name in $SHARDS index; do
    bash -c "${FETCH//\{\}/$name}" >/dev/null & downloads+=" $!"
done
for download in $downloads; do wait $download; done
echo $start $EPOCHREALTIME $EPOCHREALTIME
"#;

const RESTORE: &str = r#"
[ -z "$MEMBERS" ] || echo 0 >"$MEMBERS"
rm -rf images ready; mkdir images; mkfifo ready
export CRIU_CONFIG_FILE=/dev/null
start=$EPOCHREALTIME
setpriv --bounding-set=-sys_resource "$STREAMER" --images-dir images $SHARD_OPTIONS --shard-cmd "$FETCH" \
    --progress-fd 3 serve 3>ready & streamer=$!
grep -q -m1 socket-init ready
listens=$EPOCHREALTIME
criu restore --stream --images-dir images --restore-detached
restored=$EPOCHREALTIME
wait $streamer
echo $start $listens $restored
"#;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    Download,
    WithoutIndex,
    WithIndex,
}

struct Run {
    /// Until CRIU could connect, or the download had ended.
    first_s: f64,
    /// From then on.
    rest_s: f64,
    peak_bytes: Option<u64>,
}

/// `Err` says why there is no CRIU.
pub fn measure(
    scenarios: &[Scenario],
    options: &Options,
    work_dir: &WorkDir,
    mut said: impl FnMut(&str),
) -> Result<Result<Vec<Figures>, String>> {
    if scenarios.is_empty() {
        return Ok(Ok(vec![]));
    }
    let machine = match Machine::try_new_in(&work_dir.subdirectory("machine")?) {
        Ok(machine) => machine,
        Err(why) => return Ok(Err(why)),
    };
    said("arriving: the image");
    let application = machine.start(&format!("memory={}", options.size_bytes() >> 20));
    let before = application.goes_on();
    let capture = recipes::CAPTURE_WITH_INDEX
        .replace("--num-shards 2", &format!("--num-shards {SHARDS}"))
        .replace("wait $", "ln -s app-index app-5; wait $");
    application.run(&capture).success();
    application.is_gone();
    let names = (1..=SHARDS).map(|number| format!("app-{number}"));
    let bytes = names
        .chain(["app-index".to_owned()])
        .try_fold(0, |sum, name| {
            fs::metadata(machine.path(&name)).map(|file| sum + file.len())
        })?;
    let mut memory = Memory::new(Temperature::Warm, bytes)?;
    let mut ways = [Way::Download, Way::WithoutIndex, Way::WithIndex];
    let mut figures = vec![];
    for scenario in scenarios {
        let mut runs: Vec<(Way, Run)> = vec![];
        for round in 1..=options.runs() {
            said(&format!("{} {round}/{}", scenario.name, options.runs()));
            let count = ways.len();
            ways.rotate_left(round % count);
            for way in ways {
                memory.prepare();
                let watch = PeakWatch::start();
                let (first_s, rest_s) =
                    run(way, scenario, options, &machine, &application, &watch)?;
                let peak_bytes = watch.peak()?;
                if way != Way::Download {
                    application.goes_on_from(before);
                    application.run("kill -KILL -- -$PID").success();
                    application.is_gone();
                }
                drop(watch);
                memory.finish()?;
                runs.push((
                    way,
                    Run {
                        first_s,
                        rest_s,
                        peak_bytes,
                    },
                ));
            }
        }
        figures.push(Figures::of(scenario, bytes, &runs));
    }
    Ok(Ok(figures))
}

impl Figures {
    fn of(scenario: &Scenario, bytes: u64, runs: &[(Way, Run)]) -> Self {
        let median = |way: Way, figure: &dyn Fn(&Run) -> f64| {
            let of_way = runs.iter().filter(|(of, _)| *of == way);
            median_of(of_way.map(|(_, run)| figure(run)))
        };
        let whole = |run: &Run| run.first_s + run.rest_s;
        let over_image = |way| {
            let of_way = runs.iter().filter(|(of, _)| *of == way);
            over_image_mib(of_way.map(|(_, run)| run.peak_bytes), bytes)
        };
        Self {
            scenario: scenario.name,
            runs: runs.len() / 3,
            bytes,
            download_s: median(Way::Download, &|run| run.first_s),
            restore_s: median(Way::WithoutIndex, &|run| run.rest_s),
            without_index_s: median(Way::WithoutIndex, &whole),
            with_index_s: median(Way::WithIndex, &whole),
            without_index_over_image_mib: over_image(Way::WithoutIndex),
            with_index_over_image_mib: over_image(Way::WithIndex),
        }
    }
}

fn run(
    way: Way,
    scenario: &Scenario,
    options: &Options,
    machine: &Machine,
    application: &Application<'_>,
    watch: &PeakWatch,
) -> Result<(f64, f64)> {
    let download = Role::Download(Download {
        bytes_per_s: scenario.bytes_per_s.map(|speed| speed / SHARDS as f64),
    });
    let (script, shard_options) = match way {
        Way::Download => (DOWNLOAD, String::new()),
        Way::WithoutIndex => (RESTORE, format!("--num-shards {}", SHARDS + 1)),
        Way::WithIndex => (RESTORE, format!("--num-shards {SHARDS} --index")),
    };
    let shards: Vec<_> = (1..=SHARDS).map(|number| number.to_string()).collect();
    let program = current_exe()?;
    let text = |path: &Path| path.to_str().map(str::to_owned).context("Odd path");
    let variables = [
        ("PID", application.pid.clone()),
        ("MEMBERS", text(&watch.members().unwrap_or_default())?),
        ("SHARDS", shards.join(" ")),
        ("SHARD_OPTIONS", shard_options),
        ("STREAMER", text(&fs::canonicalize(&options.streamer)?)?),
        ("PROGRAM", text(&program)?),
        ("DOWNLOAD", download.argument()?),
        (
            "FETCH",
            r#""$PROGRAM" --role "$DOWNLOAD" <app-{}"#.to_owned(),
        ),
    ];
    let variables = variables
        .each_ref()
        .map(|(name, value)| (*name, value.as_str()));
    let ran = machine.run_with(&variables, script);
    ensure!(ran.succeeded(), "{}", ran.describe());
    let times: Result<Vec<f64>, _> = ran.stdout().split_whitespace().map(str::parse).collect();
    match times?[..] {
        [start, middle, end] => Ok((middle - start, end - middle)),
        _ => unreachable!("the scripts print three times"),
    }
}
