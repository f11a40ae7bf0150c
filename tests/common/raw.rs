//! A D-Bus client that sends messages that no library would: handmade bytes, with descriptors that the body does not
//! refer to, or refers to too often (D-Bus specification, "Message Protocol").

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use backupd::names::BUS_NAME;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

use super::System;
use super::caller::socket_as;
use super::wait;

/// Values in the order and with the padding of a message, little-endian.
#[derive(Default)]
pub struct Body(Vec<u8>);

impl Body {
    pub fn align(mut self, to: usize) -> Self {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
        self
    }

    pub fn number(mut self, value: u32) -> Self {
        self = self.align(4);
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn string(mut self, text: &str) -> Self {
        self = self.number(text.len() as u32);
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    /// Appends a variant with an array of descriptors (`ah`), all of them the first descriptor of the message.
    pub fn descriptors(mut self, count: u32) -> Self {
        self = self.signature("ah").number(4 * count);
        self.0.resize(self.0.len() + 4 * count as usize, 0);
        self
    }

    /// Appends the same descriptors, each in its own variant (`av`).
    pub fn descriptors_in_variants(mut self, count: u32) -> Self {
        self = self.signature("av").number(8 * count);
        for _ in 0..count {
            self = self.signature("h").number(0);
        }
        self
    }

    /// Appends a dictionary (`a{sv}`) with this single entry, whose padding counts from its own start.
    pub fn dictionary(mut self, entry: Self) -> Self {
        self = self.number(entry.0.len() as u32).align(8);
        self.0.extend(entry.0);
        self
    }

    fn signature(mut self, text: &str) -> Self {
        self.0.push(text.len() as u8);
        self.0.extend(text.as_bytes());
        self.0.push(0);
        self
    }

    /// Appends a header field with its code.
    fn field(mut self, code: u8, signature: &str, value: impl FnOnce(Self) -> Self) -> Self {
        self = self.align(8);
        self.0.push(code);
        value(self.signature(signature))
    }
}

/// The called object and method.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    pub path: &'a str,
    pub interface: &'a str,
    pub member: &'a str,
}

pub struct Client {
    stream: UnixStream,
    serial: u32,
    received: Vec<u8>,
}

impl Client {
    /// Connects an ordinary user with support for descriptors.
    pub fn connect(system: &System, uid: u32) -> Self {
        let mut stream = socket_as(system, uid);
        stream
            .set_read_timeout(Some(Duration::from_millis(50)))
            .expect("a timeout can be set");
        let user: String = uid
            .to_string()
            .bytes()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let hello = format!("\0AUTH EXTERNAL {user}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n");
        stream.write_all(hello.as_bytes()).expect("the bus reads");
        let mut client = Self {
            stream,
            serial: 0,
            received: Vec::new(),
        };
        let bus = Target {
            path: "/org/freedesktop/DBus",
            interface: "org.freedesktop.DBus",
            member: "Hello",
        };
        client.call("org.freedesktop.DBus", bus, "", Body::default(), &[]);
        client.wait_for("AGREE_UNIX_FD");
        client.wait_for("NameAcquired");
        client
    }

    /// Sends a call to the service and does not wait.
    pub fn send(&mut self, target: Target, signature: &str, body: Body, descriptors: &[BorrowedFd]) {
        self.call(BUS_NAME, target, signature, body, descriptors);
    }

    fn call(&mut self, to: &str, target: Target, signature: &str, body: Body, descriptors: &[BorrowedFd]) {
        self.serial += 1;
        let mut fields = Body::default()
            .field(1, "o", |it| it.string(target.path))
            .field(2, "s", |it| it.string(target.interface))
            .field(3, "s", |it| it.string(target.member))
            .field(6, "s", |it| it.string(to));
        if !signature.is_empty() {
            fields = fields.field(8, "g", |it| it.signature(signature));
        }
        if !descriptors.is_empty() {
            fields = fields.field(9, "u", |it| it.number(descriptors.len() as u32));
        }
        // A method call (1) without flags, protocol version 1.
        let mut message = Body(b"l\x01\x00\x01".to_vec())
            .number(body.0.len() as u32)
            .number(self.serial)
            .number(fields.0.len() as u32);
        message.0.extend(fields.0);
        message = message.align(8);
        message.0.extend(body.0);
        self.write(&message.0, descriptors);
    }

    fn write(&mut self, bytes: &[u8], descriptors: &[BorrowedFd]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
        }
        let bytes_sent = rustix::net::sendmsg(
            &self.stream,
            &[IoSlice::new(bytes)],
            &mut control,
            SendFlags::NOSIGNAL,
        );
        let rest = &bytes[bytes_sent.expect("the bus reads")..];
        self.stream.write_all(rest).expect("the bus reads");
    }

    /// Waits until the bus has sent these bytes since the last call.
    #[track_caller]
    pub fn wait_for(&mut self, word: &str) {
        let end = wait::until(&format!("the bus to send {word:?}"), || {
            let place = |bytes: &[u8]| bytes.windows(word.len()).position(|part| part == word.as_bytes());
            if place(&self.received).is_none() {
                let mut buffer = [0; 65536];
                // An error means no data yet.
                let count = self.stream.read(&mut buffer).unwrap_or(0);
                self.received.extend(&buffer[..count]);
            }
            place(&self.received)
        });
        self.received.drain(..end + word.len());
    }
}
