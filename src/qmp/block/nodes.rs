//! Block nodes: `blockdev-add` and its options, `blockdev-del`.

use serde::Serialize;

use crate::qmp::Done;
use crate::qmp::command::command;

/// Adds a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct BlockdevAdd(pub BlockdevOptions);

command!(BlockdevAdd, "blockdev-add", Done);

/// Deletes a node, which closes its image.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevDel<'a> {
    pub node_name: &'a str,
}

command!(BlockdevDel<'_>, "blockdev-del", Done);

/// Sets the size of a node, in bytes.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockResize<'a> {
    pub node_name: &'a str,
    pub size: u64,
}

command!(BlockResize<'_>, "block_resize", Done);

/// Makes `node` the backing image of `overlay`.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct BlockdevSnapshot<'a> {
    pub node: &'a str,
    pub overlay: &'a str,
}

command!(BlockdevSnapshot<'_>, "blockdev-snapshot", Done);

/// Serves a node over NBD.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(tag = "type", rename = "nbd", rename_all = "kebab-case")]
pub struct BlockExportAdd<'a> {
    pub id: &'a str,
    pub node_name: &'a str,
    /// The export's name for clients.
    pub name: &'a str,
    pub writable: bool,
}

command!(BlockExportAdd<'_>, "block-export-add", Done);

/// The options of a node. QEMU's programs also take them as JSON on their command lines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct BlockdevOptions {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_name: Option<String>,
    #[serde(flatten)]
    pub driver: Driver,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<CacheOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub discard: Option<Discard>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detect_zeroes: Option<DetectZeroes>,
}

impl BlockdevOptions {
    /// Creates the options of a node with QEMU's defaults. A node inside another node's options has no name.
    pub fn new(node_name: Option<String>, driver: Driver) -> Self {
        Self {
            node_name,
            driver,
            read_only: None,
            cache: None,
            discard: None,
            detect_zeroes: None,
        }
    }

    pub fn named(node_name: impl Into<String>, driver: Driver) -> Self {
        Self::new(Some(node_name.into()), driver)
    }

    /// Returns the file name with which QEMU's programs open the node.
    pub fn filename(&self) -> String {
        let node = serde_json::to_string(self).expect("options are strings and numbers");
        format!("json:{node}")
    }
}

/// A node's driver, with its own options. Sizes and offsets are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "driver", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
pub enum Driver {
    File {
        filename: String,
    },
    #[serde(rename = "host_device")]
    HostDevice {
        filename: String,
    },
    NullCo {
        size: u64,
        #[serde(skip_serializing_if = "Option::is_none")]
        read_zeroes: Option<bool>,
    },
    Raw {
        file: BlockdevRef,
        #[serde(skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        #[serde(skip_serializing_if = "Option::is_none")]
        size: Option<u64>,
    },
    Qcow2 {
        file: BlockdevRef,
        /// Always sent, because without it QEMU opens the backing file that the image's header names.
        backing: Option<BlockdevRef>,
    },
}

/// A child node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum BlockdevRef {
    /// The name of an existing node.
    Reference(String),
    Definition(Box<BlockdevOptions>),
}

impl From<String> for BlockdevRef {
    fn from(node_name: String) -> Self {
        Self::Reference(node_name)
    }
}

impl From<BlockdevOptions> for BlockdevRef {
    fn from(node: BlockdevOptions) -> Self {
        Self::Definition(Box::new(node))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct CacheOptions {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct: Option<bool>,
    pub no_flush: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Discard {
    Ignore,
    Unmap,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DetectZeroes {
    Off,
    On,
    Unmap,
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json, to_value};

    fn sent(node: BlockdevOptions) -> Value {
        to_value(BlockdevAdd(node)).unwrap()
    }

    #[test]
    fn a_node_is_sent_with_the_options_that_are_set_and_no_others() {
        let slice = Driver::Raw {
            file: "below".to_owned().into(),
            offset: Some(65536),
            size: Some(512),
        };
        assert_eq!(
            sent(BlockdevOptions::named("slice", slice)),
            json!({ "driver": "raw", "node-name": "slice", "file": "below", "offset": 65536, "size": 512 })
        );
        let null = |read_zeroes| Driver::NullCo { size: 7, read_zeroes };
        assert_eq!(
            sent(BlockdevOptions::named("n", null(None))),
            json!({ "driver": "null-co", "node-name": "n", "size": 7 })
        );
        assert_eq!(
            sent(BlockdevOptions::named("n", null(Some(false)))),
            json!({ "driver": "null-co", "node-name": "n", "size": 7, "read-zeroes": false })
        );
        let device = BlockdevOptions {
            cache: Some(CacheOptions {
                direct: None,
                no_flush: true,
            }),
            discard: Some(Discard::Unmap),
            detect_zeroes: Some(DetectZeroes::Unmap),
            read_only: Some(true),
            ..BlockdevOptions::named(
                "d",
                Driver::HostDevice {
                    filename: "/dev/fdset/7".into(),
                },
            )
        };
        assert_eq!(
            sent(device),
            json!({
                "driver": "host_device", "node-name": "d", "filename": "/dev/fdset/7", "cache": { "no-flush": true },
                "discard": "unmap", "detect-zeroes": "unmap", "read-only": true,
            })
        );
    }

    #[test]
    fn a_qcow2_image_without_a_backing_image_is_sent_with_null() {
        let file = || {
            BlockdevOptions::new(
                None,
                Driver::File {
                    filename: "/dev/fd/9".into(),
                },
            )
        };
        let base = BlockdevOptions::new(
            None,
            Driver::Qcow2 {
                file: file().into(),
                backing: None,
            },
        );
        let file = json!({ "driver": "file", "filename": "/dev/fd/9" });
        let below = json!({ "driver": "qcow2", "file": file, "backing": null });
        assert_eq!(to_value(&base).unwrap(), below);
        let filename = base.filename();
        let read: Value = serde_json::from_str(filename.strip_prefix("json:").unwrap()).unwrap();
        assert_eq!(read, below);
        let top = Driver::Qcow2 {
            file: "top-file".to_owned().into(),
            backing: Some(base.into()),
        };
        assert_eq!(
            sent(BlockdevOptions::named("top", top)),
            json!({ "driver": "qcow2", "node-name": "top", "file": "top-file", "backing": below })
        );
    }
}
