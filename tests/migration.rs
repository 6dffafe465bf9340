//! Live migration between two hosts: namespaces with a network cable between them, and an SSH
//! server on the one where the process goes to. Over there it runs on, with its memory as it was.

use std::process::Command;

use crate::criu::{Machine, machine};
use crate::readme::recipes;

/// Gives root another home and bash as its shell, in this machine's eyes. A mount on the real home
/// would hide what is in it, such as this checkout.
const HOME_OF_ITS_OWN: &str = r#"
mkdir -p -m 700 home/.ssh
sed "s|^\(root:.*\):[^:]*:[^:]*$|\1:$PWD/home:/bin/bash|" /etc/passwd >passwd
grep -q "^root:.*:$PWD/home:/bin/bash$" passwd
mount --bind passwd /etc/passwd
"#;

/// Two machines that can reach each other, the second by SSH under the name `there`.
struct Hosts {
    here: Machine,
    there: Machine,
}

impl Hosts {
    fn new() -> Option<Self> {
        let hosts = Self {
            here: machine()?,
            there: machine()?,
        };
        let cable = Command::new("ip")
            .args(["link", "add", "name", "cable", "netns", hosts.here.init()])
            .args(["type", "veth", "peer", "name", "cable", "netns"])
            .arg(hosts.there.init())
            .output()
            .expect("ip (Debian: iproute2)");
        assert!(
            cable.status.success(),
            "{}",
            String::from_utf8_lossy(&cable.stderr)
        );
        for (machine, address) in [(&hosts.here, "192.0.2.1"), (&hosts.there, "192.0.2.2")] {
            machine
                .run(&format!(
                    "ip address add {address}/24 dev cable && ip link set cable up"
                ))
                .success();
        }
        // The account's home is a directory of each machine's own, whatever is in the real one. It
        // may ask for nothing on a terminal.
        hosts
            .here
            .run(&format!(
                r#"
{HOME_OF_ITS_OWN}
ssh-keygen -q -t ed25519 -N '' -f home/.ssh/id
cat >home/.ssh/config <<END
Host there
    HostName 192.0.2.2
    Port 2222
    IdentityFile ~/.ssh/id
    StrictHostKeyChecking accept-new
END
"#
            ))
            .success();
        let key = String::from_utf8(hosts.here.read("home/.ssh/id.pub")).unwrap();
        hosts
            .there
            .run(&format!(
                r#"
{HOME_OF_ITS_OWN}
echo "export PATH='$PATH' CRIU_CONFIG_FILE='$CRIU_CONFIG_FILE'" >home/.bashrc
echo '{}' >home/.ssh/authorized_keys
dropbearkey -t ed25519 -f host-key
dropbear -E -s -p 192.0.2.2:2222 -r host-key -P dropbear.pid 2>dropbear.log
"#,
                key.trim()
            ))
            .success();
        hosts
            .here
            .run("until ssh there true; do sleep 0.1; done")
            .success();
        // A process keeps its PID, which must be free on the other host.
        hosts
            .here
            .run("echo 10000 >/proc/sys/kernel/ns_last_pid")
            .success();
        Some(hosts)
    }
}

/// CRIU is told when the connection breaks, and lets the process go on here; over there nothing is
/// restored. Then it migrates.
#[test]
fn a_process_migrates_to_another_host_as_the_readme_says() {
    const CUT: &str = r"ssh there 'head -c 3000000 >/dev/null; kill -KILL \$PPID'";
    let Some(hosts) = Hosts::new() else { return };
    let application = hosts.here.start("memory=64 threads=2 tree=1x2");
    let before = application.goes_on();
    let (_, blocks) = recipes("migration").remove(0);
    let broken = blocks[0].replace("ssh there '$arrive'", CUT);
    let said = application.run(&broken).failure().stderr();
    assert!(
        said.contains("criu-image-streamer Error: shard command "),
        "{said}"
    );
    application.goes_on_from(before);
    application.run(&blocks[0]).success();
    application.is_gone();
    application.goes_on_from(before);
    let pid = &application.pid;
    let script = format!("grep -q application /proc/{pid}/cmdline");
    hosts.there.run(&script).success();
}
