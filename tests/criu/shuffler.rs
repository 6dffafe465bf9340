//! An application that changes its memory while it checks it: `shuffler <MiB> <seconds>`.
//!
//! It fills its memory, makes the file `ready`, and waits for the file `go`. Then threads move
//! (`mremap`), drop (`madvise`), unmap, write and read their memory at random, and one forks all
//! the time, each child looking at all of it. Every page has to hold what the program's own books
//! say. The file `result` has `right`, or what was wrong.

use std::ffi::c_void;
use std::path::Path;
use std::process::exit;
use std::ptr;
use std::thread;
use std::time::{Duration, Instant};

unsafe extern "C" {
    fn mmap(address: *mut c_void, len: usize, protection: i32, flags: i32, fd: i32, offset: i64) -> *mut c_void;
    fn munmap(address: *mut c_void, len: usize) -> i32;
    fn mremap(old: *mut c_void, old_len: usize, len: usize, flags: i32, ...) -> *mut c_void;
    fn mprotect(address: *mut c_void, len: usize, protection: i32) -> i32;
    fn madvise(address: *mut c_void, len: usize, advice: i32) -> i32;
    fn fork() -> i32;
    fn waitpid(pid: i32, status: *mut i32, options: i32) -> i32;
    fn _exit(status: i32) -> !;
}

const PAGE: usize = 4096;
/// Pages of a region.
const REGION: usize = 1024;
const READ_WRITE: i32 = 3;
const PRIVATE_ANONYMOUS: i32 = 0x22;
const FIXED: i32 = 0x10;
const MAY_MOVE: i32 = 1;
const MOVE_TO: i32 = 3;
const DONT_NEED: i32 = 4;
const WIPE_ON_FORK: i32 = 18;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

/// The word that each page is full of; 0 where nothing was written, `None` where it is unmapped.
type Book = Vec<Option<u64>>;

/// Memory, and the words that it has to hold.
struct Region {
    base: *mut u64,
    book: Book,
}

fn map(pages: usize) -> *mut u64 {
    let address = unsafe { mmap(ptr::null_mut(), pages * PAGE, READ_WRITE, PRIVATE_ANONYMOUS, -1, 0) };
    assert!(address as isize != -1, "mmap");
    address.cast()
}

impl Region {
    fn new(number: u64) -> Self {
        let mut region = Self { base: map(REGION), book: vec![Some(0); REGION] };
        for page in 0..REGION {
            // Some pages are never touched.
            if !(page as u64 + number).is_multiple_of(7) {
                region.write(page, number << 32 | page as u64 + 1);
            }
        }
        region
    }

    fn at(&self, page: usize) -> *mut u64 {
        self.base.wrapping_byte_add(page * PAGE)
    }

    fn write(&mut self, page: usize, value: u64) {
        for word in 0..PAGE / 8 {
            unsafe { self.at(page).add(word).write_volatile(value) };
        }
        self.book[page] = Some(value);
    }

    /// Checks that a page has its word.
    fn check(&self, page: usize) -> Result<(), String> {
        let Some(expected) = self.book[page] else { return Ok(()) };
        for word in 0..PAGE / 8 {
            let found = unsafe { self.at(page).add(word).read_volatile() };
            if found != expected {
                return Err(format!("page {page} of {:?}, word {word}: {found:#x} for {expected:#x}", self.base));
            }
        }
        Ok(())
    }

    fn check_all(&self) -> Result<(), String> {
        (0..REGION).try_for_each(|page| self.check(page))
    }

    fn change(&mut self, random: &mut Random) -> Result<(), String> {
        let first = random.below(REGION);
        let pages = 1 + random.below(64).min(REGION - 1 - first.min(REGION - 1));
        let pages = pages.min(REGION - first);
        match random.below(12) {
            0 => {
                // All of it, somewhere else; what is unmapped leaves a hole there, too.
                let to = map(REGION);
                let mut page = 0;
                while page < REGION {
                    let is_mapped = self.book[page].is_some();
                    let end = (page..REGION).find(|&page| self.book[page].is_some() != is_mapped).unwrap_or(REGION);
                    let (from, to) = (self.at(page), to.wrapping_byte_add(page * PAGE));
                    let len = (end - page) * PAGE;
                    if is_mapped {
                        self.move_part(from, to, len);
                    } else {
                        unsafe { munmap(to.cast(), len) };
                    }
                    page = end;
                }
                self.base = to;
            }
            1 => {
                // Away and back.
                if self.book[first..first + pages].iter().all(Option::is_some) {
                    let away = map(pages);
                    self.move_part(self.at(first), away, pages * PAGE);
                    self.move_part(away, self.at(first), pages * PAGE);
                }
            }
            2 => {
                for page in first..first + pages {
                    if self.book[page].is_some() {
                        unsafe { madvise(self.at(page).cast(), PAGE, DONT_NEED) };
                        self.book[page] = Some(0);
                    }
                }
            }
            3 if pages < 8 => {
                unsafe { munmap(self.at(first).cast(), pages * PAGE) };
                self.book[first..first + pages].fill(None);
            }
            4 => {
                if self.book[first].is_some() {
                    self.write(first, random.0 | 1);
                }
            }
            5 => {
                for protection in [0, READ_WRITE] {
                    unsafe { mprotect(self.at(first).cast(), PAGE, protection) };
                }
            }
            6 if self.book[first].is_none() => {
                // New memory where there was other memory before.
                let flags = PRIVATE_ANONYMOUS | FIXED;
                unsafe { mmap(self.at(first).cast(), PAGE, READ_WRITE, flags, -1, 0) };
                self.book[first] = Some(0);
            }
            _ => (first..first + pages).try_for_each(|page| self.check(page))?,
        }
        Ok(())
    }

    fn move_to(&mut self, to: *mut u64) {
        self.move_part(self.base, to, REGION * PAGE);
        self.base = to;
    }

    /// Where there are several mappings, the kernel moves each page for itself.
    fn move_part(&self, from: *mut u64, to: *mut u64, len: usize) {
        let move_at = |at: usize, len: usize| {
            let (from, to) = (from.wrapping_byte_add(at), to.wrapping_byte_add(at));
            unsafe { mremap(from.cast(), len, len, MOVE_TO, to.cast::<c_void>()) == to.cast() }
        };
        if !move_at(0, len) {
            (0..len).step_by(PAGE).for_each(|at| assert!(move_at(at, PAGE), "mremap"));
        }
    }
}

/// Moves, drops, unmaps and checks its regions until the end.
fn shuffle(mut regions: Vec<Region>, seed: u64, end: Instant) -> Result<usize, String> {
    let mut random = Random(seed);
    let mut changes = 0;
    while Instant::now() < end {
        let region = random.below(regions.len());
        regions[region].change(&mut random)?;
        changes += 1;
        if changes % 64 == 0 {
            thread::sleep(Duration::from_millis(1));
        }
    }
    regions.iter().try_for_each(Region::check_all)?;
    Ok(changes)
}

/// Forks until the end. A child's exit status says whether its memory was right.
fn fork_often(mut regions: Vec<Region>, wiped: Region, end: Instant) -> Result<usize, String> {
    let mut random = Random(99);
    let mut forks = 0;
    while Instant::now() < end {
        let child = unsafe { fork() };
        if child == 0 {
            let mut checked = regions.iter().try_for_each(Region::check_all);
            let is_wiped = (0..REGION).all(|page| unsafe { wiped.at(page).read_volatile() } == 0);
            if !is_wiped {
                checked = Err("memory that is wiped in children".into());
            }
            // A child of its own, whose parent is gone.
            if checked.is_ok() && forks % 4 == 0 && unsafe { fork() } == 0 {
                checked = regions.iter().try_for_each(Region::check_all);
                if let Err(why) = &checked {
                    let _ = std::fs::write("grandchild", why);
                }
                unsafe { _exit(0) }
            }
            if let Err(why) = &checked {
                let _ = std::fs::write("child", why);
            }
            unsafe { _exit(checked.is_err().into()) }
        }
        let region = random.below(regions.len());
        regions[region].change(&mut random)?;
        thread::sleep(Duration::from_millis(50));
        forks += 1;
        if forks % 2 == 0 {
            let mut status = 0;
            unsafe { waitpid(-1, &mut status, 0) };
            if status != 0 {
                return Err(format!("a child ended with {status:#x}"));
            }
        }
    }
    loop {
        let mut status = 0;
        if unsafe { waitpid(-1, &mut status, 0) } == -1 {
            break;
        }
        if status != 0 {
            return Err(format!("a child ended with {status:#x}"));
        }
    }
    wiped.check_all()?;
    regions.iter().try_for_each(Region::check_all)?;
    Ok(forks)
}

unsafe impl Send for Region {}

fn main() {
    let arguments: Vec<usize> = std::env::args().skip(1).map(|it| it.parse().expect("a number")).collect();
    let [mib, seconds] = arguments[..] else { exit(2) };
    let count = mib * (1 << 20) / (REGION * PAGE);
    let mut regions: Vec<Region> = (0..count as u64).map(Region::new).collect();
    let mut wiped = Region::new(1 << 20);
    unsafe { madvise(wiped.base.cast(), REGION * PAGE, WIPE_ON_FORK) };
    std::fs::write("ready", "").expect("ready");
    while !Path::new("go").exists() {
        thread::sleep(Duration::from_millis(1));
    }
    let end = Instant::now() + Duration::from_secs(seconds as u64);
    let mut forkers = regions.split_off(regions.len() - regions.len() / 8);
    // What is wiped in children moves away, and what is not comes to its place.
    let place = wiped.base;
    wiped.move_to(map(REGION));
    forkers[0].move_to(place);
    let mut threads = vec![thread::spawn(move || fork_often(forkers, wiped, end))];
    for seed in 1..=3 {
        let share = regions.split_off(regions.len() - regions.len() / (4 - seed));
        threads.push(thread::spawn(move || shuffle(share, seed as u64, end)));
    }
    let results: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap_or(Err("panic".into()))).collect();
    let result = match results.iter().find_map(|result| result.as_ref().err()) {
        Some(why) => format!("wrong: {why}\n"),
        None => format!("right: {results:?}\n"),
    };
    std::fs::write("result.new", result).and_then(|()| std::fs::rename("result.new", "result")).expect("result");
    let _ = MAY_MOVE;
}
