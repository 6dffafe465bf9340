//! Text that another process writes line by line, collected by a thread so that the writer never
//! waits for us.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

#[derive(Clone)]
pub struct Lines {
    shared: Arc<(Mutex<State>, Condvar)>,
}

#[derive(Default)]
struct State {
    bytes: Vec<u8>,
    ended: bool,
}

impl Lines {
    pub fn collect(source: OwnedFd) -> Self {
        let lines = Self::ended();
        lines.lock().ended = false;
        let shared = Arc::clone(&lines.shared);
        thread::spawn(move || {
            let mut source = File::from(source);
            let mut buffer = [0; 4096];
            loop {
                let len = source.read(&mut buffer).unwrap_or(0);
                let (state, changed) = &*shared;
                let mut state = state.lock().unwrap();
                state.bytes.extend_from_slice(&buffer[..len]);
                state.ended = len == 0;
                changed.notify_all();
                if state.ended {
                    return;
                }
            }
        });
        lines
    }

    /// Of something that writes nothing.
    pub fn ended() -> Self {
        let state = State {
            ended: true,
            ..State::default()
        };
        Self {
            shared: Arc::new((Mutex::new(state), Condvar::new())),
        }
    }

    /// Everything written until now.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits for a whole line that satisfies `wanted`. None: the writer ended, or the time is over.
    pub fn wait_for(&self, timeout: Duration, wanted: impl Fn(&str) -> bool) -> Option<String> {
        self.wait_until(timeout, |state| {
            let text = String::from_utf8_lossy(&state.bytes);
            let whole = &text[..text.rfind('\n').map_or(0, |end| end + 1)];
            whole.lines().find(|line| wanted(line)).map(str::to_owned)
        })
    }

    /// Waits for the writer's end of the pipe to be closed by all who hold it.
    pub fn wait_for_end(&self, timeout: Duration) -> bool {
        self.wait_until(timeout, |state| state.ended.then_some(()))
            .is_some()
    }

    fn wait_until<T>(&self, timeout: Duration, look: impl Fn(&State) -> Option<T>) -> Option<T> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        loop {
            if let Some(found) = look(&state) {
                return Some(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.shared.1.wait_timeout(state, left).unwrap().0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.0.lock().unwrap()
    }
}
