use std::process::ExitCode;

use criu_image_streamer::out_of_memory::OrExit;

#[global_allocator]
static ALLOCATOR: OrExit = OrExit;

fn main() -> ExitCode {
    match criu_image_streamer::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            criu_image_streamer::notice::tell_error(&error);
            criu_image_streamer::exit_status(&error)
        }
    }
}
