//! `--tcp-listen-remap` through the whole program. That not one other byte of `files.img` changes,
//! whatever is in it, is what the fuzz target `files_img` is about.

use crate::common::criu::frame;
use crate::common::dump::{nested, number};
use crate::common::image;
use crate::common::indexed;
use crate::common::random::Random;
use crate::common::runs;
use crate::common::shards::Feeder;
use crate::common::streamer::Streamer;

const TCP: u64 = 6;
const UDP: u64 = 17;
const LISTEN: u64 = 10;
const ESTABLISHED: u64 = 1;

/// A `file_entry` of an internet socket.
fn socket((protocol, state, port): (u64, u64, u64)) -> Vec<u8> {
    let fields = [number(5, protocol), number(6, state), number(7, port)];
    [number(1, 2), nested(4, &fields.concat())].concat()
}

fn files_img(sockets: &[(u64, u64, u64)]) -> Vec<u8> {
    let mut bytes = [0x5456_4319_u32, 0x5630_3138]
        .map(u32::to_le_bytes)
        .concat();
    for socket in sockets.iter().copied().map(socket) {
        bytes.extend(frame(&socket));
    }
    bytes
}

/// A restore with that option and that `files.img`, if the image has one.
fn serve(remap: &str, files_img: Option<&[u8]>) -> (Streamer, Feeder) {
    let others = [
        ("pages-1.img", &b"pages"[..]),
        ("inventory.img", image::INVENTORY),
    ];
    let files = files_img.map(|bytes| ("files.img", bytes));
    let image = image::encode(files.into_iter().chain(others), 2, 40);
    runs::feed(
        Streamer::serve().args(["--tcp-listen-remap", remap]),
        &image,
    )
}

/// The same of an image with an index.
fn arrive(remap: &str, files_img: &[u8]) -> (Streamer, Feeder) {
    let files = image::files([
        ("files.img", files_img),
        ("pages-1.img", b"pages"),
        ("inventory.img", image::INVENTORY),
    ]);
    let image = indexed::encode(&files, 2, &mut Random::new(1));
    let launch = Streamer::serve().args(["--tcp-listen-remap", remap]);
    indexed::feed(launch, &image)
}

#[test]
fn the_ports_of_listening_tcp_sockets_change() {
    let sockets = |http, https| {
        files_img(&[
            (TCP, LISTEN, http),
            (UDP, LISTEN, 80),
            (TCP, ESTABLISHED, 80),
            (TCP, LISTEN, https),
            // The same port again, as when a server listens on IPv4 and IPv6.
            (TCP, LISTEN, http),
        ])
    };
    for (remap, http, https) in [("80:65535", 65_535, 443), ("80:443,443:80", 443, 80)] {
        let (streamer, feeder) = serve(remap, Some(&sockets(80, 443)));
        let arriving = arrive(remap, &sockets(80, 443));
        for (mut streamer, _feeder) in [(streamer, feeder), arriving] {
            let criu = streamer.criu();
            criu.expect_file("files.img", &sockets(http, https));
            criu.expect_file("pages-1.img", b"pages");
            drop(criu);
            streamer.expect_success();
        }
    }
}

/// CRIU lets sockets share a port, and the kernel then deals connections out between them.
#[test]
fn what_cannot_be_changed_is_an_error_before_criu_can_connect() {
    let sockets = files_img(&[
        (TCP, LISTEN, 8080),
        (TCP, LISTEN, 8443),
        (TCP, LISTEN, 9000),
        (TCP, ESTABLISHED, 81),
        (UDP, LISTEN, 81),
    ]);
    let cut = &sockets[..sockets.len() - 1];
    for (remap, files_img, words) in [
        // Nothing listens there: the error lists the ports on which something does.
        (
            "8080:90,81:91",
            Some(&sockets[..]),
            &["81", "8080", "8443"][..],
        ),
        ("8080:8443", Some(&sockets), &["8080", "8443"]),
        ("8443:8080", Some(&sockets), &["8080", "8443"]),
        ("8080:1,8443:1", Some(&sockets), &["8080", "8443"]),
        ("8080:8443,8443:9000", Some(&sockets), &["8443", "9000"]),
        ("8080:90", Some(cut), &["files.img"]),
        ("8080:90", Some(&[]), &["files.img"]),
        ("8080:90", None, &["--tcp-listen-remap", "files.img"]),
    ] {
        let (mut streamer, _feeder) = serve(remap, files_img);
        streamer.expect_refusal(words);
    }
}

#[test]
fn without_the_option_files_img_is_not_looked_at() {
    let files = image::files([("files.img", "anything"), ("inventory.img", "inventory")]);
    let image = image::encode_files(&files, 2, 40);
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image);
    runs::assert_served(&mut streamer, &files);
}
