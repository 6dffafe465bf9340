//! Every command in the README and in docs/ does what is said there: the blocks are read from these
//! texts and run as they stand.
//!
//! A comment before a block says what it needs: `application: …` starts that application, as
//! `$PID`, on a machine of its own, where this block and those after it run one after another; it
//! must live on afterwards, with its memory as it was. Its word `files=<MiB>` is none of the
//! application's: it makes a directory `fs` with that much in it. Blocks in `sh` are for the
//! reader's shell, in the checkout.

use std::path::Path;
use std::process::Command;

use crate::common::{random, skip};
use crate::criu::machine;

/// The texts that a reader types from.
const TEXTS: [(&str, &str); 5] = [
    ("README.md", include_str!("../README.md")),
    ("docs/recipes.md", include_str!("../docs/recipes.md")),
    ("docs/reference.md", include_str!("../docs/reference.md")),
    ("docs/failures.md", include_str!("../docs/failures.md")),
    ("docs/benchmarks.md", include_str!("../docs/benchmarks.md")),
];

/// A code block, and the comment that stands before it.
#[derive(Debug)]
struct Block<'a> {
    language: &'a str,
    comment: Option<&'a str>,
    text: String,
}

fn blocks() -> Vec<Block<'static>> {
    let mut blocks = Vec::new();
    let mut comment = None;
    let mut open: Option<Block> = None;
    for line in TEXTS.iter().flat_map(|(_, text)| text.lines()) {
        match (&mut open, line.strip_prefix("```")) {
            (None, Some(language)) => {
                open = Some(Block {
                    language,
                    comment: comment.take(),
                    text: String::new(),
                });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (Some(block), None) => {
                block.text.push_str(line);
                block.text.push('\n');
            }
            (None, None) => {
                let found = line
                    .strip_prefix("<!-- ")
                    .and_then(|rest| rest.strip_suffix(" -->"));
                comment = found.or(comment);
            }
        }
    }
    assert!(open.is_none(), "a block has no end");
    blocks
}

/// The recipes of one kind: the argument of their comment, and the blocks that belong together.
pub fn recipes(kind: &str) -> Vec<(&'static str, Vec<String>)> {
    let mut recipes: Vec<(&str, &str, Vec<String>)> = Vec::new();
    for block in blocks()
        .into_iter()
        .filter(|block| block.language == "bash")
    {
        match block.comment {
            Some(comment) => {
                let (kind, argument) = comment.split_once(": ").unwrap_or((comment, ""));
                recipes.push((kind, argument, vec![block.text]));
            }
            None => {
                let (_, _, texts) = recipes.last_mut().expect("the first recipe has a comment");
                texts.push(block.text);
            }
        }
    }
    let found = recipes.into_iter().filter(|(found, _, _)| *found == kind);
    found
        .map(|(_, argument, texts)| (argument, texts))
        .collect()
}

#[test]
fn every_recipe_brings_the_application_back() {
    let recipes = recipes("application");
    assert!(recipes.len() >= 8, "only {} recipes found", recipes.len());
    for (arguments, texts) in recipes {
        let Some(machine) = machine() else { return };
        let (files, parts): (Vec<_>, Vec<_>) = arguments
            .split(' ')
            .partition(|word| word.starts_with("files="));
        for word in files {
            let mib = word["files=".len()..].parse().expect("a number of MiB");
            make_files(&machine.path("fs"), mib);
        }
        let application = machine.start(&parts.join(" "));
        let before = application.goes_on();
        for text in texts {
            application.run(&text).success();
        }
        application.goes_on_from(before);
    }
}

#[test]
fn a_script_that_starts_criu_itself_ends_when_criu_fails_before_it_connects() {
    let recipes = recipes("application").into_iter();
    let texts = recipes.flat_map(|(_, texts)| texts);
    let scripts: Vec<_> = texts
        .filter(|text| text.contains("& streamer=$!"))
        .collect();
    assert_eq!(scripts.len(), 3, "{scripts:?}");
    let Some(machine) = machine() else { return };
    let application = machine.start("memory=10");
    let before = application.goes_on();
    let prepare = "mkdir images && mkfifo ready\n";
    let image = "criu-image-streamer -D images --shard-cmd 'lz4 >app.lz4' capture -- criu dump --stream -D images -t $PID --leave-running";
    application.run(&format!("{prepare}{image}")).success();
    for script in scripts {
        let script = script.replace(prepare, "").replace("criu dump ", "false ");
        let script = script.replace("criu restore ", "false ");
        application.run(&format!("{script}\nexit 0")).failure();
        let ended = "while pgrep -x criu-image-stre; do sleep 0.1; done";
        application.run(ended).success();
    }
    application.goes_on_from(before);
}

#[test]
fn what_a_store_of_equal_blocks_has_of_each_checkpoint_comes_back() {
    let Some(machine) = machine() else { return };
    if Command::new("borg").arg("--version").output().is_err() {
        return skip("borg is not installed: see tests/criu/install-packages");
    }
    for (parts, texts) in recipes("store") {
        let application = machine.start(parts);
        let before = application.goes_on();
        for text in texts {
            application.run(&text).success();
        }
        application.goes_on_from(before);
    }
}

/// The format has no checksums, but what these recipes write has.
#[test]
fn a_flipped_bit_is_found_by_every_recipe_with_a_checksum() {
    for checked in ["'lz4 >app.lz4'", "sha256sum", "zstd -q --adapt=max=4"] {
        let Some(machine) = machine() else { return };
        let mut recipes = recipes("application").into_iter();
        let found = recipes.find(|(_, texts)| texts[0].contains(checked));
        let (parts, texts) = found.expect("a recipe with a checksum");
        let application = machine.start(parts);
        application.run(&texts[0]).success();
        let file = ["app.lz4", "app.img", "app-1.zst"].map(|name| machine.path(name));
        let file = file.iter().find(|file| file.exists()).expect("the image");
        let mut image = std::fs::read(file).expect("the image");
        let middle = image.len() / 2;
        image[middle] ^= 1;
        std::fs::write(file, image).expect("the image");
        let said = application.run(&texts[1]).failure().stderr();
        assert!(said.contains("Error: shard command "), "{said}");
        application.is_gone();
    }
}

/// Makes a directory as an application may have one: half of it are small files in directories, and
/// half is one large file. No size is a multiple of a page's.
fn make_files(directory: &Path, mib: usize) {
    const SMALL: usize = 20_011;
    let half = mib * (1 << 20) / 2;
    for number in 0..=half / SMALL {
        let path = directory.join(format!("cache/{}/{number}", number % 10));
        std::fs::create_dir_all(path.parent().expect("a directory")).expect("a directory");
        std::fs::write(path, random::bytes(number as u64, SMALL)).expect("a small file");
    }
    std::fs::write(directory.join("database"), random::bytes(0, half + 1)).expect("a large file");
}

#[test]
fn every_recipe_is_of_a_kind_that_some_test_runs() {
    let bash = |block: &Block| block.language == "bash";
    let all = blocks().iter().filter(|block| bash(block)).count();
    let known = [
        "application",
        "container",
        "checkpointed container",
        "s3",
        "migration",
        "store",
    ]
    .into_iter();
    let known: usize = known.flat_map(recipes).map(|(_, texts)| texts.len()).sum();
    assert_eq!(known, all, "a recipe's comment names no known kind");
    for block in blocks() {
        assert!(
            ["bash", "sh", "text"].contains(&block.language),
            "no test knows a block in {:?}: {}",
            block.language,
            block.text
        );
    }
}

/// What a reader types into a shell in the checkout. Commands that run for minutes, or that run
/// these very tests (as .ci/run does, which takes them from here), are only looked up by make.
#[test]
fn every_command_for_the_checkout_works() {
    if machine().is_none() {
        return;
    }
    let root = tempfile::tempdir().expect("a directory can be made");
    let commands = blocks().into_iter().filter(|block| block.language == "sh");
    for block in commands {
        let is_long = ["test", "check", "bench", "fuzz"]
            .iter()
            .any(|target| block.text == format!("make {target}\n"));
        let output = Command::new("bash")
            .args(["-euo", "pipefail", "-c", &block.text])
            .env("MAKEFLAGS", if is_long { "n" } else { "" })
            .env("DESTDIR", root.path())
            .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
            .output()
            .expect("bash can be run");
        assert!(
            output.status.success(),
            "{}{}{}",
            block.text,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    let installed = root.path().join("usr/local/bin/criu-image-streamer");
    assert!(installed.exists(), "make install installs the program");
}

/// GitHub's anchor of a heading.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter_map(|letter| match letter {
        ' ' => Some('-'),
        '-' | '_' => Some(letter),
        _ => letter
            .is_alphanumeric()
            .then(|| letter.to_ascii_lowercase()),
    });
    kept.collect()
}

#[test]
fn every_link_leads_somewhere() {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (name, text) in TEXTS {
        for link in text.split("](").skip(1) {
            let link = &link[..link.find(')').expect("the end of a link")];
            if link.starts_with("https://") {
                continue;
            }
            let (path, place) = link.split_once('#').unwrap_or((link, ""));
            let path = match path {
                "" => checkout.join(name),
                path => checkout.join(name).with_file_name("").join(path),
            };
            let found = std::fs::read_to_string(&path);
            let found = found.unwrap_or_else(|why| panic!("{name}: {link}: {why}"));
            let headings = found.lines().filter(|line| line.starts_with('#'));
            let mut anchors = headings.map(|line| anchor(line.trim_start_matches('#').trim()));
            assert!(
                place.is_empty() || anchors.any(|anchor| anchor == place),
                "{name}: no heading for {link}"
            );
        }
    }
}
