//! Devices outside QEMU's block layer, whose data no backup can hold, because QEMU neither reads nor writes it.
//!
//! Knows the devices of a VM by their types in QEMU's object model; not what a backup is.

use std::collections::HashMap;

use crate::model::Outside;

use crate::qmp::machine::ObjectPropertyInfo;

/// Devices that are looked at; a machine has fewer.
const MAX_DEVICES: usize = 4096;
const MAX_NAME: usize = 255;
/// Devices that are named; a manifest has room for them.
const MAX_OUTSIDE: usize = 256;

/// Types whose data another program has, or the guest writes to without QEMU. Each is the beginning of a type's name: what follows is
/// the bus that it is on, as in `vhost-user-blk-pci-non-transitional`.
const TYPES: [&str; 10] = [
    "vhost-user-blk",
    "vhost-user-scsi",
    "vhost-user-fs",
    "vhost-user-device",
    "vhost-scsi",
    "vhost-vdpa-device",
    "virtio-9p",
    "virtio-pmem",
    "nvdimm",
    "usb-mtp",
];

/// Disks that are in the block layer, but are written to by SCSI commands that it passes through as they are (SG_IO): a backup
/// would be of no single point in time, and no bitmap would record what is written.
const PASSED_THROUGH: [&str; 2] = ["scsi-block", "scsi-generic"];

/// The types of a machine's devices, by their paths in QEMU's object model.
pub(super) struct Devices(HashMap<String, String>);

impl Devices {
    /// `lists` are the replies about these paths.
    pub fn of<const N: usize>(lists: [(&str, Vec<ObjectPropertyInfo>); N]) -> Self {
        let devices = lists.into_iter().flat_map(|(path, properties)| {
            let device = move |property: ObjectPropertyInfo| {
                let kind = property
                    .kind
                    .strip_prefix("child<")?
                    .strip_suffix('>')?
                    .to_owned();
                Some((format!("{path}/{}", property.name), kind))
            };
            properties.into_iter().filter_map(device)
        });
        let short = |(path, kind): &(String, String)| path.len() <= MAX_NAME && kind.len() <= MAX_NAME;
        Self(devices.filter(short).take(MAX_DEVICES).collect())
    }

    /// Those that are not in the block layer, by name.
    pub fn outside(&self) -> Vec<Outside> {
        let outside = self.0.iter().filter(|(_, kind)| has_type(kind, &TYPES));
        let mut outside: Vec<Outside> = outside
            .map(|(path, kind)| Outside {
                name: name(path).to_owned(),
                kind: kind.clone(),
            })
            .filter(|device| is_text(&device.name) && is_text(&device.kind))
            .collect();
        outside.sort_by(|a, b| a.name.cmp(&b.name));
        outside.truncate(MAX_OUTSIDE);
        outside
    }

    /// The type of the disk of a drive, whose `qdev` this is, if its guest's commands are passed through.
    pub fn passed_through(&self, qdev: &str) -> Option<&'static str> {
        let path = match qdev.starts_with('/') {
            true => qdev.to_owned(),
            false => format!("{PERIPHERAL}/{qdev}"),
        };
        let kind = self.0.get(&path)?;
        PASSED_THROUGH.into_iter().find(|passed| kind == passed)
    }
}

/// Devices with an id, and those without.
pub(super) const PERIPHERAL: &str = "/machine/peripheral";
pub(super) const ANONYMOUS: &str = "/machine/peripheral-anon";

fn name(path: &str) -> &str {
    let id = path
        .strip_prefix(PERIPHERAL)
        .and_then(|rest| rest.strip_prefix('/'));
    id.unwrap_or(path)
}

fn is_text(text: &str) -> bool {
    !text.is_empty() && !text.contains(char::is_control)
}

fn has_type(kind: &str, types: &[&str]) -> bool {
    types.iter().any(|prefix| {
        let rest = kind.strip_prefix(prefix);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        let list = |list: &[(&str, &str)]| {
            let property = |(name, kind): &(&str, &str)| ObjectPropertyInfo {
                name: (*name).to_owned(),
                kind: (*kind).to_owned(),
            };
            list.iter().map(property).collect()
        };
        let named = list(&[
            ("type", "string"),
            ("vdb", "child<vhost-user-blk-pci>"),
            ("vda", "child<virtio-blk-pci>"),
            ("share", "child<vhost-user-fs-pci>"),
            ("net", "child<vhost-user-gpio-pci>"),
            ("sda", "child<scsi-block>"),
        ]);
        let anonymous = list(&[
            ("device[0]", "child<nvdimm>"),
            ("device[1]", "child<scsi-generic>"),
        ]);
        Devices::of([(PERIPHERAL, named), (ANONYMOUS, anonymous)])
    }

    #[test]
    fn devices_with_data_of_their_own_are_found_by_their_types() {
        let found = devices().outside();
        let found: Vec<(&str, &str)> = found
            .iter()
            .map(|device| (device.name.as_str(), device.kind.as_str()))
            .collect();
        assert_eq!(
            found,
            [
                ("/machine/peripheral-anon/device[0]", "nvdimm"),
                ("share", "vhost-user-fs-pci"),
                ("vdb", "vhost-user-blk-pci"),
            ]
        );
    }

    #[test]
    fn disks_whose_commands_are_passed_through_are_told_apart() {
        let devices = devices();
        assert_eq!(devices.passed_through("sda"), Some("scsi-block"));
        let anonymous = "/machine/peripheral-anon/device[1]";
        assert_eq!(devices.passed_through(anonymous), Some("scsi-generic"));
        assert_eq!(devices.passed_through("vda"), None);
        assert_eq!(devices.passed_through("nobody"), None);
    }
}
