//! CRIU starts the streamer through its hook, kills the application, or lets it go on, only when
//! every upload has succeeded, and nothing runs before. The first part is with a real CRIU, and
//! needs root (see tests/criu/mod.rs); the second with a process that stands for one.

use std::fs::{self, File, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::thread;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::common::criu::{Criu, Role};
use crate::common::streamer::binary;
use crate::common::{dump, image, runs, skip, wait_until};
use crate::criu::{Application, machine};

/// Makes the images directory, with `capture` as the command that takes the image of a dump, and
/// `serve` as the one that brings it to a restore.
pub fn options(capture: &str, serve: &str) -> String {
    format!(
        r#"
rm -rf images options; mkdir images options
cat >options/streamer-capture.options <<'END'
# Where the image goes to.

--shard-cmd {capture}
END
cat >options/streamer-serve.options <<'END'
--shard-cmd {serve}
END
"#
    )
}

pub const DUMP: &str = "CRIU_IMAGE_STREAMER_OPTIONS=$PWD/options criu dump --stream --action-script criu-image-streamer --images-dir images --tree $PID";

const RESTORE: &str = "CRIU_IMAGE_STREAMER_OPTIONS=$PWD/options criu restore --stream --action-script criu-image-streamer --images-dir images --restore-detached";

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
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20 tree=1x1 threads=1");
    let before = application.goes_on();
    let external_files = "
echo '--ext-file-cmd a:cat a' >>options/streamer-capture.options
echo '--ext-file-cmd b:cat b' >>options/streamer-capture.options
echo '--ext-file-cmd a:cat >restored' >>options/streamer-serve.options
echo 'of the application' | tee a >b
";
    let options = options("lz4 >app.lz4", "lz4 -d <app.lz4") + external_files;
    application.run(&(options + DUMP)).success();
    application.is_gone();
    nothing_is_left(&application);
    application.run(RESTORE).success();
    application.run("cmp a restored").success();
    application.goes_on_from(before);
    nothing_is_left(&application);
}

#[test]
fn the_application_goes_on_when_an_upload_fails() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    // CRIU sees its pipes break on the way, and its script fail at the end.
    for (takes, status) in [("head -c 5000000", "1\n"), ("cat", "255\n")] {
        let upload = format!("{takes} >app.image; exit 7");
        let script = options(&upload, "cat app.image") + DUMP + " || echo $?";
        let ran = application.run(&script).success();
        assert_eq!(ran.stdout(), status, "{}", ran.stderr());
        let said = match takes {
            "cat" => ran.stderr(),
            _ => machine.text("images/streamer-capture.log"),
        };
        assert!(said.contains("failed with exit status 7"), "{said}");
        application.goes_on();
        nothing_is_left(&application);
    }
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
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    let before = application.goes_on();
    let script = dump_that_waits()
        + r#"
ls -l /proc/$(pgrep --exact criu-image-stre --parent 1)/fd
touch go
wait $criu
"#;
    // The streamer has nothing of CRIU's open.
    let open = application.run(&script).success().stdout();
    for (fd, leads_to) in [
        ("0", "/dev/null"),
        ("1", "streamer-capture.log"),
        ("2", "streamer-capture.log"),
    ] {
        let link = format!(" {fd} -> ");
        let mut lines = open.lines().filter(|line| line.contains(&link));
        assert!(lines.all(|line| line.ends_with(leads_to)), "{open}");
        assert!(open.contains(&link), "{open}");
    }
    assert!(!open.contains("script-"), "{open}");
    application.is_gone();
    application.run(RESTORE).success();
    application.goes_on_from(before);
}

#[test]
fn a_streamer_that_is_killed_has_failed() {
    let Some(machine) = machine() else { return };
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
    // The next one would replace it.
    application.run("rm images/streamer-capture.sock").success();
    nothing_is_left(&application);
    application.is_unharmed();
}

#[test]
fn a_wrong_option_ends_the_dump_before_anything_happens() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=20");
    let wrong = options("cat >app.image", "cat app.image")
        + "echo --num-shard 2 >>options/streamer-capture.options\n";
    let said = application.run(&(wrong + DUMP)).failure().stderr();
    for word in ["streamer-capture.options: line 4", "--num-shard"] {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
    assert!(!said.contains("Dumping"), "{said}");
    nothing_is_left(&application);
    application.is_unharmed();
}

/// CRIU connects by the path that it was given, and a socket's path has 107 bytes at most.
#[test]
fn a_long_path_is_in_the_way_only_where_criu_uses_it() {
    let Some(machine) = machine() else { return };
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

/// Options for a capture that keeps the image beside the socket.
const KEEP: &str = "--shard-cmd cat >image";

/// A process that stands for CRIU: the images directory is its standard input.
struct Caller {
    process: Child,
    /// The one that the hook sees.
    pid: u32,
    images_dir: Arc<TempDir>,
    options_dir: TempDir,
}

impl Caller {
    /// `words` are its command line.
    fn new(words: &[&str]) -> Self {
        Self::beside(words, Arc::new(TempDir::with_prefix("images-").unwrap()))
    }

    fn beside(words: &[&str], images_dir: Arc<TempDir>) -> Self {
        let mut command = Command::new("sh");
        // It does nothing until it is killed.
        command
            .args(["-c", "kill -STOP $$; exit", "criu"])
            .args(words);
        command.stdout(Stdio::null());
        Self::start(command, images_dir)
    }

    /// Under RPC: its parent's command line has these words.
    fn of_engine(words: &[&str]) -> Self {
        let images_dir = Arc::new(TempDir::with_prefix("images-").unwrap());
        let mut command = Command::new("bash");
        // Until then it has the shell's command line, which has an engine's words.
        let until = "until grep -q ^sleep /proc/$!/cmdline; do :; done; echo $!; wait";
        command.args(["-c", &format!("sleep 1000 <&0 >/dev/null & {until}")]);
        command.args(words).stdout(Stdio::piped());
        let mut caller = Self::start(command, images_dir);
        let said = caller.process.stdout.take().unwrap();
        let line = BufReader::new(said).lines().next();
        caller.pid = line.unwrap().unwrap().parse().unwrap();
        caller
    }

    fn start(mut command: Command, images_dir: Arc<TempDir>) -> Self {
        let process = command
            .stdin(File::open(images_dir.path()).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // The kernel sets it up a moment after the descriptors.
        let command_line = format!("/proc/{}/cmdline", process.id());
        while fs::read(&command_line).unwrap().is_empty() {}
        Self {
            pid: process.id(),
            process,
            images_dir,
            options_dir: TempDir::with_prefix("options-").unwrap(),
        }
    }

    fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.images_dir.path().join(name), content).unwrap();
    }

    /// The options for a role, such as `capture`.
    fn options(&self, role: &str, text: &str) {
        fs::write(self.options_file(role), text).unwrap();
    }

    fn options_file(&self, role: &str) -> PathBuf {
        let name = format!("streamer-{role}.options");
        self.options_dir.path().join(name)
    }

    /// A process that dumps and is connected, with these options for the capture.
    fn dumping(words: &[&str], options: &str) -> (Self, Criu) {
        let caller = Self::new(words);
        let criu = caller.captures(options);
        (caller, criu)
    }

    fn captures(&self, options: &str) -> Criu {
        self.options("capture", options);
        self.succeeds("pre-stream");
        Criu::connect(self.images_dir.path(), Role::Capture)
    }

    /// This program as CRIU's script, or a command that starts it.
    fn starts(&self, mut command: Command, action: &str) -> Command {
        command
            .env("CRIU_IMAGE_STREAMER_OPTIONS", self.options_dir.path())
            .env("CRTOOLS_SCRIPT_ACTION", action)
            .env("CRTOOLS_IMAGE_DIR", format!("/proc/{}/fd/0", self.pid))
            .current_dir(self.images_dir.path());
        command
    }

    /// What the hook says at this action, and its status. Returns when nobody has its output open.
    fn hook(&self, action: &str) -> Output {
        let mut hook = self.starts(Command::new(binary()), action);
        hook.output().unwrap()
    }

    #[track_caller]
    fn succeeds(&self, action: &str) {
        let output = self.hook(action);
        let log = fs::read_to_string(self.images_dir.path().join("streamer-capture.log"));
        assert!(output.status.success(), "{action}: {output:?}, {log:?}");
        assert!(output.stdout.is_empty() && output.stderr.is_empty());
    }

    #[track_caller]
    fn fails(&self, action: &str, words: &[&str]) {
        failed(&self.hook(action), words);
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.images_dir.path().join(name)).unwrap()
    }

    /// Ends it, and waits for the end of its streamer, whose log must have these words.
    #[track_caller]
    fn dies_and_streamer_says(mut self, role: &str, words: &str) {
        self.end();
        self.streamer_says(role, words);
    }

    #[track_caller]
    fn streamer_says(&self, role: &str, words: &str) {
        let log = || String::from_utf8(self.read(&format!("{role}.log"))).unwrap();
        let socket = self.images_dir.path().join(format!("{role}.sock"));
        wait_until("the socket goes", || !socket.exists());
        assert!(log().contains(words), "{words:?} is not in {}", log());
    }

    fn end(&mut self) {
        if self.process.id() != self.pid {
            let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
            self.pid = self.process.id();
        }
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        self.end();
    }
}

#[track_caller]
fn failed(output: &Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
}

#[test]
fn the_hook_has_something_to_do_at_two_actions_only() {
    let caller = Caller::new(&["dump"]);
    for action in [
        "pre-dump",
        "network-lock",
        "post-restore",
        "status-ready",
        "an action of a newer CRIU",
    ] {
        caller.succeeds(action);
    }
    assert_eq!(fs::read_dir(caller.images_dir.path()).unwrap().count(), 0);
}

#[test]
fn a_buffer_of_which_criu_has_nothing_is_told_to_have_no_use() {
    let caller = Caller::new(&["dump"]);
    caller.options("capture", "--buffer 1M\n--shard-cmd cat >image");
    let output = caller.hook("pre-stream");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    assert!(
        said.contains("--buffer has no use without --go-on-when-copied"),
        "{said}"
    );
}

/// The application would be frozen for ever.
#[test]
fn a_file_that_criu_never_closes_fails_the_dump() {
    let (caller, criu) = Caller::dumping(&["dump"], KEEP);
    let _forgotten = criu.create_file("of-a-plugin.img");
    criu.write_files(&dump::whole());
    caller.fails("post-dump", &["has not closed 1 of its files"]);
}

#[test]
fn what_is_missing_when_criu_says_that_all_is_written_fails_the_dump() {
    for missing in ["inventory.img", "pagemap-71.img"] {
        let (caller, criu) = Caller::dumping(&["dump"], KEEP);
        let mut files = dump::whole();
        files.remove(missing).unwrap();
        criu.write_files(&files);
        caller.fails("post-dump", &[missing, "discard it"]);
        let outcome = String::from_utf8(caller.read("streamer-capture.outcome")).unwrap();
        assert!(
            outcome.lines().last().unwrap().contains(missing),
            "{outcome}"
        );
    }
    // A CRIU that goes away before has failed, whatever it has sent.
    let (caller, criu) = Caller::dumping(&["dump"], KEEP);
    criu.write_files(&dump::whole());
    drop(criu);
    caller.streamer_says("streamer-capture", "before it was at `post-dump`");
    let image = fs::read(caller.images_dir.path().join("image")).unwrap_or_default();
    assert!(image::decode(&[image]).is_err());
}

#[test]
fn no_run_takes_another_ones_outcome_for_its_own() {
    let (first, criu) = Caller::dumping(&["dump"], KEEP);
    criu.write_files(&dump::whole());
    first.succeeds("post-dump");

    let second = Caller::new(&["dump"]);
    let outcome = first.read("streamer-capture.outcome");
    second.write("streamer-capture.outcome", &outcome);
    second.fails("post-dump", &["has not started the hook"]);

    // In one directory there is one streamer at a time, also while it waits for its commands.
    let upload = "--shard-cmd cat >image; touch taken; until [ -e go ]; do sleep 0.02; done";
    let criu = second.captures(upload);
    let third = Caller::beside(&["dump"], Arc::clone(&second.images_dir));
    third.options("capture", KEEP);
    let is_refused = || {
        third.fails("pre-stream", &["another streamer listens"]);
        third.fails("post-dump", &["has not started the hook"]);
    };
    is_refused();
    criu.write_files(&dump::whole());
    thread::scope(|scope| {
        let end = scope.spawn(|| second.succeeds("post-dump"));
        let taken = second.images_dir.path().join("taken");
        wait_until("the image", || taken.exists() || end.is_finished());
        is_refused();
        second.write("go", "");
    });
}

#[test]
fn a_streamer_ends_when_criu_ends_before_it_has_connected() {
    let capture = Caller::new(&["dump"]);
    capture.options("capture", KEEP);
    capture.succeeds("pre-stream");
    capture.dies_and_streamer_says("streamer-capture", "did not wait for it");

    let serve = Caller::new(&["restore"]);
    let shards = runs::capture(&dump::whole(), 1, None);
    serve.write("image", &shards[0]);
    serve.options("serve", "--shard-cmd cat image");
    serve.succeeds("pre-stream");
    serve.dies_and_streamer_says("streamer-serve", "it has ended without having connected");

    // While the image is still on its way, the hook itself is told.
    let mut waits = Caller::new(&["restore"]);
    waits.options("serve", "--shard-cmd touch begun; sleep 1000");
    let images_dir = waits.images_dir.path().to_owned();
    let pid = Pid::from_raw(waits.pid as i32);
    thread::scope(|scope| {
        let hook = scope.spawn(|| waits.fails("pre-stream", &["did not wait for it"]));
        let begun = images_dir.join("begun");
        wait_until("a command", || begun.exists() || hook.is_finished());
        kill(pid, Signal::SIGKILL).unwrap();
    });
    waits.end();
}

#[test]
fn the_command_lines_tell_a_dump_from_a_restore_and_files_where_they_do_not() {
    let serve = "--shard-cmd touch served; false";
    let is_served = |caller: &Caller| {
        caller.options("serve", serve);
        caller.fails("pre-stream", &["touch served"]);
        assert!(caller.images_dir.path().join("served").exists());
    };
    let dump = Caller::new(&["dump"]);
    dump.options("capture", KEEP);
    dump.options("serve", serve);
    dump.succeeds("pre-stream");
    // CRIU runs no action script when these are written.
    for words in [&["pre-dump"][..], &["cpuinfo", "dump"]] {
        let other = Caller::new(words);
        other.options("capture", KEEP);
        other.fails("pre-stream", &["without the hook"]);
    }
    // An images directory may be named so. CRIU's own words count, and not its parent's.
    for words in [&["restore", "-D", "checkpoint"][..], &["restore", "dump"]] {
        let restore = Caller::new(words);
        restore.options("capture", KEEP);
        restore.fails("pre-stream", &["streamer-serve.options"]);
        is_served(&restore);
    }
    let engine = Caller::of_engine(&["runc", "restore", "app"]);
    engine.options("capture", KEEP);
    engine.fails("pre-stream", &["streamer-serve.options"]);
    is_served(&engine);

    // What may be a restore is no capture: that could empty the very image that is to be restored.
    let unknown = Caller::of_engine(&["engine"]);
    unknown.fails("pre-stream", &["nothing tells"]);
    is_served(&unknown);
    unknown.options("capture", KEEP);
    unknown.fails("pre-stream", &["nothing tells"]);
    fs::remove_file(unknown.options_file("serve")).unwrap();
    unknown.fails("pre-stream", &["nothing tells"]);
    assert!(!unknown.images_dir.path().join("image").exists());
}

/// A container engine fills it from an archive, which may come from anyone.
#[test]
fn options_in_the_images_directory_are_never_followed() {
    for (word, role) in [("restore", "serve"), ("dump", "capture")] {
        let caller = Caller::new(&[word]);
        let name = format!("streamer-{role}.options");
        caller.write(&name, "--shard-cmd touch done; false");
        let in_images_dir = caller.images_dir.path().join(&name).display().to_string();
        let file = caller.options_file(role).display().to_string();
        let words = [
            &file,
            &*in_images_dir,
            "is not read",
            "/etc/criu-image-streamer",
        ];
        caller.fails("pre-stream", &words);
        let mut command = caller.starts(Command::new(binary()), "pre-stream");
        command.env_remove("CRIU_IMAGE_STREAMER_OPTIONS");
        let usual = format!("/etc/criu-image-streamer/{name}");
        failed(&command.output().unwrap(), &[&usual, &in_images_dir]);
        assert!(!caller.images_dir.path().join("done").exists());
    }
}

/// An engine's CRIU has no environment of its user's.
#[test]
fn options_have_a_usual_place() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root");
    }
    let caller = Caller::new(&["dump"]);
    let script = "
mount -t tmpfs tmpfs /etc
mkdir /etc/criu-image-streamer
echo '--shard-cmd cat >image' >/etc/criu-image-streamer/streamer-capture.options
";
    let mut command = caller.starts(Command::new("unshare"), "pre-stream");
    command.args(["--mount", "bash", "-ec", &format!("{script}exec \"$0\"")]);
    command.arg(binary());
    command.env_remove("CRIU_IMAGE_STREAMER_OPTIONS");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(Role::Capture.socket(caller.images_dir.path()).exists());
}

/// A container has another name, directory and id when it is restored.
#[test]
fn the_name_of_an_image_travels_in_an_engines_archive() {
    let store = TempDir::new().unwrap();
    let stored = |name: &str| store.path().join(name).display().to_string();
    let dump = Caller::of_engine(&["runc", "checkpoint", "app"]);
    let upload = format!("--shard-cmd cat >{}", stored("$CRIU_IMAGE_NAME"));
    let criu = dump.captures(&upload);
    criu.write_files(&dump::whole());
    dump.succeeds("post-dump");
    let name = String::from_utf8(dump.read("streamer-capture.name")).unwrap();
    assert!(fs::exists(stored(name.trim())).unwrap(), "{name}");
    // Engines take a directory without it for no checkpoint.
    let inventory = &dump::whole()["inventory.img"];
    assert_eq!(&dump.read("inventory.img"), inventory);

    let restore = Caller::of_engine(&["runc", "restore", "other"]);
    restore.write("streamer-capture.name", &name);
    let download = format!("--shard-cmd cat {}", stored("$CRIU_IMAGE_NAME"));
    restore.options("serve", &download);
    restore.succeeds("pre-stream");
    let criu = Criu::connect(restore.images_dir.path(), Role::Serve);
    criu.expect_file("inventory.img", inventory);

    // The archive may come from anyone.
    let hostile = Caller::of_engine(&["runc", "restore", "other"]);
    hostile.options("serve", "--shard-cmd touch started");
    for name in ["../a", "a\nb", "$(id)"] {
        hostile.write("streamer-capture.name", name);
        hostile.fails("pre-stream", &["streamer-capture.name"]);
    }
    assert!(!hostile.images_dir.path().join("started").exists());
}

#[test]
fn a_name_may_be_given_and_only_an_engine_finds_an_inventory() {
    let options = "--image-name app-1\n--shard-cmd cat >$CRIU_IMAGE_NAME";
    let (caller, criu) = Caller::dumping(&["dump"], options);
    criu.write_files(&dump::whole());
    caller.succeeds("post-dump");
    assert_eq!(caller.read("streamer-capture.name"), b"app-1\n");
    image::decode(&[caller.read("app-1")]).unwrap();
    assert!(!caller.images_dir.path().join("inventory.img").exists());
}

/// It packs the images directory as soon as it goes on.
#[test]
fn an_engine_does_not_go_on_before_an_image_in_its_directory_is_whole() {
    let engine = Caller::of_engine(&["runc", "checkpoint", "--leave-running", "app"]);
    let command = "--shard-cmd lz4 >$CRTOOLS_IMAGE_DIR/app.lz4";
    engine.options(
        "capture",
        &format!("--buffer 50%\n--go-on-when-copied\n{command}"),
    );
    engine.fails("pre-stream", &["--go-on-when-copied", "an engine packs"]);
    // Its user finds the reason nowhere else.
    let log = String::from_utf8(engine.read("streamer-capture.log")).unwrap();
    assert!(log.contains("an engine packs"), "{log}");
    // A released CRIU runs the script, and aborts.
    engine.options("capture", KEEP);
    engine.succeeds("pre-stream");
    engine.dies_and_streamer_says("streamer-capture", "over RPC");
}

/// CRIU with file capabilities: its descriptors are closed to its own user.
#[test]
fn the_images_directory_is_found_where_crius_descriptors_are_out_of_reach() {
    if !nix::unistd::geteuid().is_root() {
        return skip("needs root");
    }
    let images_dir = Arc::new(TempDir::with_prefix("images-").unwrap());
    let directory = images_dir.path().display().to_string();
    let caller = Caller::beside(&["dump", "-D", &directory], images_dir);
    // What fails at once would take the socket with it.
    caller.options("capture", "--shard-cmd cat >/dev/null");
    for path in [caller.images_dir.path(), caller.options_dir.path()] {
        std::os::unix::fs::chown(path, Some(65_534), Some(65_534)).unwrap();
    }
    let streamer = caller.images_dir.path().join("criu-image-streamer");
    // Not by this process: what another test forks meanwhile would keep it open for writing.
    let copied = Command::new("cp").arg(binary()).arg(&streamer).status();
    assert!(copied.unwrap().success());
    let mut command = caller.starts(Command::new(streamer), "pre-stream");
    command.uid(65_534).gid(65_534).current_dir("/");
    let output = command.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(Role::Capture.socket(caller.images_dir.path()).exists());
}

#[test]
fn options_that_the_hook_cannot_follow_are_refused_by_file_and_line() {
    let caller = Caller::new(&["dump"]);
    let file = caller.options_file("capture");
    let name = file.display().to_string();
    for (text, words) in [
        ("--shard-cmd cat\n--num-shards 99", "--num-shards"),
        ("--shard-cmd cat\n--progress-fd 2", "line 2"),
        ("--shard-cmd cat\n--go-on-when-copied", "only with --buffer"),
    ] {
        fs::write(&file, text).unwrap();
        caller.fails("pre-stream", &[&name, words]);
    }
    fs::write(&file, KEEP).unwrap();
    fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
    caller.fails("pre-stream", &[&name, "other users may write to it"]);
    // The first line of a file that is none of ours must not show.
    fs::remove_file(&file).unwrap();
    std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
    let output = caller.hook("pre-stream");
    failed(&output, &[&name, "out of its directory"]);
    assert!(!caller.images_dir.path().join("image").exists());
}

#[test]
fn the_hook_is_for_criu() {
    let run = |args: &[&str]| {
        let mut command = Command::new(binary());
        command.env_remove("CRTOOLS_SCRIPT_ACTION");
        command.args(args).output().unwrap()
    };
    failed(&run(&["hook"]), &["--action-script"]);
    failed(&run(&["--shard-cmd", "cat", "hook"]), &["hook", "in files"]);
}
