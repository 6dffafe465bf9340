//! Compiles the protocol definitions with protox, so that no `protoc` is needed on the building
//! machine, and keeps libgcc_s out of the program.

use std::path::PathBuf;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(["proto/image.proto", "proto/criu.proto"], ["proto"])?;
    prost_build::Config::new().compile_fds(descriptors)?;
    link_unwinder_statically()
}

/// The program is copied to bare machines and into containers, and has to run there with libc
/// alone. Rust's standard library asks the linker for the shared libgcc_s, for its unwinder. A
/// linker script of that name, found first, gives it the same code from gcc's static libraries.
fn link_unwinder_statically() -> Result<()> {
    if std::env::var("CARGO_CFG_TARGET_ENV").as_deref() != Ok("gnu") {
        return Ok(());
    }
    let directory = PathBuf::from(std::env::var("OUT_DIR")?).join("static-unwinder");
    std::fs::create_dir_all(&directory)?;
    std::fs::write(directory.join("libgcc_s.so"), "GROUP ( -lgcc_eh -lgcc )\n")?;
    println!("cargo:rustc-link-search=native={}", directory.display());
    Ok(())
}
