//! Shards on the tests' side: the other ends of the streamer's pipes, read into memory or fed from
//! memory.
//!
//! One thread for each shard, as one shard that is left alone may stop the others: where a test
//! wants that, it leaves the pipe alone and says so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread::{self, JoinHandle};

use nix::fcntl::{FcntlArg, OFlag, fcntl};

/// A close-on-exec pipe of the default capacity: its read end and its write end.
pub fn pipe() -> (OwnedFd, OwnedFd) {
    nix::unistd::pipe2(OFlag::O_CLOEXEC).expect("make a pipe")
}

/// Pipes of `size` bytes, or of the default capacity: all read ends and all write ends.
pub fn pipes(count: usize, size: Option<usize>) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
    (0..count)
        .map(|_| {
            let ends = pipe();
            if let Some(size) = size {
                set_pipe_size(&ends.1, size);
            }
            ends
        })
        .unzip()
}

pub fn set_pipe_size(end: impl AsFd, size: usize) {
    let asked = i32::try_from(size).expect("a capacity under 2 GiB");
    let got = fcntl(end.as_fd(), FcntlArg::F_SETPIPE_SZ(asked)).expect("set a pipe's capacity");
    assert!(got >= asked, "asked for a pipe of {asked} bytes, got {got}");
}

/// A pair of connected sockets.
pub fn unix_pair() -> (OwnedFd, OwnedFd) {
    let (one, other) = UnixStream::pair().unwrap();
    (one.into(), other.into())
}

pub fn tcp_pair() -> (OwnedFd, OwnedFd) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (client.into(), listener.accept().unwrap().0.into())
}

/// Reads shards to their ends.
pub struct Collector {
    threads: Vec<JoinHandle<io::Result<Vec<u8>>>>,
}

impl Collector {
    pub fn start(read_ends: Vec<OwnedFd>) -> Self {
        let collect = |shard: OwnedFd| {
            thread::spawn(move || {
                let mut bytes = Vec::new();
                File::from(shard).read_to_end(&mut bytes)?;
                Ok(bytes)
            })
        };
        Self {
            threads: read_ends.into_iter().map(collect).collect(),
        }
    }

    /// What every shard held, when all have ended.
    pub fn finish(self) -> Vec<Vec<u8>> {
        self.threads
            .into_iter()
            .map(|t| t.join().unwrap().expect("read a shard"))
            .collect()
    }
}

/// Writes shards and closes them.
pub struct Feeder {
    threads: Vec<JoinHandle<io::Result<()>>>,
}

impl Feeder {
    pub fn start(write_ends: Vec<OwnedFd>, shards: &[Vec<u8>]) -> Self {
        assert_eq!(write_ends.len(), shards.len(), "a pipe for each shard");
        let feed = |(shard, bytes): (OwnedFd, &Vec<u8>)| {
            let bytes = bytes.clone();
            thread::spawn(move || File::from(shard).write_all(&bytes))
        };
        Self {
            threads: write_ends.into_iter().zip(shards).map(feed).collect(),
        }
    }

    /// Whether each shard was taken to its end, when all writers are done. A streamer that gave up
    /// breaks the pipe.
    pub fn finish(self) -> Vec<io::Result<()>> {
        self.threads
            .into_iter()
            .map(|t| t.join().unwrap())
            .collect()
    }
}
