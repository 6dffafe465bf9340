//! `extract` into memory, and `criu restore --auto-dedup`: CRIU gives back each page of the image
//! as it restores it, and restores what it cannot restore from a stream.

use crate::common::skip;
use crate::criu::huge_pages::HugePages;
use crate::criu::{Application, Machine, machine};
use crate::readme::recipes;

/// Has a recipe write down the KiB that the image takes, before and after the restore.
pub fn measuring(recipe: &str) -> String {
    const MEASURE: &str = "df --output=used --block-size=1K extracted | tail -n 1";
    let mut script = String::new();
    for line in recipe.lines() {
        if line.contains(" restore ") {
            script += &format!("{MEASURE} >before\n");
        } else if line == "umount extracted" {
            script += &format!("{MEASURE} >after\n");
        }
        script += &format!("{line}\n");
    }
    script
}

/// The image held all of the application's memory, and now it holds next to none.
#[track_caller]
pub fn was_given_back(machine: &Machine, parts: &str) {
    let mib = parts
        .split(' ')
        .find_map(|part| part.split_once("memory="))
        .expect("an application with memory");
    let mib: u64 = mib.1.parse().expect("a number of MiB");
    let [before, after] = ["before", "after"].map(|name| {
        let text = String::from_utf8(machine.read(name)).expect("a number");
        text.trim().parse::<u64>().expect("a number of KiB")
    });
    assert!(before >= mib << 10, "{before} KiB before the restore");
    assert!(after <= 2 << 10, "{before} KiB before, {after} KiB after");
}

/// Checkpoints and restores as the README says.
fn goes_through(application: &Application<'_>) {
    let mut recipes = recipes("application");
    recipes.retain(|(_, blocks)| blocks.concat().contains("--auto-dedup"));
    let (_, blocks) = recipes.pop().expect("a recipe");
    let before = application.goes_on();
    for block in blocks {
        application.run(&measuring(&block)).success();
    }
    application.goes_on_from(before);
}

#[test]
fn nftables_rules_come_back() {
    const PARTS: &str = "memory=64";
    const RULES: &str = "nsenter --target $PID --net nft list table inet filter";
    let Some(machine) = machine() else { return };
    let application = machine.start_in("unshare --net", PARTS);
    application
        .run(
            r#"
nsenter --target $PID --net nft -f - <<'END'
add table inet filter
add chain inet filter input { type filter hook input priority 0; policy accept; }
add rule inet filter input tcp dport 1000-1200 drop
END
"#,
        )
        .success();
    let rules = application.run(RULES).success().stdout();
    assert!(rules.contains("1000-1200"), "{rules}");
    goes_through(&application);
    was_given_back(&machine, PARTS);
    assert_eq!(application.run(RULES).success().stdout(), rules);
}

#[test]
fn private_huge_pages_come_back() {
    const PARTS: &str = "memory=40 private-hugetlb=16";
    let Some(machine) = machine() else { return };
    let Some(huge_pages) = HugePages::reserve(32) else {
        return skip("the machine does not give huge pages");
    };
    let application = machine.start(PARTS);
    goes_through(&application);
    was_given_back(&machine, PARTS);
    drop(huge_pages);
}
