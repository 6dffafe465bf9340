//! The README's object store recipe, with the real AWS command line and a real S3 server (moto's,
//! on loopback): four shards, compressed and encrypted. An upload or download that breaks off half
//! way is a failure with a reason.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::image::Files;
use crate::common::streamer::{Launch, Streamer};
use crate::common::{HANG_TIMEOUT, random, runs, skip};
use crate::criu::Machine;
use crate::readme::recipes;
use tempfile::TempDir;

/// The recipe: the command for each shard, up and down. `compress` is lz4 or zstd.
const UPLOAD: &str = "COMPRESS | openssl enc -aes-256-ctr -pbkdf2 -pass file:key | aws s3 cp - s3://checkpoints/app/{}.COMPRESS.enc";
const DOWNLOAD: &str = "aws s3 cp s3://checkpoints/app/{}.COMPRESS.enc - | openssl enc -d -aes-256-ctr -pbkdf2 -pass file:key | COMPRESS -d";

const SHARDS: usize = 4;

/// The directory of the programs, or why there are none. Where `CI` is `true` there must be.
fn tools() -> Option<String> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let bring = |script: &str, arguments: &[&str]| {
        let output = Command::new(source.join(script))
            .args(arguments)
            .env("S3_HOME", home.join("s3"))
            .output()
            .map_err(|why| format!("{script}: {why}"))?;
        match output.status.success() {
            true => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    };
    let brought = bring("tests/criu/install-packages", &["lz4", "zstd", "openssl"])
        .and_then(|_| bring("tests/s3/set-up", &[]));
    match brought {
        Ok(tools) => Some(tools),
        Err(why) => {
            skip(&why);
            None
        }
    }
}

/// An S3 server with the bucket `checkpoints`, and a directory with the key in which the commands
/// run.
struct Store {
    tools: String,
    server: Child,
    port: u16,
    dir: TempDir,
}

impl Store {
    fn open() -> Option<Self> {
        let tools = tools()?;
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("key"), "a secret\n").unwrap();
        // Free a moment ago; the server takes no socket from us, nor does it tell which it took.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let log = fs::File::create(dir.path().join("server.log")).unwrap();
        let server = Command::new(Path::new(&tools).join("moto_server"))
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let store = Self {
            tools,
            server,
            port,
            dir,
        };
        let deadline = Instant::now() + HANG_TIMEOUT;
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(
                Instant::now() < deadline,
                "the server did not start: {}",
                fs::read_to_string(store.dir.path().join("server.log")).unwrap()
            );
            thread::sleep(Duration::from_millis(20));
        }
        store.aws(&["s3", "mb", "s3://checkpoints"]);
        Some(store)
    }

    fn environment(&self, port: u16) -> Vec<(&'static str, String)> {
        let path = std::env::var("PATH").unwrap_or_default();
        let nowhere = self.dir.path().join("nowhere").display().to_string();
        vec![
            ("PATH", format!("{}:{path}", self.tools)),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
            ("AWS_DEFAULT_REGION", "us-east-1".into()),
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}")),
            ("AWS_MAX_ATTEMPTS", "1".into()),
            ("AWS_CONFIG_FILE", nowhere.clone()),
            ("AWS_SHARED_CREDENTIALS_FILE", nowhere),
            ("AWS_EC2_METADATA_DISABLED", "true".into()),
            ("no_proxy", "127.0.0.1".into()),
        ]
    }

    fn aws(&self, arguments: &[&str]) -> String {
        let output = Command::new(Path::new(&self.tools).join("aws"))
            .args(arguments)
            .envs(self.environment(self.port))
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "aws {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A streamer with the recipe's commands, which reach the store through `port`.
    fn launch(&self, launch: Launch, port: u16, recipe: &str, compress: &str) -> Launch {
        let command = format!(
            "cd '{}' && {}",
            self.dir.path().display(),
            recipe.replace("COMPRESS", compress)
        );
        let launch = launch
            .args(["--num-shards".to_owned(), SHARDS.to_string()])
            .args(["--shard-cmd", &command]);
        self.environment(port)
            .into_iter()
            .fold(launch, |launch, (name, value)| launch.env(name, &value))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ended_already = self.server.kill();
        let _nothing_to_tell = self.server.wait();
    }
}

/// A way to the store that breaks for good when one direction has carried its bytes.
struct Line {
    port: u16,
}

#[derive(Clone)]
struct Budget {
    up: Arc<AtomicI64>,
    down: Arc<AtomicI64>,
}

impl Line {
    fn breaks_after(store: &Store, up: i64, down: i64) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = store.port;
        let budget = Budget {
            up: Arc::new(AtomicI64::new(up)),
            down: Arc::new(AtomicI64::new(down)),
        };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", target)) else {
                    return;
                };
                if budget.up.load(Ordering::SeqCst) <= 0 || budget.down.load(Ordering::SeqCst) <= 0
                {
                    continue;
                }
                let (client2, server2) = (client.try_clone().unwrap(), server.try_clone().unwrap());
                let (up, down) = (Arc::clone(&budget.up), Arc::clone(&budget.down));
                thread::spawn(move || forward(client, server, &up));
                thread::spawn(move || forward(server2, client2, &down));
            }
        });
        Self { port }
    }
}

fn forward(mut from: TcpStream, mut to: TcpStream, budget: &AtomicI64) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        let left = budget.fetch_sub(length as i64, Ordering::SeqCst) - length as i64;
        if left <= 0 || to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _closed_already = from.shutdown(Shutdown::Both);
    let _closed_already = to.shutdown(Shutdown::Both);
}

/// What does not compress, large enough that each shard is uploaded in several parts (of 8 MiB).
fn files() -> Files {
    Files::from([
        ("pages-1.img".to_owned(), random::bytes(1, 48 << 20)),
        ("inventory.img".to_owned(), random::bytes(2, 50)),
    ])
}

fn upload(store: &Store, files: &Files, compress: &str) {
    let mut streamer = store
        .launch(Streamer::capture(), store.port, UPLOAD, compress)
        .start();
    runs::send(&streamer, files);
    streamer.expect_success();
}

fn through_the_store(compress: &str) {
    let Some(store) = Store::open() else { return };
    let files = files();
    upload(&store, &files, compress);
    let listed = store.aws(&["s3", "ls", "s3://checkpoints/app/"]);
    for shard in 1..=SHARDS {
        let object = format!("{shard}.{compress}.enc");
        assert!(listed.contains(&object), "{object} is not in {listed}");
    }

    let launch = store.launch(Streamer::serve(), store.port, DOWNLOAD, compress);
    let mut streamer = launch.start();
    runs::assert_served(&mut streamer, &files);
}

#[test]
fn an_image_goes_through_lz4_and_openssl_to_an_object_store_and_back() {
    through_the_store("lz4");
}

#[test]
fn an_image_goes_through_zstd_and_openssl_to_an_object_store_and_back() {
    through_the_store("zstd");
}

#[test]
fn an_upload_that_fails_half_way_fails_the_capture() {
    let Some(store) = Store::open() else { return };
    let line = Line::breaks_after(&store, 20 << 20, i64::MAX);
    let mut streamer = store
        .launch(Streamer::capture(), line.port, UPLOAD, "lz4")
        .start();
    runs::send(&streamer, &files());
    let exit = streamer.expect_failure(&["shard command", "aws s3 cp"]);
    assert!(
        exit.progress.iter().all(|line| !line.starts_with('{')),
        "{:?}",
        exit.progress
    );
}

#[test]
fn a_download_that_fails_half_way_is_not_served() {
    let Some(store) = Store::open() else { return };
    upload(&store, &files(), "lz4");
    let line = Line::breaks_after(&store, i64::MAX, 20 << 20);
    let exit = store
        .launch(Streamer::serve(), line.port, DOWNLOAD, "lz4")
        .run();
    exit.expect_failure(&["shard command", "aws s3 cp"]);
    assert_eq!(exit.progress, [""; 0], "no statistics, no socket-init");
}

#[test]
fn an_object_that_is_not_there_is_named_by_its_command() {
    let Some(store) = Store::open() else { return };
    upload(&store, &files(), "lz4");
    store.aws(&["s3", "rm", "s3://checkpoints/app/3.lz4.enc"]);
    let images = TempDir::new().unwrap();
    let launch = Streamer::extract().images_dir(images.path());
    let exit = store.launch(launch, store.port, DOWNLOAD, "lz4").run();
    exit.expect_failure(&["shard command 3", "exit status"]);
    assert_eq!(fs::read_dir(images.path()).unwrap().count(), 0);
}

/// The README's blocks, as they stand there, with a real CRIU.
#[test]
fn a_process_goes_to_an_object_store_and_back_as_the_readme_says() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let Some(tools) = tools() else { return };
    let application = machine.start("memory=64 threads=2 tree=1x2");
    let before = application.goes_on();
    // The recipe presumes an account with a bucket.
    let account = format!(
        r#"
export PATH="$PATH:{tools}" BUCKET=checkpoints
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
export AWS_ENDPOINT_URL=http://127.0.0.1:5000 AWS_EC2_METADATA_DISABLED=true no_proxy=127.0.0.1
"#
    );
    machine
        .run(&format!(
            r#"{account}
moto_server --host 127.0.0.1 --port 5000 &>moto.log &
until aws s3 mb s3://$BUCKET; do sleep 0.2; done"#
        ))
        .success();
    let (_, blocks) = recipes("s3").remove(0);
    let [capture, restore] = &blocks[..] else {
        panic!("two blocks expected: {blocks:?}")
    };
    application.run(&format!("{account}{capture}")).success();
    application.is_gone();
    application.run(&format!("{account}{restore}")).success();
    application.goes_on_from(before);
}
