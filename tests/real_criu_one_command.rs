//! One command each way, with a real CRIU that the streamer starts: a checkpoint that fails or is
//! interrupted leaves the application unharmed, in a terminal too. They need root; see
//! tests/criu/mod.rs.

use crate::criu::recipes::EXTRACT;
use crate::criu::{Application, Machine, machine};

/// A shard that takes nothing: the dump stands still with the application frozen.
const STALLED: &str = "sleep 1000";

/// Prints CRIU's PID. A dynamic loader may run it.
const CRIU: &str = "pgrep -f '^([^ ]*/)?(criu|ld-linux[^ ]*) '";

fn capture(shard: &str, command: &str) -> String {
    format!(
        "rm -rf images; mkdir images
         criu-image-streamer --images-dir images --shard-cmd '{shard}' -p 3 capture -- {command}"
    )
}

/// Runs a script that ends with this status, and returns what was said on standard error.
fn ends_with(application: &Application<'_>, status: u8, script: &str) -> String {
    let script = format!(
        "status=0; ( {script} ) 3>progress || status=$?
         test $status = {status} || {{ echo status $status; exit 1; }}
         ! test -e images/streamer-capture.sock"
    );
    application.run(&script).success().stderr()
}

/// A machine's init waits for its children now and then; others have none to wait for.
fn nothing_is_left(machine: &Machine) {
    let script = "
        for attempt in $(seq 100); do
            left=$(ps -e -o stat=,comm= | grep -E '^Z|criu|sleep' | grep -v '^Z.*application' || true)
            test \"$left\" || exit 0
            sleep 0.1
        done
        echo \"$left\"; exit 1";
    machine.run(script).success();
}

#[test]
fn a_criu_that_fails_ends_the_capture_with_its_status() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    for command in [
        // It does not get as far as connecting.
        "criu dump --stream --no-such-option",
        // It connects, and finds no process.
        "criu dump --stream -D images -t 999999",
        // It forgets what it was told to do.
        "criu dump -D elsewhere --stream -t $PID",
    ] {
        let said = ends_with(&application, 1, &capture("cat >app.image", command));
        assert!(said.contains("`criu dump"), "{said}");
        assert!(said.contains("failed with exit status"), "{said}");
        application.goes_on();
        application.run(EXTRACT).failure();
    }
    nothing_is_left(&machine);
    application.is_unharmed();
}

/// An evacuation of a spot instance that came too late: timeout(1) signals its whole group.
#[test]
fn an_application_survives_a_capture_that_ran_out_of_time() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=40 tree=1x2 threads=2");
    for signal in ["TERM", "INT", "HUP"] {
        let before = application.goes_on();
        let script = capture(STALLED, "criu dump --stream -D images -t $PID");
        let script = script.replace(
            "criu-image-streamer",
            &format!("timeout --preserve-status -s {signal} 2 criu-image-streamer"),
        );
        let status = match signal {
            "TERM" => 143,
            "INT" => 130,
            _ => 129,
        };
        let said = ends_with(&application, status, &script);
        assert!(said.contains(&format!("ended by SIG{signal}")), "{said}");
        // CRIU itself said so: it was not killed, and we have waited for it.
        assert!(said.contains("Dumping FAILED"), "{said}");
        application
            .run("grep -q checkpoint-start progress")
            .success();
        application.goes_on_from(before);
        nothing_is_left(&machine);
    }
    application.is_unharmed();
}

/// Runs a command on a terminal of its own, whose keys are what comes from `keys`.
fn on_a_terminal(command: &str, keys: &str) -> String {
    format!("({keys}) | script -qefc \"{command}\" typescript >/dev/null")
}

/// ^C goes to the whole group in the foreground, CRIU included.
#[test]
fn an_application_survives_an_interrupt_from_the_terminal() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=40 tree=1x2");
    let before = application.goes_on();
    let streamer = format!(
        "exec 3>progress; trap : INT; criu-image-streamer -D images --shard-cmd '{STALLED}' -p 3 \
         capture -- criu dump --stream -D images -t $PID; echo \\$? >status"
    );
    let keys = "until grep -q checkpoint-start progress; do sleep 0.05; done
        sleep 0.3; printf '\\003'; until test -s status; do sleep 0.1; done";
    let script = format!(
        "mkdir images; : >progress\n{}\ntest \"$(cat status)\" = 130
         ! test -e images/streamer-capture.sock",
        on_a_terminal(&streamer, keys)
    );
    application.run(&script).success();
    application.goes_on_from(before);
    let said = machine.text("typescript");
    assert!(said.contains("ended by SIGINT"), "{said}");
    assert!(said.contains("Dumping FAILED"), "{said}");
    nothing_is_left(&machine);
    application.is_unharmed();
}

/// The application's terminal is the one that the streamer and CRIU run on, in the foreground.
#[test]
fn an_application_of_a_terminal_moves_to_another() {
    let Some(machine) = machine() else { return };
    // Started from a shell with job control, as its foreground job.
    let start =
        "set -m; application $PWD/application.state memory=20 & echo \\$! >pid; fg >/dev/null";
    let end = "while ! test -e over; do sleep 0.1; done";
    machine
        .run(&format!(
            "rm -f over; ({}) &\nuntil test -s application.state; do sleep 0.05; done",
            on_a_terminal(&format!("bash -c '{start}'"), end)
        ))
        .success();
    let pid = machine.run("cat pid").success().stdout();
    let application = machine.adopt(&pid, "application.state");
    let before = application.goes_on();
    application
        .run(
            "mkdir images
             criu-image-streamer -D images --shard-cmd 'cat >app.image' capture -- \
                criu dump --stream --shell-job -D images -t $PID
             touch over",
        )
        .success();
    application.is_gone();
    let restore = "criu-image-streamer -D images --shard-cmd 'cat app.image' serve -- criu restore --stream --shell-job -D images; echo \\$? >status";
    application
        .run(&format!(
            "rm -f over; ({}) &\nuntil kill -0 $PID; do sleep 0.05; done 2>/dev/null",
            on_a_terminal(restore, end)
        ))
        .success();
    application.goes_on_from(before);
    // In the terminal's foreground, and CRIU and the streamer wait for its end.
    application
        .run(&format!(
            "test \"$(ps -o pgid= -p $PID)\" = \"$(ps -o tpgid= -p $PID)\"
             test \"$({CRIU})\"; ! test -e status
             kill -TERM $PID; until test -s status; do sleep 0.05; done; touch over",
        ))
        .success();
    nothing_is_left(&machine);
}

/// Its parent is whoever adopts orphans: not the streamer, which adopts those of shard commands.
#[test]
fn a_restored_application_is_on_its_own() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    application
        .run(&format!(
            "exec 3>progress; {}",
            capture("cat >app.image", "criu dump --stream -D images -t $PID")
        ))
        .success();
    application.is_gone();
    application
        .run(
            "criu-image-streamer -D images --shard-cmd 'cat app.image' serve -- bash -c \"
                 criu restore --stream -D images -d && ps -o ppid= -p $PID >parent\"
             test $(cat parent) = 1",
        )
        .success();
    application.goes_on_from(before);
    nothing_is_left(&machine);
}
