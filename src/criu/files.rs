//! What is known of CRIU's image files by their names.
//!
//! CRIU makes the names of its files from templates (`imgset_template` in its source), and opens
//! files by these names whether or not they belong to the image that it reads.

use anyhow::{Result, ensure};

/// CRIU reads this file first, and restores nothing without it. A dump writes it when the memory is
/// written; a few files that were opened before are completed after it (docs/protocol.md, section
/// 1).
pub(crate) const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the
/// application.
pub(crate) const CPUINFO: &str = "cpuinfo.img";

/// Whether a file holds memory of the application: large, and read once, front to back.
pub(crate) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}

/// How the names of all image files end, those of plugins included.
const SUFFIX: &str = ".img";

/// Files of which an image has one.
const SINGLE: &[&str] = &[
    "apparmor",
    "binfmt-misc",
    "bpfmap-data",
    "bpfmap-file",
    "cgroup",
    "cpuinfo",
    "eventfd",
    "eventpoll",
    "eventpoll-tfd",
    "ext-files",
    "fanotify",
    "fanotify-mark",
    "fifo",
    "fifo-data",
    "filelocks",
    "files",
    "inetsk",
    "inotify",
    "inotify-wd",
    "inventory",
    "memfd",
    "memfd-secret",
    "netlinksk",
    "ns-files",
    "packetsk",
    "pipes",
    "pipes-data",
    "pstree",
    "reg-files",
    "remap-fpath",
    "seccomp",
    "signalfd",
    "sk-queues",
    "timerfd",
    "tty",
    "tty-data",
    "tty-info",
    "tunfile",
    "unixsk",
];

/// Files of which an image has one for each process, namespace or other object; `-` and a number
/// follow.
const NUMBERED: &[&str] = &[
    "autofs",
    "binfmt-misc",
    "core",
    "creds",
    "fdinfo",
    "filelocks",
    "fs",
    "ghost-file",
    "ids",
    "ifaddr",
    "ip6tables",
    "ipcns-msg",
    "ipcns-sem",
    "ipcns-shm",
    "ipcns-var",
    "iptables",
    "itimers",
    "mm",
    "mountpoints",
    "netdev",
    "netns",
    "netns-ct",
    "netns-exp",
    "nftables",
    "pagemap",
    "pagemap-secretmem",
    "pagemap-shmem",
    "pages",
    "pages-shmem",
    "pidns",
    "posix-timers",
    "rlimit",
    "route",
    "route6",
    "rule",
    "sigacts",
    "signal-p",
    "signal-s",
    "tcp-stream",
    "timens",
    "tmpfs",
    "tmpfs-dev",
    "userns",
    "utsns",
    "vmas",
];

/// What most image files start with: `IMG_COMMON_MAGIC` and `IMG_SERVICE_MAGIC`, little-endian.
const MAGICS: [[u8; 4]; 2] = [[0x19, 0x43, 0x56, 0x54], [0x40, 0x59, 0x10, 0x55]];

/// Bytes of a file that [`is_criu_file`] looks at.
pub(crate) const MAGIC_LENGTH: usize = 4;

/// Whether CRIU may open a file of this name when it restores.
pub(crate) fn is_criu_name(name: &str) -> bool {
    let Some(stem) = name.strip_suffix(SUFFIX) else {
        return false;
    };
    let stem = stem.strip_suffix(".tar.gz").unwrap_or(stem);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit());
    let is_numbered = |(kind, number)| NUMBERED.contains(&kind) && is_number(number);
    SINGLE.contains(&stem) || stem.rsplit_once('-').is_some_and(is_numbered)
}

/// Whether a file is one of CRIU's, to judge by its name and its first bytes: an image file of a
/// CRIU that is newer than this list, or of a plugin, has a name that is not known.
pub(crate) fn is_criu_file(name: &str, start: &[u8]) -> bool {
    is_criu_name(name)
        || (name.ends_with(SUFFIX) && MAGICS.iter().any(|magic| start.starts_with(magic)))
}

/// Whether a file may be part of what CRIU restores, and not an external file.
pub(crate) fn is_image_file(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// Whether a file holds data of the application, of any size: CRIU reads it once, in one process.
pub(crate) fn is_application_data(name: &str) -> bool {
    is_pages(name) || name.starts_with("tmpfs-") || name.starts_with("ghost-file-")
}

/// Whether a file holds the nftables rules of a network namespace.
pub(crate) fn is_nftables(name: &str) -> bool {
    name.starts_with("nftables-")
}

/// Checks that these files of an image are something to restore from: an application, the
/// processor's features alone, or external files alone.
///
/// # Errors
/// When there is no `inventory.img` among CRIU's files.
pub(crate) fn check_whole<'a>(names: impl Iterator<Item = &'a str>) -> Result<()> {
    let names: Vec<_> = names.filter(|name| is_image_file(name)).collect();
    ensure!(
        names.contains(&INVENTORY) || names.iter().all(|&name| name == CPUINFO),
        "checking the image: it has {} files of CRIU's and no {INVENTORY}, without which CRIU \
         restores nothing: it is of a dump that failed; use another one",
        names.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_criu_would_open_are_told_from_a_users() {
        for name in [
            "inventory.img",
            "core-1234.img",
            "ghost-file-1f.img",
            "ipcns-shm-9.img",
            "tmpfs-dev-73.tar.gz.img",
            "pagemap-shmem-42.img",
            "nftables-10.img",
        ] {
            assert!(is_criu_file(name, b""), "{name}");
        }
        for name in [
            "disk.img",
            "core-dump.img",
            "inventory.img.bak",
            "stats-dump",
            "dump.log",
            "parent",
            "pages-.img",
        ] {
            assert!(!is_criu_file(name, b"\0\0\0\0"), "{name}");
        }
        let common = [0x19, 0x43, 0x56, 0x54, 1, 2];
        assert!(is_criu_file("newer-1.img", &common));
        assert!(!is_criu_file("newer-1", &common));
    }

    #[test]
    fn an_image_of_criu_has_an_inventory() {
        let check = |names: &[&str]| check_whole(names.iter().copied()).is_ok();
        for whole in [
            &["core-1.img", INVENTORY][..],
            &[CPUINFO],
            &[CPUINFO, "fs.tar"],
            &["fs.tar"],
        ] {
            assert!(check(whole), "{whole:?}");
        }
        for broken in [
            &["core-1.img"][..],
            &[CPUINFO, "core-1.img"],
            &["fs.tar", "pages-1.img"],
        ] {
            assert!(!check(broken), "{broken:?}");
        }
    }
}
