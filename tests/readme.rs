//! Every command in the README does what the README says: the blocks are read from it and run as they stand.
//!
//! A comment before a block says what it needs: `application: …` starts that application, as `$PID`, on a machine of its own,
//! where this block and those after it run one after another; it must live on afterwards, with its memory as it was.
//! Blocks in `sh` are for the reader's shell, in the checkout.

mod criu;

use std::path::Path;
use std::process::Command;

use criu::Machine;

const README: &str = include_str!("../README.md");

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
    for line in README.lines() {
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
    assert!(open.is_none(), "a block of the README has no end");
    blocks
}

/// The recipes of one kind: the argument of their comment, and the blocks that belong together.
fn recipes(kind: &str) -> Vec<(&'static str, Vec<String>)> {
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
        let Some(machine) = Machine::new() else {
            return;
        };
        let application = machine.start(arguments);
        let before = application.goes_on();
        for text in texts {
            application.run(&text).success();
        }
        application.goes_on_from(before);
    }
}

#[test]
fn every_block_of_commands_is_run_by_some_test() {
    for block in blocks() {
        match block.language {
            "text" => {}
            "sh" => assert!(
                [
                    "make demo\n",
                    "make install\n",
                    "make test\n",
                    "make bench\n",
                    "make fuzz\n"
                ]
                .contains(&&*block.text),
                "no test runs {:?}",
                block.text
            ),
            "bash" => {}
            other => panic!("a block in {other:?}, which no test knows: {}", block.text),
        }
    }
    let kinds = ["application", "s3", "migration"];
    let all = blocks()
        .into_iter()
        .filter(|block| block.language == "bash")
        .count();
    let known: usize = kinds
        .iter()
        .flat_map(|kind| recipes(kind))
        .map(|(_, texts)| texts.len())
        .sum();
    assert_eq!(known, all, "a recipe's comment names no known kind");
}

#[test]
fn the_demonstration_works_as_the_only_command() {
    if Machine::new().is_none() {
        return;
    }
    let output = Command::new("make")
        .arg("demo")
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")))
        .output()
        .expect("make can be run");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{said}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    println!("{said}");
}
