//! An image that does not fit ends in an error while the machine still breathes, in a memory cgroup
//! that stands for the machine. Pages in pipes belong to no process, so that the kernel's
//! out-of-memory killer would take the wrong one. And a capture with a buffer takes no more than
//! there is.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use crate::buffer::dump_of;
use crate::common::cgroup::MemoryCgroup;
use crate::common::image::{self, Shard};
use crate::common::indexed::{IS_INDEX, filename};
use crate::common::keeping::Keeping;
use crate::common::runs::{self, assert_same_files};
use crate::common::shards::{self, Collector, pipe};
use crate::common::streamer::{Launch, Streamer};
use crate::common::{root_or_skip, skip, wait_until};
use crate::criu::machine;
use crate::criu::recipes::{CAPTURE_WITH_INDEX, RESTORE_WITH_INDEX, lazily};

const MIB: u64 = 1 << 20;

/// What a cgroup's processes may use together.
const LIMIT: u64 = 256 * MIB;

/// A cgroup with the usual limit.
fn limited() -> Option<MemoryCgroup> {
    cgroup(Some(LIMIT))
}

/// A cgroup, or `None` where no cgroup can be made.
fn cgroup(limit: Option<u64>) -> Option<MemoryCgroup> {
    if !root_or_skip() {
        return None;
    }
    let made = MemoryCgroup::create(limit);
    if let Err(why) = &made {
        skip(&format!("no memory cgroup can be made here: {why}"));
    }
    made.ok()
}

/// Writes an image with one page file of `size` bytes, from within the cgroup: pages in a pipe
/// count as memory of the process that wrote them.
fn produce(cgroup: &MemoryCgroup, size: u64, shard: OwnedFd) -> Child {
    let dir = TempDir::new().unwrap();
    let begin = Shard::new()
        .filename(0, "pages-1.img")
        .data_marker(1, size as u32);
    let end = Shard::new().file_eof(2).inventory_and_end(3);
    fs::write(dir.path().join("begin"), begin.bytes).unwrap();
    fs::write(dir.path().join("end"), end.bytes).unwrap();
    const SCRIPT: &str = r#"
        exec 3<begin 4<end
        echo opened >&2
        echo $$ >"$1"
        cat <&3
        dd if=/dev/zero bs=64k count="$2" status=none
        cat <&4
    "#;
    // The directory goes when the script has opened what is in it.
    let mut producer = Command::new("bash")
        .args(["-ec", SCRIPT, "bash"])
        .arg(cgroup.members())
        .arg((size >> 16).to_string())
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .stdout(shard)
        .stderr(Stdio::piped())
        .spawn()
        .expect("start bash");
    let mut line = [0];
    let stderr = producer.stderr.as_mut().expect("it is a pipe");
    io::Read::read_exact(stderr, &mut line).expect("bash has begun");
    producer
}

/// A `serve` in the cgroup, and what writes its image.
fn receive(cgroup: &MemoryCgroup, size: u64, keeping: Keeping) -> (Streamer, Child) {
    let (reader, writer) = pipe();
    let launch = keeping.serve().shards([reader]);
    let streamer = launch.limit(cgroup.limit()).start();
    (streamer, produce(cgroup, size, writer))
}

#[test]
fn an_image_larger_than_the_memory_is_refused_before_the_kernel_kills() {
    for keeping in Keeping::ALL {
        let Some(cgroup) = limited() else { return };
        let (mut streamer, mut producer) = receive(&cgroup, 2 * LIMIT, keeping);
        let exit = streamer.wait();
        assert_eq!(exit.status.code(), Some(1), "{keeping:?}: {}", exit.status);
        exit.expect_failure(&["memory", "does not fit"]);
        assert_eq!(exit.progress, [""; 0], "{keeping:?}");
        // Its pipe is broken, or dd's, which bash tells.
        assert!(!producer.wait().unwrap().success(), "{keeping:?}");
        assert_eq!(cgroup.oom_kills(), 0, "{keeping:?}");
    }
}

/// Files that were read again and again, as those of the image are, are no memory in use.
#[test]
fn an_image_that_fits_is_served_also_in_the_place_of_page_cache() {
    for keeping in Keeping::ALL {
        let Some(cgroup) = limited() else { return };
        let dir = TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        const FILL: &str = "echo $$ >\"$0\"
            dd if=/dev/zero of=cached bs=1M count=128 conv=fsync status=none
            cat cached cached cached >/dev/null";
        let mut reader = Command::new("bash");
        reader.args(["-ec", FILL]).arg(cgroup.members());
        assert!(reader.current_dir(&dir).status().unwrap().success());
        let size = LIMIT / 4 * 3;
        let (streamer, mut producer) = receive(&cgroup, size, keeping);
        read_pages(streamer, size / MIB);
        assert!(producer.wait().unwrap().success(), "{keeping:?}");
        assert_eq!(cgroup.oom_kills(), 0, "{keeping:?}");
    }
}

/// An index, and a shard with `mib` MiB of pages, as files that commands in a cgroup read.
fn large_image_with_an_index(mib: u64) -> TempDir {
    let dir = TempDir::new().unwrap();
    let name = [&filename("pages-1.img")[..], &IS_INDEX].concat();
    let index = Shard::new().marker(0, &name).file_eof(mib + 1);
    let index = index.inventory_and_end(mib + 2);
    let pages = vec![7; MIB as usize];
    let mut shard = fs::File::create(dir.path().join("1")).unwrap();
    for seq in 1..=mib {
        let chunk = Shard::new().data(seq, &pages);
        io::Write::write_all(&mut shard, &chunk.bytes).unwrap();
    }
    fs::write(dir.path().join("index"), index.bytes).unwrap();
    dir
}

/// Reads the pages from outside of the cgroup.
fn read_pages(mut streamer: Streamer, mib: u64) {
    let criu = streamer.criu();
    let mut pages = criu.open_file("pages-1.img").expect("it was sent");
    let taken = io::copy(&mut pages, &mut io::sink()).expect("read a file");
    assert_eq!(taken, mib * MIB);
    drop(criu);
    streamer.expect_success();
}

/// Shards rest while memory is short, and CRIU has what it waits for.
#[test]
fn an_image_with_an_index_may_be_larger_than_the_memory_that_the_streamer_has() {
    let mib = 2 * LIMIT / MIB;
    let image = large_image_with_an_index(mib);
    for keeping in Keeping::ALL {
        let Some(cgroup) = limited() else { return };
        let command = format!("cat '{}'/{{}}", image.path().display());
        let launch = keeping.serve().args(["--index", "--shard-cmd", &command]);
        let streamer = launch.limit(cgroup.limit()).start();
        assert!(streamer.outlasts(Duration::from_millis(500)), "{keeping:?}");
        read_pages(streamer, mib);
        assert_eq!(cgroup.oom_kills(), 0, "{keeping:?}");
    }
}

/// As a capture at the other end does, which writes the end of its index when CRIU has finished.
#[test]
fn shards_rest_no_longer_when_their_writer_comes_to_the_index_last() {
    let Some(cgroup) = cgroup(Some(128 * MIB)) else {
        return;
    };
    let mib = 72;
    let image = large_image_with_an_index(mib);
    let (readers, writers) = shards::pipes(2, None);
    let [pages, index] = <[OwnedFd; 2]>::try_from(readers).unwrap();
    let number = index.as_raw_fd().to_string();
    let launch = Keeping::Memory.serve().shards([pages]).inherit(index);
    let launch = launch.args(["--index-fd", &number]);
    let streamer = launch.limit(cgroup.limit()).start();
    for (name, writer) in ["1", "index"].iter().zip(writers) {
        let content = fs::read(image.path().join(name)).unwrap();
        io::Write::write_all(&mut fs::File::from(writer), &content).unwrap();
    }
    read_pages(streamer, mib);
}

/// One shard of the image comes before the other, and does not fit.
#[test]
fn early_data_that_does_not_fit_is_an_error_and_no_hang() {
    for launch in [Streamer::extract as fn() -> Launch, Streamer::list] {
        let Some(cgroup) = limited() else { return };
        let image = large_image_with_an_index(2 * LIMIT / MIB);
        let dir = image.path().display();
        let command = format!("[ {{}} != index ] || exec sleep 100; cat '{dir}'/{{}}");
        let launch = launch().args(["--index", "--shard-cmd", &command]);
        let mut streamer = launch.limit(cgroup.limit()).start();
        streamer.expect_failure(&["memory", "does not fit"]);
        assert_eq!(cgroup.oom_kills(), 0);
    }
}

/// Image and application together: what CRIU has taken, or was filled in, is gone.
#[test]
fn a_restore_takes_little_more_memory_than_the_image_and_the_application_together_hold() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=200 tree=1x1");
    let restores = [RESTORE_WITH_INDEX, RESTORE_ALL_FIRST];
    let lazy = restores.map(lazily);
    // Otherwise CRIU restores it to the cgroup that it was in, and its memory counts there.
    let here = |it: &str| it.replace("criu restore", "criu restore --manage-cgroups=ignore");
    for restore in restores.into_iter().chain(lazy.iter().map(String::as_str)) {
        let before = application.goes_on();
        application.run(CAPTURE_WITH_INDEX).success();
        application.is_gone();
        let names = ["app-1", "app-2", "app-index"];
        let image: usize = names.map(|name| machine.read(name).len()).iter().sum();
        let Some(cgroup) = cgroup(None) else { return };
        let enter = format!("echo 0 >{}\n", cgroup.members().display());
        application.run(&(enter + &here(restore))).success();
        let members = fs::read_to_string(cgroup.members()).expect("its members");
        assert!(!members.is_empty(), "the application is elsewhere");
        let peak = cgroup.peak().expect("a cgroup knows its peak");
        application.goes_on_from(before);
        assert!(peak > image as u64 / 2, "{peak} bytes: of something else");
        let over = peak.saturating_sub(image as u64) / MIB;
        assert!(over < 64, "{over} MiB more than {} MiB", image as u64 / MIB);
        application.run(CAPTURE_WITH_INDEX).success();
        application.is_gone();
        // The next one is restored outside of it.
        application.run(&here(RESTORE_WITH_INDEX)).success();
    }
}

/// The same image, all of which is received before CRIU starts.
const RESTORE_ALL_FIRST: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
ln -sf app-index app-3
criu-image-streamer --images-dir images --num-shards 3 --shard-cmd 'cat app-{}' \
    --progress-fd 3 serve 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached
wait $streamer
"#;

#[test]
fn a_buffer_takes_no_more_than_there_is_and_criu_waits() {
    for buffer in ["2G", "100%"] {
        let Some(cgroup) = limited() else { return };
        let files = dump_of((2 * LIMIT / MIB) as usize);
        let (readers, writers) = shards::pipes(1, None);
        let launch = Streamer::capture().args(["--buffer", buffer]);
        let mut streamer = launch.limit(cgroup.limit()).shards(writers).start();
        let collector = thread::scope(|scope| {
            scope.spawn(|| runs::send(&streamer, &files));
            // The shard takes nothing until the buffer is as full as it gets.
            // The program itself is in the page cache, and counts elsewhere.
            let rss = || streamer.memory_kib("RssAnon") << 10;
            wait_until("half of the memory", || rss() >= LIMIT / 2);
            thread::sleep(Duration::from_millis(500));
            assert!(rss() < LIMIT, "{} bytes", rss());
            Collector::start(readers)
        });
        streamer.expect_success();
        assert_eq!(cgroup.oom_kills(), 0, "{buffer}");
        assert_same_files(&image::decode(&collector.finish()).unwrap(), &files);
    }
}
