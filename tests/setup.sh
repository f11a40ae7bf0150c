#!/bin/sh
# Installs missing dependencies for building and testing the project on Debian 12 or 13 as root, and prints each step.
# It is quick and silent if nothing is missing.
#
#   setup.sh            for building and for the tests
#   setup.sh lint       and for the checks of 'make lint'
#   setup.sh package    and for making the Debian package
#   setup.sh system     and for booting a system with it
#
# It checks for programs and files and not for packages, so other systems with different package names pass too.
set -eu

readonly what=${1:-}
# The packages for the Linux of tests/freeze/guest.rs and tests/power_cuts.rs. They are unpacked and not installed.
readonly guest=${XDG_CACHE_HOME:-/var/cache}/backupd-test-guest
missing=
need() { # PACKAGE DESCRIPTION: something of this package is missing
    case " $missing " in
    *" $1 "*) ;;
    *) missing="$missing $1" ;;
    esac
    echo "missing: $2 ($1)"
}
program() { # PROGRAM PACKAGE; the system's directories count even where an ordinary user's PATH lacks them
    PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null 2>&1 || need "$2" "$1"
}

look() {
    missing=
    program cc gcc
    program strip binutils
    [ -e /usr/include/stdlib.h ] || need libc6-dev "the C library's headers"
    program pkg-config pkg-config
    if command -v pkg-config >/dev/null 2>&1; then
        pkg-config --exists polkit-gobject-1 || need libpolkit-gobject-1-dev "polkit's client library"
    else
        need libpolkit-gobject-1-dev "polkit's client library"
    fi
    [ -n "${QEMU:-}" ] || program qemu-system-x86_64 qemu-system-x86
    program qemu-img qemu-utils
    program qemu-io qemu-utils
    program dbus-daemon dbus
    program dbus-monitor dbus-bin
    program busctl systemd
    program systemd-analyze systemd
    program gdbus libglib2.0-bin
    program setpriv util-linux
    program unshare util-linux
    program losetup mount
    program chattr e2fsprogs
    program mkfs.xfs xfsprogs
    [ -x /usr/lib/polkit-1/polkitd ] || need polkitd polkitd
    if [ "$what" = lint ]; then
        program shellcheck shellcheck
        program mandoc mandoc
    fi
    case $what in package | system)
        program dh debhelper
        program dpkg-buildpackage dpkg-dev
        ;;
    esac
    if [ "$what" = system ]; then
        program debootstrap debootstrap
        program systemd-nspawn systemd-container
        program lintian lintian
    fi
}

guest_is_there() { # moved there when it is whole; that of an earlier set-up may lack a module
    [ -n "$what" ] || [ -e "$guest/modules/xfs.ko" ]
}

look
if ! command -v "${CARGO:-cargo}" >/dev/null 2>&1; then
    echo "There is no cargo in PATH. The project needs a stable Rust toolchain, 1.89 or newer, with rustfmt and clippy." >&2
    exit 1
fi
if [ -z "$missing" ]; then
    ! guest_is_there || exit 0
    echo "missing: a Linux guest for the tests, in $guest"
fi

if ! command -v apt-get >/dev/null 2>&1; then
    echo "Install these with your system's own tools: the names above are Debian's." >&2
    exit 1
fi
if [ "$(id -u)" != 0 ]; then
    echo "Run tests/setup.sh $what as root once, or install them yourself:" >&2
    [ -z "$missing" ] || echo "    apt-get install$missing" >&2
    exit 1
fi

export DEBIAN_FRONTEND=noninteractive LC_ALL=C
apt() { apt-get -q -y -o DPkg::Lock::Timeout=300 "$@"; }

[ -z "$missing" ] || echo "installing:$missing"
apt update || echo "apt-get update failed; trying with the lists that are here" >&2

# qemu-utils and qemu-system-x86 share files of one version: apt refuses a pair of different versions, or one replaces
# the other. A host may have a newer qemu-utils from backports. So both are requested in the version of the emulator in
# the host's suite, which downgrades a newer one.
case " $missing " in
*" qemu-system-x86 "*)
    version=$(apt-cache policy qemu-system-x86 | sed -n 's/^ *Candidate: //p')
    if [ -n "$version" ] && [ "$version" != "(none)" ]; then
        echo "QEMU $version: the emulator and its tools, from one suite"
        missing="$(echo " $missing " | sed 's/ qemu-system-x86 / /; s/ qemu-utils / /')"
        missing="$missing qemu-system-x86=$version qemu-utils=$version"
    fi
    ;;
*" qemu-utils "*)
    # The reverse: tools in the version of the installed emulator.
    version=$(dpkg-query -W -f '${Version}' qemu-system-x86 2>/dev/null || true)
    [ -z "$version" ] || missing="$(echo " $missing " | sed "s/ qemu-utils / qemu-utils=$version /")"
    ;;
esac

# shellcheck disable=SC2086  # a list of packages
if [ -n "$missing" ] && ! apt install --no-install-recommends --allow-downgrades $missing; then
    echo "apt-get could not install:$missing" >&2
    exit 1
fi

look
[ -z "$missing" ] || exit 1
guest_is_there && exit 0

# Debian's smallest kernel, its modules for QEMU's devices, an agent, and a shell. The other libraries are those of
# this host's QEMU.
mkdir -p "$(dirname "$guest")"
new=$(mktemp -d "$guest.XXXXXX")
mkdir -p "$new/tree" "$new/made/modules"
kernel=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/^ *Depends: *\(linux-image-[^ ]*\)$/\1/p' | head -n 1)
if ! (cd "$new" && apt download "${kernel:-linux-image-cloud-amd64}" qemu-guest-agent busybox-static); then
    rm -rf -- "$new"
    echo "a kernel, an agent and a shell for a Linux guest could not be had: tests/freeze/guest.rs and tests/power_cuts.rs will fail" >&2
    exit 0
fi
for package in "$new"/*.deb; do dpkg -x "$package" "$new/tree"; done
cp "$new"/tree/boot/vmlinuz-* "$new/made/vmlinuz"
for program in busybox qemu-ga; do
    find "$new/tree" -type f -path '*bin/*' -name "$program" -exec cp {} "$new/made/" \;
done
find "$new/tree" -path '*/kernel/*' '(' -path '*/drivers/virtio/*' -o -name 'virtio_blk.ko*' -o -name 'virtio_console.ko*' \
    -o -path '*/fs/ext4/*' -o -path '*/fs/xfs/*' -o -path '*/fs/jbd2/*' -o -name 'mbcache.ko*' -o -name '*crc16.ko*' -o -name '*crc32c*.ko*' ')' \
    -name '*.ko*' -exec cp {} "$new/made/modules/" \;
find "$new/made/modules" -name '*.xz' -exec "$new/made/busybox" unxz {} +
# Another run may have been first.
if ! guest_is_there; then
    [ ! -e "$guest" ] || mv -T "$guest" "$new/former"
    mv -T "$new/made" "$guest" || guest_is_there
fi
rm -rf -- "$new"
echo "a Linux guest for the tests is in $guest"
