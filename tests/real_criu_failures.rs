//! When something dies during a checkpoint or a restore, with a real CRIU: the application runs on,
//! or there is a whole image of it, whatever died, and whenever. They need root; see
//! tests/criu/mod.rs.

use crate::criu::recipes::{CAPTURE, EXTRACT, RESTORE};
use crate::criu::{Application, machine};

/// How far the image has come when something happens, in bytes of an image of some 40 MB: from
/// nothing but the first marker to shortly before the end.
const MOMENTS: [usize; 5] = [0, 100, 200_000, 20_000_000, 40_000_000];

/// A later moment may find the whole rest of the image in pipes, and the application killed.
const MOMENTS_FOR_PLAIN_DUMPS: usize = 20_000_000;

/// How CRIU is told to dump.
enum Dump {
    /// It kills the application as soon as it has sent everything.
    Plain,
    /// The application is only stopped until the image is known to be whole.
    Safe,
}

/// An uncompressed checkpoint: `read` is the shard's reader, and knows the streamer's PID as
/// `$(cat streamer.pid)`.
fn capture(dump: Dump, read: &str) -> String {
    let (option, killed, resumed) = match dump {
        Dump::Plain => ("", ":", ":"),
        Dump::Safe => (
            "--leave-stopped",
            "kill -KILL -- -$PID",
            "kill -CONT -- -$PID",
        ),
    };
    format!(
        r#"
rm -rf images ready; mkdir images; mkfifo ready
{{ bash -c 'echo $$ >streamer.pid; exec criu-image-streamer --images-dir images --progress-fd 3 capture' 3>ready |
    {read} >app.image; }} & pipeline=$!
grep -q -m1 socket-init ready
if criu dump --stream --images-dir images --tree $PID {option} && wait $pipeline; then
    {killed}
else
    {resumed}
    wait $pipeline || true
    exit 1
fi
"#
    )
}

/// After a failed checkpoint: the application goes on, and what there is of an image passes for
/// none.
fn nothing_has_happened(application: &Application<'_>) {
    application.goes_on();
    application.run(EXTRACT).failure();
    let left = application.run("ls -A extracted").success().stdout();
    assert_eq!(left, "", "of an image that is not whole, nothing is left");
}

#[test]
fn an_application_survives_the_end_of_the_shards_reader_at_any_moment() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    let dies_half_way = |dump, read: &str| {
        let said = application.run(&capture(dump, read)).failure().stderr();
        assert!(said.contains("criu-image-streamer Error: "), "{said}");
        nothing_has_happened(&application);
    };
    for bytes in MOMENTS {
        dies_half_way(Dump::Safe, &format!("head -c {bytes}"));
        if bytes <= MOMENTS_FOR_PLAIN_DUMPS {
            dies_half_way(Dump::Plain, &format!("head -c {bytes}"));
        }
    }
    dies_half_way(Dump::Plain, "(head -c 5000000; sleep 0.3)");
    application.is_unharmed();
}

#[test]
fn an_application_survives_the_end_of_the_streamer_at_any_moment() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    for signal in ["KILL", "TERM"] {
        for bytes in MOMENTS {
            // A reader that takes nothing at first would stop the streamer before there is anything
            // to interrupt.
            let bytes = bytes.max(1);
            application
                .run(&capture(
                    Dump::Safe,
                    &format!("(head -c {bytes}; kill -{signal} $(cat streamer.pid); cat)"),
                ))
                .failure();
            nothing_has_happened(&application);
            if signal == "TERM" {
                assert!(!machine.path("images/streamer-capture.sock").exists());
            }
        }
    }
    application.is_unharmed();
}

#[test]
fn a_restore_that_lost_its_streamer_can_be_done_again() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    let before = application.goes_on();
    application.run(CAPTURE).success();
    application.is_gone();
    for milliseconds in [0, 20, 40, 80, 120] {
        let script = format!(
            r#"
rm -rf images ready; mkdir images; mkfifo ready
lz4 -d <app.lz4 >app.image
bash -c 'echo $$ >streamer.pid; exec criu-image-streamer --images-dir images --progress-fd 3 serve' 3>ready <app.image &
grep -q -m1 socket-init ready
(sleep {:.3}; kill -KILL $(cat streamer.pid)) &
criu restore --stream --images-dir images --restore-detached
"#,
            f64::from(milliseconds) / 1000.0
        );
        if application.run(&script).succeeded() {
            application.goes_on_from(before);
            application.run("kill -KILL -- -$PID").success();
        }
        // Of a restore that failed nothing must be left either.
        application.is_gone();
    }
    application.run(RESTORE).success();
    application.goes_on_from(before);
}
