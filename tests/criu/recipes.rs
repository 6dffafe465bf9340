//! The README's recipes that more than one test follows. They know the application's PID as `$PID`.

/// Checkpoint to a compressed file. The pipeline is in braces so that `wait` gets to know when any part of it failed.
pub const CAPTURE: &str = r#"
mkdir -p images && mkfifo ready
{ criu-image-streamer --images-dir images --progress-fd 3 capture 3>ready | lz4 >app.lz4; } & pipeline=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID
wait $pipeline
rm ready
"#;

/// Restore from it.
pub const RESTORE: &str = r#"
mkdir -p images && mkfifo ready
{ lz4 -d <app.lz4 | criu-image-streamer --images-dir images --progress-fd 3 serve 3>ready; } & pipeline=$!
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached
wait $pipeline
rm ready
"#;

/// The safe way: the application is only stopped until the image is known to be whole. `compress` is the reader of
/// the shard.
pub fn capture_safely(compress: &str) -> String {
    format!(
        r#"
mkdir images && mkfifo ready
{{ criu-image-streamer --images-dir images --progress-fd 3 capture 3>ready | {compress} >app.lz4; }} & pipeline=$!
grep -q -m1 socket-init ready
if criu dump --stream --images-dir images --tree $PID --leave-stopped && wait $pipeline; then
    kill -KILL -- -$PID
else
    kill -CONT -- -$PID
    exit 1
fi
rm ready
"#
    )
}
