//! The yardstick of restores: what a straightforward program does.
//!
//! It makes its pipes as large as it may, reads the markers in order, each chunk into fresh memory
//! of 4 KiB pages, and then answers CRIU's requests one after another: pages by vmsplice, small
//! files by write. All of it correct, none of it clever.

use crate::common::criu::{Role, frame};
use crate::memory::{PageMemory, Pages};
use crate::role::claim_fds;
use anyhow::{Context, Result, ensure};
use criu_image_streamer::criu::proto::ImgStreamerRequestEntry;
use criu_image_streamer::format::proto::{Marker, marker::Body};
use nix::cmsg_space;
use nix::fcntl::{FcntlArg, SpliceFFlags, fcntl, vmsplice};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use prost::Message;
use serde::{Deserialize, Serialize};
use std::{
    collections::HashMap,
    fs::File,
    io::{IoSlice, IoSliceMut, Read, Write},
    os::fd::{AsRawFd, OwnedFd, RawFd},
    os::unix::net::{UnixListener, UnixStream},
    path::PathBuf,
};

#[derive(Serialize, Deserialize)]
pub struct Naive {
    pub images_dir: PathBuf,
    pub shards: Vec<RawFd>,
    pub progress: RawFd,
    pub pipe_size: usize,
}

enum Chunk {
    Pages(PageMemory, usize),
    Small(Vec<u8>),
}

type Store = HashMap<String, Vec<Chunk>>;

const PAGE: usize = 4096;

impl Naive {
    pub fn play(self) -> Result<()> {
        let shards = claim_fds(&self.shards).into_iter().map(File::from);
        let mut progress = File::from(claim_fds(&[self.progress]).remove(0));
        let store = receive(shards.collect(), self.pipe_size)?;
        let listener = UnixListener::bind(Role::Serve.socket(&self.images_dir))?;
        progress.write_all(b"socket-init\n")?;
        let (criu, _) = listener.accept()?;
        serve(store, criu)
    }
}

fn receive(mut shards: Vec<File>, pipe_size: usize) -> Result<Store> {
    let mut store = Store::new();
    let mut current = None;
    let mut next: Vec<Option<Marker>> = vec![];
    for shard in &mut shards {
        let mut size = pipe_size;
        while fcntl(&*shard, FcntlArg::F_SETPIPE_SZ(size as i32)).is_err() && size > PAGE {
            size /= 2;
        }
        next.push(read_marker(shard)?);
    }
    for seq in 0.. {
        let turn = (next.iter())
            .position(|marker| marker.as_ref().is_some_and(|marker| marker.seq == seq))
            .context("A marker is missing")?;
        let shard = &mut shards[turn];
        match next[turn].take().and_then(|marker| marker.body) {
            Some(Body::Filename(name)) => {
                store.entry(name.clone()).or_default();
                current = Some(name);
            }
            Some(Body::FileData(size)) => {
                let name = current.as_ref().context("Data without a file")?;
                let file = store.get_mut(name).context("No such file")?;
                file.push(read_chunk(shard, size as usize)?);
            }
            Some(Body::FileEof(_)) => current = None,
            Some(Body::ImageEof(_)) => break,
            None => anyhow::bail!("A marker without a body"),
        }
        next[turn] = read_marker(shard)?;
    }
    Ok(store)
}

fn read_marker(shard: &mut File) -> Result<Option<Marker>> {
    let mut length = [0; 4];
    if shard.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    shard.read_exact(&mut length[1..])?;
    let mut marker = vec![0; u32::from_le_bytes(length) as usize];
    shard.read_exact(&mut marker)?;
    Ok(Some(Marker::decode(marker.as_slice())?))
}

fn read_chunk(shard: &mut File, size: usize) -> Result<Chunk> {
    if size < PAGE {
        let mut bytes = vec![0; size];
        shard.read_exact(&mut bytes)?;
        return Ok(Chunk::Small(bytes));
    }
    let mut pages = PageMemory::fresh(size, Pages::Small)?;
    shard.read_exact(pages.as_mut_slice())?;
    Ok(Chunk::Pages(pages, size))
}

fn serve(mut store: Store, mut criu: UnixStream) -> Result<()> {
    while let Some(name) = read_request(&mut criu)? {
        let file = store.remove(&name);
        criu.write_all(&frame(&[0x08, file.is_some().into()]))?;
        let Some(chunks) = file else { continue };
        let mut pipe = receive_pipe(&criu)?;
        for chunk in chunks {
            match chunk {
                Chunk::Small(bytes) => pipe.write_all(&bytes)?,
                Chunk::Pages(pages, size) => {
                    let mut sent = 0;
                    while sent < size {
                        let left = [IoSlice::new(&pages[sent..size])];
                        sent += vmsplice(&pipe, &left, SpliceFFlags::empty())?;
                    }
                }
            }
        }
    }
    Ok(())
}

fn read_request(criu: &mut UnixStream) -> Result<Option<String>> {
    let mut length = [0; 4];
    if criu.read(&mut length[..1])? == 0 {
        return Ok(None);
    }
    criu.read_exact(&mut length[1..])?;
    let mut request = vec![0; u32::from_le_bytes(length) as usize];
    criu.read_exact(&mut request)?;
    let request = ImgStreamerRequestEntry::decode(request.as_slice())?;
    Ok(Some(request.filename))
}

/// The descriptor that CRIU sends next.
fn receive_pipe(criu: &UnixStream) -> Result<File> {
    let mut byte = [0];
    let mut data = [IoSliceMut::new(&mut byte)];
    let mut space = cmsg_space!([i32; 1]);
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let message = recvmsg::<()>(criu.as_raw_fd(), &mut data, Some(&mut space), flags)?;
    let mut fds: Vec<OwnedFd> = vec![];
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = control {
            fds.extend(claim_fds(&numbers));
        }
    }
    ensure!(fds.len() == 1, "CRIU sent {} descriptors", fds.len());
    Ok(File::from(fds.remove(0)))
}
