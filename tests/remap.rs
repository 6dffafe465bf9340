//! `--tcp-listen-remap`: listening TCP ports change, and not one other byte of `files.img`.

use crate::common::image::{self, put_varint};
use crate::common::runs;
use crate::common::streamer::{Launch, Streamer};

const TCP: u64 = 6;
const UDP: u64 = 17;
const LISTEN: u64 = 10;
const ESTABLISHED: u64 = 1;

fn varint_field(message: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(message, field << 3);
    put_varint(message, value);
}

fn bytes_field(message: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(message, field << 3 | 2);
    put_varint(message, bytes.len() as u64);
    message.extend_from_slice(bytes);
}

/// A `file_entry` of an internet socket, with fields around the port that this streamer knows
/// nothing of.
fn socket(id: u64, proto: u64, state: u64, port: u64) -> Vec<u8> {
    let mut isk = Vec::new();
    varint_field(&mut isk, 1, id);
    varint_field(&mut isk, 3, 2);
    varint_field(&mut isk, 5, proto);
    varint_field(&mut isk, 6, state);
    varint_field(&mut isk, 7, port);
    varint_field(&mut isk, 8, 0);
    bytes_field(&mut isk, 1000, b"a field of a newer CRIU");
    isk.extend_from_slice(&[15 << 3 | 5, 1, 2, 3, 4]);
    isk.extend_from_slice(&[14 << 3 | 1, 1, 2, 3, 4, 5, 6, 7, 8]);
    // A number with a byte that it does not need: a program that decodes and encodes it again loses
    // that byte.
    isk.extend_from_slice(&[13 << 3, 0x81, 0x80, 0x00]);

    let mut entry = Vec::new();
    varint_field(&mut entry, 1, 2);
    varint_field(&mut entry, 2, id);
    bytes_field(&mut entry, 4, &isk);
    bytes_field(&mut entry, 2000, b"another one");
    entry
}

/// An entry that is no internet socket.
fn regular_file(id: u64) -> Vec<u8> {
    let mut entry = Vec::new();
    varint_field(&mut entry, 1, 1);
    varint_field(&mut entry, 2, id);
    bytes_field(&mut entry, 3, b"\x08\x01\x3a\x0a/bin/sleep");
    entry
}

fn files_img(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = [0x5456_4319_u32.to_le_bytes(), 0x5630_3138_u32.to_le_bytes()].concat();
    entries
        .iter()
        .for_each(|entry| bytes.extend(crate::common::criu::frame(entry)));
    bytes
}

fn serve(remap: &str) -> Launch {
    Streamer::serve().args(["--tcp-listen-remap", remap])
}

fn image_with(files_img: &[u8]) -> Vec<Vec<u8>> {
    image::encode(
        [("files.img", files_img), ("inventory.img", b"inventory")],
        2,
        40,
    )
}

#[track_caller]
fn assert_remapped(remap: &str, before: &[Vec<u8>], after: &[Vec<u8>]) {
    let (mut streamer, _feeder) = runs::feed(serve(remap), &image_with(&files_img(before)));
    let criu = streamer.criu();
    assert_eq!(
        criu.read_file("files.img").unwrap(),
        files_img(after),
        "{remap}"
    );
    criu.expect_file("inventory.img", b"inventory");
    drop(criu);
    streamer.expect_success();
}

#[test]
fn only_the_port_of_listening_tcp_sockets_changes() {
    let entries = |port| {
        [
            regular_file(1),
            socket(2, TCP, LISTEN, port),
            socket(3, UDP, LISTEN, 8080),
            socket(4, TCP, ESTABLISHED, 8080),
            socket(5, TCP, LISTEN, 443),
            // The same port again, as when a server listens on IPv4 and IPv6.
            socket(6, TCP, LISTEN, port),
        ]
    };
    // Ports of one, two and three bytes: the lengths of the messages around them change as well.
    for port in [80, 8081, 50_000, 65_535, 1] {
        assert_remapped(&format!("8080:{port}"), &entries(8080), &entries(port));
    }
}

#[test]
fn several_ports_change_at_once_even_places() {
    let entries = |a, b, c| {
        [
            socket(1, TCP, LISTEN, a),
            socket(2, TCP, LISTEN, b),
            socket(3, TCP, LISTEN, c),
        ]
    };
    assert_remapped(
        "80:443,443:80",
        &entries(80, 443, 22),
        &entries(443, 80, 22),
    );
    assert_remapped("1:2,2:3,3:4", &entries(1, 2, 3), &entries(2, 3, 4));
}

#[test]
fn a_port_without_a_listener_is_an_error_that_lists_those_found() {
    let files = files_img(&[
        socket(1, TCP, LISTEN, 8080),
        socket(2, TCP, LISTEN, 8443),
        socket(3, TCP, ESTABLISHED, 81),
        socket(4, UDP, LISTEN, 81),
    ]);
    let (mut streamer, _feeder) = runs::feed(serve("8080:90,81:91"), &image_with(&files));
    streamer.expect_failure(&["81", "8080", "8443"]);
}

#[test]
fn an_image_without_files_img_has_no_port_to_change() {
    let image = image::inventory();
    let (mut streamer, _feeder) = runs::feed(serve("80:81"), &image);
    streamer.expect_failure(&["--tcp-listen-remap", "files.img"]);
}

#[test]
fn a_files_img_that_is_not_one_is_an_error() {
    let good = files_img(&[socket(1, TCP, LISTEN, 80)]);
    let wrong_magic = [&[0; 8][..], &good[8..]].concat();
    let frame_of_4_gib = [&good[..8], &[0xff; 4]].concat();
    let not_protobuf = [&good[..8], &crate::common::criu::frame(&[0xff; 20])].concat();
    for bad in [
        &wrong_magic,
        &frame_of_4_gib,
        &not_protobuf,
        &good[..4].to_vec(),
        &Vec::new(),
    ] {
        let (mut streamer, _feeder) = runs::feed(serve("80:81"), &image_with(bad));
        streamer.expect_failure(&["files.img"]);
    }
    for cut in 9..good.len() {
        let (mut streamer, _feeder) = runs::feed(serve("80:81"), &image_with(&good[..cut]));
        streamer.expect_failure(&["files.img"]);
    }
}

#[test]
fn without_the_option_files_img_is_not_looked_at() {
    let (mut streamer, _feeder) = runs::feed(Streamer::serve(), &image_with(b"anything"));
    let criu = streamer.criu();
    assert_eq!(
        criu.read_file("files.img").as_deref(),
        Some(&b"anything"[..])
    );
    drop(criu);
    streamer.expect_success();
}

/// CRIU lets sockets share a port, and the kernel then deals connections out between them.
#[test]
fn a_port_that_another_socket_of_the_image_listens_on_is_refused() {
    let files = files_img(&[
        socket(1, TCP, LISTEN, 8080),
        socket(2, TCP, LISTEN, 8443),
        socket(3, TCP, LISTEN, 9000),
    ]);
    for (remap, both) in [
        ("8080:8443", ["8080", "8443"]),
        ("8443:8080", ["8080", "8443"]),
        ("8080:1,8443:1", ["8080", "8443"]),
        ("8080:8443,8443:9000", ["8443", "9000"]),
    ] {
        let (mut streamer, _feeder) = runs::feed(serve(remap), &image_with(&files));
        let exit = streamer.wait();
        assert_eq!(exit.status.code(), Some(1), "{remap}");
        exit.expect_failure(&both);
        assert_eq!(exit.progress, [""; 0], "{remap}");
    }
}
