//! A damaged image with an index, served while it arrives to a real CRIU: no process is ever left
//! running, and the streamer says what was wrong. They need root; see tests/criu/mod.rs.

use crate::common::random::Random;
use crate::common::setting;
use crate::criu::recipes::{CAPTURE_WITH_INDEX, RESTORE_WITH_INDEX};
use crate::criu::{Application, Machine};

/// A restore from `app-{}` as `$READ` makes it of each shard: both CRIU and the streamer fail, and
/// nothing runs.
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
grep -q 'criu-image-streamer Error: ' streamer.log
# A killed process takes a moment to go.
for _ in $(seq 100); do
    kill -0 -- -$PID 2>/dev/null || exit 0
    sleep 0.05
done
echo "something was left running" >&2
exit 1
"#;

fn fails(application: &Application<'_>, read: &str) {
    application
        .run(&format!("READ='{read}'\n{FAILING_RESTORE}"))
        .success();
}

#[test]
fn nothing_of_a_damaged_image_is_left_running() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=24 threads=2 tree=1x2");
    let before = application.goes_on();
    application.run(CAPTURE_WITH_INDEX).success();
    application.is_gone();
    let size = |name: &str| machine.read(name).len();
    let sizes = ["app-1", "app-2", "app-index"].map(size);
    assert!(sizes[0] > 1 << 20 && sizes[1] > 1 << 20, "{sizes:?}");

    let mut random = Random::new(setting("INDEX_SEED", 1));
    for round in 0..setting("INDEX_CUTS", 12) {
        let which = random.below(2);
        let cut = match round {
            // The last byte, and a shard that is missing.
            0 => sizes[which] - 1,
            1 => 0,
            _ => random.below(sizes[which]),
        };
        let number = which + 1;
        fails(
            &application,
            &format!("if [ {{}} = {number} ]; then head -c {cut} app-{{}}; else cat app-{{}}; fi"),
        );
    }
    // A download that fails after its last byte.
    fails(&application, "cat app-{}; [ {} != 2 ]");
    let cut = random.below(sizes[2]);
    fails(
        &application,
        &format!("if [ {{}} = index ]; then head -c {cut} app-{{}}; else cat app-{{}}; fi"),
    );
    // Something follows the end of a shard.
    fails(
        &application,
        "cat app-{}; [ {} != 1 ] || head -c 100 app-{}",
    );

    application.run(RESTORE_WITH_INDEX).success();
    application.goes_on_from(before);

    // Shards of two images.
    application.run("mv app-2 other-2").success();
    application.run(CAPTURE_WITH_INDEX).success();
    application.is_gone();
    fails(
        &application,
        "if [ {} = 2 ]; then cat other-2; else cat app-{}; fi",
    );
}
