//! Dumps by a real CRIU that fail at some moment, one after another, of one application: each time the streamer says so, and the application
//! goes on unharmed as if nobody had tried. In the end it is checkpointed and restored all the same.
//!
//! CRIU kills an application whose last file is written, so these dumps fail before: the application has more memory than fits into
//! all the pipes.

mod common;
mod criu;

use common::random::Random;
use criu::Machine;
use criu::recipes::{CAPTURE, RESTORE};

/// Bytes of the application's memory.
const MEMORY: usize = 40 << 20;

/// Bytes that may be on their way in pipes.
const IN_PIPES: usize = 12 << 20;

/// A dump of which the shard's reader takes `$BYTES` bytes before it does something.
fn failing_dump(bytes: usize, reader_then: &str) -> String {
    format!(
        r#"
rm -rf images ready shard && mkdir images && mkfifo ready shard
criu-image-streamer --images-dir images --progress-fd 3 capture 3>ready >shard & streamer=$!
{{ head -c {bytes} >part; {reader_then}; }} <shard & reader=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID && dumped=0 || dumped=$?
wait $streamer && streamed=0 || streamed=$?
wait $reader || true
echo "criu: $dumped, streamer: $streamed"
[ $dumped != 0 ] && [ $streamed != 0 ]
[ $streamed = 137 ] || [ ! -e images/streamer-capture.sock ]
"#
    )
}

#[test]
fn the_application_goes_on_after_every_dump_that_failed() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=1x2 threads=2");
    let before = application.goes_on();
    let faults = [
        ("the reader leaves", "true"),
        ("SIGTERM", "kill -TERM $streamer; cat >/dev/null"),
        ("SIGKILL", "kill -KILL $streamer; cat >/dev/null"),
        ("the reader stands still, then leaves", "sleep 0.3"),
    ];
    let mut random = Random::new(1);
    let mut injected = Vec::new();
    for round in 0..8 {
        let (name, reader_then) = faults[round % faults.len()];
        let bytes = 1 + random.below(MEMORY - IN_PIPES);
        application.run(&failing_dump(bytes, reader_then)).success();
        application.goes_on_from(before);
        injected.push(format!("{name} after {bytes} bytes"));
    }
    application.run("rm -rf images ready shard part").success();
    application.run(CAPTURE).success();
    application.is_gone();
    application.run(RESTORE).success();
    application.goes_on_from(before);
    common::report(format_args!(
        "real CRIU: {} dumps that failed ({}), the application unharmed by all",
        injected.len(),
        injected.join(", ")
    ));
}
