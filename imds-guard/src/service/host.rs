//! Which host this is.

use std::fs;

use crate::record::Host;

/// Where the firmware of instances on Nitro has the instance's id (EC2 User Guide, "Detect whether a host is
/// an EC2 instance").
const ASSET_TAG: &str = "/sys/devices/virtual/dmi/id/board_asset_tag";

/// This one.
pub fn this() -> Host {
    let name = nix::unistd::gethostname().map_or_else(
        |_| "unknown".into(),
        |name| name.to_string_lossy().into_owned(),
    );
    let tag = fs::read_to_string(ASSET_TAG).unwrap_or_default();
    Host {
        name,
        instance: instance(&tag),
    }
}

/// The id of an instance, if that is what it is: elsewhere it is a serial number, or nothing.
fn instance(tag: &str) -> Option<String> {
    let tag = tag.trim();
    let number = tag.strip_prefix("i-")?;
    let is_id = (8..=17).contains(&number.len()) && number.bytes().all(|it| it.is_ascii_hexdigit());
    is_id.then(|| tag.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_asset_tag_may_be_an_instance() {
        let table = [
            ("i-0123456789abcdef0\n", Some("i-0123456789abcdef0")),
            ("i-12345678\n", Some("i-12345678")),
            ("Not Specified\n", None),
            ("i-\u{1b}[31m", None),
            ("", None),
        ];
        for (tag, expected) in table {
            assert_eq!(instance(tag).as_deref(), expected, "{tag:?}");
        }
    }
}
