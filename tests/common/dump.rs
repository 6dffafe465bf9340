//! What CRIU's image files hold, as far as the streamer looks into them. Put together by hand,
//! without the program's protobuf definitions.

use super::PAGE;
use super::criu::frame;
use super::image::{Files, put_varint};

/// Of a process that lives.
pub const ALIVE: u64 = 1;
/// Of one that has ended, and is not waited for yet.
pub const DEAD: u64 = 2;

/// The pages of a pagemap's entry are in the pages file.
pub const PRESENT: u64 = 4;

const COMMON_MAGIC: u32 = 0x54564319;

/// A field of protobuf that is a number.
pub fn number(field: u64, value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, field << 3);
    put_varint(&mut bytes, value);
    bytes
}

/// A field of protobuf that is a message, or a string.
pub fn nested(field: u64, message: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_varint(&mut bytes, field << 3 | 2);
    put_varint(&mut bytes, message.len() as u64);
    bytes.extend(message);
    bytes
}

/// A file of such messages.
pub fn file(messages: impl IntoIterator<Item = Vec<u8>>) -> Vec<u8> {
    let mut bytes = [COMMON_MAGIC, 1].map(u32::to_le_bytes).concat();
    for message in messages {
        bytes.extend(frame(&message));
    }
    bytes
}

/// inventory.img with more fields than it must have.
pub fn inventory(more: &[u8]) -> Vec<u8> {
    let message = [&number(1, 2)[..], more].concat();
    [&0x58313116_u32.to_le_bytes()[..], &frame(&message)].concat()
}

/// pstree.img of processes and their threads.
pub fn tree(processes: &[(u64, &[u64])]) -> Vec<u8> {
    file(processes.iter().map(|(pid, threads)| {
        let own = [number(1, *pid), number(2, 0), number(3, 1), number(4, 1)];
        let threads = threads.iter().map(|thread| number(5, *thread));
        own.into_iter().chain(threads).flatten().collect()
    }))
}

/// core-PID.img of a process.
pub fn core(state: u64) -> Vec<u8> {
    let task = [number(1, state), nested(6, b"application")].concat();
    file([[number(1, 1), nested(3, &task)].concat()])
}

/// pagemap-*.img, with flags and numbers of pages.
pub fn pagemap(pages_id: u64, entries: &[(u64, u64)]) -> Vec<u8> {
    let entries = entries.iter().map(|&(flags, pages)| {
        let fields = [
            number(1, 0x1000),
            number(2, 0),
            number(4, flags),
            number(5, pages),
        ];
        fields.concat()
    });
    file([number(1, pages_id)].into_iter().chain(entries))
}

/// files.img with files of these numbers.
pub fn open_files(ids: impl IntoIterator<Item = u64>) -> Vec<u8> {
    file(
        ids.into_iter()
            .map(|id| [number(1, 1), number(2, id)].concat()),
    )
}

/// The files of a dump that succeeded: of a process with two threads, and of its child, which has
/// ended.
pub fn whole() -> Files {
    let thread = file([number(1, 1)]);
    super::image::files([
        ("pstree.img", tree(&[(71, &[71, 72]), (73, &[73])])),
        ("core-71.img", core(ALIVE)),
        ("core-72.img", thread),
        ("core-73.img", core(DEAD)),
        ("ids-71.img", file([number(1, 1)])),
        ("mm-71.img", file([number(12, 1)])),
        ("fs-71.img", file([[number(1, 2), number(2, 3)].concat()])),
        ("fdinfo-2.img", file([4, 5, 4].map(|id| number(1, id)))),
        (
            "pagemap-71.img",
            pagemap(901, &[(PRESENT, 2), (PRESENT | 2, 1)]),
        ),
        ("pages-901.img", vec![7; 3 * PAGE]),
        ("files.img", open_files(1..=5)),
        ("sk-queues.img", file([])),
        ("inventory.img", inventory(&[])),
    ])
}
