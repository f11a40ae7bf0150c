//! A guest of half a sector. It reports that it runs, waits for a byte on its serial port, and powers off or panics.
//!
//! A VM with [`super::vm::Builder::guest`] boots it with QEMU's own firmware.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::wait::DEADLINE;

/// 16-bit code, as the firmware starts it at 0x7c00. The ports are those of QEMU's PC machines: COM1 at 0x3f8, the ACPI
/// PM1a control register where SeaBIOS puts it, and the `pvpanic` device's.
#[rustfmt::skip]
const CODE: &[u8] = &[
    0xba, 0xf8, 0x03,       //      mov dx, 0x3f8
    0xb0, b'R',             //      mov al, 'R'
    0xee,                   //      out dx, al          reports that it runs
    0xba, 0xfd, 0x03,       //      mov dx, 0x3fd
    0xec,                   // 1:   in  al, dx
    0xa8, 0x01,             //      test al, 1          waits for a byte
    0x74, 0xfb,             //      jz  1b
    0xba, 0xf8, 0x03,       //      mov dx, 0x3f8
    0xec,                   //      in  al, dx          reads it
    0x3c, b'P',             //      cmp al, 'P'
    0x74, 0x08,             //      je  2f
    0xba, 0x05, 0x05,       //      mov dx, 0x505
    0xb0, 0x01,             //      mov al, 1
    0xee,                   //      out dx, al          panics
    0xeb, 0xfe,             //      jmp $
    0xba, 0x04, 0x06,       // 2:   mov dx, 0x604
    0xb8, 0x00, 0x20,       //      mov ax, 0x2000      SLP_EN, and type 0: off
    0xef,                   //      out dx, ax
    0xeb, 0xfe,             //      jmp $
];
/// The signature that the firmware requires at the end of the sector.
const SIGNATURE: [u8; 2] = [0x55, 0xaa];
const IMAGE: usize = 1 << 20;

/// The host's end of the serial port.
pub struct Guest(UnixStream);

/// Returns QEMU's arguments for the guest and creates its image in `dir`. The disk is read-only, so that it is not
/// backed up.
pub(super) fn arguments(dir: &Path) -> Vec<String> {
    let mut image = vec![0; IMAGE];
    image[..CODE.len()].copy_from_slice(CODE);
    image[510..512].copy_from_slice(&SIGNATURE);
    let path = dir.join("guest.raw");
    std::fs::write(&path, image).expect("the guest's image is written");
    let arguments = [
        "-drive".to_owned(),
        format!("if=none,id=guest,format=raw,readonly=on,file={}", path.display()),
        "-device".to_owned(),
        "virtio-blk-pci,drive=guest,bootindex=0".to_owned(),
        "-chardev".to_owned(),
        format!(
            "socket,id=guest-port,path={},server=on,wait=off",
            dir.join("port").display()
        ),
        "-serial".to_owned(),
        "chardev:guest-port".to_owned(),
        "-device".to_owned(),
        "pvpanic".to_owned(),
    ];
    arguments.into()
}

impl Guest {
    /// Connects to the serial port. Must be called before the VM runs: QEMU drops output without a listener.
    pub(super) fn connect(dir: &Path) -> Self {
        let port = UnixStream::connect(dir.join("port")).expect("the serial port accepts a connection");
        port.set_read_timeout(Some(DEADLINE))
            .expect("the port has a deadline");
        Self(port)
    }

    /// Waits until the guest has booted.
    #[track_caller]
    pub(super) fn wait_for_boot(&mut self) {
        let mut word = [0];
        self.0.read_exact(&mut word).expect("the guest boots");
        assert_eq!(&word, b"R", "the guest reports that it runs");
    }

    /// Makes the guest power the VM off.
    pub fn power_off(&mut self) {
        self.0.write_all(b"P").expect("the command reaches the guest");
    }

    /// Makes the guest panic.
    pub fn panic(&mut self) {
        self.0.write_all(b"C").expect("the command reaches the guest");
    }
}
