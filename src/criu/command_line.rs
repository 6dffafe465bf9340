//! The command line of a CRIU, or of the engine that drives one, as far as it shows what is going
//! on. Under RPC, in another PID namespace, and once CRIU has ended it shows nothing; nothing is
//! assumed then.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use super::Role;

/// CRIU's options with which the application's memory stays out of the stream.
const MEMORY_ELSEWHERE: [&str; 3] = ["--lazy-pages", "--page-server", "--prev-images-dir"];

/// Bytes of an option that distinguish it from all others.
const MIN_OPTION: usize = "--lazy".len();

/// The arguments of a process, with a NUL behind each.
#[derive(Debug)]
pub(crate) struct CommandLine(pub(crate) Vec<u8>);

impl CommandLine {
    /// That of a process; empty where it cannot be read.
    pub(super) fn of(pid: u32) -> Self {
        Self(fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default())
    }

    fn arguments(&self) -> impl Iterator<Item = &[u8]> {
        self.0.split(|&byte| byte == 0)
    }

    /// True if cpuinfo.img comes alone.
    pub(crate) fn is_of_cpuinfo(&self) -> bool {
        self.arguments().any(|argument| argument == b"cpuinfo")
    }

    /// True if CRIU runs no action script when all is written: a pre-dump, or cpuinfo.img alone.
    pub(crate) fn takes_no_dump(&self) -> bool {
        let is_action = matches!(self.actions()[..], [b"pre-dump" | b"cpuinfo", ..]);
        is_action || self.arguments().any(|it| it == b"--pre-dump")
    }

    /// True if the application lives on after a dump.
    pub(crate) fn lets_live(&self) -> bool {
        let is_option = |it: &[u8]| it == b"-R" || it == b"-s" || it.starts_with(b"--leave-");
        self.arguments().any(is_option)
    }

    /// True for a restore whose memory is filled in afterwards.
    pub(crate) fn has_lazy_pages(&self) -> bool {
        self.arguments().any(|it| it.starts_with(b"--lazy"))
    }

    /// The option with which the application's memory stays out of the stream. CRIU takes the
    /// beginning of an option for the option.
    pub(crate) fn memory_elsewhere(&self) -> Option<&'static str> {
        let option = |argument: &[u8]| {
            let name = argument.split(|&byte| byte == b'=').next()?;
            let is_meant = |option: &&&str| option.as_bytes().starts_with(name);
            let option = MEMORY_ELSEWHERE.iter().find(is_meant);
            option.copied().filter(|_| name.len() >= MIN_OPTION)
        };
        self.arguments().find_map(option)
    }

    /// The images directory that it names.
    pub(super) fn images_dir(&self) -> &Path {
        let mut words = self.arguments();
        let directory = words.by_ref().find_map(|word| match word {
            b"-D" | b"--images-dir" => Some(&b""[..]),
            _ => word
                .strip_prefix(b"-D")
                .or_else(|| word.strip_prefix(b"--images-dir=")),
        });
        let directory = directory.filter(|it| !it.is_empty()).or(words.next());
        Path::new(OsStr::from_bytes(directory.unwrap_or_default()))
    }

    /// The words that may be CRIU's action. One that follows an option may be its value instead,
    /// such as the name of a directory: it counts only where there is no other.
    pub(super) fn actions(&self) -> Vec<&[u8]> {
        let words: Vec<_> = self.arguments().collect();
        let pairs = words.windows(2).filter(|pair| role_of(pair[1]).is_some());
        let may_be_value = |pair: &&[&[u8]]| pair[0].starts_with(b"-") && !pair[0].contains(&b'=');
        let (maybe, surely): (Vec<_>, Vec<_>) = pairs.partition(may_be_value);
        match surely.first() {
            Some(pair) => vec![pair[1]],
            None => maybe.iter().map(|pair| pair[1]).collect(),
        }
    }

    /// The streamer's role, if all words that may be CRIU's action agree on it.
    pub(crate) fn role(&self) -> Option<Role> {
        let mut roles = self.actions().into_iter().map(role_of);
        let first = roles.next()?;
        first.filter(|_| roles.all(|role| role == first))
    }
}

/// The streamer's role where this word is CRIU's action.
fn role_of(word: &[u8]) -> Option<Role> {
    match word {
        b"dump" | b"checkpoint" | b"pre-dump" | b"cpuinfo" => Some(Role::Capture),
        b"restore" => Some(Role::Serve),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(words: &str) -> CommandLine {
        CommandLine(words.replace(' ', "\0").into_bytes())
    }

    #[test]
    fn it_names_the_images_directory() {
        for (words, directory) in [
            ("criu dump -t 1 -D images", "images"),
            ("criu dump -D/images -t 1", "/images"),
            ("criu --images-dir=a dump", "a"),
            ("criu dump --images-dir a", "a"),
            ("criu dump", ""),
        ] {
            assert_eq!(line(words).images_dir(), Path::new(directory), "{words}");
        }
    }

    #[test]
    fn it_tells_what_is_going_on() {
        for (words, role) in [
            ("criu dump --stream -t 1", Some(Role::Capture)),
            ("criu -D images restore", Some(Role::Serve)),
            ("criu restore -D checkpoint", Some(Role::Serve)),
            ("criu restore -D dump", Some(Role::Serve)),
            ("criu -D dump restore", Some(Role::Serve)),
            ("criu -v4 -D=dump restore", Some(Role::Serve)),
            ("criu -v4 dump", Some(Role::Capture)),
            ("criu -v4 dump -D restore", None),
            ("criu pre-dump --stream", Some(Role::Capture)),
            ("criu cpuinfo dump", Some(Role::Capture)),
            (
                "runc --root /run/runc checkpoint restore",
                Some(Role::Capture),
            ),
            (
                "runc restore --image-path checkpoint app",
                Some(Role::Serve),
            ),
            ("criu swrk 3", None),
            ("dump", None),
            ("", None),
        ] {
            assert_eq!(line(words).role(), role, "{words}");
        }
        for (words, no_dump) in [
            ("criu pre-dump --stream", true),
            ("criu cpuinfo dump", true),
            ("runc checkpoint --pre-dump a", true),
            ("criu -v4 pre-dump", true),
            ("criu dump --stream -t 1", false),
            ("criu dump --stream -D pre-dump", false),
            ("criu -D cpuinfo dump", false),
        ] {
            assert_eq!(line(words).takes_no_dump(), no_dump, "{words}");
        }
        for (words, lives) in [
            ("criu dump -R", true),
            ("criu dump --leave-running", true),
            ("runc checkpoint --leave-running a", true),
            ("criu dump --stream -t 7", false),
        ] {
            assert_eq!(line(words).lets_live(), lives, "{words}");
        }
    }

    #[test]
    fn it_tells_what_comes_over_the_stream() {
        assert!(line("criu cpuinfo dump --stream").is_of_cpuinfo());
        assert!(line("criu restore --stream --lazy-pages").has_lazy_pages());
        for (words, option) in [
            ("criu dump --lazy-pages --stream", "--lazy-pages"),
            ("criu dump --stream --lazy", "--lazy-pages"),
            ("criu dump --stream --page-server", "--page-server"),
            ("criu dump --prev-images-dir=a", "--prev-images-dir"),
        ] {
            assert_eq!(line(words).memory_elsewhere(), Some(option), "{words}");
        }
        for words in ["", "criu dump --stream -t 7 --", "criu swrk 3"] {
            let line = line(words);
            assert_eq!(line.memory_elsewhere(), None, "{words:?}");
            assert!(!line.is_of_cpuinfo() && !line.has_lazy_pages(), "{words:?}");
        }
    }
}
