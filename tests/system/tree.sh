#!/bin/bash
# Creates a bootable Debian tree, with the dependencies of the package and of its tests.
#
#   tree.sh SUITE DIRECTORY
#
# The directory gets its name when it is complete. Called by run.sh, in namespaces whose mounts end with it.
set -euo pipefail
readonly suite=$1 tree=$2 new=$2.new
readonly PACKAGES="systemd systemd-sysv libpam-systemd polkitd dbus dbus-broker qemu-system-x86 qemu-utils seabios socat"

mirror() { # where this machine's apt gets Debian from
    if [ -n "${BACKUPD_TEST_MIRROR:-}" ]; then
        echo "$BACKUPD_TEST_MIRROR"
        return
    fi
    # Suites like "bookworm-security" are in separate archives.
    # shellcheck disable=SC2016  # apt's own variables
    apt-get indextargets --format '$(ORIGIN) $(CODENAME) $(SITE)' 'Created-By: Packages' |
        awk '$1 == "Debian" && $2 !~ /-/ && !found { print $3; found = 1 }'
}

from=$(mirror)
[ -n "$from" ] || {
    echo "apt knows no Debian mirror here; say BACKUPD_TEST_MIRROR=http://…"
    exit 1
}
echo "from $from"
rm -rf --one-file-system -- "$new"
mkdir -p "$new"

# The mirror is used as this host's apt uses it.
eval "$(apt-config shell proxy Acquire::http::Proxy)"
[ -z "${proxy:-}" ] || export http_proxy=$proxy
export DEBIAN_FRONTEND=noninteractive LC_ALL=C
debootstrap --variant=minbase "$suite" "$new" "$from"
apt-config dump | grep '^Acquire::' >"$new/etc/apt/apt.conf.d/00tests" || true

# debootstrap cannot resolve polkitd's dependencies, but apt can. The booted system has no network, so the tree
# contains everything that it needs.
printf '#!/bin/sh\nexit 101\n' >"$new/usr/sbin/policy-rc.d"
chmod 755 "$new/usr/sbin/policy-rc.d"
# shellcheck disable=SC2016,SC2086  # the inner shell's; a list of packages
chroot "$new" sh -euc '
    apt-get -q update
    apt-get -q -y install --no-install-recommends "$@"
    apt-get clean
    # The bus is chosen at boot.
    systemctl disable dbus-broker.service
    rm -rf /var/lib/apt/lists/*' sh $PACKAGES
rm "$new/usr/sbin/policy-rc.d"
mv "$new" "$tree"
