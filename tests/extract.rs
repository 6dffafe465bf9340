//! What `extract` promises to those who restore from disk: a whole image, and no file of another
//! one, or nothing new in the directory.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::common::PAGE;
use crate::common::child;
use crate::common::image::{self, Files};
use crate::common::random;
use crate::common::runs::{self, assert_same_files};
use crate::common::shards::{Collector, pipe, pipes};
use crate::common::skip;
use crate::common::streamer::{Streamer, binary};
use tempfile::TempDir;

/// An image of three small files in as few bytes as possible, for the tests that try every byte.
fn tiny_image(shard_count: usize) -> Vec<Vec<u8>> {
    let files = [
        ("a.img", &b"first"[..]),
        ("b.img", b"second"),
        ("inventory.img", b"third"),
    ];
    image::encode(files, shard_count, 4)
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o7777
}

#[test]
fn files_in_a_directory_made_for_them_are_for_their_owner_alone() {
    let files = runs::sample_files(1);
    let parent = TempDir::new().unwrap();
    let dir = parent.path().join("of/the/image");
    let shards = image::encode_files(&files, 2, 100_000);
    runs::extract_into(&dir, &shards).expect_success();
    assert_same_files(&runs::read_dir(&dir), &files);
    assert_eq!(mode(&dir), 0o700);
    for name in files.keys() {
        assert_eq!(mode(&dir.join(name)), 0o600, "{name}");
    }
}

/// A process in a user namespace opens image files as that namespace's root, who is another user
/// here. So CRIU writes them with mode 0644, as the umask allows.
#[test]
fn files_in_a_directory_of_the_callers_choice_have_the_mode_of_crius_own() {
    let dir = TempDir::new().unwrap();
    let open_to_all = fs::Permissions::from_mode(0o755);
    fs::set_permissions(dir.path(), open_to_all).unwrap();
    let like_criu = dir.path().join("like-criu");
    let options = File::options().write(true).create(true).mode(0o644).clone();
    options.open(&like_criu).unwrap();
    runs::extract_into(dir.path(), &tiny_image(1)).expect_success();
    for name in ["a.img", "b.img", "inventory.img"] {
        let path = dir.path().join(name);
        assert_eq!(mode(&path), mode(&like_criu), "{name}");
        if nix::unistd::geteuid().is_root() && mode(&path) == 0o644 {
            let read = child::as_user(65_534, || fs::read(&path));
            assert!(read.is_ok(), "{name} for another user: {read:?}");
        }
    }
}

/// CRIU opens optional files by name: one of an earlier image would be restored with this one. A
/// user who can write to the directory must not make root write elsewhere.
#[test]
fn after_an_extract_the_directory_holds_one_image_and_what_is_not_crius() {
    const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 1, 2, 3, 4];
    let dir = TempDir::new().unwrap();
    let earlier = [
        ("core-1.img", &b"core"[..]),
        ("fs-1.img", b"fs"),
        ("ghost-file-1f.img", b"a deleted file"),
        ("pages-1.img", b"pages"),
        ("tmpfs-dev-73.tar.gz.img", b"tar"),
        ("of-a-newer-criu.img", &MAGIC),
        ("inventory.img", b"inventory of the earlier image"),
    ];
    runs::extract_into(dir.path(), &image::encode(earlier, 2, 10)).expect_success();
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), earlier.len());
    let at = |name: &str| dir.path().join(name);
    let elsewhere = TempDir::new().unwrap();
    fs::write(elsewhere.path().join("linked"), "elsewhere").unwrap();
    symlink(elsewhere.path().join("linked"), at("ghost-file-2.img")).unwrap();
    fs::remove_file(at("core-1.img")).unwrap();
    symlink(elsewhere.path().join("linked"), at("core-1.img")).unwrap();
    fs::remove_file(at("inventory.img")).unwrap();
    symlink(elsewhere.path().join("new"), at("inventory.img")).unwrap();
    symlink("../earlier", at("parent")).unwrap();
    fs::create_dir(at("core-2.img")).unwrap();
    let kept = [
        "disk.img",
        "core-dump.img",
        "stats-dump",
        "restore.log",
        "inventory.img.bak",
    ];
    for name in kept {
        fs::write(at(name), "of the user").unwrap();
    }

    let later = [("core-1.img", &b"new core"[..]), ("inventory.img", b"new")];
    runs::extract_into(dir.path(), &image::encode(later, 2, 10)).expect_success();
    let mut found: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut expected = kept.to_vec();
    expected.extend(["core-1.img", "core-2.img", "inventory.img", "parent"]);
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!(fs::read(at("core-1.img")).unwrap(), b"new core");
    let untouched = image::files([("linked", "elsewhere")]);
    assert_eq!(runs::read_dir(elsewhere.path()), untouched);
}

/// The directory is in the way of the last file that is moved, when all that the new image does not
/// have was set aside.
#[test]
fn a_move_that_fails_brings_all_of_an_earlier_image_back() {
    let dir = TempDir::new().unwrap();
    for name in ["inventory.img", "core-1.img", "ghost-file-1.img"] {
        fs::write(dir.path().join(name), name).unwrap();
    }
    let before = runs::read_dir(dir.path());
    let in_the_way = dir.path().join("zzz.img");
    fs::create_dir(&in_the_way).unwrap();
    let new = ["core-1.img", "zzz.img", "inventory.img"].map(|name| (name, &b"new"[..]));
    let image = image::encode(new, 1, 10);
    runs::extract_into(dir.path(), &image).expect_failure(&["zzz.img"]);
    fs::remove_dir(in_the_way).unwrap();
    assert_same_files(&runs::read_dir(dir.path()), &before);
}

#[test]
fn external_files_alone_are_extracted_and_leave_an_image_in_the_directory_alone() {
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("inventory.img"), "of an image").unwrap();
    fs::write(dir.path().join("ghost-file-1.img"), "of an image").unwrap();
    let before = runs::read_dir(dir.path());
    let (reader, writer) = pipe();
    let tar = Collector::start(vec![reader]);
    let launch = Streamer::extract().images_dir(dir.path());
    let (mut streamer, _feeder) = runs::feed(
        launch.ext_file("fs.tar", writer),
        &image::encode([("fs.tar", &b"tar"[..])], 1, 10),
    );
    streamer.expect_success();
    assert_eq!(tar.finish(), [b"tar"]);
    assert_same_files(&runs::read_dir(dir.path()), &before);
}

#[test]
fn an_image_without_inventory_is_refused_and_leaves_an_earlier_one_as_it_was() {
    let broken: [&[(&str, &[u8])]; 3] = [
        &[("core-1.img", b"core"), ("pages-1.img", b"pages")],
        &[("cpuinfo.img", b"cpu"), ("core-1.img", b"core")],
        &[],
    ];
    for files in broken {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("inventory.img"), "of an earlier image").unwrap();
        fs::write(dir.path().join("core-1.img"), "of an earlier image").unwrap();
        let before = runs::read_dir(dir.path());
        let image = image::encode(files.iter().copied(), 2, 10);
        let missing = match files {
            [] => "no file",
            _ => "inventory.img",
        };
        runs::extract_into(dir.path(), &image).expect_refusal(&[missing]);
        assert_same_files(&runs::read_dir(dir.path()), &before);
    }
}

#[test]
fn an_external_file_that_the_image_does_not_have_is_an_error() {
    for launch in [Streamer::extract(), Streamer::serve()] {
        let (_reader, writer) = pipe();
        let (mut streamer, _feeder) = runs::feed(launch.ext_file("fs.tar", writer), &tiny_image(1));
        streamer.expect_failure(&["fs.tar"]);
    }
}

#[test]
fn an_external_file_ends_before_the_rest_of_the_image_has_arrived() {
    for launch in [Streamer::extract(), Streamer::serve()] {
        let [image] = &image::encode(
            [("fs.tar", &b"tar"[..]), ("inventory.img", b"inventory")],
            1,
            100,
        )[..] else {
            unreachable!("one shard")
        };
        let entries = image::split(0, image).unwrap();
        let rest_at = entries[3].offset;

        let (tar_reader, tar_writer) = pipe();
        let (mut readers, mut writers) = pipes(1, None);
        let streamer = launch
            .ext_file("fs.tar", tar_writer)
            .shards(readers.pop())
            .start();
        let tar = Collector::start(vec![tar_reader]);
        let mut shard = File::from(writers.pop().unwrap());
        shard.write_all(&image[..rest_at]).unwrap();
        // This returns only when the streamer has closed its end, while the shard is still open.
        assert_eq!(tar.finish(), [b"tar"]);
        assert!(streamer.is_running());
    }
}

/// The external file's pipe is full at the very moment at which the shard ends early: nothing may
/// be waited for that has happened already.
#[test]
fn a_shard_that_is_cut_while_the_external_files_reader_is_busy_is_an_error() {
    for size in (14 * PAGE..18 * PAGE).step_by(PAGE / 4) {
        let cut = image::Shard::new()
            .filename(0, "fs.tar")
            .data_marker(1, 1 << 20)
            .raw(&vec![1; size]);
        let (readers, mut writers) = pipes(1, Some(64 * PAGE));
        File::from(writers.remove(0)).write_all(&cut.bytes).unwrap();
        let shard = readers[0].try_clone().unwrap();
        let (tar_reader, tar_writer) = pipe();
        let mut streamer = Streamer::extract()
            .shards(readers)
            .ext_file("fs.tar", tar_writer)
            .start();
        while child::queued(&shard) > 0 && child::queued(&tar_reader) < 14 * PAGE {
            thread::sleep(Duration::from_millis(1));
        }
        let tar = Collector::start(vec![tar_reader]);
        streamer.expect_failure(&["shard"]);
        assert!(tar.finish()[0].len() <= size);
    }
}

#[test]
fn a_shard_that_is_missing_or_cut_at_any_byte_is_an_error_and_leaves_nothing() {
    let image = tiny_image(3);
    for (cut_shard, bytes) in image.iter().enumerate() {
        for cut in 0..bytes.len() {
            let mut shards = image.clone();
            shards[cut_shard].truncate(cut);
            assert_refused(
                &shards,
                &["shard"],
                &format!("shard {cut_shard} cut at {cut}"),
            );
        }
        let mut shards = image.clone();
        shards.remove(cut_shard);
        assert_refused(&shards, &["shard"], &format!("no shard {cut_shard}"));
    }
}

/// What `syncfs` does not tell: the files' disk, a loop device, is on a tmpfs that is full for a
/// while, below an overlay.
const LOSING_DISK: &str = r#"
mount -t tmpfs -o size=300m none . && cd "$PWD"
truncate -s 100m disk.img
mkfs.ext4 -q -b 4096 -O ^has_journal disk.img
mkdir disk lower merged
mount -o loop disk.img disk
mkdir disk/upper disk/work
mount -t overlay -o lowerdir=lower,upperdir=disk/upper,workdir=disk/work none merged
mkfifo shard
"$STREAMER" --images-dir merged/images --shard-fds 0 extract <shard &
exec 3>shard
head -c 100000 <&0 >&3
until [ -s merged/images/.criu-image-streamer.*/0 ]; do sleep 0.01; done
sync -f disk
used=$(df --output=used -k . | tail -n 1)
mount -o remount,size=$((used + 1000))k .
head -c 6000000 <&0 >&3
until [ "$(stat -c %s merged/images/.criu-image-streamer.*/0)" -gt 6000000 ]; do sleep 0.01; done
sync -f disk || true
mount -o remount,size=300m .
cat >&3
exec 3>&-
wait $! && status=0 || status=$?
umount merged disk
exit $status
"#;

#[test]
fn pages_that_the_disk_did_not_take_below_an_overlay_are_missed() {
    let dir = TempDir::new().unwrap();
    let pages = random::bytes(1, 6 << 20);
    let files = [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")];
    let image = dir.path().join("image");
    fs::write(&image, image::encode(files, 1, 64 << 10).remove(0)).unwrap();
    let can_mount = "mount -t tmpfs none . && losetup -f && grep -q overlay /proc/filesystems";
    let run = |script: &str| {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "bash", "-ec", script]);
        unshare.env("STREAMER", binary()).current_dir(dir.path());
        let image = File::open(&image).unwrap();
        unshare.stdin(image).output().unwrap()
    };
    if !run(can_mount).status.success() {
        return skip("needs root, a loop device and overlayfs");
    }
    let output = run(LOSING_DISK);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("flushing pages-1.img to disk"), "{error}");
}

/// Exit status 1, and an images directory as empty as before.
#[track_caller]
fn assert_refused(shards: &[Vec<u8>], words: &[&str], what: &str) {
    println!("{what}");
    let (dir, exit) = runs::extract(shards);
    exit.expect_refusal(words);
    assert_eq!(runs::read_dir(dir.path()), Files::new());
}
