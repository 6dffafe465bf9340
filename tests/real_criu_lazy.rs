//! A real CRIU's restore that runs at once. Whatever the application does with its memory, and
//! whichever process dies while pages are missing, the application finds every byte right, or is
//! dead. These tests need root; see tests/criu/mod.rs.
//!
//! `LAZY_RUNS` and `LAZY_KILLS` set the number of runs, and `LAZY_SEED` the moments.

use crate::common::random::Random;
use crate::common::setting;
use crate::criu::recipes::{CAPTURE, CAPTURE_WITH_INDEX, OTHERS, RESTORE, lazily};
use crate::criu::{Machine, machine};

/// Starts the program that changes its memory while it checks it, and checkpoints it. After a
/// restore it goes on for `$SECONDS_LEFT`.
const CHECKPOINT: &str = r#"
rm -f ready go
setsid shuffler 48 ${SECONDS_LEFT:-1} </dev/null &>shuffler.log & PID=$!
until [ -e ready ]; do sleep 0.05; done
CAPTURE
wait $PID || true
touch go
"#;

/// Restores it with all commands in one, and waits until nothing is left of anything.
const RESTORE_AND_END: &str = r#"
rm -rf images result child grandchild; mkdir images
criu-image-streamer --images-dir images --num-shards 2 --index --shard-cmd 'cat app-{}' \
    serve --lazy-pages -- \
    criu restore --stream --lazy-pages --images-dir images --restore-detached 2>streamer.log &
streamer=$!
KILL
status=0
wait $streamer || status=$?
for _ in $(seq 600); do
    # A CRIU that is killed while it tries out ptrace leaves the stopped child that it does it with.
    left=$(OTHERS | awk '!($3 ~ /^[Tt]/ && /criu restore/)')
    [ -n "$left" ] || break
    sleep 0.05
done
if [ -n "$left" ]; then echo "left: $left" >&2; exit 1; fi
! [ -e child ] && ! [ -e grandchild ]
! [ -e images/lazy-pages.socket ] || [ $status = 137 ]
echo "status $status: $(cat result 2>/dev/null || echo dead)"
"#;

fn checkpoint(machine: &Machine) {
    let script = CHECKPOINT.replace("CAPTURE", CAPTURE_WITH_INDEX);
    machine.run(&script).success();
}

/// With these settings of the shell. Returns what became of the application.
fn restore(machine: &Machine, settings: &str, kill: &str) -> String {
    let script = RESTORE_AND_END
        .replace("OTHERS", OTHERS)
        .replace("KILL", kill);
    let script = format!("{settings}\n{script}");
    machine.run(&script).success().stdout()
}

fn expect_whole_or_dead(ended: &str, kill: &str) {
    let is_one = ended.contains(": right") || ended.contains(": dead");
    assert!(is_one, "{kill}: {ended}");
}

fn shuffled() -> Option<Machine> {
    let machine = Machine::with_shuffler()?;
    checkpoint(&machine);
    Some(machine)
}

/// It forks, moves memory, drops it and unmaps it while most of it is missing.
#[test]
fn memory_is_right_whatever_the_application_does_with_it() {
    let Some(machine) = shuffled() else { return };
    for run in 0..setting("LAZY_RUNS", 3) {
        let ended = restore(&machine, "", "");
        assert!(ended.starts_with("status 0: right"), "run {run}: {ended}");
    }
}

#[test]
fn whoever_is_killed_the_application_is_whole_or_dead() {
    let Some(machine) = shuffled() else { return };
    let mut random = Random::new(setting("LAZY_SEED", 1));
    let victims = [
        "kill -KILL $streamer",
        "kill -KILL $(pgrep -P $streamer -x memory-guardian)",
        "kill -KILL $(pgrep -P $streamer -f '^([^ ]*/)?(criu|ld-linux[^ ]*) ')",
        "kill -KILL $(pgrep -x cat)",
        // A supervisor that ends the whole group; CRIU is in it.
        "kill -TERM $streamer",
    ];
    for kill in 0..setting("LAZY_KILLS", 15) {
        let victim = victims[kill as usize % victims.len()];
        let delay = random.below(700);
        let kill = format!("sleep 0.{delay:03}; {victim} || true");
        expect_whole_or_dead(&restore(&machine, "", &kill), &kill);
    }
}

#[test]
fn an_option_that_one_side_forgot_is_named_before_anything_runs() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    application.run(CAPTURE).success();
    application.is_gone();
    for (ours, theirs, said) in [
        ("--lazy-pages", "", "runs without its own --lazy-pages"),
        ("", "--lazy-pages", "give `serve` the same option"),
    ] {
        let script = format!(
            "rm -rf images; mkdir images; status=0
             lz4 -d <app.lz4 | criu-image-streamer -D images serve {ours} -- \
                 criu restore --stream {theirs} --images-dir images --restore-detached || status=$?
             test $status != 0"
        );
        let stderr = application.run(&script).success().stderr();
        assert!(stderr.contains(said), "{stderr}");
        application.is_gone();
    }
    application.run(&lazily(RESTORE)).success();
    application.goes_on_from(before);
}

#[test]
fn an_application_that_is_restored_stopped_has_its_memory_first() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=40 tree=1x2 threads=2");
    let before = application.goes_on();
    application.run(CAPTURE).success();
    application.is_gone();
    let restore =
        lazily(RESTORE).replace("--restore-detached", "--restore-detached --leave-stopped");
    application
        .run(&format!("{restore}\nkill -CONT -- -$PID"))
        .success();
    application.goes_on_from(before);
}

#[test]
fn a_zombie_and_its_parent_come_back() {
    let Some(machine) = machine() else { return };
    let script = format!(
        "setsid bash -c 'sleep 0.5 & exec sleep 1000' </dev/null &>/dev/null & PID=$!
         until ps --ppid $PID -o stat= | grep -q Z; do sleep 0.05; done
         {CAPTURE}
         wait $PID || true
         {}
         ps --ppid $PID -o stat= | grep -q Z
         kill -KILL $PID",
        lazily(RESTORE)
    );
    machine.run(&script).success();
}

/// `kill -KILL -$group`, as supervisors do it when their patience ends.
#[test]
fn nothing_runs_on_when_the_whole_group_is_killed() {
    let Some(machine) = shuffled() else { return };
    let mut random = Random::new(setting("LAZY_SEED", 1));
    for _ in 0..setting("LAZY_KILLS", 15).div_ceil(5) {
        let delay = random.below(700);
        let kill = format!("sleep 0.{delay:03}; kill -KILL -- -$streamer || true");
        // `set -m` gives the streamer a group, which CRIU and the shards' commands are in, or have
        // their own.
        expect_whole_or_dead(&restore(&machine, "set -m", &kill), &kill);
    }
}

#[test]
fn criu_s_hook_serves_an_application_that_runs_at_once() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=40 threads=2");
    let before = application.goes_on();
    application.run(CAPTURE_WITH_INDEX).success();
    application.is_gone();
    let script = "
        rm -rf images options; mkdir images options
        printf '%s\\n' '--lazy-pages' '--num-shards 2' '--index' \"--shard-cmd cat $PWD/app-{}\" \\
            >options/streamer-serve.options
        export CRIU_IMAGE_STREAMER_OPTIONS=$PWD/options
        criu restore --stream --lazy-pages --images-dir images --restore-detached \\
            --action-script \"$(command -v criu-image-streamer)\"
        for _ in $(seq 200); do
            if grep -q memory-in-place images/streamer-serve.log; then exit 0; fi
            sleep 0.05
        done
        cat images/streamer-serve.log >&2; exit 1";
    application.run(script).success();
    application.goes_on_from(before);
}
