//! The README's recipes, with a real CRIU and the real tools: an application is checkpointed through the streamer, and
//! restored through it, and goes on as if nothing had happened.
//!
//! Each recipe stands here as it stands in the README. They need root; see tests/criu/mod.rs.

mod criu;

use criu::recipes::{CAPTURE, RESTORE, capture_safely};
use criu::{Application, Machine};

/// Checkpoints and restores an application, which must be gone in between and go on afterwards.
fn through_the_streamer(application: &Application<'_>) {
    let before = application.goes_on();
    application.run(CAPTURE).success();
    application.is_gone();
    application.run(RESTORE).success();
    application.goes_on_from(before);
}

#[test]
fn a_process_is_restored_from_a_compressed_file() {
    let Some(machine) = Machine::new() else {
        return;
    };
    through_the_streamer(&machine.start("memory=40 threads=3 ghost=$PWD/ghost file=$PWD/file"));
}

#[test]
fn a_restored_process_can_be_checkpointed_again() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40");
    through_the_streamer(&application);
    through_the_streamer(&application);
}

#[test]
fn a_tree_of_processes_with_threads_pipes_and_shared_memory_is_restored() {
    let Some(machine) = Machine::new() else {
        return;
    };
    through_the_streamer(&machine.start("tree=3x2 threads=3 memory=4"));
}

#[test]
fn a_process_with_a_gibibyte_of_memory_is_restored() {
    let Some(machine) = Machine::new() else {
        return;
    };
    through_the_streamer(&machine.start("memory=1024"));
}

#[test]
fn an_extracted_image_is_what_criu_itself_would_have_written() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=2x2");
    let before = application.goes_on();
    application.run(CAPTURE).success();
    application
        .run(
            "mkdir extracted
            lz4 -d <app.lz4 | criu-image-streamer --images-dir extracted extract",
        )
        .success();

    let inventory = image_entries(&machine.read("extracted/inventory.img"), &[0x5831_3116]);
    let img_version = varint_field(&inventory[0], 1);
    assert!((1..=2).contains(&img_version), "{img_version}");
    let tree = machine.read("extracted/pstree.img");
    let tree = image_entries(&tree, &[0x5456_4319, 0x5027_3030]);
    let pids: Vec<u64> = tree.iter().map(|entry| varint_field(entry, 1)).collect();
    assert_eq!(pids.len(), 7, "the root, two children, four grandchildren");
    assert_eq!(pids[0].to_string(), application.pid);

    application
        .run("criu restore --images-dir extracted --restore-detached")
        .success();
    application.goes_on_from(before);
}

#[test]
fn shards_go_through_a_compressor_each() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=64 threads=2");
    let before = application.goes_on();
    application
        .run(
            r#"
mkdir images && mkfifo ready
exec 10> >(lz4 >app-1.lz4); compressors=$!
exec 11> >(lz4 >app-2.lz4); compressors+=" $!"
exec 12> >(lz4 >app-3.lz4); compressors+=" $!"
criu-image-streamer --images-dir images --shard-fds 10,11,12 --progress-fd 3 capture 3>ready & streamer=$!
exec 10>&- 11>&- 12>&-
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID
for process in $streamer $compressors; do wait $process; done
rm ready
"#,
        )
        .success();
    for shard in ["app-1.lz4", "app-2.lz4", "app-3.lz4"] {
        let size = machine.read(shard).len();
        assert!(size > 4 << 20, "{shard} has only {size} bytes of 64 MiB");
    }
    application
        .run(
            r#"
mkfifo ready
exec 10< <(lz4 -d <app-1.lz4) 11< <(lz4 -d <app-2.lz4) 12< <(lz4 -d <app-3.lz4)
criu-image-streamer --images-dir images --shard-fds 10,11,12 --progress-fd 3 serve 3>ready & streamer=$!
exec 10<&- 11<&- 12<&-
grep -q -m1 socket-init ready
criu restore --stream --images-dir images --restore-detached
wait $streamer
"#,
        )
        .success();
    application.goes_on_from(before);
}

#[test]
fn a_file_system_travels_in_the_same_image() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40");
    let before = application.goes_on();
    machine
        .run("mkdir -p fs/deep/down && head -c 3000000 /dev/urandom >fs/deep/down/data && ln -s deep fs/link && : >fs/empty")
        .success();
    application
        .run(
            r#"
mkdir images && mkfifo ready archive
{ tar -C fs -cf - . | tee fs.tar >archive; } & tar=$!
{ criu-image-streamer --images-dir images --ext-file-fds fs.tar:4 --progress-fd 3 capture 3>ready 4<archive |
    lz4 >app.lz4; } & pipeline=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir images --tree $PID
wait $tar
wait $pipeline
rm ready archive
"#,
        )
        .success();
    application
        .run(
            r#"
mkdir restored && mkfifo ready archive
{ tee back.tar <archive | tar -C restored -xf -; } & tar=$!
{ lz4 -d <app.lz4 |
    criu-image-streamer --images-dir images --ext-file-fds fs.tar:4 --progress-fd 3 serve 3>ready 4>archive; } & pipeline=$!
grep -q -m1 socket-init ready
wait $tar
criu restore --stream --images-dir images --restore-detached
wait $pipeline
"#,
        )
        .success();
    application.goes_on_from(before);
    machine.run("diff -r fs restored").success();
    assert!(
        machine.read("fs.tar") == machine.read("back.tar"),
        "the archive changed on its way"
    );
}

#[test]
fn a_process_migrates_through_a_pipe() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=64 tree=1x2");
    let before = application.goes_on();
    application
        .run(
            r#"
mkdir here there && mkfifo ready arrived
{ criu-image-streamer --images-dir here --progress-fd 3 capture 3>ready |
    criu-image-streamer --images-dir there --progress-fd 3 serve 3>arrived; } & pipeline=$!
grep -q -m1 socket-init arrived & arrival=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir here --tree $PID
wait $arrival
criu restore --stream --images-dir there --restore-detached
wait $pipeline
"#,
        )
        .success();
    application.goes_on_from(before);
}

#[test]
fn a_process_migrates_through_ssh() {
    let Some(machine) = Machine::new() else {
        return;
    };
    // The other host is this one. Its account, in this mount namespace, has a home of the test's.
    machine
        .run(
            r#"
mkdir -p -m 700 home/.ssh
sed "s|^root:\(.*\):[^:]*:[^:]*$|root:\1:$PWD/home:/bin/bash|" /etc/passwd >passwd
mount --bind passwd /etc/passwd
echo "export PATH='$PATH'" >home/.bashrc
ssh-keygen -q -t ed25519 -N '' -f home/.ssh/id
cp home/.ssh/id.pub home/.ssh/authorized_keys
cat >home/.ssh/config <<END
Host there
    HostName 127.0.0.1
    Port 2222
    IdentityFile $PWD/home/.ssh/id
    StrictHostKeyChecking accept-new
END
dropbearkey -t ed25519 -f host-key
dropbear -E -s -p 127.0.0.1:2222 -r host-key -P dropbear.pid 2>dropbear.log
"#,
        )
        .success();
    machine
        .run("until ssh there true; do sleep 0.1; done")
        .success();
    let application = machine.start("memory=64 tree=1x2");
    let before = application.goes_on();
    application
        .run(
            r#"
mkdir here && mkfifo ready
cat >arrive <<'END'
mkdir there && mkfifo arrived
criu-image-streamer --images-dir there --progress-fd 3 serve 3>arrived <&0 & streamer=$!
grep -q -m1 socket-init arrived
criu restore --stream --images-dir there --restore-detached
wait $streamer
END
{ criu-image-streamer --images-dir here --progress-fd 3 capture 3>ready |
    ssh there "cd $PWD && bash -euo pipefail arrive"; } & pipeline=$!
grep -q -m1 socket-init ready
criu dump --stream --images-dir here --tree $PID
wait $pipeline
"#,
        )
        .success();
    application.goes_on_from(before);
}

#[test]
fn the_safe_way_ends_the_application_when_the_image_is_whole() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=1x2");
    let before = application.goes_on();
    application.run(&capture_safely("lz4")).success();
    application.is_gone();
    application.run(RESTORE).success();
    application.goes_on_from(before);
}

#[test]
fn the_safe_way_lets_the_application_go_on_when_a_compressor_fails_late() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=1x2");
    let before = application.goes_on();
    // CRIU and the streamer have succeeded by then: only the pipeline's status tells.
    application
        .run(&capture_safely("(lz4 && exit 3)"))
        .failure();
    application.goes_on_from(before);
}

#[test]
fn the_application_goes_on_when_a_compressor_dies_half_way() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("memory=40 tree=1x2");
    let before = application.goes_on();
    let ran = application
        .run(&capture_safely("head -c 5000000"))
        .failure();
    let said = ran.stderr();
    assert!(
        said.contains("criu-image-streamer Error: "),
        "{}",
        ran.describe()
    );
    application.goes_on_from(before);
}

#[test]
fn a_server_is_restored_to_another_port() {
    let Some(machine) = Machine::new() else {
        return;
    };
    let application = machine.start("listen=7000 memory=10");
    let before = application.goes_on();
    let ask = |port: u16| {
        application.run(&format!(
            "exec 5<>/dev/tcp/127.0.0.1/{port} && head -n 1 <&5"
        ))
    };
    let answer = ask(7000).success().stdout();
    assert!(answer.starts_with(&before.nonce.to_string()), "{answer}");

    application.run(CAPTURE).success();
    application
        .run(&RESTORE.replace(" serve ", " --tcp-listen-remap 7000:7001 serve "))
        .success();
    application.goes_on_from(before);
    let answer = ask(7001).success().stdout();
    assert!(answer.starts_with(&before.nonce.to_string()), "{answer}");
    ask(7000).failure();
}

/// The messages of a CRIU image file: one or two magic numbers, then each message behind its length.
fn image_entries(image: &[u8], magics: &[u32]) -> Vec<Vec<u8>> {
    let magics: Vec<u8> = magics
        .iter()
        .flat_map(|magic| magic.to_le_bytes())
        .collect();
    let mut rest = image.strip_prefix(&magics[..]).expect("the magics");
    let mut entries = Vec::new();
    while let Some((length, body)) = rest.split_first_chunk() {
        let (entry, behind) = body.split_at(u32::from_le_bytes(*length) as usize);
        entries.push(entry.to_vec());
        rest = behind;
    }
    assert_eq!(rest, b"", "the last message is whole");
    entries
}

/// A message's field that is a varint, among fields of any kind. Walks the message to its end, so that one which is no
/// protobuf is noticed.
fn varint_field(message: &[u8], wanted: u64) -> u64 {
    fn varint(rest: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let (byte, behind) = rest.split_first().expect("a varint that is whole");
            *rest = behind;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return value;
            }
        }
        panic!("a varint of more than 64 bits");
    }
    let mut rest = message;
    let mut found = None;
    while !rest.is_empty() {
        let key = varint(&mut rest);
        match key & 7 {
            0 => {
                let value = varint(&mut rest);
                found = found.or((key >> 3 == wanted).then_some(value));
            }
            1 => rest = &rest[8..],
            2 => {
                let length = varint(&mut rest) as usize;
                rest = &rest[length..];
            }
            5 => rest = &rest[4..],
            kind => panic!("no protobuf has a field of kind {kind}"),
        }
    }
    found.unwrap_or_else(|| panic!("no field {wanted}"))
}
