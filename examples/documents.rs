//! Writes the shells' completions, from the same source as `--help`:
//!
//! ```text
//! cargo run --example documents -- <directory>
//! ```
//!
//! The program itself can do without this code, so it is not part of it.

use std::path::PathBuf;
use std::{env, fs, io};

use criu_image_streamer::Args;
use structopt::StructOpt;
use structopt::clap::Shell;

const NAME: &str = "criu-image-streamer";

fn main() -> io::Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).expect("usage: documents <directory>"));
    fs::create_dir_all(&directory)?;
    for shell in [Shell::Zsh, Shell::Fish] {
        Args::clap().gen_completions(NAME, shell, &directory);
    }
    fs::write(directory.join(format!("{NAME}.bash")), bash_completions())
}

/// clap calls the subcommands of a program with hyphens in its name by other names than it looks
/// for.
fn bash_completions() -> String {
    let mut script = Vec::new();
    Args::clap().gen_completions_to(NAME, Shell::Bash, &mut script);
    let inside = NAME.replace('-', "__");
    String::from_utf8(script)
        .expect("clap writes UTF-8")
        .replace(&format!("cmd=\"{NAME}\""), &format!("cmd=\"{inside}\""))
        .replace(
            &format!("{NAME})\n            opts="),
            &format!("{inside})\n            opts="),
        )
}
