//! Devices outside QEMU's block layer. A backup cannot contain their data, because QEMU neither reads nor writes it.
//!
//! Knows the devices of a VM by their types in QEMU's object model; not backups.

use std::collections::HashMap;

use crate::model::Outside;

use crate::qmp::machine::ObjectPropertyInfo;

const MAX_NAME: usize = 255;
/// The most devices to report; a manifest has room for them.
const MAX_OUTSIDE: usize = 256;

/// Types whose data another program stores, or that the guest writes without QEMU. Each is the prefix of a type name;
/// the rest is the bus, as in `vhost-user-blk-pci-non-transitional`.
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

/// Disks in the block layer to which QEMU passes the guest's SCSI commands through (SG_IO). QEMU does not see the
/// writes, so a backup would not show one point in time, and no bitmap would record the writes.
const PASSED_THROUGH: [&str; 2] = ["scsi-block", "scsi-generic"];

/// The types of a VM's devices, by their paths in QEMU's object model.
pub(super) struct Devices(HashMap<String, String>);

impl Devices {
    /// `lists` has each path and the reply for it.
    pub fn of<const N: usize>(lists: [(&str, impl IntoIterator<Item = ObjectPropertyInfo>); N]) -> Self {
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
        Self(devices.filter(short).collect())
    }

    /// Returns the devices outside the block layer, sorted by name.
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

    /// Returns the type of the device `qdev` if QEMU passes the guest's commands through.
    pub fn passed_through(&self, qdev: &str) -> Option<&'static str> {
        let path = match qdev.starts_with('/') {
            true => qdev.to_owned(),
            false => format!("{PERIPHERAL}/{qdev}"),
        };
        let kind = self.0.get(&path)?;
        PASSED_THROUGH.into_iter().find(|passed| kind == passed)
    }
}

/// The paths of devices with an id, and of devices without.
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
            list.iter().map(property).collect::<Vec<_>>()
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
    fn devices_outside_the_block_layer_are_found_by_their_types() {
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
    fn disks_with_passed_through_commands_are_recognised() {
        let devices = devices();
        assert_eq!(devices.passed_through("sda"), Some("scsi-block"));
        let anonymous = "/machine/peripheral-anon/device[1]";
        assert_eq!(devices.passed_through(anonymous), Some("scsi-generic"));
        assert_eq!(devices.passed_through("vda"), None);
        assert_eq!(devices.passed_through("nobody"), None);
    }
}
