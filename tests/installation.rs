//! What `make install` and `make deb` install: a program that runs, a manual page that tells what
//! `--help` tells, completions that their shell can read; and that `make uninstall` takes all of it
//! away.
//!
//! They run on the build that the tests use, as an optimized one takes minutes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use crate::common::skip;
use crate::common::streamer::binary;
use tempfile::TempDir;

/// The directory of the binary that is tested.
fn output() -> &'static Path {
    let program = Path::new(env!("CARGO_BIN_EXE_criu-image-streamer"));
    program.parent().unwrap()
}

/// The standard output and standard error of a command in the checkout, which must succeed.
#[track_caller]
fn run_in(environment: &[(&str, &Path)], program: &str, arguments: &[&str]) -> (String, String) {
    let mut command = Command::new(program);
    for variable in ["MAKEFLAGS", "DESTDIR", "PREFIX", "BINDIR", "BUILD", "CARGO"] {
        command.env_remove(variable);
    }
    let output = command
        .args(arguments)
        .envs(environment.iter().copied())
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap_or_else(|why| panic!("{program}: {why}"));
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{stdout}{stderr}",
        output.status
    );
    (stdout, stderr)
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    run_in(&[], program, arguments).0
}

#[track_caller]
fn make(target: &str, variables: &[&str]) {
    // Each makes the documents anew, where another one may be about to install them.
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock();
    let build = format!("BUILD={}", output().file_name().unwrap().display());
    let target_dir = format!("CARGO_TARGET_DIR={}", output().parent().unwrap().display());
    run(
        "make",
        &[&[target, &build, &target_dir], variables].concat(),
    );
}

#[track_caller]
fn assert_runs(program: &Path) {
    let version = run(program.to_str().unwrap(), &["--version"]);
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}

/// The files below a directory must be these.
#[track_caller]
fn assert_files(root: &Path, expected: &[&str]) {
    let mut found = BTreeSet::new();
    let mut directories = vec![root.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else {
                found.insert(path.strip_prefix(root).unwrap().to_owned());
            }
        }
    }
    assert_eq!(found, expected.iter().map(PathBuf::from).collect());
}

/// Without these programs the manual stays untested on this machine only; CI has them.
fn is_missing(program: &str) -> bool {
    let missing = Command::new(program).arg("--version").output().is_err();
    if missing {
        skip(&format!("{program} is missing"));
    }
    missing
}

/// Both a newcomer's way to find an option: none is left out.
#[track_caller]
fn assert_tells_what_help_tells(text: &str) {
    const OTHERS: [&str; 6] = [
        "--help",
        "--version",
        "--stream",
        "--tree",
        "--action-script",
        "--serve",
    ];
    let help = run(binary().to_str().unwrap(), &["--help"]);
    let options: BTreeSet<_> = help
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-')
        .filter(|word| word.starts_with("--") && word.len() > 2 && !OTHERS.contains(word))
        .collect();
    assert!(options.len() > 7, "{options:?}");
    for option in options {
        assert!(text.contains(option), "{option} is missing in\n{text}");
    }
}

#[test]
fn make_install_installs_all_and_make_uninstall_removes_it() {
    if is_missing("help2man") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let destination = format!("DESTDIR={}", dir.path().display());
    let variables = [
        &destination,
        "PREFIX=/opt/streamer",
        "BINDIR=/opt/streamer/sbin",
    ];
    make("install", &variables);
    let root = dir.path().join("opt/streamer");
    let expected = [
        "sbin/criu-image-streamer",
        "share/man/man1/criu-image-streamer.1",
        "share/bash-completion/completions/criu-image-streamer",
        "share/zsh/site-functions/_criu-image-streamer",
        "share/fish/vendor_completions.d/criu-image-streamer.fish",
    ];
    assert_files(&root, &expected);
    assert_runs(&root.join(expected[0]));

    let read = |file: &str| fs::read_to_string(root.join(file)).unwrap();
    let manual = read(expected[1]);
    assert!(manual.is_ascii(), "the formatter reads bytes");
    assert_tells_what_help_tells(&manual.replace("\\-", "-"));
    assert_tells_what_help_tells(&read(expected[2]));
    assert_tells_what_help_tells(&read(expected[3]));
    // Fish knows a long option by its name alone.
    assert_tells_what_help_tells(&read(expected[4]).replace("-l ", "--"));

    let complete = |words: &str, last: usize| {
        let script = format!(
            "source '{}' && COMP_WORDS=({words}) COMP_CWORD={last} && \
             _criu-image-streamer criu-image-streamer \"${{COMP_WORDS[{last}]}}\" && echo \"${{COMPREPLY[@]}}\"",
            root.join(expected[2]).display()
        );
        run("bash", &["-euc", &script])
    };
    assert_eq!(complete("criu-image-streamer cap", 1), "capture\n");
    assert_eq!(
        complete("criu-image-streamer serve --shard-c", 2),
        "--shard-cmd\n"
    );

    if !is_missing("groff") {
        let page = root.join(expected[1]);
        let arguments = ["-man", "-Tutf8", "-ww", "-P-cbou", page.to_str().unwrap()];
        let (text, warnings) = run_in(&[], "groff", &arguments);
        assert_eq!(warnings, "");
        for word in ["EXIT STATUS", "EXAMPLES", "socket-init"] {
            assert!(text.contains(word), "{word} is not in\n{text}");
        }
    }

    make("uninstall", &variables);
    assert_files(dir.path(), &[]);
}

/// CRIU's test suite and FastFreeze take it from there, and build it with `make BUILD=debug`, or
/// with `make` alone.
#[test]
fn make_leaves_the_program_at_the_top_of_the_checkout() {
    let checkout = env!("CARGO_MANIFEST_DIR");
    // Not in this checkout, where a user may have left an optimized one.
    let top = TempDir::new().unwrap();
    let makefile = format!("{checkout}/Makefile");
    let place = ["-C", top.path().to_str().unwrap(), "-f", &makefile];
    let cargo = format!("CARGO=env -C {checkout} cargo");
    for _ in 0..2 {
        make("all", &[&place[..], &[&cargo]].concat());
        assert_runs(&top.path().join("criu-image-streamer"));
        assert_files(top.path(), &["criu-image-streamer"]);
    }
    make("clean", &[&place[..], &["CARGO=true"]].concat());
    assert_files(top.path(), &[]);
}

/// As in a shell that has just run the installer of Rust, which changes the PATH of the next ones.
#[test]
fn a_rust_that_is_not_in_path_is_found() {
    let dir = TempDir::new().unwrap();
    let [rust, path] = [".cargo/bin", "bin"].map(|name| dir.path().join(name));
    for directory in [&rust, &path] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::write(rust.join("cargo"), "").unwrap();
    let make = run("sh", &["-c", "command -v make"]);
    symlink(make.trim(), path.join("make")).unwrap();
    let (commands, _) = run_in(&[("HOME", dir.path()), ("PATH", &*path)], "make", &["-n"]);
    let cargo = format!("{}/cargo build", rust.display());
    assert!(commands.contains(&cargo), "{commands}");
}

#[test]
fn a_build_is_optimized_unless_it_is_for_debugging() {
    let optimized = run("make", &["-n", "CARGO_TARGET_DIR=out"]);
    assert!(optimized.contains("cargo build --release"), "{optimized}");
    assert!(
        optimized.contains("out/release/criu-image-streamer"),
        "{optimized}"
    );
    let debug = run("make", &["-n", "CARGO_TARGET_DIR=out", "BUILD=debug"]);
    assert!(!debug.contains("release"), "{debug}");
    assert!(debug.contains("out/debug/criu-image-streamer"), "{debug}");
}

#[test]
fn every_subcommand_shows_an_example() {
    for subcommand in ["capture", "extract", "serve", "list"] {
        let help = run(binary().to_str().unwrap(), &[subcommand, "--help"]);
        let examples = help.split_once("Examples:").expect("examples").1;
        let own = examples.lines().any(|line| {
            line.contains("criu-image-streamer ")
                && (line.ends_with(subcommand) || line.contains(&format!(" {subcommand} -- criu ")))
        });
        assert!(own, "{examples}");
    }
}

#[test]
fn the_debian_package_holds_the_same() {
    if is_missing("help2man") {
        return;
    }
    make("deb", &[]);
    let architecture = run("dpkg", &["--print-architecture"]);
    let version = env!("CARGO_PKG_VERSION");
    let package = format!("criu-image-streamer_{version}_{}.deb", architecture.trim());
    let package = output().join(package);
    let package = package.to_str().unwrap();
    let fields = run(
        "dpkg-deb",
        &["--field", package, "Package", "Version", "Depends"],
    );
    let expected =
        format!("Package: criu-image-streamer\nVersion: {version}\nDepends: libc6 (>= 2.");
    assert!(fields.starts_with(&expected), "{fields}");
    let owners = run("dpkg-deb", &["--contents", package]);
    assert!(
        owners.lines().all(|line| line.contains(" root/root ")),
        "{owners}"
    );

    let tree = TempDir::new().unwrap();
    run(
        "dpkg-deb",
        &["--extract", package, tree.path().to_str().unwrap()],
    );
    let expected = [
        "bin/criu-image-streamer",
        "share/man/man1/criu-image-streamer.1.gz",
        "share/bash-completion/completions/criu-image-streamer",
        "share/zsh/vendor-completions/_criu-image-streamer",
        "share/fish/vendor_completions.d/criu-image-streamer.fish",
        "share/doc/criu-image-streamer/copyright",
        "share/doc/criu-image-streamer/README.md",
        "share/doc/criu-image-streamer/docs/benchmarks.md",
        "share/doc/criu-image-streamer/docs/failures.md",
        "share/doc/criu-image-streamer/docs/kubernetes.md",
        "share/doc/criu-image-streamer/docs/protocol.md",
        "share/doc/criu-image-streamer/docs/recipes.md",
        "share/doc/criu-image-streamer/docs/reference.md",
        "share/doc/criu-image-streamer/docs/timelines.svg",
    ];
    assert_files(&tree.path().join("usr"), &expected);
    assert_runs(&tree.path().join("usr/bin/criu-image-streamer"));
}
