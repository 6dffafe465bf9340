//! Whatever CRIU restores without the streamer it restores with it: processes in namespaces of
//! their own, with network rules, file systems and files that are in the image, and trees of
//! processes.
//!
//! CRIU treats its images as files there: it opens several at once, hands some to
//! `iptables-restore` or `tar`, and closes others unread. Each application goes through a plain
//! dump and restore first, which shows that this CRIU can do it on this machine, and then through
//! the streamer, again and again. They need root; see tests/criu/mod.rs.

use crate::common::keeping::Keeping;
use crate::common::skip;
use crate::criu::huge_pages::HugePages;
use crate::criu::recipes::{CAPTURE, CAPTURE_WITH_INDEX, RESTORE, RESTORE_WITH_INDEX, lazily};
use crate::criu::{Application, Machine, machine};

/// How often an application goes through the streamer: what goes wrong here depends on who is
/// faster.
const ROUNDS: usize = 3;

const PLAIN_DUMP: &str =
    "rm -rf images; mkdir images; criu dump --images-dir images --tree $PID $DUMP_OPTIONS";

const PLAIN_RESTORE: &str = "criu restore --images-dir images --restore-detached $RESTORE_OPTIONS";

/// Runs a program in a root file system of its own: the files of this one, without what is mounted
/// there, and a few mounts beside them. In the mounts of the host CRIU gets lost.
const IN_ITS_ROOT: &str = r#"
mkdir root
mount --bind / root
mount -t tmpfs tmpfs root/dev
mknod -m 666 root/dev/null c 1 3
mknod -m 666 root/dev/urandom c 1 9
mount -t proc proc root/proc
directory=$PWD
cd root
pivot_root . mnt
umount -l /mnt
mount -t tmpfs tmpfs /mnt
cp -r /etc /mnt
cd "$directory"
PATH=$directory:$PATH
exec "$@"
"#;

/// An application, and how to checkpoint it.
#[derive(Default)]
struct Case {
    /// What starts it, if it runs in namespaces of its own.
    command: &'static str,
    parts: &'static str,
    /// A script to run in its network namespace once it has started.
    network: &'static str,
    /// A script that prints what must be the same after a restore, run in the application's
    /// namespaces.
    observe: &'static str,
    /// It runs in its own root file system.
    own_root: bool,
    /// What CRIU has to be told.
    dump_options: &'static str,
}

impl Case {
    /// Takes the application through CRIU alone, and then through the streamer.
    fn goes_through(&self) {
        let machine = if self.own_root {
            Machine::new_on_root_file_system()
        } else {
            machine()
        };
        let Some(machine) = machine else {
            return;
        };
        let mut command = self.command.to_owned();
        if self.own_root {
            command += " bash -e in-its-root";
            std::fs::write(machine.path("in-its-root"), IN_ITS_ROOT).expect("in-its-root");
            // Its directory may be on a mount, and that root has none.
            machine
                .run("cp \"$(command -v application)\" .; mkdir new-root; mount --bind / new-root")
                .success();
        }
        let mut application = machine.start_in(&command, self.parts);
        if !self.network.is_empty() {
            self.inside(&application, self.network);
        }
        if let Err(why) = self.restores(&machine, &mut application, PLAIN_DUMP, PLAIN_RESTORE) {
            return skip(&format!("CRIU alone cannot do this here: {why}"));
        }
        for round in 1..=ROUNDS {
            // Every other time with an index, while the image arrives; in the second half the
            // application runs before its memory is there.
            let (dump, restore) = match round % 2 {
                0 => (CAPTURE_WITH_INDEX, RESTORE_WITH_INDEX),
                _ => (CAPTURE, RESTORE),
            };
            let keeping = Keeping::in_turn(round);
            let mut restore = keeping.in_script(restore);
            if round > ROUNDS / 2 {
                restore = lazily(&restore);
            }
            if let Err(why) = self.restores(&machine, &mut application, dump, &restore) {
                panic!("round {round} of {ROUNDS}, {keeping:?}: {why}");
            }
        }
    }

    /// The application, restored, is the same inside and out; `Err` if a script failed.
    fn restores(
        &self,
        machine: &Machine,
        application: &mut Application<'_>,
        dump: &str,
        restore: &str,
    ) -> Result<(), String> {
        let before = application.goes_on();
        let observed = self.inside(application, self.observe);
        // CRIU builds a mount namespace's root on a mount point that it is given.
        let root = if self.own_root {
            "--root $PWD/new-root"
        } else {
            ""
        };
        let options = format!(
            r#"RESTORE_OPTIONS="--pidfile $PWD/restored.pid {root}"; DUMP_OPTIONS="{}""#,
            self.dump_options
        );
        for script in ["rm -f restored.pid", dump, restore] {
            let ran = application.run(&format!("{options}\n{script}"));
            if !ran.succeeded() {
                return Err(ran.describe());
            }
        }
        // In a PID namespace of its own it is PID 1 again, and out here it may have any other.
        let pid = String::from_utf8(machine.read("restored.pid")).expect("a PID");
        application.pid = pid.trim().into();
        application.goes_on_from(before);
        assert_eq!(self.inside(application, self.observe), observed);
        Ok(())
    }

    /// Runs a script in the application's network, mount, UTS and IPC namespaces.
    fn inside(&self, application: &Application<'_>, script: &str) -> String {
        let script = format!(
            "nsenter --target $PID --net --mount --uts --ipc bash -euo pipefail <<'END'\n{script}\nEND"
        );
        application.run(&script).success().stdout()
    }
}

// The rules themselves are lost: CRIU asks fstat for the size of nftables' image, which for a pipe
// is 0, and restores an empty ruleset. Rules of iptables-legacy go through a child process, and are
// restored.
#[test]
fn a_process_behind_nftables_rules() {
    Case {
        command: "unshare --net",
        parts: "memory=20",
        network: r#"
ip link set lo up
nft add table inet filter
nft 'add chain inet filter input { type filter hook input priority 0; policy accept; }'
for port in $(seq 1000 1200); do echo "add rule inet filter input tcp dport $port counter drop"; done | nft -f -
"#,
        ..Case::default()
    }
    .goes_through();
}

/// The archive of its tmpfs is larger than what an index takes of a file.
#[test]
fn a_process_with_everything_of_its_own() {
    Case {
        command: "unshare --pid --fork --mount --net --uts --ipc",
        own_root: true,
        parts: "memory=20 tree=2x2 threads=2 file=/mnt/file ghost=/mnt/ghost",
        network: r#"
hostname another
ipcmk --shmem 100000
ipcmk --queue
head -c 30M /dev/urandom >/mnt/large
ip link set lo up
ip link add pair type veth peer name other
ip addr add 10.7.0.1/24 dev pair
ip link set other up
ip link set pair up
for port in $(seq 1000 1100); do iptables-legacy -A INPUT -p tcp --dport $port -j DROP; done
ip6tables-legacy -A INPUT -p tcp --dport 99 -j DROP
"#,
        observe: r#"
hostname; ipcs --shmems; ipcs --queues
while ip -6 addr | grep tentative >/dev/null; do sleep 0.1; done
ip -oneline addr; ip route show table all | sort
iptables-legacy-save --table filter | grep -e '^-A'; ip6tables-legacy-save --table filter | grep -e '^-A'
cd /mnt && find . -type f | sort | xargs sha256sum
"#,
        ..Case::default()
    }
    .goes_through();
}

#[test]
fn deleted_files_of_many_sizes() {
    Case {
        parts: "ghost=$PWD/a ghost=$PWD/b,1 ghost=$PWD/c,3 ghost=$PWD/d,9 file=$PWD/e,2",
        dump_options: "--ghost-limit 16M",
        ..Case::default()
    }
    .goes_through();
}

/// CRIU dumps the memory that they share first, and asks for it last.
#[test]
fn a_large_tree_of_processes_that_share_memory() {
    Case {
        parts: "shared=40 memory=1 tree=3x4 threads=1",
        ..Case::default()
    }
    .goes_through();
}

// Shared ones: private huge pages CRIU reads with preadv at an offset, for which it needs a file.
#[test]
fn a_process_with_huge_pages() {
    let Some(huge_pages) = HugePages::reserve(32) else {
        return skip("the machine does not give huge pages");
    };
    Case {
        parts: "memory=20 hugetlb=16",
        ..Case::default()
    }
    .goes_through();
    drop(huge_pages);
}

#[test]
fn a_process_with_much_memory() {
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=512");
    for keeping in Keeping::ALL {
        let before = application.goes_on();
        application.run(CAPTURE).success();
        application.is_gone();
        application.run(&keeping.in_script(RESTORE)).success();
        application.goes_on_from(before);
    }
}

#[test]
fn a_server_is_restored_to_another_port() {
    let Some(machine) = machine() else { return };
    let application = machine.start("listen=7000 memory=10");
    let before = application.goes_on();
    let ask = |port: u16| {
        application.run(&format!(
            "exec 5<>/dev/tcp/127.0.0.1/{port} && head -n 1 <&5"
        ))
    };
    let answer = ask(7000).success().stdout();
    assert!(answer.starts_with(&before.nonce.to_string()), "{answer}");

    application.run(CAPTURE).success();
    application
        .run(&RESTORE.replace(" serve ", " --tcp-listen-remap 7000:7001 serve "))
        .success();
    application.goes_on_from(before);
    let answer = ask(7001).success().stdout();
    assert!(answer.starts_with(&before.nonce.to_string()), "{answer}");
    ask(7000).failure();
}
