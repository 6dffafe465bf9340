//! An image with an index that arrives at a real CRIU. Of a damaged one no process is ever left
//! running, and the streamer says what was wrong. They need root; see tests/criu/mod.rs.
//!
//! `INDEX_CUTS` sets at how many places shards are cut, and `INDEX_SEED` where.

use crate::common::random::Random;
use crate::common::setting;
use crate::criu::recipes::{CAPTURE_WITH_INDEX, OTHERS, RESTORE_WITH_INDEX};
use crate::criu::{Application, Machine, State, machine};

/// A restore from what `$READ` makes of each shard: both CRIU and the streamer fail, which gives
/// `$REASON`, and nothing runs.
const FAILING_RESTORE: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
criu-image-streamer --images-dir images --num-shards 2 --index --shard-cmd "$READ" \
    --progress-fd 3 serve 3>ready 2>streamer.log & streamer=$!
if grep -q -m1 socket-init ready; then
    if criu restore --stream --images-dir images --restore-detached &>criu.log; then
        echo "CRIU has restored it" >&2
        exit 1
    fi
fi
status=0
wait $streamer || status=$?
[ $status = 1 ]
grep -E "criu-image-streamer Error: .*($REASON)" streamer.log
# A killed process takes a moment to go.
for _ in $(seq 100); do
    left=$(OTHERS)
    [ -n "$left" ] || exit 0
    sleep 0.05
done
echo "something was left running: $left" >&2
exit 1
"#;

#[track_caller]
fn fails(application: &Application<'_>, read: &str, reason: &str) {
    let restore = FAILING_RESTORE.replace("OTHERS", OTHERS);
    application
        .run(&format!("READ='{read}'\nREASON='{reason}'\n{restore}"))
        .success();
}

/// It was not the application's fault: the whole image is restored, and runs.
#[track_caller]
fn succeeds(application: &Application<'_>, before: State) {
    application.run(RESTORE_WITH_INDEX).success();
    application.goes_on_from(before);
    let running = application.run(OTHERS).success().stdout();
    assert!(running.contains("application.state"), "{running}");
}

/// What reads `app-{}`, but one of the shards in another way.
fn but(which: &str, other: &str) -> String {
    format!("if [ {{}} = {which} ]; then {other}; else cat app-{{}}; fi")
}

const PARTS: &str = "memory=24 threads=2 tree=1x2 shared=4";

/// Makes `app-*`, the image of an application that was running, and tells how large its shards are.
fn checkpoint(machine: &Machine, application: &Application<'_>) -> [usize; 3] {
    application.run(CAPTURE_WITH_INDEX).success();
    application.is_gone();
    let sizes = SHARDS.map(|name| machine.read(&format!("app-{name}")).len());
    assert!(sizes[0] > 1 << 20 && sizes[1] > 1 << 20, "{sizes:?}");
    sizes
}

const SHARDS: [&str; 3] = ["1", "2", "index"];

#[test]
fn nothing_is_left_running_of_an_image_that_is_cut_or_mixed_with_another() {
    let Some(machine) = machine() else { return };
    let application = machine.start(PARTS);
    let before = application.goes_on();
    let sizes = checkpoint(&machine, &application);
    let cut = |which: usize, at: usize| {
        let name = SHARDS[which];
        fails(
            &application,
            &but(name, &format!("head -c {at} app-{name}")),
            "cut off|is missing|no shard is an index",
        );
    };
    for (which, size) in sizes.into_iter().enumerate() {
        cut(which, size - 1);
        cut(which, 0);
    }
    let mut random = Random::new(setting("INDEX_SEED", 1));
    for round in 0..setting("INDEX_CUTS", 6) {
        let which = if round % 5 == 4 { 2 } else { random.below(2) };
        cut(which, random.below(sizes[which]));
    }
    // Shards of two images of the same application, one moment and the next.
    succeeds(&application, before);
    application
        .run("for name in 1 2 index; do mv app-$name other-$name; done")
        .success();
    checkpoint(&machine, &application);
    let same = "cmp app-1 other-1 || cmp app-2 other-2";
    application.run(same).failure();
    for name in SHARDS {
        fails(
            &application,
            &but(name, &format!("cat other-{name}")),
            "are of different images",
        );
    }
    succeeds(&application, before);
}
