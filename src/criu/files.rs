//! What is known of CRIU's image files by their names.

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

/// How a file is made up; `None` for those that begin with no magic: memory, archives, what other
/// programs wrote, and files that are not known.
pub(crate) fn layout(name: &str) -> Option<Layout> {
    let stem = name.strip_suffix(".img")?;
    let of = |stem: &str| match stem {
        _ if OF_MESSAGES.contains(&stem) => Some(Layout::Messages),
        _ if MIXED.contains(&stem) => Some(Layout::Mixed),
        _ => None,
    };
    let numbered = |(stem, number): (&str, &str)| {
        let is_number = !number.is_empty() && number.bytes().all(|digit| digit.is_ascii_hexdigit());
        is_number.then(|| of(stem)).flatten()
    };
    of(stem).or_else(|| numbered(stem.rsplit_once('-')?))
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
}
