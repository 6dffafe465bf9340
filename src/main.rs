use std::process::ExitCode;

fn main() -> ExitCode {
    match criu_image_streamer::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => criu_image_streamer::exit_status(failure).into(),
    }
}
