//! The README's object store recipe, with a real CRIU, the real AWS command line and a real S3
//! server (moto's, on loopback). An upload or download that breaks off half way is a failure.

use std::path::Path;
use std::process::Command;

use crate::common::skip;
use crate::criu::{Machine, machine};
use crate::readme::recipes;

/// An account with a bucket, as the recipe presumes.
const ACCOUNT: &str = r#"
export PATH="$PATH:TOOLS" BUCKET=checkpoints AWS_MAX_ATTEMPTS=1 AWS_ENDPOINT_URL=http://127.0.0.1:5000
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true no_proxy=127.0.0.1
"#;

const START: &str = r#"
moto_server --host 127.0.0.1 --port 5000 &>moto.log &
until aws s3 mb s3://$BUCKET; do sleep 0.2; done
"#;

/// A line to the server that breaks for good when it has carried 20 MB.
const BREAKING_LINE: &str = r#"
cat >line.py <<'END'
import socket, threading
left = 20_000_000
def forward(source, to):
    global left
    try:
        while left > 0 and (data := source.recv(1 << 16)):
            left -= len(data)
            to.sendall(data)
        source.shutdown(socket.SHUT_RDWR)
        to.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
while True:
    client = listener.accept()[0]
    server = socket.create_connection(("127.0.0.1", 5000))
    for ends in (client, server), (server, client):
        threading.Thread(target=forward, args=ends, daemon=True).start()
END
python3 line.py >port 2>line.log &
until [ -s port ]; do sleep 0.1; done
export AWS_ENDPOINT_URL=http://127.0.0.1:$(cat port)
"#;

/// The recipe's two blocks, each behind what makes it an account's; `None` where there is no
/// machine, or no server.
fn with_a_store() -> Option<(Machine, [String; 2])> {
    let machine = machine()?;
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let found = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/s3/set-up"))
        .env("S3_HOME", home.join("s3"))
        .output()
        .expect("tests/s3/set-up");
    if !found.status.success() {
        skip(&String::from_utf8_lossy(&found.stderr));
        return None;
    }
    let tools = String::from_utf8_lossy(&found.stdout);
    let account = ACCOUNT.replace("TOOLS", tools.trim());
    machine.run(&format!("{account}{START}")).success();
    let (_, blocks) = recipes("s3").remove(0);
    let blocks = <[String; 2]>::try_from(blocks).expect("a capture and a restore");
    Some((machine, blocks.map(|block| format!("{account}{block}"))))
}

#[test]
fn a_process_goes_to_an_object_store_and_back_as_the_readme_says() {
    let Some((machine, [capture, restore])) = with_a_store() else {
        return;
    };
    let application = machine.start("memory=64 threads=2 tree=1x2");
    let before = application.goes_on();
    application.run(&capture).success();
    application.is_gone();
    application.run(&restore).success();
    application.goes_on_from(before);
}

/// Encrypted, as the README says how.
#[test]
fn a_transfer_that_breaks_off_half_way_fails_and_harms_nothing() {
    const KEY: &str = "-aes-256-ctr -pbkdf2 -pass file:key";
    let Some((machine, [capture, restore])) = with_a_store() else {
        return;
    };
    let capture = capture.replace("lz4 |", &format!("lz4 | openssl enc {KEY} |"));
    let restore = restore.replace("| lz4", &format!("| openssl enc -d {KEY} | lz4"));
    assert!(
        capture.contains(KEY) && restore.contains(KEY),
        "{capture}{restore}"
    );
    machine.run("echo a secret >key").success();
    let application = machine.start("memory=64 threads=2 tree=1x2");
    let breaks_off = |block: &str| {
        let cut = format!("{BREAKING_LINE}criu-image-streamer -D");
        let block = block.replacen("criu-image-streamer -D", &cut, 1);
        let said = application.run(&block).failure().stderr();
        let named = said.contains("criu-image-streamer Error: shard command ");
        assert!(named && said.contains("aws s3 cp"), "{said}");
    };
    let before = application.goes_on();
    breaks_off(&capture.replace("-t $PID", "-t $PID --leave-stopped"));
    application.run("kill -CONT -- -$PID").success();
    application.goes_on_from(before);
    application.run(&capture).success();
    application.is_gone();
    breaks_off(&restore);
    application.is_gone();
    application.run(&restore).success();
    application.goes_on_from(before);
}
