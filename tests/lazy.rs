//! An image that `serve --lazy-pages` divides, up to where CRIU restores it. The application's
//! fate is in real_criu_lazy.rs.

use std::fs;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use nix::sys::signal::Signal;

use crate::common::criu::frame;
use crate::common::dump::number;
use crate::common::image;
use crate::common::runs;
use crate::common::shards::Feeder;
use crate::common::streamer::Streamer;
use crate::common::wait_until;

/// Held by a test whose CRIU has its socket in our working directory.
static TURN: Mutex<()> = Mutex::new(());

const PAGE: u64 = 4096;
const PRESENT: u64 = 4;
const LAZY: u64 = 6;

/// An entry: the first page, how many, and the flags.
type Entry = (u64, u64, u64);

fn pagemap(entries: &[Entry]) -> Vec<u8> {
    let mut bytes = [0x5456_4319_u32, 0x5608_4025]
        .map(u32::to_le_bytes)
        .concat();
    bytes.extend(frame(&number(1, 1)));
    for &(page, pages, flags) in entries {
        let fields = [
            number(1, page.wrapping_mul(PAGE)),
            number(2, 0),
            number(4, flags),
            number(5, pages),
        ];
        bytes.extend(frame(&fields.concat()));
    }
    bytes
}

/// Pages that differ.
fn pages(count: u64) -> Vec<u8> {
    (0..count * PAGE / 8)
        .flat_map(|word| (word * 0x9e37_79b9).to_le_bytes())
        .collect()
}

/// A restore of a process with this pagemap and these pages, which arrive in odd pieces.
fn serve(entries: &[Entry], pages: &[u8]) -> (Streamer, Feeder) {
    let pagemap = pagemap(entries);
    let files = [
        ("pagemap-7.img", &pagemap[..]),
        ("pages-1.img", pages),
        ("inventory.img", image::INVENTORY),
    ];
    runs::feed(
        Streamer::serve().args(["--lazy-pages"]),
        &image::encode(files, 2, 70_001),
    )
}

#[test]
fn pagemaps_that_no_criu_writes_are_refused_before_criu_may_connect() {
    for (entries, said) in [
        (&[(16, 3, LAZY), (18, 1, LAZY)][..], "overlaps"),
        (&[(16, 1, LAZY), (15, 1, PRESENT)], "belongs in front"),
        (&[(16, 1 << 60, LAZY)], "beyond the address space"),
        (&[(u64::MAX / PAGE, 4, LAZY)], "beyond the address space"),
        (&[(16, 4, 2)], "dumped with --lazy-pages"),
        (&[(16, 4, 5)], "parent image"),
    ] {
        let (mut streamer, _feeder) = serve(entries, &pages(4));
        let exit = streamer.expect_failure(&["pagemap-7.img", said]);
        assert!(
            !exit.progress.iter().any(|line| line == "socket-init"),
            "{entries:?}"
        );
    }
}

#[test]
fn criu_gets_what_is_not_lazy_and_all_of_what_is_not_understood() {
    let _turn = TURN.lock();
    let pages = pages(600);
    let (eager, lazy) = ((1, 3, PRESENT), (16, 590, LAZY));
    // The pages of the processes that it restores, in the order of the file.
    let part =
        |first: u64, count: u64| &pages[(first * PAGE) as usize..((first + count) * PAGE) as usize];
    for (entries, served, is_ordinary) in [
        (
            &[eager, lazy, (700, 7, PRESENT)][..],
            [part(0, 3), part(593, 7)].concat(),
            false,
        ),
        (&[(16, 600, LAZY)], Vec::new(), false),
        // A flag of a later CRIU, and pages that take less than a page each.
        (&[eager, (16, 597, LAZY | 8)], pages.clone(), true),
        (&[eager, (16, 900, LAZY)], pages.clone(), true),
    ] {
        let (mut streamer, _feeder) = serve(entries, &pages);
        let criu = streamer.criu();
        criu.expect_file("inventory.img", image::INVENTORY);
        // Its own socket, in our working directory, since the first request.
        let daemon = UnixStream::connect("lazy-pages.socket").expect("the lazy-pages socket");
        let entries: Vec<Entry> = entries
            .iter()
            .map(|&(page, count, flags)| {
                (page, count, if is_ordinary { flags & !2 } else { flags })
            })
            .collect();
        criu.expect_file("pagemap-7.img", &pagemap(&entries));
        criu.expect_file("pages-1.img", &served);
        assert_eq!(streamer.stderr().contains("before it goes on"), is_ordinary);
        // It fails before all is restored.
        drop(daemon);
        streamer.expect_failure(&["before all was restored"]);
    }
    // A CRIU that was started without the option does not come there.
    let (mut streamer, _feeder) = serve(&[lazy, (700, 10, PRESENT)], &pages);
    let criu = streamer.criu();
    criu.expect_file("inventory.img", image::INVENTORY);
    assert!(criu.try_open_file("pagemap-7.img").is_err());
    streamer.expect_failure(&["without its own --lazy-pages"]);
    assert!(!std::path::Path::new("lazy-pages.socket").exists());
}

/// Its CRIU is gone as well, and the process would wait for it for ever.
#[test]
fn a_process_whose_message_was_not_read_whole_does_not_outlive_the_streamer() {
    let _turn = TURN.lock();
    for is_unread in [true, false] {
        let (streamer, _feeder) = serve(&[(16, 600, LAZY)], &pages(600));
        let criu = streamer.criu();
        criu.expect_file("inventory.img", image::INVENTORY);
        let daemon = UnixStream::connect("lazy-pages.socket").expect("the lazy-pages socket");
        criu.open_file("pagemap-7.img").expect("a pagemap");
        if is_unread {
            streamer.signal(Signal::SIGSTOP);
        }
        // Its PID in the image, without the userfaultfd that comes next.
        let mut process = Command::new("sh")
            .args(["-c", r"printf '\7\0\0\0' >&0; echo; exec sleep 100 2>&-"])
            .stdin(OwnedFd::from(daemon))
            .stdout(Stdio::piped())
            .spawn()
            .expect("a process");
        let mut has_sent = process.stdout.take().expect("its output");
        has_sent.read_exact(&mut [0]).expect("a line");
        if !is_unread {
            // Killed before that, it leaves CRIU's process to fail when it sends the rest.
            wait_until("the guardian knows the process", || {
                let records = streamer.descriptors("/memfd:restored");
                let record = records.values().next().expect("its record");
                let lines = fs::read_to_string(record).expect("its lines");
                // CRIU's connection, and the process.
                lines.lines().count() == 2
            });
        }
        streamer.signal(Signal::SIGKILL);
        wait_until("the process is killed", || {
            process.try_wait().expect("its end").is_some()
        });
    }
}
