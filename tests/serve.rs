//! What `serve` promises to CRIU: the image is complete before CRIU may connect, nothing of it is
//! ever on disk, files are opened, read and left in any order, and the memory of a file is given
//! back while it is sent.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::child::{self, Limit};
use crate::common::dump;
use crate::common::image::{self, Files};
use crate::common::keeping::Keeping;
use crate::common::random::{self, Random};
use crate::common::runs::{self, assert_same_bytes};
use crate::common::shards::{self, Collector, Feeder, pipe};
use crate::common::streamer::{Launch, Streamer};
use crate::common::{skip, wait_until};

const MIB: usize = 1 << 20;

#[test]
fn files_are_served_in_any_order_by_both_names_of_the_command() {
    let files = runs::sample_files(1);
    for launch in [Streamer::serve(), Streamer::extract_serve()] {
        let (mut streamer, _feeder) = runs::feed(launch, &image::encode_files(&files, 3, 70_000));
        let criu = streamer.criu();
        for (name, content) in files.iter().rev() {
            criu.expect_file(name, content);
        }
        assert_eq!(criu.read_file("none.img"), None);
        let mut open = criu.open_file("inventory.img").unwrap();
        let on_disk = fs::read_dir(streamer.images_dir()).unwrap();
        let on_disk: Vec<_> = on_disk.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(
            on_disk,
            ["streamer-serve.sock"],
            "nothing is written to disk"
        );
        // Files go on after CRIU has closed its connection.
        drop(criu);
        let mut content = Vec::new();
        open.read_to_end(&mut content).unwrap();
        assert_same_bytes("inventory.img", &content, &files["inventory.img"]);
        streamer.expect_success();
        assert_eq!(fs::read_dir(streamer.images_dir()).unwrap().count(), 0);
    }
}

/// Even while the external file's reader is slow and shards run ahead.
#[test]
fn external_files_are_streamed_through_without_being_kept() {
    const SIZE: usize = 64 * MIB;
    let content = vec![7; SIZE];
    let image = image::encode(
        [("fs.tar", &content[..]), ("inventory.img", b"inventory")],
        2,
        MIB,
    );
    let (readers, mut writers) = shards::pipes(2, None);
    let (tar_reader, tar_writer) = pipe();
    let mut streamer = Streamer::serve()
        .shards(readers)
        .ext_file("fs.tar", tar_writer)
        .start();
    // The file's name first, so that the other shard is known to be ahead in an external file.
    let mut first = File::from(writers.remove(0));
    let name_size = image::split(0, &image[0]).unwrap()[1].offset;
    first.write_all(&image[0][..name_size]).unwrap();
    wait_until("the name is taken", || child::queued(&first) == 0);
    let ahead = Feeder::start(writers, &image[1..]);
    let rest = Feeder::start(vec![first.into()], &[image[0][name_size..].to_vec()]);
    wait_until("the file comes", || child::queued(&tar_reader) > 0);
    let tar = Collector::start(vec![tar_reader]);
    assert_eq!(tar.finish()[0].len(), SIZE);
    let criu = streamer.criu();
    assert_eq!(criu.read_file("fs.tar"), None, "it is no file of CRIU's");
    let peak = streamer.memory_kib("VmHWM");
    assert!(peak < (SIZE >> 10) as u64 / 4, "{peak} KiB");
    drop(criu);
    streamer.expect_success();
    ahead.finish();
    rest.finish();
}

/// CRIU copies what it reads: if the streamer kept it as well, the machine would need the memory
/// twice.
#[test]
fn memory_is_given_back_while_a_slow_criu_takes_a_large_file() {
    memory_is_given_back(Streamer::serve());
    // With few descriptors, nothing is held in pipes.
    memory_is_given_back(Streamer::serve().limit(Limit::OpenFiles(256)));
}

fn memory_is_given_back(launch: Launch) {
    const SIZE: usize = 96 * MIB;
    const STEP: usize = 16 * MIB;
    const SLACK_KIB: u64 = 8 << 10;
    let pages = random::bytes(1, SIZE);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        4,
        MIB,
    );
    let (mut streamer, _feeder) = runs::feed(launch, &image);
    let criu = streamer.criu();
    let before = streamer.image_kib();
    assert!(
        before >= (SIZE >> 10) as u64,
        "the image is held in memory: {before} KiB"
    );

    let mut file = criu.open_file("pages-1.img").unwrap();
    let mut taken = vec![0; STEP];
    for offset in (0..SIZE).step_by(STEP) {
        file.read_exact(&mut taken).unwrap();
        assert_same_bytes("pages-1.img", &taken, &pages[offset..offset + STEP]);
        let allowed = before - ((offset + STEP) >> 10) as u64 + SLACK_KIB;
        wait_until(&format!("{allowed} KiB"), || {
            streamer.image_kib() <= allowed
        });
    }
    drop((file, criu));
    streamer.expect_success();
}

/// CRIU reads them by the size of the file, which a pipe does not have.
#[test]
fn firewall_rules_that_criu_does_not_restore_from_a_stream_are_told() {
    let stderr_with = |rules: &[u8]| {
        let files = [
            ("nftables-12.img", rules),
            ("nftables-13.img", b""),
            ("inventory.img", b"inventory"),
        ];
        let image = image::encode(files, 2, 100_000);
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
        let criu = streamer.criu();
        // It is told before CRIU begins.
        if !rules.is_empty() {
            streamer.wait_for_stderr("nftables-12.img");
        }
        let stderr = streamer.stderr();
        criu.expect_file("nftables-12.img", rules);
        drop(criu);
        streamer.expect_success();
        stderr
    };
    let stderr = stderr_with(b"table inet filter {}");
    for word in ["nftables-12.img", "extract"] {
        assert!(stderr.contains(word), "nothing about {word}: {stderr}");
    }
    assert!(!stderr.contains("nftables-13.img"), "{stderr}");
    assert_eq!(stderr_with(b""), "");
}

/// What the other tests of this module, and of others, count on.
#[test]
fn an_image_is_kept_where_limits_say() {
    if !may_hold_in_pipes() {
        return skip("without CAP_SYS_ADMIN or CAP_SYS_RESOURCE, nothing is held in pipes");
    }
    const SIZE: usize = 32 * MIB;
    let pages = random::bytes(1, SIZE);
    let files = image::files([("pages-1.img", pages.clone())]);
    let image = image::encode_files(&files, 2, MIB);
    let size_kib = (SIZE >> 10) as u64;
    for keeping in Keeping::ALL {
        let (mut streamer, _feeder) = runs::feed(keeping.serve(), &image);
        let criu = streamer.criu();
        let held = streamer.image_kib() - streamer.memory_kib("VmRSS");
        let expected = match keeping {
            // The few bytes by which a chunk exceeds a pipe are read, with what follows them.
            Keeping::Pipes => size_kib / 8 * 7..size_kib,
            Keeping::Memory => 0..1,
            Keeping::Both => 32..Keeping::FEW_PIPES * 1024 + 1,
        };
        assert!(expected.contains(&held), "{keeping:?}: {held} KiB in pipes");
        criu.expect_file("pages-1.img", &pages);
        drop(criu);
        streamer.expect_success();
    }
}

fn may_hold_in_pipes() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(effective.unwrap().trim(), 16).unwrap();
    const SYS_ADMIN: u64 = 1 << 21;
    const SYS_RESOURCE: u64 = 1 << 24;
    effective & (SYS_ADMIN | SYS_RESOURCE) != 0
}

/// Descriptors are for the files that CRIU has open.
#[test]
fn chunks_of_a_file_share_the_pipes_that_hold_them() {
    if !may_hold_in_pipes() {
        return;
    }
    let files = Files::from([("pages-1.img".into(), vec![7; 37 << 20])]);
    let files = files.into_iter().chain(dump::whole()).collect();
    for chunk in [64 << 10, 252 << 10] {
        let shards = image::encode_files(&files, 2, chunk);
        let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &shards);
        streamer.wait_for_line("socket-init");
        let open = streamer.open_fds();
        assert!(open < 80, "{open} descriptors");
        runs::assert_served(&mut streamer, &files);
    }
}

#[test]
fn thousands_of_requests_leave_the_streamer_as_it_was() {
    let mut random = Random::new(1);
    let files: Files = (0..20)
        .map(|i| (format!("file-{i}.img"), random.bytes(i * 1000)))
        .collect();
    let names: Vec<_> = files.keys().collect();
    let (mut streamer, _feeder) =
        runs::feed(Streamer::serve(), &image::encode_files(&files, 2, 10_000));
    let criu = streamer.criu();
    let ask = |random: &mut Random, times| {
        for _ in 0..times {
            let name = *random.pick(&names);
            match random.below(4) {
                0 => assert!(criu.open_file("nothing.img").is_none()),
                1 => drop(criu.open_file(name).expect(name)),
                _ => assert_same_bytes(name, &criu.read_file(name).expect(name), &files[name]),
            }
        }
    };
    ask(&mut random, 100);
    let (fds, threads) = (settled(&streamer, |s| s.open_fds()), streamer.threads());
    let memory = streamer.memory_kib("VmRSS");
    ask(&mut random, 2_000);
    assert_eq!(settled(&streamer, |s| s.open_fds()), fds);
    assert_eq!(streamer.threads(), threads);
    let grown = streamer.memory_kib("VmRSS").saturating_sub(memory);
    assert!(grown < 256, "{grown} KiB more than before");
    drop(criu);
    streamer.expect_success();
}

/// A pipe that CRIU just closed is noticed a moment later: the least of what is seen until it stays
/// the same for long.
fn settled(streamer: &Streamer, look: impl Fn(&Streamer) -> usize) -> usize {
    let mut least = look(streamer);
    let mut since = Instant::now();
    while since.elapsed() < Duration::from_millis(200) {
        let now = look(streamer);
        if now < least {
            (least, since) = (now, Instant::now());
        }
        thread::sleep(Duration::from_millis(5));
    }
    least
}

/// Pages go to CRIU and are freed, so that the machine does not need the memory twice: there is no
/// second time.
#[test]
fn a_page_file_asked_for_again_is_an_error_that_names_it() {
    let pages = random::bytes(1, 4 * MIB);
    let image = image::encode(
        [("pages-1.img", &pages[..]), ("inventory.img", b"inventory")],
        1,
        MIB,
    );
    for keeping in Keeping::ALL {
        let (mut streamer, _feeder) = runs::feed(keeping.serve(), &image);
        let criu = streamer.criu();
        criu.expect_file("pages-1.img", &pages);
        if let Ok(Some(mut again)) = criu.try_open_file("pages-1.img") {
            let mut content = Vec::new();
            match again.read_to_end(&mut content) {
                Ok(_) => assert!(content.is_empty(), "bytes of a file that was given away"),
                Err(error) => assert_eq!(error.kind(), ErrorKind::BrokenPipe),
            }
        }
        drop(criu);
        streamer.expect_failure(&["pages-1.img"]);
    }
}
