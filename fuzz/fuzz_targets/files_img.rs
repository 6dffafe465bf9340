#![no_main]

#[allow(
    dead_code,
    reason = "each target uses one of the functions, and none makes inputs"
)]
#[path = "../../tests/fuzzing/mod.rs"]
mod fuzzing;

libfuzzer_sys::fuzz_target!(|input: &[u8]| fuzzing::files_img::run(input));
