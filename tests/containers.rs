//! A container of runc's goes through the streamer as the README says. Everything happens in
//! namespaces and cgroups of its own, and nothing stays behind.

use std::path::Path;

use crate::criu::{Application, Machine, State};
use crate::from_memory::{self, measuring};
use crate::readme::recipes;

/// The application alone in a root file system, with its state on a bind mount and its standard
/// output in a pipe, as container engines have it. `runc spec` makes the root read-only, which CRIU
/// cannot restore.
const START: &str = r#"
cat /proc/self/mounts >mounts
chmod 755 .
mkdir -p bundle/rootfs/{data,dev,proc,sys} bundle/data
cp "$APPLICATION" bundle/rootfs/
runc spec --bundle bundle
jq --args '
    .root.readonly = false
    | .process.terminal = false
    | .process.args = ["/application", "/data/application.state"] + $ARGS.positional
    | .mounts += [{type: "bind", source: "data", destination: "/data", options: ["rbind"]}]
    | NAMESPACES' PARTS <bundle/config.json >config.json
mv config.json bundle/
chown -R "$(jq '.linux.uidMappings[0].hostID // 0' bundle/config.json)" bundle
runc run --detach --bundle bundle app </dev/null > >(exec cat >container.log) 2>&1
until [ -s bundle/data/application.state ]; do sleep 0.05; done
runc state app | jq .pid
"#;

/// What `runc spec` has: all namespaces but a user namespace.
const USUAL: &str = ".";

const WITH_USER_NAMESPACE: &str = r#"
    .linux.namespaces += [{type: "user"}]
    | .linux.uidMappings = [{containerID: 0, hostID: 100000, size: 65536}]
    | .linux.gidMappings = .linux.uidMappings
"#;

/// As podman and containerd make one: the network namespace is there before, and stays.
const WITH_NETWORK_NAMESPACE: &str = r#"
    .linux.namespaces |= map(if .type == "network" then .path = "/run/netns/app" else . end)
"#;

/// Ends the container; then no process is left but the machine's first and this script. A runc that
/// cannot remove a cgroup, because a thread is not quite dead, says so and succeeds.
const END: &str = r#"
runc kill app KILL
until grep -qx 'populated 0' /sys/fs/cgroup/app/cgroup.events; do sleep 0.05; done
until runc delete app; do sleep 0.05; done
diff mounts /proc/self/mounts
[ -z "$(ls /run/runc)" ]
others() {
    local process
    for process in /proc/[0-9]*; do
        [[ $process = /proc/1 || $process = /proc/$$ ]] || return 0
    done
    return 1
}
while others; do sleep 0.05; done
"#;

struct Container<'machine> {
    machine: &'machine Machine,
    application: Application<'machine>,
    before: State,
}

impl<'machine> Container<'machine> {
    fn start(machine: &'machine Machine, namespaces: &str, parts: &str) -> Self {
        let script = START
            .replace("NAMESPACES", namespaces)
            .replace("PARTS", parts);
        let pid = machine.run(&script).success().stdout();
        let application = machine.adopt(&pid, "bundle/data/application.state");
        let before = application.goes_on();
        Self {
            machine,
            application,
            before,
        }
    }

    /// It has come back from the image, with the standard output of the last script in place of the
    /// pipe that `descriptors.json` names.
    fn has_come_back(self) {
        self.application.goes_on_from(self.before);
        let script =
            "readlink /proc/$(runc state app | jq .pid)/fd/1; runc state app | jq -r .status";
        let said = self.machine.run(script).success().stdout();
        let (output, status) = said.trim().split_once('\n').expect("two lines");
        assert_eq!(status, "running");
        let directory = self.machine.path("");
        let output = Path::new(output)
            .strip_prefix(directory)
            .expect("a file in it");
        assert!(output.to_string_lossy().starts_with("script-"), "{said}");
    }
}

/// The container ends, and then the machine.
fn leaves_nothing_behind(machine: Machine) {
    machine.run(END).success();
    let left = machine.container_cgroups();
    assert!(left.is_empty(), "{left:?}");
    let directory = machine.path("");
    let cgroups = machine.cgroups();
    drop(machine);
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("read the mounts");
    assert!(!mounts.contains(&*directory.to_string_lossy()), "{mounts}");
    for path in [&directory, &cgroups, Path::new("/run/runc/app")] {
        assert!(!path.exists(), "{} is still there", path.display());
    }
}

/// The README's recipe of a kind: the application's parts, and the blocks.
fn recipe(kind: &str) -> (&'static str, Vec<String>) {
    let mut found = recipes(kind);
    assert_eq!(found.len(), 1, "recipes for a {kind}");
    found.remove(0)
}

#[test]
fn a_container_is_checkpointed_and_restored_as_the_readme_says() {
    let Some(machine) = Machine::for_containers() else {
        return;
    };
    let (parts, blocks) = recipe("container");
    let container = Container::start(&machine, USUAL, parts);
    for block in &blocks {
        container.application.run(block).success();
    }
    container.has_come_back();
    leaves_nothing_behind(machine);
}

#[test]
fn a_container_keeps_its_network_namespace() {
    const EXTERNAL: &str = r#"--external "net[$(stat -Lc %i /run/netns/app)]:extRootNetNS""#;
    let Some(machine) = Machine::for_containers() else {
        return;
    };
    machine.run("ip netns add app").success();
    let (parts, blocks) = recipe("container");
    let container = Container::start(&machine, WITH_NETWORK_NAMESPACE, parts);
    for block in &blocks {
        let block = block.replace(" --empty-ns network", "");
        let block = block.replace("--empty-ns net", EXTERNAL);
        container.application.run(&block).success();
    }
    container
        .application
        .run("[ /run/netns/app -ef /proc/$(runc state app | jq .pid)/ns/net ]")
        .success();
    container.has_come_back();
    leaves_nothing_behind(machine);
}

#[test]
fn a_container_is_restored_from_memory_that_it_gives_back() {
    let (_, checkpoint) = recipe("container");
    let (parts, restore) = recipe("checkpointed container");
    for namespaces in [USUAL, WITH_USER_NAMESPACE] {
        let Some(machine) = Machine::for_containers() else {
            return;
        };
        let container = Container::start(&machine, namespaces, parts);
        container.application.run(&checkpoint[0]).success();
        // The root of a user namespace must get at the image, as the README says.
        let restore = match namespaces {
            WITH_USER_NAMESPACE => restore[0].replace("mode=700", "mode=711"),
            _ => restore[0].clone(),
        };
        container.application.run(&measuring(&restore)).success();
        container.has_come_back();
        from_memory::was_given_back(&machine, parts);
        leaves_nothing_behind(machine);
    }
}
