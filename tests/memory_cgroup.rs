//! An image that does not fit ends in an error while the machine still breathes, in a memory cgroup
//! that stands for the machine. Pages in pipes belong to no process, so that the kernel's
//! out-of-memory killer would take the wrong one.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use crate::common::cgroup::Cgroup;
use crate::common::image::Shard;
use crate::common::keeping::Keeping;
use crate::common::shards::pipe;
use crate::common::streamer::Streamer;
use crate::common::{root_or_skip, skip};

const MIB: u64 = 1 << 20;

/// What a cgroup's processes may use together.
const LIMIT: u64 = 256 * MIB;

/// A memory cgroup of our own. It ends with the test.
struct MemoryCgroup {
    group: Cgroup,
    version: Version,
}

#[derive(Clone, Copy)]
enum Version {
    V1,
    V2,
}

impl MemoryCgroup {
    fn create(limit: u64) -> io::Result<Self> {
        let v1 = Path::new("/sys/fs/cgroup/memory");
        let (parent, version) = if v1.join("memory.limit_in_bytes").exists() {
            (v1, Version::V1)
        } else {
            let root = Path::new("/sys/fs/cgroup");
            fs::write(root.join("cgroup.subtree_control"), "+memory")?;
            (root, Version::V2)
        };
        let group = Cgroup::create_in(parent)?;
        let (file, swapping) = match version {
            Version::V1 => ("memory.limit_in_bytes", "memory.swappiness"),
            Version::V2 => ("memory.max", "memory.swap.max"),
        };
        fs::write(group.path().join(file), limit.to_string())?;
        // Not there where the kernel does not swap.
        let _ = fs::write(group.path().join(swapping), "0");
        Ok(Self { group, version })
    }

    /// How many processes the kernel has killed in it.
    fn oom_kills(&self) -> u64 {
        let file = match self.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let events = self.group.path().join(file);
        let text = fs::read_to_string(events).expect("read the cgroup's events");
        let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        kills.expect("a count of kills").trim().parse().unwrap()
    }
}

/// A cgroup, or `None` where no cgroup can be made.
fn cgroup() -> Option<MemoryCgroup> {
    if !root_or_skip() {
        return None;
    }
    let made = MemoryCgroup::create(LIMIT);
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
        .arg(cgroup.group.path().join("cgroup.procs"))
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
    let streamer = launch.limit(cgroup.group.limit()).start();
    (streamer, produce(cgroup, size, writer))
}

#[test]
fn an_image_larger_than_the_memory_is_refused_before_the_kernel_kills() {
    for keeping in Keeping::ALL {
        let Some(cgroup) = cgroup() else { return };
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

#[test]
fn an_image_that_fits_is_served_in_little_more_memory_than_its_size() {
    for keeping in Keeping::ALL {
        let Some(cgroup) = cgroup() else { return };
        let size = LIMIT / 4 * 3;
        let (mut streamer, mut producer) = receive(&cgroup, size, keeping);
        let criu = streamer.criu();
        let mut pages = criu.open_file("pages-1.img").expect("it was sent");
        let taken = io::copy(&mut pages, &mut io::sink()).expect("read a file");
        assert_eq!(taken, size, "{keeping:?}");
        drop(criu);
        streamer.expect_success();
        assert!(producer.wait().unwrap().success(), "{keeping:?}");
        assert_eq!(cgroup.oom_kills(), 0, "{keeping:?}");
    }
}
