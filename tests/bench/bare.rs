//! The floor under small files: a server that answers every request with the same bytes, and has no image.
//!
//! What a file costs is mostly two exchanges between two processes, a pipe that is made and passed, and nothing that a streamer could do
//! better: this server looks nothing up, checks nothing, and keeps CRIU on its own processor, which a real one must not, as the
//! application would inherit it. How fast a machine does that changes by half within an hour, so it runs in turns with the others.

use crate::common::criu::{Role, frame};
use crate::image::Content;
use crate::naive::receive_pipe;
use crate::role::claim_fds;
use anyhow::{Context, Result, ensure};
use nix::sched::{CpuSet, sched_getcpu, sched_setaffinity};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use std::{
    fs::File,
    io::{Read, Write},
    os::fd::RawFd,
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

#[derive(Serialize, Deserialize)]
pub struct Bare {
    pub images_dir: PathBuf,
    pub progress: RawFd,
    /// Small files, as large as those that CRIU asks for one after the other.
    pub content: Content,
}

impl Bare {
    pub fn play(self) -> Result<()> {
        let mut progress = File::from(claim_fds(&[self.progress]).remove(0));
        let listener = UnixListener::bind(Role::Serve.socket(&self.images_dir))?;
        progress.write_all(b"socket-init\n")?;
        let (mut criu, _) = listener.accept()?;
        share_processor(&criu).context("Failed to share a processor with CRIU")?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        epoll.add(&criu, EpollEvent::new(EpollFlags::EPOLLIN, 0))?;
        let wait = || epoll.wait(&mut [EpollEvent::empty()], EpollTimeout::NONE);
        let sizes: Vec<_> = self
            .content
            .files()
            .iter()
            .map(|(_, size)| *size as usize)
            .collect();
        let bytes = vec![1; sizes.iter().copied().max().unwrap_or(0)];
        let exists = frame(&[0x08, 1]);
        let mut request = [0; 1 << 10];
        for size in sizes {
            wait()?;
            ensure!(criu.read(&mut request)? > 0, "CRIU is gone");
            criu.write_all(&exists)?;
            wait()?;
            receive_pipe(&criu)?.write_all(&bytes[..size])?;
        }
        Ok(())
    }
}

/// Keeps both ends on this processor.
fn share_processor(criu: &UnixStream) -> Result<()> {
    let mut here = CpuSet::new();
    here.set(sched_getcpu()?)?;
    let client = Pid::from_raw(getsockopt(criu, PeerCredentials)?.pid());
    for process in [Pid::this(), client] {
        sched_setaffinity(process, &here)?;
    }
    Ok(())
}
