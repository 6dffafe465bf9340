//! CRIU's side of the image socket (docs/protocol.md, section 1).
//!
//! ```text
//!            CRIU                         streamer
//!   capture  request(name)       ──────▶
//!            1 byte + read end   ──────▶           splices the pipe's data away until its end
//!   serve    request(name)       ──────▶
//!                                ◀──────  reply(exists)
//!            1 byte + write end  ──────▶           fills the pipe (if it exists)
//! ```
//!
//! The messages are put together by hand, without the program's protobuf definitions. Every
//! descriptor is close-on-exec, as a pipe's end in an unrelated process would keep the pipe from
//! ending.

use std::fs::File;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::HANG_TIMEOUT;
use super::image::Files;
use super::shards::{pipe, set_pipe_size};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Capture,
    Serve,
}

impl Role {
    pub fn socket(self, images_dir: &Path) -> PathBuf {
        images_dir.join(match self {
            Role::Capture => "streamer-capture.sock",
            Role::Serve => "streamer-serve.sock",
        })
    }
}

/// One connection. All processes of a CRIU share theirs and take turns, so it can be shared by
/// threads.
pub struct Criu {
    connection: Mutex<UnixStream>,
}

impl Criu {
    /// Panics unless the streamer listens: wait for `socket-init` first.
    pub fn connect(images_dir: &Path, role: Role) -> Self {
        Self::try_connect(images_dir, role)
            .unwrap_or_else(|e| panic!("connect to {}: {e}", role.socket(images_dir).display()))
    }

    pub fn try_connect(images_dir: &Path, role: Role) -> io::Result<Self> {
        let connection = UnixStream::connect(role.socket(images_dir))?;
        connection.set_read_timeout(Some(HANG_TIMEOUT))?;
        connection.set_write_timeout(Some(HANG_TIMEOUT))?;
        Ok(Self {
            connection: Mutex::new(connection),
        })
    }

    /// Capture: the pipe into which the file is to be written.
    pub fn create_file(&self, name: &str) -> File {
        self.create_file_in_pipe(name, None)
    }

    /// Capture: the same, with a pipe of that many bytes.
    pub fn create_file_in_pipe(&self, name: &str, pipe_size: Option<usize>) -> File {
        self.try_create_file(name, pipe_size)
            .unwrap_or_else(|e| panic!("request file {name}: {e}"))
    }

    /// Capture: the same, for a streamer that may be gone.
    pub fn try_create_file(&self, name: &str, pipe_size: Option<usize>) -> io::Result<File> {
        let (read_end, write_end) = pipe();
        if let Some(size) = pipe_size {
            set_pipe_size(&write_end, size);
        }
        let mut turn = self.turn();
        turn.write_all(&request(name))?;
        send_fds(&turn, &[&read_end])?;
        Ok(File::from(write_end))
    }

    /// Capture: the whole file, written and closed.
    pub fn write_file(&self, name: &str, content: &[u8]) {
        let mut file = self.create_file(name);
        file.write_all(content)
            .unwrap_or_else(|e| panic!("write file {name}: {e}"));
    }

    /// Capture: all of these files, in CRIU's order: `inventory.img` is the last.
    pub fn write_files(&self, files: &Files) {
        for (name, content) in super::runs::inventory_last(files) {
            self.write_file(name, content);
        }
    }

    /// Serve: the pipe from which the file is to be read. None: there is no such file.
    pub fn open_file(&self, name: &str) -> Option<File> {
        self.try_open_file(name)
            .unwrap_or_else(|e| panic!("request file {name}: {e}"))
    }

    /// Serve: the same, for a streamer that may be gone.
    pub fn try_open_file(&self, name: &str) -> io::Result<Option<File>> {
        let mut turn = self.turn();
        turn.write_all(&request(name))?;
        if !read_reply(&mut turn)? {
            return Ok(None);
        }
        let (read_end, write_end) = pipe();
        send_fds(&turn, &[&write_end])?;
        Ok(Some(File::from(read_end)))
    }

    /// Serve: the whole file. None: there is no such file.
    pub fn read_file(&self, name: &str) -> Option<Vec<u8>> {
        let mut content = Vec::new();
        let mut file = self.open_file(name)?;
        file.read_to_end(&mut content)
            .unwrap_or_else(|e| panic!("read file {name}: {e}"));
        Some(content)
    }

    /// Serve: the whole file, which must hold this.
    #[track_caller]
    pub fn expect_file(&self, name: &str, content: &[u8]) {
        let found = self.read_file(name);
        let found = found.unwrap_or_else(|| panic!("{name} is not in the image"));
        super::runs::assert_same_bytes(name, &found, content);
    }

    /// Serve: all of these files.
    #[track_caller]
    pub fn expect_files(&self, files: &Files) {
        for (name, content) in files {
            self.expect_file(name, content);
        }
    }

    /// The connection itself, for those who do not keep to the protocol.
    pub fn turn(&self) -> MutexGuard<'_, UnixStream> {
        self.connection.lock().unwrap()
    }
}

/// The request as it goes over the socket: frame, then the protobuf string field 1.
pub fn request(name: &str) -> Vec<u8> {
    let mut message = vec![0x0a];
    super::image::put_varint(&mut message, name.len() as u64);
    message.extend_from_slice(name.as_bytes());
    frame(&message)
}

pub fn frame(message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("a message under 4 GiB");
    [&len.to_le_bytes()[..], message].concat()
}

/// The reply's `exists`, which must be all that the message holds.
pub fn read_reply(connection: &mut UnixStream) -> io::Result<bool> {
    let mut reply = [0; 6];
    connection.read_exact(&mut reply)?;
    match reply {
        [2, 0, 0, 0, 0x08, exists @ (0 | 1)] => Ok(exists == 1),
        other => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("not a reply: {other:02x?}"),
        )),
    }
}

/// One data byte that carries the descriptors. CRIU sends exactly one.
pub fn send_fds(connection: &UnixStream, fds: &[&OwnedFd]) -> io::Result<()> {
    let raw: Vec<_> = fds.iter().map(|fd| fd.as_fd().as_raw_fd()).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[][..] } else { &rights[..] };
    sendmsg::<()>(
        connection.as_raw_fd(),
        &[IoSlice::new(&[0])],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}
