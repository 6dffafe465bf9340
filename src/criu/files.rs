//! CRIU's image files, by their names.

use anyhow::{Result, ensure};

/// CRIU reads this file first, and restores nothing without it. A dump writes it when the memory is
/// written; a few files that were opened before are completed after it (docs/protocol.md, section
/// 1).
pub(crate) const INVENTORY: &str = "inventory.img";

/// The file that `criu cpuinfo dump` sends alone, and `criu dump` before it freezes the
/// application.
pub(crate) const CPUINFO: &str = "cpuinfo.img";

/// The process tree: each dump has one, and a pre-dump has none.
pub(crate) const TREE: &str = "pstree.img";

/// All open files of all processes.
pub(crate) const OPEN_FILES: &str = "files.img";

/// The end of the names of all image files, also of plugins.
const SUFFIX: &str = ".img";

/// The first bytes of most image files.
pub(crate) const COMMON_MAGIC: u32 = 0x5456_4319;

/// The first bytes of inventory.img.
pub(crate) const INVENTORY_MAGIC: u32 = 0x5831_3116;

/// The make-up of a file of CRIU's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A magic and then messages, each behind its length.
    OfMessages,
    /// A magic, and data too.
    Mixed,
    /// No magic: memory, archives, and the output of other programs.
    Raw,
}

/// The names of all kinds, without `.img` and without a number at the end.
const KINDS: [(Kind, &str); 3] = [
    (
        Kind::OfMessages,
        "apparmor cgroup core cpuinfo creds eventfd eventpoll eventpoll-tfd ext-files fanotify \
         fanotify-mark fdinfo fifo filelocks files fs ids inetsk inotify inotify-wd inventory \
         ipcns-var itimers mm mountpoints netdev netlinksk netns ns-files packetsk pagemap \
         pagemap-shmem pidfd pidns pipes posix-timers pstree reg-files remap-fpath rlimit seccomp \
         sigacts signal-p signal-s signalfd timens timerfd tty tty-info tunfile unixsk userns \
         utsns vmas",
    ),
    (
        Kind::Mixed,
        "autofs binfmt-misc bpfmap-data bpfmap-file fifo-data ghost-file ipcns-msg ipcns-sem \
         ipcns-shm memfd pipes-data sk-queues tcp-stream tty-data",
    ),
    (
        Kind::Raw,
        "ifaddr ip6tables iptables memfd-secret netns-ct netns-exp nftables pagemap-secretmem \
         pages pages-shmem route route6 rule tmpfs tmpfs-dev",
    ),
];

/// The kind of a file of CRIU's with this name; `None` for all other names.
pub(crate) fn kind(name: &str) -> Option<Kind> {
    let stem = name.strip_suffix(SUFFIX)?;
    let stem = stem.strip_suffix(".tar.gz").unwrap_or(stem);
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|it| it.is_ascii_hexdigit());
    let numbered = stem.rsplit_once('-');
    let numbered = numbered.filter(|(_, number)| is_number(number));
    let is_meant = |listed: &str| listed == stem || numbered.is_some_and(|it| it.0 == listed);
    let mut kinds = KINDS.iter();
    let found = kinds.find(|(_, names)| names.split(' ').any(is_meant))?;
    Some(found.0)
}

/// True if a file holds memory of the application: large, and read once, front to back.
pub(crate) fn is_pages(name: &str) -> bool {
    name.starts_with("pages-")
}

/// The first bytes of CRIU's files, and of its service's and statistics' files.
const MAGICS: [u32; 2] = [COMMON_MAGIC, 0x5510_5940];

/// Bytes of a file that [`is_criu_file`] looks at.
pub(crate) const MAGIC_LENGTH: usize = 4;

/// True if a file is one of CRIU's, to judge by its name and its first bytes: an image file of a
/// CRIU that is newer than this list, or of a plugin, has a name that is not known.
pub(crate) fn is_criu_file(name: &str, start: &[u8]) -> bool {
    kind(name).is_some()
        || (name.ends_with(SUFFIX)
            && MAGICS
                .iter()
                .any(|magic| start.starts_with(&magic.to_le_bytes())))
}

/// True if CRIU may restore from a file, and it is no external one.
pub(crate) fn is_image_file(name: &str) -> bool {
    name.ends_with(SUFFIX)
}

/// True if a file holds the nftables rules of a network namespace.
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
        for (name, expected) in [
            ("inventory.img", Some(Kind::OfMessages)),
            ("core-17.img", Some(Kind::OfMessages)),
            ("pagemap-shmem-3.img", Some(Kind::OfMessages)),
            ("ghost-file-1f.img", Some(Kind::Mixed)),
            ("pages-1.img", Some(Kind::Raw)),
            ("tmpfs-5.tar.gz.img", Some(Kind::Raw)),
            ("file-1.img", None),
            ("core-1", None),
            (".img", None),
        ] {
            assert_eq!(kind(name), expected, "{name}");
        }
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
