//! Writes the manual page and the shells' completions, from the same source as `--help`:
//!
//! ```text
//! cargo run --example documents -- <directory>
//! ```
//!
//! The program itself can do without this code, so it is not part of it.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::{env, fs, io};

use criu_image_streamer::cli::Args;
use structopt::StructOpt;
use structopt::clap::{App, Shell};

const NAME: &str = "criu-image-streamer";

/// What `--help` has no place for.
const MORE: &str = r#".SH EXIT STATUS
0 only if everything succeeded: the image is complete, and every shard command has ended with exit status 0.
1 for every failure, which standard error names. 128 and the signal's number after SIGTERM, SIGINT or SIGHUP.
.SH PROGRESS
The progress descriptor carries one line for each event.
.TP
.B socket-init
CRIU can connect.
.TP
.B checkpoint-start
capture: the application is frozen.
.TP
.B {"shards":[{"size":\fIbytes\fP,"transfer_duration_millis":\fIms\fP},…]}
The image is complete. The shards are in the order of \fB\-\-shard\-fds\fP, or of the shard commands.
.SH SEE ALSO
.BR criu (8)
"#;

fn main() -> io::Result<()> {
    let directory = PathBuf::from(env::args_os().nth(1).expect("usage: documents <directory>"));
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(format!("{NAME}.1")), manual(&Args::clap()))?;
    for shell in [Shell::Zsh, Shell::Fish] {
        Args::clap().gen_completions(NAME, shell, &directory);
    }
    fs::write(directory.join(format!("{NAME}.bash")), bash_completions())
}

/// clap calls the subcommands of a program with hyphens in its name by other names than it looks for.
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

fn manual(app: &App) -> String {
    let about = app.p.meta.about.unwrap_or_default();
    let (summary, description) = match app.p.meta.long_about {
        Some(long) => long.split_once('\n').unwrap_or((long, "")),
        None => (about, ""),
    };
    let mut page = format!(
        ".TH {} 1 \"\" \"{NAME} {}\" \"User Commands\"\n.SH NAME\n{NAME} \\- {}\n.SH SYNOPSIS\n.nf\n{}\n.fi\n.SH DESCRIPTION\n{}\n",
        NAME.to_uppercase(),
        env!("CARGO_PKG_VERSION"),
        escape(summary.trim_end_matches('.')),
        escape(app.p.meta.usage_str.unwrap_or_default()),
        escape(summary),
    );
    if !description.trim().is_empty() {
        let _ = writeln!(page, ".PP\n{}", escape(description.trim()));
    }
    page.push_str(".SH OPTIONS\n");
    options(app, &mut page);
    page.push_str(".SH SUBCOMMANDS\n");
    for command in &app.p.subcommands {
        let meta = &command.p.meta;
        let _ = writeln!(
            page,
            ".SS {}\n{}",
            escape(&meta.name),
            escape(meta.about.unwrap_or_default())
        );
        options(command, &mut page);
        examples(meta.more_help, &mut page);
    }
    page.push_str(&ascii(MORE));
    page
}

/// Each option with its explanation. Those of the whole program are not repeated for its subcommands.
fn options(app: &App, page: &mut String) {
    let mut all = Vec::new();
    for option in &app.p.opts {
        let values = option.v.val_names.iter().flat_map(|names| names.values());
        let value = values.fold(String::new(), |text, name| {
            format!("{text} \\fI{}\\fP", escape(name))
        });
        all.push((option.s.unified_ord, &option.b, &option.s, value));
    }
    for flag in &app.p.flags {
        all.push((flag.s.unified_ord, &flag.b, &flag.s, String::new()));
    }
    all.sort_by_key(|(order, ..)| *order);
    for (_, base, switch, value) in all {
        let short = switch.short.map(|short| format!("\\-{short}"));
        let long = switch.long.map(|long| format!("\\-\\-{}", escape(long)));
        let names: Vec<_> = short.into_iter().chain(long).collect();
        let _ = writeln!(
            page,
            ".TP\n\\fB{}\\fP{value}\n{}",
            names.join("\\fP, \\fB"),
            escape(base.help.unwrap_or_default())
        );
    }
}

fn examples(text: Option<&str>, page: &mut String) {
    let Some(text) = text else { return };
    let _ = writeln!(page, ".PP\nExamples:\n.PP\n.nf");
    for line in text.lines().filter(|line| !line.starts_with("EXAMPLES")) {
        let _ = writeln!(page, "{}", escape(line));
    }
    page.push_str(".fi\n");
}

/// The formatter reads bytes.
fn ascii(text: &str) -> String {
    let of_char = |letter: char| match letter.is_ascii() {
        true => letter.to_string(),
        false => format!("\\[u{:04X}]", u32::from(letter)),
    };
    text.chars().map(of_char).collect()
}

/// Text that the formatter takes as it is.
fn escape(text: &str) -> String {
    let lines = text.lines().map(|line| {
        let line = line.replace('\\', "\\e").replace('-', "\\-");
        let line = ascii(&line);
        match line.starts_with(['.', '\'']) {
            true => format!("\\&{line}"),
            false => line,
        }
    });
    lines.collect::<Vec<_>>().join("\n")
}
