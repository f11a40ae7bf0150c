//! Recognises libvirt's own sockets of a VM. QEMU serves one client at a time, so another client of such a socket locks
//! libvirt out.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// The longest command line that Linux allows, in bytes.
const MAX_COMMAND_LINE: u64 = 6 << 20;
/// The libvirt programs that listen on the monitor sockets and pass them to QEMU.
const DAEMONS: [&str; 2] = ["libvirtd", "virtqemud"];

/// Returns true if libvirt itself connects to that socket. These are a VM's monitor,
/// `.../libvirt/qemu/.../domain-1-web/monitor.sock`, and the guest agent's channel `org.qemu.guest_agent.0` below
/// libvirt's directories. Other sockets there are the administrator's, because security modules let QEMU create sockets
/// only there.
pub(super) fn is_one(path: &Path) -> bool {
    let names: Vec<&str> = path.iter().filter_map(|name| name.to_str()).collect();
    let Some((name, above)) = names.split_last() else {
        return false;
    };
    let below_libvirt = above.windows(2).any(|pair| pair == ["libvirt", "qemu"]);
    let of_domain = above
        .last()
        .is_some_and(|directory| is_domain_directory(directory));
    match *name {
        "monitor.sock" => below_libvirt || of_domain,
        "org.qemu.guest_agent.0" => below_libvirt,
        _ => false,
    }
}

/// The form is `domain-NUMBER-NAME`.
fn is_domain_directory(name: &str) -> bool {
    let rest = name.strip_prefix("domain-").and_then(|rest| rest.split_once('-'));
    rest.is_some_and(|(number, _)| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Returns true if the process that listens at `path` does so for libvirt. Blocks while that process holds its memory
/// map lock.
pub(super) fn is_behind(process: u32, path: &Path) -> bool {
    let name = std::fs::read_to_string(format!("/proc/{process}/comm"));
    if name.is_ok_and(|name| DAEMONS.contains(&name.trim_end())) {
        return true;
    }
    let mut line = Vec::new();
    let read = File::open(format!("/proc/{process}/cmdline"))
        .and_then(|file| file.take(MAX_COMMAND_LINE).read_to_end(&mut line));
    // A process that has ended or is hidden is not counted as libvirt's.
    read.is_ok() && is_monitor_of(&line, path)
}

/// Returns true if `path` is the monitor that libvirt gave to the QEMU with this command line. Each argument ends with
/// a zero byte.
fn is_monitor_of(command_line: &[u8], path: &Path) -> bool {
    let arguments: Vec<String> = command_line
        .split(|byte| *byte == 0)
        .map(|argument| String::from_utf8_lossy(argument).into_owned())
        .collect();
    let values = |option: &'static str| {
        let pairs = arguments.windows(2);
        let pairs = pairs.filter(move |pair| pair[0].trim_start_matches('-') == option);
        pairs.map(|pair| pair[1].split(',').collect::<Vec<_>>())
    };
    let monitored = values("mon").any(|value| value.contains(&"chardev=charmonitor"));
    let here = format!("path={}", path.display());
    let here = values("chardev").any(|value| value.contains(&"id=charmonitor") && value.contains(&&*here));
    monitored && here
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_of_libvirt_are_recognised_by_their_paths() {
        for path in [
            "/var/lib/libvirt/qemu/domain-1-web/monitor.sock",
            "/run/libvirt/qemu/3-web/monitor.sock",
            "/home/anna/.config/libvirt/qemu/lib/domain-12-my-vm/monitor.sock",
            "/srv/embedded/lib/domain-1-web/monitor.sock",
            "/run/libvirt/qemu/channel/1-web/org.qemu.guest_agent.0",
            "/var/lib/libvirt/qemu/channel/target/domain-1-web/org.qemu.guest_agent.0",
        ] {
            assert!(is_one(Path::new(path)), "{path}");
        }
        for path in [
            "/var/lib/libvirt/qemu/domain-1-web/backup.sock",
            "/var/lib/libvirt/qemu/channel/target/domain-1-web/org.example.agent",
            "/run/vm/monitor.sock",
            "/run/domain-web/monitor.sock",
            "/run/qemu/libvirt/monitor.sock",
            "/run/vm/org.qemu.guest_agent.0",
        ] {
            assert!(!is_one(Path::new(path)), "{path}");
        }
    }

    #[test]
    fn only_the_monitor_of_libvirt_is_recognised_in_a_command_line() {
        let line = |monitor: &str| {
            let own = "socket,id=own,path=/run/own.sock,server=on";
            let libvirts = "socket,id=charmonitor,path=/run/libvirts.sock,server=on,wait=off";
            let mon = format!("chardev={monitor},id=monitor,mode=control");
            [
                "qemu",
                "-name",
                "guest=web",
                "-chardev",
                own,
                "-chardev",
                libvirts,
                "-mon",
                &mon,
                "",
            ]
            .join("\0")
        };
        let is_libvirts = |line: String, path| is_monitor_of(line.as_bytes(), Path::new(path));
        assert!(is_libvirts(line("charmonitor"), "/run/libvirts.sock"));
        assert!(
            !is_libvirts(line("charmonitor"), "/run/own.sock"),
            "an additional monitor"
        );
        assert!(!is_libvirts(line("own"), "/run/libvirts.sock"));
    }
}
