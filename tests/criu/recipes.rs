//! Recipes that more than one test follows, much like the README's. They know the application's PID
//! as `$PID`, and CRIU gets `$DUMP_OPTIONS` and `$RESTORE_OPTIONS`.

/// Lists the processes of the machine besides its first one and this script's.
pub const OTHERS: &str = "ps -e -o pid=,ppid=,stat=,args= | awk -v me=$$ '$1 != 1 && $1 != me && $2 != me && $3 !~ /^Z/ && $4 !~ /^(ps|awk)$/'";

/// Checkpoint to a compressed file. The pipeline is in braces so that `wait` gets to know when any
/// part of it failed.
pub const CAPTURE: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
{ criu-image-streamer --images-dir images --progress-fd 3 capture 3>ready | lz4 >app.lz4; } & pipeline=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID ${DUMP_OPTIONS:-}
wait $pipeline
"#;

/// Restore from it.
pub const RESTORE: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
{ lz4 -d <app.lz4 | criu-image-streamer --images-dir images --progress-fd 3 serve 3>ready; } & pipeline=$!
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached ${RESTORE_OPTIONS:-}
wait $pipeline
"#;

/// The same restore, in which the application runs before its memory is there.
pub fn lazily(restore: &str) -> String {
    restore
        .replace(" serve ", " serve --lazy-pages ")
        .replace("restore --stream", "restore --stream --lazy-pages")
}

/// Extraction of an uncompressed `app.image`.
pub const EXTRACT: &str = "
rm -rf extracted; mkdir extracted
criu-image-streamer --images-dir extracted extract <app.image
";

/// Checkpoint to two shards and an index.
pub const CAPTURE_WITH_INDEX: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
criu-image-streamer --images-dir images --num-shards 2 --index --shard-cmd 'cat >app-{}' \
    --progress-fd 3 capture 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID ${DUMP_OPTIONS:-}
wait $streamer
"#;

/// Restore from them while they arrive.
pub const RESTORE_WITH_INDEX: &str = r#"
rm -rf images ready; mkdir images; mkfifo ready
criu-image-streamer --images-dir images --num-shards 2 --index --shard-cmd 'cat app-{}' \
    --progress-fd 3 serve 3>ready & streamer=$!
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached ${RESTORE_OPTIONS:-}
wait $streamer
"#;
