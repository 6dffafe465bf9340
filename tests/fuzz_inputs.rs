//! The fuzz targets on inputs that are the same each time: the seeds in `fuzz/seeds/`, what ends
//! too early of each, and mutations of them. `make fuzz` goes on from the same seeds.
//!
//! `FUZZ_MUTATIONS` sets how many mutations of each target are tried. A failing one is written to a
//! file whose name is printed, for `cargo +nightly fuzz run <target> <file>`.

use std::fs;
use std::panic::{self, AssertUnwindSafe};
use std::path::{Path, PathBuf};

use crate::common::random::Random;
use crate::common::setting;
use crate::fuzzing::{TARGETS, Target};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

type Seeds = Vec<(String, Vec<u8>)>;

fn seeds(target: &str) -> Seeds {
    let entries = fs::read_dir(root().join("fuzz/seeds").join(target)).unwrap();
    let paths = entries.map(|entry| entry.unwrap().path());
    let mut seeds: Seeds = paths
        .map(|path| (path.display().to_string(), fs::read(path).unwrap()))
        .collect();
    seeds.sort();
    seeds
}

/// Runs one input, and keeps it if it fails.
fn try_input((target, run): Target, input: &[u8], what: &str) {
    if let Err(panic) = panic::catch_unwind(AssertUnwindSafe(|| run(input))) {
        let kept: PathBuf = root().join("fuzz/artifacts").join(target);
        fs::create_dir_all(&kept).unwrap();
        let kept = kept.join("deterministic");
        fs::write(&kept, input).unwrap();
        eprintln!("{target}, {what}: the input is in {}", kept.display());
        panic::resume_unwind(panic);
    }
}

fn run_target(target: Target) {
    let seeds = seeds(target.0);
    assert!(seeds.len() >= 8, "seeds of {}", target.0);
    let mut runs = 0;
    for (name, input) in &seeds {
        try_input(target, input, name);
        // Each end of a short seed, and some of a long one.
        let step = input.len().div_ceil(200).max(1);
        for end in (0..input.len()).step_by(step) {
            try_input(target, &input[..end], &format!("{name} cut at {end}"));
            runs += 1;
        }
    }
    for seed in 0..setting("FUZZ_MUTATIONS", 800) {
        let mut random = Random::new(seed);
        let (name, input) = random.pick(&seeds);
        let mut input = input.clone();
        for _ in 0..1 + random.below(4) {
            mutate(&mut input, &seeds, &mut random);
        }
        try_input(target, &input, &format!("mutation {seed}, of {name}"));
        runs += 1;
    }
    crate::common::report(format_args!(
        "{}: {} seeds and {runs} inputs made of them",
        target.0,
        seeds.len()
    ));
}

fn mutate(input: &mut Vec<u8>, seeds: &Seeds, random: &mut Random) {
    const TELLING: [u8; 8] = [0, 1, 6, 10, 0x7f, 0x80, 0xfe, 0xff];
    let at = random.below(input.len() + 1);
    let end = (at + 1 + random.below(40)).min(input.len());
    match random.below(8) {
        0 if at < input.len() => input[at] ^= 1 << random.below(8),
        1 if at < input.len() => input[at] = *random.pick(&TELLING),
        2 if at < input.len() => input[at] = random.next() as u8,
        3 => drop(input.drain(at..end)),
        4 => {
            let copy = input[at..end].to_vec();
            let to = random.below(input.len() + 1);
            input.splice(to..to, copy);
        }
        5 => {
            let (_, other) = random.pick(seeds);
            let from = random.below(other.len());
            let to = (from + random.below(200)).min(other.len());
            input.splice(at..end, other[from..to].iter().copied());
        }
        6 => {
            let count = random.below(6);
            input.splice(at..at, random.bytes(count));
        }
        _ => input.truncate(at),
    }
}

#[test]
fn any_marker_stream_is_accepted_or_refused_as_the_reference_does() {
    run_target(TARGETS[0]);
}

#[test]
fn any_messages_of_criu_are_understood_as_the_reference_does() {
    run_target(TARGETS[1]);
}

#[test]
fn any_files_img_is_changed_in_its_ports_alone() {
    run_target(TARGETS[2]);
}
