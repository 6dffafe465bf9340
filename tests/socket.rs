//! The socket in the images directory: who gets in, what a stranger can do there (nothing), and
//! what stays behind (nothing).

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::common::child;
use crate::common::criu::{self, Role, read_reply, send_fds};
use crate::common::image;
use crate::common::runs;
use crate::common::shards::{self, Collector, Feeder, pipe, pipes};
use crate::common::streamer::{Launch, Streamer};
use crate::common::{HANG_TIMEOUT, PAGE, root_or_skip, wait_until};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const ROLES: [Role; 2] = [Role::Capture, Role::Serve];

/// A streamer that waits for CRIU, with the threads on the other side of its shard.
struct Listening {
    streamer: Streamer,
    role: Role,
    collector: Option<Collector>,
    _feeder: Option<Feeder>,
}

impl Listening {
    fn start(role: Role) -> Self {
        Self::start_with(role, |launch| launch)
    }

    fn start_with(role: Role, configure: impl FnOnce(Launch) -> Launch) -> Self {
        let listening = Self::launch(role, configure);
        listening.streamer.wait_for_line("socket-init");
        listening
    }

    fn launch(role: Role, configure: impl FnOnce(Launch) -> Launch) -> Self {
        match role {
            Role::Capture => {
                let (readers, writers) = shards::pipes(1, None);
                let streamer = configure(Streamer::capture().shards(writers)).start();
                Self {
                    streamer,
                    role,
                    collector: Some(Collector::start(readers)),
                    _feeder: None,
                }
            }
            Role::Serve => {
                let image = image::inventory();
                let (streamer, feeder) = runs::feed(configure(Streamer::serve()), &image);
                Self {
                    streamer,
                    role,
                    collector: None,
                    _feeder: Some(feeder),
                }
            }
        }
    }

    fn socket(&self) -> std::path::PathBuf {
        self.role.socket(self.streamer.images_dir())
    }

    fn stranger(&self) -> UnixStream {
        UnixStream::connect(self.socket()).unwrap()
    }

    /// CRIU comes, and everything works.
    fn expect_unharmed(mut self) -> String {
        let criu = self.streamer.criu();
        match self.role {
            Role::Capture => criu.write_file("inventory.img", b"inventory"),
            Role::Serve => criu.expect_file("inventory.img", b"inventory"),
        }
        drop(criu);
        let exit = self.streamer.expect_success();
        if let Some(collector) = self.collector.take() {
            assert_eq!(
                image::decode(&collector.finish()).unwrap()["inventory.img"],
                b"inventory"
            );
        }
        assert!(!self.socket().exists(), "the socket stays behind");
        exit.stderr
    }
}

#[test]
fn only_the_owner_may_connect_whatever_the_directorys_mode() {
    const NOBODY: u32 = 65_534;
    for role in ROLES {
        let dir = TempDir::new().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let listening = Listening::start_with(role, |launch| launch.images_dir(dir.path()));
        let metadata = fs::symlink_metadata(listening.socket()).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o7777, 0o600);
        if root_or_skip() {
            let stranger = child::as_user(NOBODY, || UnixStream::connect(listening.socket()));
            assert_eq!(stranger.unwrap_err().kind(), ErrorKind::PermissionDenied);
        }
        listening.expect_unharmed();
    }
}

#[test]
fn a_stale_socket_is_replaced() {
    for role in ROLES {
        let dir = TempDir::new().unwrap();
        drop(UnixListener::bind(role.socket(dir.path())).unwrap());
        Listening::start_with(role, |launch| launch.images_dir(dir.path())).expect_unharmed();
    }
}

#[test]
fn anything_else_of_that_name_is_left_alone() {
    type Plant = fn(&Path);
    let plants: [(&str, Plant); 3] = [
        ("a file", |path| fs::write(path, "precious").unwrap()),
        ("a directory", |path| fs::create_dir(path).unwrap()),
        ("a symlink", |path| symlink("/nowhere", path).unwrap()),
    ];
    for role in ROLES {
        for (what, plant) in plants {
            let dir = TempDir::new().unwrap();
            let path = role.socket(dir.path());
            plant(&path);
            let kind = fs::symlink_metadata(&path).unwrap().file_type();
            let mut refused = Listening::launch(role, |launch| launch.images_dir(dir.path()));
            refused.streamer.expect_failure(&[path.to_str().unwrap()]);
            assert_eq!(
                fs::symlink_metadata(&path).unwrap().file_type(),
                kind,
                "{what}"
            );
        }
    }
}

#[test]
fn a_second_streamer_is_refused_and_the_first_one_does_not_notice() {
    let firsts = ROLES.map(|role| {
        let dir = TempDir::new().unwrap();
        let first = Listening::start_with(role, |launch| launch.images_dir(dir.path()));
        let mut second = Listening::launch(role, |launch| launch.images_dir(dir.path()));
        let socket = first.socket();
        second.streamer.expect_failure(&[socket.to_str().unwrap()]);
        (first, dir)
    });
    // The second streamer was no client that leaves a grace behind.
    runs::outlast_grace();
    for (first, _dir) in firsts {
        first.expect_unharmed();
    }
}

#[test]
fn signals_clean_up_and_say_which() {
    for role in ROLES {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            for connected in [false, true] {
                let mut listening = Listening::start(role);
                let criu = connected.then(|| listening.streamer.criu());
                let open = criu.as_ref().map(|criu| match role {
                    Role::Capture => criu.create_file("pages-1.img"),
                    Role::Serve => criu.open_file("inventory.img").unwrap(),
                });
                listening.streamer.signal(signal);
                let exit = listening.streamer.wait();
                assert_eq!(
                    exit.status.code(),
                    Some(128 + signal as i32),
                    "{role:?} {signal} {}",
                    exit.stderr
                );
                assert!(
                    !listening.socket().exists(),
                    "{role:?} {signal}: the socket stays behind"
                );
                drop((criu, open));
                if let Some(collector) = listening.collector.take() {
                    assert!(
                        image::decode(&collector.finish()).is_err(),
                        "no image was captured"
                    );
                }
            }
        }
    }
}

#[test]
fn a_signal_ends_a_restore_that_waits_for_its_image() {
    for launch in [Streamer::extract, Streamer::serve] {
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            let (readers, mut writers) = pipes(1, None);
            let mut streamer = launch().shards(readers).start();
            let begun = image::Shard::new()
                .filename(0, "pages-1.img")
                .data(1, &[1; 10 * PAGE])
                .bytes;
            let mut shard = File::from(writers.pop().unwrap());
            shard.write_all(&begun).unwrap();
            wait_until("it is taken", || child::queued(&shard) == 0);
            streamer.signal(signal);
            assert_eq!(streamer.wait().status.code(), Some(128 + signal as i32));
            assert_eq!(runs::read_dir(streamer.images_dir()), image::Files::new());
        }
    }
}

#[test]
fn clients_that_say_nothing_or_half_a_message_harm_nothing() {
    let request = criu::request("inventory.img");
    for role in ROLES {
        let listening = Listening::start(role);
        let strangers = (0..request.len()).map(|said| {
            let stranger = || {
                let mut stranger = listening.stranger();
                stranger.write_all(&request[..said]).unwrap();
                stranger
            };
            drop(stranger());
            stranger()
        });
        let staying: Vec<_> = strangers.collect();
        listening.expect_unharmed();
        drop(staying);
    }
}

#[test]
fn a_client_that_leaves_without_a_word_harms_nothing_if_criu_comes_soon() {
    for role in ROLES {
        let listening = Listening::start(role);
        drop(listening.stranger());
        listening.expect_unharmed();
    }
}

#[test]
fn a_criu_that_failed_before_its_first_file_does_not_leave_a_script_waiting() {
    for role in ROLES {
        let mut listening = Listening::start(role);
        drop(listening.stranger());
        listening.streamer.expect_failure(&["CRIU"]);
        assert!(!listening.socket().exists());
    }
}

#[test]
fn a_message_that_is_none_is_an_error_that_names_the_peer() {
    let bad = [
        ("over 10 KiB", criu::frame(&[0; 10 * 1024 + 1])),
        ("of 4 GiB", vec![0xff; 100]),
        ("no protobuf", criu::frame(&[0xff; 20])),
        (
            "with a name that is no text",
            criu::frame(&[0x0a, 2, 0xff, 0xfe]),
        ),
        ("with a name cut short", criu::frame(&[0x0a, 20, b'a'])),
    ];
    for role in ROLES {
        for (what, message) in &bad {
            let listening = Listening::start(role);
            let mut stranger = listening.stranger();
            stranger.write_all(message).unwrap();
            // The streamer hangs up, or at least answers nothing.
            stranger.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
            assert!(!matches!(stranger.read(&mut [0; 6]), Ok(1..)), "{what}");
            let stderr = listening.expect_unharmed();
            assert!(
                stderr.contains(&std::process::id().to_string()),
                "{what}: the peer is not named: {stderr}"
            );
        }
    }
}

/// What a stranger sends instead of a pipe. The streamer must neither use it nor keep it.
fn not_the_right_pipes(role: Role) -> Vec<(&'static str, Vec<OwnedFd>)> {
    let right_end = || {
        let (read_end, write_end) = pipe();
        if role == Role::Capture {
            read_end
        } else {
            write_end
        }
    };
    vec![
        ("250 pipes", (0..250).map(|_| right_end()).collect()),
        ("two pipes", vec![right_end(), right_end()]),
        ("a byte alone", vec![]),
        ("a socket", vec![UnixStream::pair().unwrap().0.into()]),
        ("a file", vec![tempfile::tempfile().unwrap().into()]),
        ("a directory", vec![File::open("/").unwrap().into()]),
    ]
}

#[test]
fn anything_but_one_pipe_harms_nothing_and_is_not_kept() {
    const TIMES: usize = 20;
    for role in ROLES {
        for (what, fds) in not_the_right_pipes(role) {
            let listening = Listening::start(role);
            let send_it = || {
                let mut stranger = listening.stranger();
                stranger.set_read_timeout(Some(HANG_TIMEOUT)).unwrap();
                stranger.write_all(&criu::request("inventory.img")).unwrap();
                if role == Role::Serve {
                    assert!(read_reply(&mut stranger).unwrap());
                }
                send_fds(&stranger, &fds.iter().collect::<Vec<_>>()).unwrap();
                let answer = stranger.read(&mut [0; 6]);
                assert!(!matches!(answer, Ok(1..)), "{what}: no answer to that");
            };
            // The first one is answered when the streamer has all it needs open; when a connection
            // has ended, nothing of it is kept.
            send_it();
            let before = listening.streamer.open_fds();
            for _ in 0..TIMES {
                send_it();
            }
            let kept = listening.streamer.open_fds().saturating_sub(before);
            assert_eq!(kept, 0, "{what}: descriptors are kept");
            listening.expect_unharmed();
        }
    }
}

/// CRIU's limit is 107 bytes; how the streamer binds the socket takes nothing of that.
#[test]
fn the_longest_path_that_criu_takes_can_be_used() {
    for role in ROLES {
        let dir = TempDir::new().unwrap();
        let length = 107 - role.socket(dir.path()).as_os_str().len() - 1;
        let deep = dir.path().join("d".repeat(length));
        fs::create_dir(&deep).unwrap();
        assert_eq!(role.socket(&deep).as_os_str().len(), 107);
        Listening::start_with(role, |launch| launch.images_dir(&deep)).expect_unharmed();
    }
}

/// Under RPC, CRIU's action scripts get such a path, which is gone when CRIU is.
#[test]
fn the_socket_is_removed_although_the_path_of_its_directory_is_gone() {
    for role in ROLES {
        let dir = TempDir::new().unwrap();
        let open = File::open(dir.path()).unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), open.as_raw_fd());
        let mut listening = Listening::start_with(role, |launch| launch.images_dir(path));
        drop(open);
        assert!(role.socket(dir.path()).exists());
        listening.streamer.signal(Signal::SIGTERM);
        listening.streamer.wait();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{role:?}");
    }
}
