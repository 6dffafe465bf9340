//! Any bytes on the shards: accepted exactly when a dumb reference accepts them, with the same
//! files, in memory and on disk; otherwise an error, and the images directory is as it was before.
//!
//! ```text
//! input: | flags | length (u32 LE) | length | … | first shard | second shard | … | last shard |
//! flags: bits 0 and 1 are the number of shards less one, bit 7 says whether to try it on disk too
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use criu_image_streamer::fuzzing::{Marker, marker::Body, marker_stream};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::pipe2;
use prost::Message;

/// The largest shard. It has room for chunks that are held in pipes: those of 32 KiB or more,
/// behind the 32 KiB that are read ahead of the first.
const LARGEST: usize = 240 << 10;

/// The size of the shards' pipes. A whole shard fits, so that no thread is needed to write while
/// the program reads.
const PIPE_SIZE: i32 = 256 << 10;

const DISK: u8 = 0x80;

fn shards(input: &[u8]) -> Option<(Vec<&[u8]>, bool)> {
    let (&flags, mut rest) = input.split_first()?;
    let mut lengths = Vec::new();
    for _ in 0..flags & 3 {
        let (length, after) = rest.split_first_chunk()?;
        lengths.push(u32::from_le_bytes(*length) as usize);
        rest = after;
    }
    let mut shards = Vec::new();
    for length in lengths {
        let (shard, after) = rest.split_at(length.min(rest.len()));
        shards.push(shard);
        rest = after;
    }
    shards.push(rest);
    let fit = shards.iter().all(|shard| shard.len() <= LARGEST);
    fit.then_some((shards, flags & DISK != 0))
}

pub fn run(input: &[u8]) {
    let Some((shards, on_disk)) = shards(input) else {
        return;
    };
    let expected = reference(&shards);
    in_memory(&shards, &expected);
    if on_disk {
        to_disk(&shards, &expected);
    }
}

type Files = BTreeMap<String, Vec<u8>>;

fn in_memory(shards: &[&[u8]], expected: &Option<Files>) {
    let found = marker_stream(pipes(shards), None);
    compare(&found, expected);
}

fn to_disk(shards: &[&[u8]], expected: &Option<Files>) {
    let shared_memory = Path::new("/dev/shm");
    let builder = tempfile::Builder::new();
    let dir = if shared_memory.is_dir() {
        builder.tempdir_in(shared_memory)
    } else {
        builder.tempdir()
    };
    let dir = dir.unwrap();
    let before = Files::from([
        ("inventory.img".to_owned(), b"earlier".to_vec()),
        ("ghost-file-1.img".to_owned(), b"earlier, too".to_vec()),
        ("users.img".to_owned(), b"not of an image".to_vec()),
    ]);
    for (name, content) in &before {
        fs::write(dir.path().join(name), content).unwrap();
    }
    let found = marker_stream(pipes(shards), Some(dir.path()));
    let after = read_dir(dir.path());
    match found {
        Ok(_) => {
            let expected = expected.clone();
            let expected = expected.expect("the reference refuses what is on disk now");
            let mut all = before;
            // External files alone are no image that takes another's place.
            if expected.keys().any(|name| name.ends_with(".img")) {
                all.retain(|name, _| name == "users.img");
            }
            all.extend(expected);
            assert!(after == all, "other files on disk than those of the image");
        }
        Err(error) => {
            assert!(after == before, "something has changed on disk: {error:#}");
            assert!(
                expected.is_none(),
                "the reference accepts what is refused with: {error:#}"
            );
        }
    }
}

fn read_dir(dir: &Path) -> Files {
    let entries = fs::read_dir(dir).unwrap().map(Result::unwrap);
    entries
        .map(|entry| {
            let name = entry.file_name().into_string().unwrap();
            (name, fs::read(entry.path()).unwrap())
        })
        .collect()
}

/// Pipes that hold these bytes, and end behind them.
fn pipes(shards: &[&[u8]]) -> Vec<OwnedFd> {
    let filled = |bytes: &&[u8]| {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).unwrap();
        let capacity = fcntl(&write, FcntlArg::F_GETPIPE_SZ).unwrap() as usize;
        if bytes.len() > capacity {
            fcntl(&write, FcntlArg::F_SETPIPE_SZ(PIPE_SIZE)).unwrap();
        }
        assert_eq!(nix::unistd::write(&write, bytes), Ok(bytes.len()));
        read
    };
    shards.iter().map(filled).collect()
}

fn compare(found: &anyhow::Result<Files>, expected: &Option<Files>) {
    match (found, expected) {
        (Ok(found), Some(expected)) => {
            assert!(found == expected, "other files than the reference's")
        }
        (Ok(_), None) => panic!("accepted what the reference refuses"),
        (Err(error), Some(_)) => panic!("the reference accepts what is refused with: {error:#}"),
        (Err(_), None) => {}
    }
}

/// The whole image format: collect all markers, sort them, replay them.
fn reference(shards: &[&[u8]]) -> Option<Files> {
    let (mut markers, mut origins) = (BTreeMap::new(), Vec::new());
    for shard in shards {
        let mut rest = *shard;
        let mut last = None;
        while !rest.is_empty() {
            let length = u32::from_le_bytes(take(&mut rest, 4)?.try_into().unwrap());
            if length > 10 << 10 {
                return None;
            }
            let marker = Marker::decode(take(&mut rest, length as usize)?).ok()?;
            let data = match marker.body {
                Some(Body::FileData(size)) => take(&mut rest, size as usize)?,
                _ => &[],
            };
            if last.is_none() {
                origins.push(marker.origin);
            }
            if last.replace(marker.seq) >= Some(marker.seq) || markers.contains_key(&marker.seq) {
                return None;
            }
            markers.insert(marker.seq, (marker.body?, data));
        }
    }
    if origins.windows(2).any(|pair| pair[0] != pair[1]) {
        return None;
    }
    let contiguous = markers.keys().copied().eq(0..markers.len() as u64);
    let mut markers = markers.into_values();
    if !contiguous || !matches!(markers.next_back()?.0, Body::ImageEof(true)) {
        return None;
    }
    let (mut files, mut open, mut current) = (Files::new(), Files::new(), None);
    for (body, data) in markers {
        match body {
            Body::Filename(name) => {
                let forbidden = BTreeSet::from(["", ".", "..", "parent", "dump.log"]);
                if forbidden.contains(&*name) || name.contains(['/', '\0']) || name.len() > 255 {
                    return None;
                }
                open.entry(name.clone()).or_default();
                current = Some(name);
            }
            Body::FileData(_) => open.get_mut(current.as_ref()?)?.extend_from_slice(data),
            Body::FileEof(true) => {
                let name = current.take()?;
                let content = open.remove(&name)?;
                files.insert(name, content);
            }
            Body::FileEof(false) | Body::ImageEof(_) => return None,
        }
    }
    open.is_empty().then_some(files)
}

fn take<'a>(bytes: &mut &'a [u8], count: usize) -> Option<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(count)?;
    *bytes = rest;
    Some(taken)
}
