//! What `make install` and `make deb` install: a program that runs, a manual page that tells what
//! `--help` tells, completions that their shell can read; and that `make uninstall` takes all of it
//! away.
//!
//! They run on the build that the tests use, as an optimized one takes minutes.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::common::skip;
use crate::common::streamer::binary;
use tempfile::TempDir;

/// The directory of the binary that is tested.
fn output() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_criu-image-streamer"))
        .parent()
        .unwrap()
}

#[track_caller]
fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_remove("MAKEFLAGS")
        .env_remove("DESTDIR")
        .env_remove("PREFIX")
        .env_remove("BINDIR")
        .env_remove("BUILD")
        .output()
        .unwrap_or_else(|why| panic!("{program}: {why}"));
    assert_success(program, arguments, &output);
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn assert_success(program: &str, arguments: &[&str], output: &Output) {
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

#[track_caller]
fn make(target: &str, variables: &[&str]) {
    let build = format!("BUILD={}", output().file_name().unwrap().display());
    let target_dir = format!("CARGO_TARGET_DIR={}", output().parent().unwrap().display());
    let mut arguments = vec![target, &build, &target_dir];
    arguments.extend(variables);
    run("make", &arguments);
}

/// All files below a directory, relative to it.
fn files(root: &Path) -> BTreeSet<PathBuf> {
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
    found
}

fn paths(names: &[&str]) -> BTreeSet<PathBuf> {
    names.iter().map(PathBuf::from).collect()
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
    let help = run(binary().to_str().unwrap(), &["--help"]);
    let options: BTreeSet<_> = help
        .split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '-')
        .filter(|word| word.starts_with("--") && word.len() > 2 && *word != "--stream")
        .collect();
    assert!(options.len() > 7, "{options:?}");
    for option in options {
        let others = [
            "--help",
            "--version",
            "--tree",
            "--action-script",
            "--serve",
        ];
        let own = !others.contains(&option);
        assert!(
            !own || text.contains(option),
            "{option} is missing in\n{text}"
        );
    }
}

#[test]
fn make_install_installs_all_and_make_uninstall_removes_it() {
    if is_missing("help2man") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let destination = format!("DESTDIR={}", dir.path().display());
    let variables = [destination.as_str(), "PREFIX=/opt/streamer"];
    make("install", &variables);
    let root = dir.path().join("opt/streamer");
    let expected = [
        "bin/criu-image-streamer",
        "share/man/man1/criu-image-streamer.1",
        "share/bash-completion/completions/criu-image-streamer",
        "share/zsh/site-functions/_criu-image-streamer",
        "share/fish/vendor_completions.d/criu-image-streamer.fish",
    ];
    assert_eq!(files(&root), paths(&expected));
    let version = run(
        root.join("bin/criu-image-streamer").to_str().unwrap(),
        &["--version"],
    );
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");

    let manual = fs::read_to_string(root.join("share/man/man1/criu-image-streamer.1")).unwrap();
    assert!(manual.is_ascii(), "the formatter reads bytes");
    assert_tells_what_help_tells(&manual.replace("\\-", "-"));
    for file in &expected[2..] {
        let completions = fs::read_to_string(root.join(file)).unwrap();
        // Fish knows a long option by its name alone.
        let fish = file.ends_with(".fish");
        let completions = if fish {
            completions.replace("-l ", "--")
        } else {
            completions
        };
        assert_tells_what_help_tells(&completions);
    }

    make("uninstall", &variables);
    assert_eq!(files(dir.path()), BTreeSet::new());
}

#[test]
fn bindir_says_where_the_program_goes() {
    let dir = TempDir::new().unwrap();
    let destination = format!("DESTDIR={}", dir.path().display());
    let variables = [destination.as_str(), "PREFIX=/usr", "BINDIR=/usr/sbin"];
    make("install", &variables);
    let installed = files(&dir.path().join("usr"));
    assert!(
        installed.contains(Path::new("sbin/criu-image-streamer"))
            && !installed.contains(Path::new("bin/criu-image-streamer")),
        "{installed:?}"
    );
    make("uninstall", &variables);
    assert_eq!(files(dir.path()), BTreeSet::new());
}

/// CRIU's test suite and FastFreeze take it from there, and build it with `make BUILD=debug`, or
/// with `make` alone.
#[test]
fn make_leaves_the_program_at_the_top_of_the_checkout() {
    let checkout = env!("CARGO_MANIFEST_DIR");
    // Not in this checkout, where a user may have left an optimized one.
    let top = TempDir::new().unwrap();
    let place = [
        "-C",
        top.path().to_str().unwrap(),
        "-f",
        &format!("{checkout}/Makefile"),
    ];
    let program = top.path().join("criu-image-streamer");
    let cargo = format!("CARGO=env -C {checkout} cargo");
    for _ in 0..2 {
        make("all", &[&place[..], &[&cargo]].concat());
        let version = run(program.to_str().unwrap(), &["--version"]);
        assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
        assert_eq!(files(top.path()), paths(&["criu-image-streamer"]));
    }
    make("clean", &[&place[..], &["CARGO=true"]].concat());
    assert_eq!(files(top.path()), BTreeSet::new());
}

/// As in a shell that has just run the installer of Rust, which changes the PATH of the next ones.
#[test]
fn a_rust_that_is_not_in_path_is_found() {
    let dir = TempDir::new().unwrap();
    let rust = dir.path().join(".cargo/bin");
    let path = dir.path().join("bin");
    for directory in [&rust, &path] {
        fs::create_dir_all(directory).unwrap();
    }
    fs::write(rust.join("cargo"), "").unwrap();
    let make = run("sh", &["-c", "command -v make"]);
    symlink(make.trim(), path.join("make")).unwrap();
    let output = Command::new("make")
        .arg("-n")
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env_clear()
        .envs([("HOME", dir.path()), ("PATH", &path)])
        .output()
        .unwrap();
    assert_success("make", &[], &output);
    let commands = String::from_utf8_lossy(&output.stdout);
    let cargo = format!("{}/cargo build", rust.display());
    assert!(commands.contains(&cargo), "{commands}");
}

#[test]
fn a_build_is_optimized_unless_it_is_for_debugging() {
    let commands = |build: &[&str]| run("make", &[&["-n", "CARGO_TARGET_DIR=out"], build].concat());
    for optimized in [commands(&[]), commands(&["BUILD=release"])] {
        assert!(optimized.contains("cargo build --release"), "{optimized}");
        assert!(
            optimized.contains("out/release/criu-image-streamer"),
            "{optimized}"
        );
    }
    let debug = commands(&["BUILD=debug"]);
    assert!(!debug.contains("release"), "{debug}");
    assert!(debug.contains("out/debug/criu-image-streamer"), "{debug}");
    let other = Command::new("make")
        .args(["-n", "BUILD=fast"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(!other.status.success());
}

#[test]
fn bash_completes_options_and_subcommands() {
    let dir = TempDir::new().unwrap();
    let documents = format!("DOCUMENTS={}", dir.path().display());
    make("documents", &[&documents]);
    let complete = |words: &str, last: usize| {
        let script = format!(
            "source '{}/criu-image-streamer.bash' && COMP_WORDS=({words}) COMP_CWORD={last} && \
             _criu-image-streamer criu-image-streamer \"${{COMP_WORDS[{last}]}}\" && echo \"${{COMPREPLY[@]}}\"",
            dir.path().display()
        );
        run("bash", &["-euc", &script])
    };
    assert_eq!(complete("criu-image-streamer cap", 1).trim(), "capture");
    assert_eq!(
        complete("criu-image-streamer serve --shard-c", 2).trim(),
        "--shard-cmd"
    );
}

#[test]
fn the_manual_page_is_well_formed() {
    if is_missing("help2man") || is_missing("groff") {
        return;
    }
    let dir = TempDir::new().unwrap();
    let documents = format!("DOCUMENTS={}", dir.path().display());
    make("documents", &[&documents]);
    let page = dir.path().join("criu-image-streamer.1");
    let output = Command::new("groff")
        .args(["-man", "-Tutf8", "-ww", "-P-c"])
        .arg(&page)
        .output()
        .unwrap();
    assert_success("groff", &[], &output);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "", "warnings");
    // Bold letters are struck twice.
    let mut text = String::new();
    for letter in String::from_utf8_lossy(&output.stdout).chars() {
        match letter {
            '\u{8}' => drop(text.pop()),
            letter => text.push(letter),
        }
    }
    for word in ["EXIT STATUS", "EXAMPLES", "socket-init"] {
        assert!(text.contains(word), "{word} is not in\n{text}");
    }
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
fn the_debian_package_installs_in_a_clean_tree() {
    if is_missing("help2man") {
        return;
    }
    make("deb", &[]);
    let architecture = run("dpkg", &["--print-architecture"]);
    let package = output().join(format!(
        "criu-image-streamer_{}_{}.deb",
        env!("CARGO_PKG_VERSION"),
        architecture.trim()
    ));
    let package = package.to_str().unwrap();
    let field = |name: &str| run("dpkg-deb", &["--field", package, name]);
    assert_eq!(field("Package").trim(), "criu-image-streamer");
    assert_eq!(field("Version").trim(), env!("CARGO_PKG_VERSION"));
    assert!(
        field("Depends").starts_with("libc6 (>= 2."),
        "{}",
        field("Depends")
    );
    let owners = run("dpkg-deb", &["--contents", package]);
    assert!(
        owners.lines().all(|line| line.contains(" root/root ")),
        "{owners}"
    );

    let tree = TempDir::new().unwrap();
    let root = tree.path().to_str().unwrap();
    for directory in ["var/lib/dpkg/info", "var/lib/dpkg/updates"] {
        fs::create_dir_all(tree.path().join(directory)).unwrap();
    }
    fs::write(tree.path().join("var/lib/dpkg/status"), "").unwrap();
    // The tree has no libc to depend on: unpacked, it stands as dpkg would have it.
    let as_root = nix::unistd::geteuid().is_root();
    if as_root {
        run(
            "dpkg",
            &[
                "--root",
                root,
                "--log=/dev/null",
                "--force-depends",
                "--force-script-chrootless",
                "--install",
                package,
            ],
        );
        let status = fs::read_to_string(tree.path().join("var/lib/dpkg/status")).unwrap();
        assert!(status.contains("Status: install ok installed"), "{status}");
    } else {
        run("dpkg-deb", &["--extract", package, root]);
    }
    let installed = files(&tree.path().join("usr"));
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
        "share/doc/criu-image-streamer/docs/protocol.md",
        "share/doc/criu-image-streamer/docs/recipes.md",
        "share/doc/criu-image-streamer/docs/reference.md",
    ];
    assert_eq!(installed, paths(&expected));
    let program = tree.path().join("usr/bin/criu-image-streamer");
    let version = run(program.to_str().unwrap(), &["--version"]);
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
}
