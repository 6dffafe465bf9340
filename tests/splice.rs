//! A probe for kernels whose splice loses, repeats or mixes up data when pages are partly filled:
//! `cargo test splice`.

use std::io::Write;
use std::thread;

use crate::common::image::Files;
use crate::common::random;
use crate::common::runs;
use crate::common::shards;
use crate::common::streamer::Streamer;

/// Every 10 bytes end a write, so that pipe buffers hold anything from 10 bytes to what the kernel
/// merged.
#[test]
fn splice_keeps_tiny_pieces_in_order() {
    const FILES: u64 = 200;
    let mut files: Files = (0..FILES)
        .map(|i| (format!("file-{i}.img"), random::bytes(i, 10_000)))
        .collect();
    files.insert("inventory.img".into(), random::bytes(FILES, 10_000));

    let (readers, writers) = shards::pipes(4, None);
    let mut capture = Streamer::capture().shards(writers).start();
    let mut serve = Streamer::serve().shards(readers).start();

    let dumping = capture.criu();
    let names: Vec<_> = files
        .keys()
        .filter(|name| *name != "inventory.img")
        .collect();
    thread::scope(|scope| {
        for share in names.chunks(names.len().div_ceil(4)) {
            let (dumping, files) = (&dumping, &files);
            scope.spawn(move || {
                for name in share {
                    let mut file = dumping.create_file(name);
                    files[*name]
                        .chunks(10)
                        .for_each(|piece| file.write_all(piece).unwrap());
                }
            });
        }
    });
    dumping.write_file("inventory.img", &files["inventory.img"]);
    drop(dumping);
    capture.expect_success();

    runs::assert_served(&mut serve, &files);
}
