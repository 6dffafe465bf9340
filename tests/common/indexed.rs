//! Images with an index: written down a second time (docs/protocol.md, section 2), captured, and
//! served while they arrive.

use std::collections::VecDeque;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};

use super::image::{self, Files, Shard};
use super::random::Random;
use super::runs;
use super::shards::{self, Collector, Feeder};
use super::streamer::{Launch, Streamer};

/// What any file but one with pages has in the index.
pub const KEPT_IN_INDEX: usize = 1 << 20;

/// Field 100 of the image's first marker, true: its shard is the index.
pub const IS_INDEX: [u8; 3] = [0xa0, 0x06, 1];

/// Fields that a reader does not know: a number, eight bytes, some bytes, and four.
pub const UNKNOWN: [&[u8]; 4] = [
    &[0x70, 0x96, 0x01],
    &[0xb1, 0x06, 1, 2, 3, 4, 5, 6, 7, 8],
    &[0xe2, 0x12, 3, b'n', b'e', b'w'],
    &[0xed, 0x12, 9, 9, 9, 9],
];

/// Data shards, and the index.
#[derive(Clone)]
pub struct Indexed {
    pub shards: Vec<Vec<u8>>,
    pub index: Vec<u8>,
}

impl Indexed {
    /// All shards, the index being the last.
    pub fn all(&self) -> Vec<Vec<u8>> {
        let shards = self.shards.iter().cloned();
        shards.chain([self.index.clone()]).collect()
    }
}

/// An image of these files as any writer may make it: several files take turns, chunks are of any
/// size and go to any data shard, markers have fields that no reader knows.
pub fn encode(files: &Files, shard_count: usize, random: &mut Random) -> Indexed {
    let mut shards = vec![Shard::new(); shard_count + 1];
    let mut seq = 0;
    let mut put = |random: &mut Random, shard: usize, field: &[u8], data: &[u8]| {
        let mut body = field.to_vec();
        if seq == 0 {
            body.extend(IS_INDEX);
        }
        if random.one_in(4) {
            body.extend(*random.pick(&UNKNOWN));
        }
        let before = std::mem::take(&mut shards[shard]);
        shards[shard] = before.marker(seq, &body).raw(data);
        seq += 1;
    };
    let mut names: Vec<_> = files.keys().cloned().collect();
    random.shuffle(&mut names);
    let mut closed = VecDeque::from(names);
    let mut open: Vec<(String, &[u8], usize)> = Vec::new();
    let mut current = String::new();
    loop {
        if open.is_empty() || (open.len() < 3 && random.one_in(20)) {
            match closed.pop_front() {
                Some(name) => open.push((name.clone(), &files[&name], 0)),
                None if open.is_empty() => break,
                None => {}
            }
        }
        let turn = random.below(open.len());
        let (name, rest, sent) = &mut open[turn];
        if current != *name {
            current = name.clone();
            put(random, shard_count, &filename(name), &[]);
        }
        // Some writers find out about a file's end only after a chunk without data.
        if rest.is_empty() && !random.one_in(4) {
            put(random, shard_count, &[4 << 3, 1], &[]);
            open.swap_remove(turn);
            current.clear();
            continue;
        }
        let most = *random.pick(&[1, 100, 10_000, 70_000, 300_000]);
        let chunk = rest.len().min(1 + random.below(most));
        let is_spread = name.starts_with("pages-") || *sent >= KEPT_IN_INDEX;
        let shard = if is_spread {
            random.below(shard_count)
        } else {
            shard_count
        };
        put(random, shard, &file_data(chunk), &rest[..chunk]);
        (*rest, *sent) = (&rest[chunk..], *sent + chunk);
    }
    put(random, shard_count, &[5 << 3, 1], &[]);
    let index = shards.pop().expect("the index is the last").bytes;
    Indexed {
        shards: shards.into_iter().map(|shard| shard.bytes).collect(),
        index,
    }
}

pub fn filename(name: &str) -> Vec<u8> {
    let mut field = vec![2 << 3 | 2];
    image::put_varint(&mut field, name.len() as u64);
    field.extend_from_slice(name.as_bytes());
    field
}

pub fn file_data(size: usize) -> Vec<u8> {
    let mut field = vec![3 << 3];
    image::put_varint(&mut field, size as u64);
    field
}

fn with_index(launch: Launch, end: OwnedFd) -> Launch {
    let number = end.as_raw_fd().to_string();
    launch.inherit(end).args(["--index-fd", &number])
}

/// What a capture makes of these files.
pub fn capture(files: &Files, shard_count: usize) -> Indexed {
    let (readers, writers) = shards::pipes(shard_count, None);
    let (index_reader, index_writer) = shards::pipe();
    let mut streamer = with_index(Streamer::capture().shards(writers), index_writer).start();
    let collector = Collector::start(readers);
    let index = Collector::start(vec![index_reader]);
    runs::send(&streamer, files);
    let exit = streamer.expect_success();
    let stats = exit.progress.last().unwrap();
    assert_eq!(stats.matches("size").count(), shard_count + 1, "{stats}");
    Indexed {
        shards: collector.finish(),
        index: index.finish().remove(0),
    }
}

/// A streamer that serves an image with an index, and the ends to feed it through.
pub struct Serving {
    pub streamer: Streamer,
    pub shards: Vec<OwnedFd>,
    pub index: OwnedFd,
}

pub fn serve(shard_count: usize, launch: Launch) -> Serving {
    let (readers, shards) = shards::pipes(shard_count, None);
    let (index_reader, index) = shards::pipe();
    let streamer = with_index(launch.shards(readers), index_reader).start();
    Serving {
        streamer,
        shards,
        index,
    }
}

/// A streamer that is fed an image with an index, all at once.
pub fn feed(launch: Launch, image: &Indexed) -> (Streamer, Feeder) {
    let (streamer, ends) = serve(image.shards.len(), launch).into_parts();
    (streamer, Feeder::start(ends, &image.all()))
}

impl Serving {
    /// With the index already there; the ends of the data shards.
    pub fn with_index(self, index: &[u8]) -> (Streamer, Vec<OwnedFd>) {
        File::from(self.index).write_all(index).unwrap();
        (self.streamer, self.shards)
    }

    /// The ends of all shards, that of the index being the last.
    pub fn into_parts(self) -> (Streamer, Vec<OwnedFd>) {
        let ends = self.shards.into_iter().chain([self.index]);
        (self.streamer, ends.collect())
    }
}
