//! What is known of CRIU's image files by their names.

use anyhow::{Result, ensure};

/// CRIU reads this file first, and restores nothing without it. A dump writes it when the memory is
/// written; a few files that were opened before are completed after it (docs/protocol.md, section
/// 1).
pub(crate) const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the
/// application.
pub(crate) const CPUINFO: &str = "cpuinfo.img";

/// The process tree.
pub(crate) const TREE: &str = "pstree.img";

/// All open files, whatever has them.
pub(crate) const OPEN_FILES: &str = "files.img";

/// How the names of all image files end, those of plugins included.
const SUFFIX: &str = ".img";

/// What most image files begin with.
pub(crate) const COMMON_MAGIC: u32 = 0x5456_4319;

/// What inventory.img begins with.
pub(crate) const INVENTORY_MAGIC: u32 = 0x5831_3116;

/// Bytes of the magic of a file other than inventory.img: what all files have in common, and then
/// what those of one kind have.
pub(crate) const MAGIC: usize = 8;

/// How a file is made up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// A magic, and then messages, each behind its length.
    Messages,
    /// A magic, and then messages and data.
    Mixed,
}

/// The files that are made of messages, without `.img` and a number at the end.
const OF_MESSAGES: &[&str] = &[
    "apparmor",
    "cgroup",
    "core",
    "cpuinfo",
    "creds",
    "eventfd",
    "eventpoll",
    "eventpoll-tfd",
    "ext-files",
    "fanotify",
    "fanotify-mark",
    "fdinfo",
    "fifo",
    "filelocks",
    "files",
    "fs",
    "ids",
    "inetsk",
    "inotify",
    "inotify-wd",
    "inventory",
    "ipcns-var",
    "itimers",
    "mm",
    "mountpoints",
    "netdev",
    "netlinksk",
    "netns",
    "ns-files",
    "packetsk",
    "pagemap",
    "pagemap-shmem",
    "pidfd",
    "pidns",
    "pipes",
    "posix-timers",
    "pstree",
    "reg-files",
    "remap-fpath",
    "rlimit",
    "seccomp",
    "sigacts",
    "signal-p",
    "signal-s",
    "signalfd",
    "timens",
    "timerfd",
    "tty",
    "tty-info",
    "tunfile",
    "unixsk",
    "userns",
    "utsns",
    "vmas",
];

/// The files that begin with a magic, and hold data too.
const MIXED: &[&str] = &[
    "autofs",
    "binfmt-misc",
    "bpfmap-data",
    "bpfmap-file",
    "fifo-data",
    "ghost-file",
    "ipcns-msg",
    "ipcns-sem",
    "ipcns-shm",
    "memfd",
    "pipes-data",
    "sk-queues",
    "tcp-stream",
    "tty-data",
];

/// The files that begin with no magic: memory, archives, and what other programs write.
const RAW: &[&str] = &[
    "ifaddr",
    "ip6tables",
    "iptables",
    "memfd-secret",
    "netns-ct",
    "netns-exp",
    "nftables",
    "pagemap-secretmem",
    "pages",
    "pages-shmem",
    "route",
    "route6",
    "rule",
    "tmpfs",
    "tmpfs-dev",
];

/// How a file is made up; `None` for those that begin with no magic, and files that are not known.
pub(crate) fn layout(name: &str) -> Option<Layout> {
    let kind = kind(name)?;
    if OF_MESSAGES.contains(&kind) {
        Some(Layout::Messages)
    } else {
        MIXED.contains(&kind).then_some(Layout::Mixed)
    }
}

/// What kind of file of CRIU's has this name: what stands before `.img`, and before the number of a
/// process, namespace or other object.
fn kind(name: &str) -> Option<&str> {
    let stem = name.strip_suffix(SUFFIX)?;
    let stem = stem.strip_suffix(".tar.gz").unwrap_or(stem);
    let is_known = |kind: &&str| {
        [OF_MESSAGES, MIXED, RAW]
            .iter()
            .any(|list| list.contains(kind))
    };
    let numbered = || {
        let (kind, number) = stem.rsplit_once('-')?;
        let is_number = !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_number.then_some(kind)
    };
    [Some(stem), numbered()]
        .into_iter()
        .flatten()
        .find(is_known)
}

/// Whether CRIU may open a file of this name when it restores.
pub(crate) fn is_criu_name(name: &str) -> bool {
    kind(name).is_some()
}

/// The number in the name of a file of this kind, such as 7 of `core` in `core-7.img`.
pub(crate) fn number(name: &str, kind: &str) -> Option<u32> {
    let number = name.strip_suffix(".img")?.strip_prefix(kind)?;
    number.strip_prefix('-')?.parse().ok()
}

/// Whether a file holds memory of the application: large, and read once, front to back.
pub(crate) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}

/// What the files of CRIU, and those of its service and statistics, begin with.
const MAGICS: [u32; 2] = [COMMON_MAGIC, 0x5510_5940];

/// Bytes of a file that [`is_criu_file`] looks at.
pub(crate) const MAGIC_LENGTH: usize = 4;

/// Whether a file is one of CRIU's, to judge by its name and its first bytes: an image file of a
/// CRIU that is newer than this list, or of a plugin, has a name that is not known.
pub(crate) fn is_criu_file(name: &str, start: &[u8]) -> bool {
    is_criu_name(name)
        || (name.ends_with(SUFFIX)
            && MAGICS
                .iter()
                .any(|magic| start.starts_with(&magic.to_le_bytes())))
}

/// Whether a file may be part of what CRIU restores, and not an external file.
pub(crate) fn is_image_file(name: &str) -> bool {
    name.ends_with(SUFFIX)
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
        "checking the image: there is no {INVENTORY} among its {} image files, and without it CRIU \
         restores nothing: the dump failed; use another image",
        names.len()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_how_files_are_made_up() {
        for name in [
            "inventory.img",
            "files.img",
            "core-17.img",
            "pagemap-shmem-3.img",
        ] {
            assert_eq!(layout(name), Some(Layout::Messages), "{name}");
        }
        for name in ["sk-queues.img", "ghost-file-1f.img", "ipcns-shm-9.img"] {
            assert_eq!(layout(name), Some(Layout::Mixed), "{name}");
        }
        for name in [
            "pages-1.img",
            "tmpfs-5.tar.gz.img",
            "iptables-9.img",
            "netns-ct-9.img",
        ] {
            assert_eq!(layout(name), None, "{name}");
        }
        for name in ["file-1.img", "core-.img", "core-1", "mm-x.img", ".img"] {
            assert_eq!(layout(name), None, "{name}");
        }
        assert_eq!(number("core-17.img", "core"), Some(17));
        assert_eq!(number("pagemap-shmem-3.img", "pagemap"), None);
        assert_eq!(number("core.img", "core"), None);
    }

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
