//! CRIU starts the streamer through its hook, with a real CRIU: it kills the application, or lets
//! it go on, only when every upload has succeeded, and nothing else runs before. They need root;
//! see tests/criu/mod.rs.

use crate::common::{PAGE, report};
use crate::criu::{Application, Machine};

/// Makes the images directory, with `capture` as the command that takes the image of a dump, and
/// `serve` as the one that brings it to a restore.
fn options(capture: &str, serve: &str) -> String {
    format!(
        r#"
rm -rf images; mkdir images
cat >images/streamer-capture.options <<'END'
# Where the image goes to.

--shard-cmd {capture}
END
cat >images/streamer-serve.options <<'END'
--shard-cmd {serve}
END
"#
    )
}

const DUMP: &str =
    "criu dump --stream --action-script criu-image-streamer --images-dir images --tree $PID";

const RESTORE: &str = "criu restore --stream --action-script criu-image-streamer --images-dir images --restore-detached";

/// What the streamers that CRIU has started leave behind: no process, and no socket.
fn nothing_is_left(application: &Application<'_>) {
    let script = "
for _ in {1..100}; do
    pgrep --exact criu-image-stre || exit 0
    sleep 0.1
done
exit 1
";
    application.run(script).success();
    application.run("! ls images/*.sock").success();
}

#[test]
fn criu_alone_checkpoints_and_restores() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    let before = application.goes_on();
    let options = options("lz4 >app.lz4", "lz4 -d <app.lz4");
    application.run(&(options + DUMP)).success();
    application.is_gone();
    nothing_is_left(&application);
    application.run(RESTORE).success();
    application.goes_on_from(before);
    nothing_is_left(&application);
}

#[test]
fn the_application_goes_on_when_an_upload_fails_at_the_end() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let script = options("cat >app.image; exit 7", "cat app.image") + DUMP;
    let said = application.run(&script).failure().stderr();
    assert!(said.contains("failed with exit status 7"), "{said}");
    application.goes_on();
    nothing_is_left(&application);
    application.is_unharmed();
}

#[test]
fn the_application_goes_on_when_an_upload_fails_on_the_way() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let script = options("head -c 5000000 >app.image; exit 7", "cat app.image") + DUMP;
    application.run(&script).failure();
    let log = machine.read("images/streamer-capture.log");
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("failed with exit status 7"), "{log}");
    application.goes_on();
    nothing_is_left(&application);
    application.is_unharmed();
}

/// A dump in the background whose upload has taken everything, and does not end before there is a
/// file `go`.
const DUMP_THAT_WAITS: &str = "
until [ -e taken ]; do sleep 0.05; done
cmp application.state <(sleep 0.5; cat application.state)
kill -0 $criu
";

fn dump_that_waits() -> String {
    let upload = "cat >app.image; touch taken; until [ -e go ]; do sleep 0.05; done";
    options(upload, "cat app.image") + DUMP + " & criu=$!\n" + DUMP_THAT_WAITS
}

#[test]
fn everything_is_frozen_until_the_upload_has_succeeded() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    let script = dump_that_waits() + "touch go; wait $criu";
    application.run(&script).success();
    application.is_gone();
    application.run(RESTORE).success();
    application.goes_on_from(before);
}

#[test]
fn a_streamer_that_is_killed_has_failed() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    // The other process of that name, the script, is a child of CRIU's.
    let script = dump_that_waits()
        + r#"
pkill -KILL --exact criu-image-stre --parent 1
touch go
! wait $criu
"#;
    let said = application.run(&script).success().stderr();
    assert!(said.contains("was killed, or crashed"), "{said}");
    application.goes_on();
    nothing_is_left(&application);
    application.is_unharmed();
}

#[test]
fn an_image_has_no_end_when_criu_is_killed_before_the_upload_has_ended() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let script = dump_that_waits() + "kill -KILL $criu; wait $criu || true";
    application.run(&script).success();
    nothing_is_left(&application);
    let log = machine.read("images/streamer-capture.log");
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("did not wait for it"), "{log}");
}

#[test]
fn the_streamer_has_nothing_of_criu_open() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let script = dump_that_waits()
        + r#"
ls -l /proc/$(pgrep --exact criu-image-stre --parent 1)/fd
touch go
wait $criu
"#;
    let open = application.run(&script).success().stdout();
    let streams: Vec<_> = ["0", "1", "2"]
        .map(|fd| {
            let line = open
                .lines()
                .find(|line| line.contains(&format!(" {fd} -> ")));
            line.unwrap_or_else(|| panic!("no {fd} in {open}"))
        })
        .into();
    assert!(streams[0].ends_with("/dev/null"), "{open}");
    assert!(streams[1].ends_with("streamer-capture.log"), "{open}");
    assert!(streams[2].ends_with("streamer-capture.log"), "{open}");
    assert!(!open.contains("script-"), "{open}");
}

/// Captures an application that goes on, into a shard of 20 MB/s, and returns the pages in the
/// image.
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
/// first, so that none can be ahead of it, and one at most is half written.
fn torn(pages: &[u8]) -> usize {
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
    assert_eq!(found.len(), REWRITTEN * (1 << 20) / PAGE);
    let ahead = found
        .iter()
        .filter(|(_, start, end)| (*start).max(*end) > first);
    let half = found.iter().filter(|(_, start, end)| start != end);
    ahead.count().max(half.count().saturating_sub(1))
}

/// MiB that the application rewrites.
const REWRITTEN: usize = 32;

#[test]
fn an_application_may_go_on_after_a_checkpoint_through_the_hook() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start(&format!("rewrite={REWRITTEN}"));
    let slow = r#"while [ "$(head -c 1M | tee -a app.image | wc -c)" -gt 0 ]; do sleep 0.05; done"#;
    let dump = options(slow, "cat app.image") + DUMP + " --leave-running";
    for _ in 0..10 {
        let pages = capture_while_running(&machine, &application, &dump);
        assert_eq!(torn(&pages), 0);
    }
    let without_hook = format!(
        r#"
rm -rf images; mkdir images; mkfifo ready
criu-image-streamer --images-dir images --shard-cmd '{slow}' --progress-fd 3 capture 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID --leave-running
wait $streamer
"#
    );
    let pages = torn(&capture_while_running(
        &machine,
        &application,
        &without_hook,
    ));
    report(format_args!("without the hook, {pages} pages were torn"));
    assert!(pages > 0, "this test cannot fail");
}

#[test]
fn a_download_that_fails_leaves_nothing_running() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    application
        .run(&(options("cat >app.image", "cat app.image") + DUMP))
        .success();
    application.is_gone();
    for broken in ["head -c 9000000 app.image", "cat app.image; exit 7"] {
        let said = application
            .run(&(options("false", broken) + RESTORE))
            .failure()
            .stderr();
        assert!(said.contains("criu-image-streamer Error: "), "{said}");
        application.is_gone();
        nothing_is_left(&application);
    }
    application
        .run(&(options("false", "cat app.image") + RESTORE))
        .success();
    application.goes_on_from(before);
}

#[test]
fn a_wrong_option_ends_the_dump_before_anything_happens() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let wrong = options("cat >app.image", "cat app.image")
        + "echo --num-shard 2 >>images/streamer-capture.options\n";
    let none = "rm -rf images; mkdir images\n".to_owned();
    for (options, words) in [
        (wrong, ["streamer-capture.options: line 4", "--num-shard"]),
        (none, ["images/streamer-capture.options", "opening it"]),
    ] {
        let said = application.run(&(options + DUMP)).failure().stderr();
        for word in words {
            assert!(said.contains(word), "{word:?} is not in {said}");
        }
        assert!(!said.contains("Dumping"), "{said}");
        nothing_is_left(&application);
    }
    application.is_unharmed();
}

#[test]
fn a_dump_without_stream_fails_in_the_hook() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let plain = options("cat >app.image", "cat app.image") + &DUMP.replace("--stream", "");
    let said = application.run(&plain).failure().stderr();
    assert!(said.contains("start it with --stream"), "{said}");
    application.is_unharmed();
}

/// CRIU connects by the path that it was given, and a socket's path has 107 bytes at most.
#[test]
fn a_long_path_is_in_the_way_only_where_criu_uses_it() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    let deep = "x".repeat(100);
    let inside = |script: String| format!("mkdir -p {deep}; cd {deep}\n{script}");
    let options = options("cat >app.image", "cat app.image");
    let absolute = (options.clone() + DUMP).replace("--images-dir ", "--images-dir $PWD/");
    application.run(&inside(absolute)).failure();
    application.goes_on();
    nothing_is_left(&application);
    application.run(&inside(options + DUMP)).success();
    application.is_gone();
    application.run(&inside(RESTORE.into())).success();
    application.goes_on_from(before);
}
