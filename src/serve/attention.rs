//! How the server waits for CRIU's next word: at real-time priority, on the processor where CRIU runs.
//!
//! CRIU says two things for a file, and sleeps after each until it has the answer. Two processes that take turns like that are put on
//! two processors by the scheduler, and then each word costs two wake-ups of an idle processor: 10 µs and more each on a virtual
//! machine, several times what the answer costs. Where the server waits on CRIU's own processor, at a priority that lets it interrupt
//! CRIU at once, the answer is there before CRIU asks for it: neither of them sleeps but for the other, and nobody is woken elsewhere.
//! Waiting without sleeping saves half of the wake-ups only, and takes a processor for it.
//!
//! Measured on 50,000 files of 1 KiB, 2 virtual processors: 2.9 s and 1.7 CPU s waiting in `epoll_wait` alone, 1.8 s and 1.9 CPU s
//! without sleeping, 1.9 s and 1.0 CPU s like this. On a restore of 400 processes by CRIU: 1.18 s and 0.26 CPU s without sleeping, 1.14 s
//! and 0.14 CPU s like this.
//!
//! The priority is only for waiting and for small files. While a larger one is under way, CRIU and the server work at the
//! same time, best on two processors. Who started the server at another priority than the usual one knows why, and it stays. Where the
//! kernel refuses the priority (`CAP_SYS_NICE`, or `ulimit -r`), the server waits like any other.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sched::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use nix::unistd::Pid;

use crate::poller::be_exact;

/// How often to look where CRIU runs. Looking takes 4 µs, and the load balancer, which sees an idle processor beside one with two
/// processes, moves CRIU away every 10 to 20 ms.
const LOOK: Duration = Duration::from_millis(1);

/// The lowest real-time priority: above every usual process, below every other real-time one.
const PRIORITY: libc::c_int = 1;

/// The processor's number in `/proc/<pid>/stat`: field 39, and the fields behind the name, which ends with the last parenthesis, start
/// with the third (proc(5)).
const PROCESSOR: usize = 39 - 3;

/// Bytes of the longest `/proc/<pid>/stat`: 51 numbers of up to 20 digits and a name of up to 64 bytes.
const LONGEST_STAT: usize = 2048;

/// How closely the calling thread attends to CRIU.
pub struct Attention {
    may: bool,
    close: bool,
    looked: Option<Instant>,
    watched: Option<Watched>,
}

/// A process whose processor was asked for.
struct Watched {
    pid: Pid,
    /// Its `/proc/<pid>/stat`, kept open: to open it again would more than double what a look takes.
    stat: File,
}

impl Attention {
    /// Of a thread that runs as its starter wanted.
    pub fn new() -> Self {
        // SAFETY: the call takes a number, 0 for the calling thread, and changes nothing.
        let usual = unsafe { libc::sched_getscheduler(0) } == libc::SCHED_OTHER;
        // SAFETY: as above. -1 may be the value or a failure, and is not 0 in either case.
        let nice = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
        Self {
            may: usual && nice == 0,
            close: false,
            looked: None,
            watched: None,
        }
    }

    /// Waits closely from now on, or like any other process.
    pub fn set(&mut self, close: bool) {
        if !self.may || close == self.close {
            return;
        }
        let (policy, sched_priority) = if close {
            (libc::SCHED_FIFO, PRIORITY)
        } else {
            (libc::SCHED_OTHER, 0)
        };
        let parameters = libc::sched_param { sched_priority };
        // SAFETY: the call reads the parameters, which live longer; 0 is the calling thread.
        let set = Errno::result(unsafe {
            libc::sched_setscheduler(0, policy | libc::SCHED_RESET_ON_FORK, &parameters)
        });
        match set {
            Ok(_) => {
                self.close = close;
                if !close {
                    be_exact();
                }
            }
            Err(_) => self.may = false,
        }
    }

    /// The processor on which `client` sleeps until it is answered, if it is another one than ours. Asks once in a while only.
    pub fn look(&mut self, client: Option<Pid>) -> Option<usize> {
        let now = Instant::now();
        let is_time = self.looked.is_none_or(|last| now - last >= LOOK);
        if !self.close || !is_time {
            return None;
        }
        self.looked = Some(now);
        let found = self.processor_of(client?);
        found.filter(|&found| Ok(found) != sched_getcpu())
    }

    fn processor_of(&mut self, pid: Pid) -> Option<usize> {
        if self.watched.as_ref().is_none_or(|known| known.pid != pid) {
            let stat = File::open(format!("/proc/{pid}/stat")).ok()?;
            self.watched = Some(Watched { pid, stat });
        }
        let mut buffer = [0; LONGEST_STAT];
        let Ok(bytes) = self.watched.as_ref()?.stat.read_at(&mut buffer, 0) else {
            // The process is gone, and its number may be another one's by now.
            self.watched = None;
            return None;
        };
        processor(&String::from_utf8_lossy(&buffer[..bytes]))
    }

    /// Moves to a processor. A real-time thread then stays where it is. For the moment after an answer, when the client was woken on
    /// that processor and has not asked again.
    pub fn follow(&self, processor: usize) {
        let own = Pid::from_raw(0);
        let Ok(before) = sched_getaffinity(own) else {
            return;
        };
        let mut there = CpuSet::new();
        // Refused where we may not run, which is as good as not having looked.
        if there.set(processor).is_ok() && sched_setaffinity(own, &there).is_ok() {
            let _ = sched_setaffinity(own, &before);
        }
    }
}

impl Default for Attention {
    fn default() -> Self {
        Self::new()
    }
}

/// What follows is done at the usual priority.
impl Drop for Attention {
    fn drop(&mut self) {
        self.set(false);
    }
}

fn processor(stat: &str) -> Option<usize> {
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(PROCESSOR)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_read_past_any_name() {
        let rest = (3..=52).map(|field| field.to_string());
        let stat = format!("1 (a) b 7) {}", rest.collect::<Vec<_>>().join(" "));
        assert_eq!(processor(&stat), Some(39));
        assert_eq!(processor("1 (a"), None);
        let own = std::fs::read_to_string("/proc/self/stat").unwrap();
        assert!(processor(&own).is_some());
    }
}
