//! The application that the tests checkpoint. It has state in every place that an image must carry
//! over, and goes over all of it again and again, so that a restored one proves by itself that
//! nothing was lost.
//!
//!     application <state-file> [part…]
//!
//! Every few milliseconds it rewrites the state file, a single line `<nonce> <rounds> <sweeps>`: a
//! number drawn when it started (a restored process still has it, a restarted one has not), the
//! rounds so far, and how many times they have gone over all of its memory. What it finds damaged
//! it reports there instead, `damaged: …`, and exits. Parts:
//!
//!     memory=<MiB>      private memory with a pattern, one more for each process
//!     compressible=<MiB>
//!                       likewise, with every second page such that it shrinks to a third
//!     pause=<ms>        the time between two rounds
//!     rewrite=<MiB>     private memory that it writes anew from the first page to the last, each
//!                       round with the next number in every page, behind `REWRITE` and the page's
//!                       number
//!     touch=<MiB>       private memory of which it reads 20 pages at random each round. Of the
//!                       first 20,000 since it was frozen, the 99th percentile and the longest,
//!                       in milliseconds, are then in a file like the state file, `.touches`
//!     mappings=<n>      a page each, of which every other one cannot be written to
//!     hugetlb=<MiB>     shared memory on huge pages
//!     private-hugetlb=<MiB>
//!                       private memory on huge pages
//!     shared=<MiB>      memory with a pattern that all processes share
//!     threads=<n>       threads besides the main one, that count in memory
//!     tree=<d>x<w>      each process has w children, d generations of them; every round, a token
//!                       goes to each child and back through pipes, and every process counts in a
//!                       shared memory segment
//!     ghost=<file>      a file that was deleted while open; `<file>,<MiB>` is one of that size
//!     file=<file>       an open file, likewise
//!     listen=<port>     answers every TCP connection with `<nonce> <rounds>`
//!
//! It is no part of the crate: the tests compile it with `rustc`.

use std::fs::File;
use std::io::{Error, PipeReader, PipeWriter, Read, Write, pipe};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

const MIB: usize = 1 << 20;
const PAGE: usize = 1 << 12;
const PROT_READ: i32 = 1;
const ROUND: Duration = Duration::from_millis(5);

unsafe extern "C" {
    fn fork() -> i32;
    fn mprotect(addr: *mut u8, len: usize, prot: i32) -> i32;
    fn mmap(addr: *mut u8, len: usize, prot: i32, flags: i32, fd: i32, offset: i64) -> *mut u8;
}

/// Anonymous memory; `flags` as for mmap(2).
fn map(len: usize, flags: i32) -> &'static mut [u8] {
    const PROT_READ_WRITE: i32 = 3;
    const MAP_ANONYMOUS: i32 = 0x20;
    let (flags, nowhere) = (flags | MAP_ANONYMOUS, std::ptr::null_mut());
    // SAFETY: a fresh anonymous mapping of `len` bytes, which nothing else knows and which is never
    // unmapped.
    unsafe {
        let at = mmap(nowhere, len, PROT_READ_WRITE, flags, -1, 0);
        assert_ne!(at as isize, -1, "mmap: {}", Error::last_os_error());
        std::slice::from_raw_parts_mut(at, len)
    }
}
const MAP_SHARED: i32 = 0x01;
const MAP_PRIVATE: i32 = 0x02;
const MAP_HUGETLB: i32 = 0x40000;

/// The pattern's word at an index: different in every word, page and process, so that a page in the
/// wrong place shows.
fn word(nonce: u64, index: usize) -> u64 {
    let mixed = (nonce ^ index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ (mixed >> 29)
}

/// The same in the first of two pages; in the second, of each 48 words the first 16 come thrice.
fn compressible_word(nonce: u64, index: usize) -> u64 {
    if (index / 512).is_multiple_of(2) {
        return word(nonce, index);
    }
    word(nonce, index - index % 48 + index % 16)
}

type Pattern = fn(nonce: u64, index: usize) -> u64;

/// Something whose contents this process knows, and checks a bit further every round.
trait Part {
    fn check(&mut self) -> Result<(), String>;

    /// How many times it was checked from end to end, if that takes more than a round.
    fn sweeps(&self) -> u64 {
        u64::MAX
    }
}

struct Memory {
    name: &'static str,
    nonce: u64,
    word: Pattern,
    bytes: &'static mut [u8],
    position: usize,
    sweeps: u64,
}

impl Memory {
    fn new(name: &'static str, word: Pattern, nonce: u64, mib: usize, flags: i32) -> Self {
        let bytes = map(mib * MIB, flags);
        for (index, chunk) in bytes.chunks_exact_mut(8).enumerate() {
            chunk.copy_from_slice(&word(nonce, index).to_le_bytes());
        }
        let (position, sweeps) = (0, 0);
        Self {
            name,
            nonce,
            word,
            bytes,
            position,
            sweeps,
        }
    }
}

impl Part for Memory {
    fn check(&mut self) -> Result<(), String> {
        let end = (self.position + 8 * MIB).min(self.bytes.len());
        for (offset, chunk) in self.bytes[self.position..end].chunks_exact(8).enumerate() {
            let index = self.position / 8 + offset;
            if chunk != (self.word)(self.nonce, index).to_le_bytes() {
                return Err(format!("{} at byte {}", self.name, index * 8));
            }
        }
        self.position = end;
        if end == self.bytes.len() {
            self.position = 0;
            self.sweeps += 1;
        }
        Ok(())
    }

    fn sweeps(&self) -> u64 {
        self.sweeps
    }
}

struct Rewritten {
    bytes: &'static mut [u8],
    rounds: u64,
}

impl Part for Rewritten {
    fn check(&mut self) -> Result<(), String> {
        self.rounds += 1;
        for (page, bytes) in self.bytes.chunks_exact_mut(4096).enumerate() {
            bytes[..8].copy_from_slice(b"REWRITE\0");
            bytes[8..16].copy_from_slice(&(page as u64).to_le_bytes());
            for word in bytes[16..].chunks_exact_mut(8) {
                word.copy_from_slice(&self.rounds.to_le_bytes());
            }
        }
        Ok(())
    }
}

/// Memory of which it reads a few pages at random each round, and how long each took.
struct Touched {
    bytes: &'static mut [u8],
    random: u64,
    last: Instant,
    times: Vec<Duration>,
    report: String,
}

impl Touched {
    const TOUCHES: usize = 20_000;
    /// Longer than a round takes: it was frozen.
    const FROZEN: Duration = Duration::from_millis(300);
}

impl Part for Touched {
    fn check(&mut self) -> Result<(), String> {
        if self.last.elapsed() > Self::FROZEN {
            self.times.clear();
        }
        self.last = Instant::now();
        if self.times.len() == Self::TOUCHES {
            return Ok(());
        }
        for _ in 0..20 {
            self.random = word(self.random, 1);
            let page = self.random as usize % (self.bytes.len() / PAGE) * PAGE;
            let from = Instant::now();
            std::hint::black_box(self.bytes[page]);
            self.times.push(from.elapsed());
        }
        if self.times.len() == Self::TOUCHES {
            let mut times = self.times.clone();
            times.sort();
            let ms = |nth: usize| times[nth].as_secs_f64() * 1e3;
            let line = format!("{} {}\n", ms(times.len() * 99 / 100), ms(times.len() - 1));
            std::fs::write(&self.report, line).map_err(|why| why.to_string())?;
        }
        Ok(())
    }
}

fn open(path: &str) -> File {
    let mut options = File::options();
    let file = options.read(true).write(true).create(true).truncate(true);
    let file = file.open(path);
    file.unwrap_or_else(|why| panic!("open {path}: {why}"))
}

struct OpenFile {
    path: String,
    contents: Vec<u8>,
    file: File,
}

impl OpenFile {
    /// The size where none is given, in words.
    const WORDS: usize = 40_000;

    /// `path,MiB` gives the size.
    fn new(named: &str, nonce: u64) -> Self {
        let (path, words) = match named.split_once(',') {
            Some((path, mib)) => (path, mib.parse::<usize>().expect("a size") * MIB / 8),
            None => (named, Self::WORDS),
        };
        let contents: Vec<u8> = (0..words)
            .flat_map(|index| word(nonce, index).to_le_bytes())
            .collect();
        let mut file = open(path);
        file.write_all(&contents).unwrap();
        Self {
            path: path.into(),
            contents,
            file,
        }
    }
}

impl Part for OpenFile {
    fn check(&mut self) -> Result<(), String> {
        let mut found = vec![0; self.contents.len() + 1];
        match self.file.read_at(&mut found, 0) {
            Ok(length) if found[..length] == self.contents[..] => Ok(()),
            other => Err(format!("open file {}: {other:?}", self.path)),
        }
    }
}

/// Threads that count; each check wants every one of them to have moved on since the last time it
/// was asked.
struct Threads {
    counts: Vec<Arc<AtomicU64>>,
    seen: Vec<u64>,
    unmoved: u32,
}

impl Threads {
    fn new(number: usize) -> Self {
        let counts = (0..number).map(|_| Arc::new(AtomicU64::new(0)));
        let counts: Vec<_> = counts.collect();
        for count in counts.iter().cloned() {
            std::thread::spawn(move || {
                loop {
                    count.fetch_add(1, SeqCst);
                    std::thread::sleep(ROUND);
                }
            });
        }
        let seen = vec![0; number];
        Self {
            counts,
            seen,
            unmoved: 0,
        }
    }
}

impl Part for Threads {
    fn check(&mut self) -> Result<(), String> {
        let now: Vec<u64> = self.counts.iter().map(|count| count.load(SeqCst)).collect();
        if now.iter().zip(&self.seen).all(|(now, seen)| now > seen) {
            self.seen = now;
            self.unmoved = 0;
            return Ok(());
        }
        self.unmoved += 1;
        // 1000 rounds of 5 ms: far more than a busy machine lets a thread starve.
        if self.unmoved == 1000 {
            return Err(format!(
                "threads stand still: {now:?} after {:?}",
                self.seen
            ));
        }
        Ok(())
    }
}

/// Pipes to a child process and back.
struct Child {
    to: PipeWriter,
    from: PipeReader,
}

/// The processes below this one, and the shared memory where all of them count their rounds.
struct Tree {
    children: Vec<Child>,
    counts: &'static [AtomicU64],
    me: usize,
    rounds: u64,
}

impl Tree {
    /// Sends a token through every child and back; each process that it passes adds one.
    fn pass(&mut self, token: u64) -> Result<u64, String> {
        self.rounds += 1;
        let before = self.counts[self.me].swap(self.rounds, SeqCst);
        if before != self.rounds - 1 {
            return Err(format!("shared memory: {before} before {}", self.rounds));
        }
        let mut token = token + 1;
        for child in &mut self.children {
            let mut bytes = token.to_le_bytes();
            let sent = child.to.write_all(&bytes);
            let passed = sent.and_then(|()| child.from.read_exact(&mut bytes));
            passed.map_err(|why| format!("pipes of a child: {why}"))?;
            token = u64::from_le_bytes(bytes);
        }
        Ok(token)
    }
}

fn processes_below(depth: usize, width: usize) -> usize {
    (1..=depth as u32).map(|depth| width.pow(depth)).sum()
}

/// Forks the whole tree of processes, and returns in each: its number, counted from the root down,
/// its parent, and its children. No process may have threads yet.
fn grow(depth: usize, width: usize) -> (usize, Option<Child>, Vec<Child>) {
    let mut up = None;
    let mut me = 0;
    let mut children = Vec::new();
    let mut generation = 0;
    // A child goes round this loop again, as the parent of the next generation.
    while generation < depth && children.len() < width {
        let (child_reads, to) = pipe().expect("a pipe");
        let (from, child_writes) = pipe().expect("a pipe");
        // SAFETY: one thread, so that every lock is free in the child.
        match unsafe { fork() } {
            -1 => panic!("fork: {}", Error::last_os_error()),
            0 => {
                generation += 1;
                me += 1 + children.len() * (1 + processes_below(depth - generation, width));
                children.clear();
                let (to, from) = (child_writes, child_reads);
                up = Some(Child { to, from });
            }
            _ => children.push(Child { to, from }),
        }
    }
    (me, up, children)
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: application <state-file> [part…]";
    let state_path = arguments.next().expect(usage);
    let parts: Vec<String> = arguments.collect();
    let parts = parts.iter().map(|part| part.split_once('=').expect(usage));
    let parts: Vec<(&str, &str)> = parts.collect();
    let value = |name: &str| parts.iter().find(|part| part.0 == name).map(|part| part.1);
    let number = |name: &str| value(name).map_or(0, |value| value.parse().expect("a number"));

    let mut random = [0; 8];
    let read = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut random));
    read.expect("/dev/urandom");
    let nonce = u64::from_le_bytes(random);

    let (depth, width) = value("tree").map_or((0, 0), |shape| {
        let (depth, width) = shape.split_once('x').expect("tree=<depth>x<width>");
        (depth.parse().unwrap(), width.parse().unwrap())
    });
    let all = 1 + processes_below(depth, width);
    let counts = map(all.next_multiple_of(512) * 8, MAP_SHARED);
    // SAFETY: page aligned, zeroed, never unmapped, and touched as AtomicU64 only.
    let counts = unsafe { std::slice::from_raw_parts(counts.as_ptr().cast::<AtomicU64>(), all) };

    let shared = match number("shared") {
        0 => None,
        mib => Some(Memory::new("shared", word, nonce, mib, MAP_SHARED)),
    };

    let (me, up, children) = grow(depth, width);
    let nonce = word(nonce, me);
    let mut tree = Tree {
        children,
        counts,
        me,
        rounds: 0,
    };

    let mut checked: Vec<Box<dyn Part>> = Vec::new();
    for (part, word, flags) in [
        ("memory", word as Pattern, MAP_PRIVATE),
        ("compressible", compressible_word, MAP_PRIVATE),
        ("hugetlb", word, MAP_SHARED | MAP_HUGETLB),
        ("private-hugetlb", word, MAP_PRIVATE | MAP_HUGETLB),
    ] {
        if number(part) > 0 && (me == 0 || flags == MAP_PRIVATE) {
            checked.push(Box::new(Memory::new(
                part,
                word,
                nonce,
                number(part),
                flags,
            )));
        }
    }
    if number("touch") > 0 {
        let bytes = map(number("touch") * MIB, MAP_PRIVATE);
        bytes.fill(1);
        checked.push(Box::new(Touched {
            bytes,
            random: nonce,
            last: Instant::now(),
            times: Vec::with_capacity(Touched::TOUCHES),
            report: state_path.replace(".state", ".touches"),
        }));
    }
    if number("rewrite") > 0 {
        let bytes = map(number("rewrite") * MIB, MAP_PRIVATE);
        checked.push(Box::new(Rewritten { bytes, rounds: 0 }));
    }
    for page in map(number("mappings") * PAGE + PAGE, MAP_PRIVATE).chunks_exact_mut(2 * PAGE) {
        page[0] = 1;
        // SAFETY: a page of a mapping that nothing else knows, and which is not touched again.
        unsafe { assert_eq!(mprotect(page.as_mut_ptr(), PAGE, PROT_READ), 0) }
    }
    if let Some(shared) = shared {
        checked.push(Box::new(shared));
    }
    if number("threads") > 0 {
        checked.push(Box::new(Threads::new(number("threads"))));
    }
    for (name, path) in parts.iter().filter(|_| me == 0) {
        if ["file", "ghost"].contains(name) {
            let file = OpenFile::new(path, nonce);
            if *name == "ghost" {
                std::fs::remove_file(&file.path).unwrap();
            }
            checked.push(Box::new(file));
        }
    }
    let check =
        |checked: &mut Vec<Box<dyn Part>>| checked.iter_mut().try_for_each(|part| part.check());

    // A process in the tree works when its parent's token comes; the end of its pipe is the end of
    // its parent.
    if let Some(mut up) = up {
        let mut bytes = [0; 8];
        while up.from.read_exact(&mut bytes).is_ok() {
            let result = check(&mut checked).and_then(|()| tree.pass(u64::from_le_bytes(bytes)));
            // No answer but a closed pipe tells the parent, who has the state file, of the damage.
            let Ok(token) = result else { return };
            if up.to.write_all(&token.to_le_bytes()).is_err() {
                return;
            }
        }
        return;
    }

    let state = open(&state_path);
    // A line of one length: CRIU refuses to restore a process whose open file changed its size.
    let report = |line: String| {
        let line = format!("{line:<79}\n");
        state.write_all_at(line.as_bytes(), 0).expect("state file")
    };
    let rounds = Arc::new(AtomicU64::new(0));
    if let Some(port) = value("listen") {
        let listener = TcpListener::bind(format!("127.0.0.1:{port}")).expect("listen");
        let rounds = Arc::clone(&rounds);
        std::thread::spawn(move || {
            for connection in listener.incoming() {
                // A client that hung up is no concern of ours.
                let _ = connection
                    .and_then(|mut client| writeln!(client, "{nonce} {}", rounds.load(SeqCst)));
            }
        });
    }
    let pause = value("pause").map_or(ROUND, |_| Duration::from_millis(number("pause") as u64));
    loop {
        let counted = check(&mut checked).and_then(|()| tree.pass(0));
        if counted != Ok(all as u64) {
            report(format!("damaged: {counted:?} of {all} processes"));
            std::process::exit(1);
        }
        let round = rounds.fetch_add(1, SeqCst) + 1;
        let sweeps = checked.iter().map(|part| part.sweeps()).min();
        let sweeps = sweeps.unwrap_or(u64::MAX).min(round);
        report(format!("{nonce} {round} {sweeps}"));
        std::thread::sleep(pause);
    }
}
