//! An application goes on as soon as `capture --buffer` has its memory, with a real CRIU: whatever
//! it does then is not in the image, and whatever becomes of the image is not its concern. They
//! need root; see tests/criu/mod.rs.

use crate::common::PAGE;
use crate::criu::recipes::{EXTRACT, RESTORE};
use crate::criu::{Application, Machine, machine};
use crate::hook::{DUMP, options};

/// How often an application is captured while it changes.
const RUNS: usize = 5;

/// MiB that the application rewrites all the time.
const REWRITTEN: usize = 8;

/// What takes the image at 5 MB per second.
const SLOW: &str =
    r#"while [ "$(head -c 500000 | tee -a app.image | wc -c)" -gt 0 ]; do sleep 0.1; done"#;

/// A checkpoint to the script `reader`. The application goes on when the streamer says
/// `memory-copied`, and at the end in any case.
const CAPTURE: &str = r#"
rm -rf images ready app.image; mkdir images; mkfifo ready
criu-image-streamer --images-dir images --buffer 50% --shard-cmd '. ./reader' --progress-fd 3 capture 3>ready & streamer=$!
exec 4<ready
grep -q -m1 socket-init <&4
if criu dump --stream --images-dir images --tree $PID --leave-stopped; then
    grep -q -m1 memory-copied <&4 && touch told || true
    kill -CONT -- -$PID
fi
wait $streamer
"#;

/// A dump through the hook, in which CRIU lets the application go on when its memory is copied. The
/// upload is waited for: what it has left to say is in the file with the outcome.
fn dump_through_hook(upload: &str) -> String {
    let buffered = "
printf '%s\\n' '--buffer 50%' --go-on-when-copied >>options/streamer-capture.options
";
    let wait = "
touch gone-on
until [ -e images/streamer-capture.outcome ]; do sleep 0.05; done
";
    options(upload, "cat app.image") + buffered + DUMP + " --leave-running\n" + wait
}

/// Captures an application that goes on, into a slow shard, and returns the pages in the image.
fn capture_while_running(machine: &Machine, application: &Application<'_>, dump: &str) -> Vec<u8> {
    let extract = "
rm -rf extracted
criu-image-streamer --images-dir extracted extract <app.image
cat extracted/pages-*.img >pages
";
    application.run("rm -f app.image ready").success();
    application.run(dump).success();
    application.goes_on();
    application.run(extract).success();
    machine.read("pages")
}

/// How many pages were written after the application had been frozen: it writes the first page
/// first, so that none can be ahead of it, and one at most is half written. It writes `mib` MiB.
fn torn(pages: &[u8], mib: usize) -> usize {
    let word = |page: &[u8], at: usize| {
        u64::from_le_bytes(page[at..at + 8].try_into().expect("eight bytes"))
    };
    let mut found: Vec<(u64, u64, u64)> = pages
        .chunks_exact(PAGE)
        .filter(|page| page.starts_with(b"REWRITE\0"))
        .map(|page| (word(page, 8), word(page, 16), word(page, PAGE - 8)))
        .collect();
    found.sort_unstable();
    let (number, first, _) = found[0];
    assert_eq!(number, 0, "the first page is there");
    assert_eq!(found.len(), mib * (1 << 20) / PAGE);
    let ahead = found
        .iter()
        .filter(|(_, start, end)| (*start).max(*end) > first);
    let half = found.iter().filter(|(_, start, end)| start != end);
    ahead.count().max(half.count().saturating_sub(1))
}

#[test]
fn what_an_application_does_when_it_goes_on_is_not_in_the_image() {
    let Some(machine) = machine() else { return };
    std::fs::write(machine.path("reader"), SLOW).expect("reader");
    let application = machine.start(&format!("rewrite={REWRITTEN}"));
    let succeeded = "grep -qx succeeded images/streamer-capture.outcome\n";
    let through_hook = dump_through_hook(SLOW) + succeeded;
    for run in 1..=RUNS {
        for dump in [through_hook.as_str(), CAPTURE] {
            // One in five of the others.
            if dump == CAPTURE && run % 5 != 0 {
                continue;
            }
            let pages = capture_while_running(&machine, &application, dump);
            assert_eq!(torn(&pages, REWRITTEN), 0, "run {run}: {dump}");
        }
    }
    // That this test can fail.
    let without = CAPTURE
        .replace("--buffer 50%", "")
        .replace("--leave-stopped", "--leave-running")
        .replace("grep -q -m1 memory-copied <&4 && touch told || true", "");
    let pages = capture_while_running(&machine, &application, &without);
    assert!(torn(&pages, REWRITTEN) > 0);
}

#[test]
fn the_image_of_an_application_that_goes_on_can_be_restored() {
    let Some(machine) = machine() else { return };
    std::fs::write(machine.path("reader"), "lz4 >app.lz4").expect("reader");
    let application = machine.start("memory=20 tree=1x1 threads=1");
    for dump in [dump_through_hook("lz4 >app.lz4").as_str(), CAPTURE] {
        let before = application.goes_on();
        application.run(dump).success();
        application.goes_on_from(before);
        application.run("kill -KILL -- -$PID").success();
        application.is_gone();
        application.run(RESTORE).success();
        application.goes_on_from(before);
    }
}

#[test]
fn an_application_that_goes_on_survives_the_failure_of_its_image() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    for reader in [
        "head -c 5000000 >app.image",
        "head -c 5000000 >app.image; until [ -e told ]; do sleep 0.05; done; exit 3",
        "until [ -e told ]; do sleep 0.05; done; cat >app.image; exit 3",
        "head -c 100000 >app.image; until [ -e told ]; do sleep 0.05; done; kill -KILL $PPID",
    ] {
        std::fs::write(machine.path("reader"), reader).expect("reader");
        application.run("rm -f told").success();
        application.run(CAPTURE).failure();
        application.goes_on();
        // Where it is whole, the status alone tells that it may not be trusted.
        if !reader.contains("cat") {
            application.run(EXTRACT).failure();
        }
    }
    application.is_unharmed();
}
