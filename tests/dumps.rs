//! A dump that falls short is refused, and what is missing is named: CRIU's end of the connection
//! looks the same whether the dump succeeded or not.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use crate::common::criu::{Criu, Role};
use crate::common::dump;
use crate::common::image::{self, Files};
use crate::common::runs::{self, assert_same_files};
use crate::common::streamer::{Exit, Streamer};

/// Captures these files, and gives what the shards hold.
fn capture(files: &Files) -> (Exit, Vec<Vec<u8>>) {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 2);
    runs::send(&streamer, files);
    let exit = streamer.wait();
    (exit, collector.finish())
}

/// The capture fails and says this, and what it wrote is no image.
#[track_caller]
fn refused(files: &Files, words: &[&str]) {
    let (exit, shards) = capture(files);
    exit.expect_failure(words);
    assert!(image::decode(&shards).is_err(), "it looks whole");
}

#[track_caller]
fn accepted(files: &Files) {
    let (exit, shards) = capture(files);
    exit.expect_success();
    assert_same_files(&image::decode(&shards).unwrap(), files);
}

/// A whole dump, but for these files.
fn with<const N: usize>(files: [(&str, Vec<u8>); N]) -> Files {
    let mut dump = dump::whole();
    dump.extend(image::files(files));
    dump
}

#[test]
fn a_whole_dump_is_an_image() {
    accepted(&dump::whole());
    // Neither what other programs wrote nor files of kinds that are not known begin with a magic.
    accepted(&with([
        ("iptables-9.img", Vec::new()),
        ("tmpfs-dev-72.tar.gz.img", Vec::new()),
        ("of-a-plugin.img", vec![1]),
    ]));
}

#[test]
fn what_a_dump_must_have_is_missed_by_name() {
    for name in ["pstree.img", "files.img", "pagemap-71.img"] {
        let mut files = dump::whole();
        files.remove(name).expect(name);
        refused(&files, &["capturing the image", name, "discard it"]);
    }
    // A pre-dump has an inventory, and may have memory.
    let mut files = dump::whole();
    files.retain(|name, _| name.starts_with("inventory") || name.starts_with("pagemap"));
    refused(&files, &["pre-dump"]);
}

#[test]
fn files_that_criu_did_not_get_to_flush_are_named() {
    let whole = dump::whole();
    for name in ["files.img", "sk-queues.img", "core-72.img"] {
        refused(&with([(name, Vec::new())]), &[name, "is empty"]);
    }
    for (name, end) in [("files.img", 8 + 4), ("mm-71.img", 9), ("inventory.img", 5)] {
        let cut = whole[name][..end].to_vec();
        refused(&with([(name, cut)]), &[name]);
    }
}

/// A newer CRIU has its reasons: what it packs, adds or leaves out is no defect.
#[test]
fn whatever_a_newer_criu_does_its_whole_dump_is_an_image() {
    let huge = dump::file([vec![7; 16 << 20]]);
    // Compressed pages take less than their pagemap says, and all-zero ones nothing.
    accepted(&with([("pages-901.img", vec![7; 100])]));
    accepted(&with([("pages-901.img", Vec::new())]));
    accepted(&with([
        ("mm-71.img", huge.clone()),
        ("files.img", huge),
        ("unknown-71.img", vec![1; 3]),
        ("fs-71.img", dump::file([dump::number(1000, 1)])),
        // Another magic, and flags that are not known.
        ("ids-71.img", vec![1; 100]),
        ("pagemap-71.img", dump::pagemap(901, &[(1 << 9 | 1, 3)])),
    ]));
    let mut files = dump::whole();
    for name in ["core-72.img", "ids-71.img", "fs-71.img", "pages-901.img"] {
        files.remove(name).expect(name);
    }
    accepted(&files);
}

#[test]
fn of_a_file_sent_twice_the_last_one_is_looked_at() {
    let send = |first: &[u8], last: &[u8]| {
        let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
        let criu = streamer.criu();
        criu.write_file("files.img", first);
        criu.write_files(&with([("files.img", last.to_vec())]));
        drop(criu);
        let exit = streamer.wait();
        collector.finish();
        exit
    };
    let whole = &dump::whole()["files.img"];
    assert!(send(b"", whole).status.success());
    send(whole, b"").expect_failure(&["files.img", "is empty"]);
}

#[test]
fn two_dumps_at_once_are_an_error_and_not_one_image() {
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
    let (first, second) = (streamer.criu(), streamer.criu());
    first.write_files(&dump::whole());
    // It may have lost its streamer by then.
    let _ = second.try_create_file("core-1.img", None);
    streamer.expect_failure(&["sends files too"]);
    assert!(image::decode(&collector.finish()).is_err());
}

/// Captures a whole dump, and while CRIU sends it something happens in the images directory.
fn capture_beside(directory: &tempfile::TempDir, act: impl FnOnce()) -> Exit {
    let launch = Streamer::capture().images_dir(directory.path());
    let (mut streamer, collector) = runs::collect(launch, 1);
    let criu = streamer.criu();
    let dump = dump::whole();
    let mut files = runs::inventory_last(&dump);
    let (name, content) = files.next().unwrap();
    criu.write_file(name, content);
    streamer.wait_for_line("checkpoint-start");
    act();
    for (name, content) in files {
        criu.write_file(name, content);
    }
    drop(criu);
    let exit = streamer.wait();
    let is_image = image::decode(&collector.finish()).is_ok();
    assert_eq!(is_image, exit.status.success());
    exit
}

#[test]
fn an_image_file_that_appears_beside_the_stream_is_named() {
    let forgotten = [
        ("core-1.img", dump::core(dump::ALIVE)),
        ("inventory.img", dump::inventory(&[])),
        ("amdgpu-kfd-1.img", vec![0; 100]),
    ];
    for (name, content) in forgotten {
        let directory = tempfile::tempdir().unwrap();
        let write = || fs::write(directory.path().join(name), &content).unwrap();
        capture_beside(&directory, write).expect_failure(&[name, "beside the stream"]);
        // Now it was there before, as part of an earlier image.
        assert!(capture_beside(&directory, || ()).status.success());
        // Written anew, it is not.
        capture_beside(&directory, write).expect_failure(&[name, "beside the stream"]);
    }
}

#[test]
fn an_image_file_of_an_earlier_dump_may_be_linked_and_have_its_mode_changed() {
    let directory = tempfile::tempdir().unwrap();
    let earlier = directory.path().join("core-7.img");
    fs::write(&earlier, dump::core(dump::ALIVE)).unwrap();
    let exit = capture_beside(&directory, || {
        fs::set_permissions(&earlier, fs::Permissions::from_mode(0o400)).unwrap();
        fs::hard_link(&earlier, directory.path().join("kept")).unwrap();
    });
    exit.expect_success();
}

/// Writes what is in a directory without being of an image.
fn write_others(directory: &Path) {
    let service_magic = 0x55105940_u32.to_le_bytes();
    for (name, content) in [
        ("dump.log", &b"(00.000)"[..]),
        ("stats-dump", &service_magic),
        ("irmap-cache", &service_magic),
        ("app.img", &[4, 0, 0, 0, 0x12, 2, b'a', b'b']),
        ("empty.img", &[]),
    ] {
        let mut file = fs::File::create(directory.join(name)).unwrap();
        file.write_all(content).unwrap();
    }
    fs::create_dir_all(directory.join("core-1.img")).unwrap();
}

#[test]
fn what_is_not_of_an_image_may_appear_beside_the_stream() {
    let directory = tempfile::tempdir().unwrap();
    for i in 0..1000 {
        fs::write(directory.path().join(format!("of-others-{i}")), "").unwrap();
    }
    capture_beside(&directory, || write_others(directory.path())).expect_success();
}

/// A CRIU without `--stream` would be waited for without end.
#[test]
fn a_criu_that_writes_its_files_and_does_not_connect_is_told_of() {
    let directory = tempfile::tempdir().unwrap();
    let [earlier, new] = ["core-7.img", "fdinfo-2.img"].map(|name| directory.path().join(name));
    fs::write(earlier, dump::core(dump::ALIVE)).unwrap();
    let launch = Streamer::capture().images_dir(directory.path());
    let (mut streamer, collector) = runs::collect(launch, 1);
    streamer.wait_for_line("socket-init");
    write_others(directory.path());
    assert!(streamer.outlasts(Duration::from_millis(200)));
    // CRIU creates a file, and writes what it has buffered later.
    let mut file = fs::File::create(&new).unwrap();
    assert!(streamer.outlasts(Duration::from_millis(100)));
    file.write_all(&dump::open_files([1])).unwrap();
    streamer.expect_failure(&["fdinfo-2.img", "--stream was probably forgotten"]);
    assert!(image::decode(&collector.finish()).is_err());
}

/// How long a capture that must not end is watched.
const WATCHED: Duration = Duration::from_millis(300);

#[test]
fn a_capture_waits_for_the_end_of_criu_whatever_it_has_sent() {
    let foreign = image::files([("inventory.img", "inventory")]);
    for files in [foreign, dump::whole()] {
        let (mut streamer, _collector) = runs::collect(Streamer::capture(), 2);
        let criu = streamer.criu();
        criu.write_files(&files);
        assert!(streamer.outlasts(WATCHED), "it may send more");
        drop(criu);
        streamer.expect_success();
    }
}

/// In a process of its own, whose command line says `cpuinfo`.
pub fn send_cpuinfo(streamer: &Streamer) {
    let sent = Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "--ignored",
            "dumps::criu_cpuinfo_dump",
            "cpuinfo",
        ])
        .env("IMAGES_DIR", streamer.images_dir())
        .output()
        .unwrap();
    assert!(sent.status.success(), "{sent:?}");
}

#[test]
#[ignore = "a part of other tests"]
fn criu_cpuinfo_dump() {
    let Some(images_dir) = std::env::var_os("IMAGES_DIR") else {
        return;
    };
    let criu = Criu::connect(Path::new(&images_dir), Role::Capture);
    criu.write_file("cpuinfo.img", &dump::file([]));
    // Its command line is there for as long as it is.
    thread::sleep(WATCHED);
}

#[test]
fn cpuinfo_alone_is_an_image_only_where_it_was_asked_for() {
    let cpuinfo = image::files([("cpuinfo.img", dump::file([]))]);
    let (mut streamer, collector) = runs::collect(Streamer::capture(), 1);
    streamer.wait_for_line("socket-init");
    send_cpuinfo(&streamer);
    let exit = streamer.expect_success();
    assert_eq!(exit.progress.len(), 2, "nothing was frozen: {exit:?}");
    assert_same_files(&image::decode(&collector.finish()).unwrap(), &cpuinfo);

    // A `criu dump --cpu-cap` that failed sends it, too.
    refused(&cpuinfo, &["inventory.img"]);
    // So may a CRIU that is gone when it is heard.
    let (mut streamer, _collector) = runs::collect(Streamer::capture(), 1);
    streamer.wait_for_line("socket-init");
    streamer.signal(Signal::SIGSTOP);
    send_cpuinfo(&streamer);
    streamer.signal(Signal::SIGCONT);
    streamer.expect_failure(&["inventory.img"]);
}
