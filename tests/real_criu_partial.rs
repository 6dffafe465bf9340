//! A real CRIU that delivers less than a dump, and says so nowhere: the streamer does. They need
//! root; see tests/criu/mod.rs.

use std::time::{Duration, Instant};

use crate::common::runs::read_dir;
use crate::criu::recipes::EXTRACT;
use crate::criu::{Application, Machine, machine};
use crate::hook::{DUMP, options};

/// A capture, and a script around CRIU, which is to print CRIU's status.
fn capture(criu: &str) -> String {
    format!(
        r#"
rm -rf images ready app.image; mkdir images; mkfifo ready
{{ criu-image-streamer --images-dir images --progress-fd 3 capture 3>ready | cat >app.image; }} & pipeline=$!
grep -q -m1 socket-init ready
{criu}
wait $pipeline
"#
    )
}

/// The capture fails and says this, nothing passes for an image, and the application can still be
/// checkpointed and restored.
#[track_caller]
fn is_refused(machine: &Machine, application: &Application<'_>, criu: &str, words: &[&str]) {
    let ran = application.run(&capture(criu));
    let (described, said) = (ran.describe(), ran.failure().stderr());
    let error = said
        .lines()
        .find(|line| line.starts_with("criu-image-streamer Error: "))
        .unwrap_or_else(|| panic!("no error\n{described}"));
    for word in words {
        assert!(error.contains(word), "no {word:?} in: {error}\n{described}");
    }
    application.run(EXTRACT).failure();
    assert!(read_dir(&machine.path("extracted")).is_empty());
    application.is_unharmed();
}

#[test]
fn a_pre_dump_is_no_image_whether_it_succeeds_or_fails() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=10 tree=1x1");
    let failing = "! criu pre-dump --stream --images-dir images --tree 99999";
    is_refused(&machine, &application, failing, &["pre-dump"]);
    // CRIU aborts on kernels that do not know which pages were written to.
    if machine
        .run("criu check --feature mem_dirty_track")
        .succeeded()
    {
        let succeeding = "criu pre-dump --stream --images-dir images --tree $PID";
        is_refused(&machine, &application, succeeding, &["pre-dump"]);
    }
}

/// Were a lazy dump not refused, CRIU would wait for the pages to be fetched.
#[test]
fn a_dump_whose_memory_goes_elsewhere_is_refused_at_once() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=10");
    let server =
        "criu page-server --images-dir images --port 7070 --daemon --pidfile $PWD/server.pid";
    for (before, option) in [(server, "--page-server"), ("", "--lazy-pages")] {
        let criu = format!(
            "{before}
             ! criu dump --stream --images-dir images --tree $PID {option} --address 127.0.0.1 --port 7070"
        );
        is_refused(&machine, &application, &criu, &[option]);
    }
}

/// CRIU waits for its hook there, with the application frozen.
#[test]
fn under_the_hook_a_dump_to_a_page_server_fails_at_once_and_the_application_goes_on() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=10");
    let server = "
mkdir elsewhere
criu page-server --images-dir elsewhere --port 7071 --daemon --pidfile server.pid
";
    let dump = format!("{DUMP} --page-server --address 127.0.0.1 --port 7071");
    let script = options("cat >app.image", "cat app.image") + server + &dump;
    let begin = Instant::now();
    application.run(&script).failure();
    assert!(begin.elapsed() < Duration::from_secs(30));
    let log = machine.read("images/streamer-capture.log");
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains("CRIU was given --page-server"), "{log}");
    application.goes_on();
    application.is_unharmed();
}

/// The message that describes them has over 2 MiB.
#[test]
fn an_application_of_36_000_mappings_is_captured() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=10 mappings=36000");
    application.is_unharmed();
}
