//! The user namespace that this process is in.

/// Whether it is the initial one, which is the one that maps every user to itself; `None` where
/// there is no /proc.
pub(crate) fn is_initial() -> Option<bool> {
    let map = std::fs::read_to_string("/proc/self/uid_map").ok()?;
    Some(map.split_whitespace().eq(["0", "0", "4294967295"]))
}

/// The user that the kernel shows in place of one whom this namespace does not know.
pub(crate) fn unknown_user() -> u32 {
    const DEFAULT: u32 = 65_534;
    let number = std::fs::read_to_string("/proc/sys/kernel/overflowuid");
    number.map_or(DEFAULT, |number| number.trim().parse().unwrap_or(DEFAULT))
}
