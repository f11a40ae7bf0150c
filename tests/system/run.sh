#!/bin/bash
# Tests the package in a real system, as root; `make test-system` runs this.
#
#   run.sh PACKAGE NEXT_PACKAGE     two .deb files, of one version and of a higher one
#
# Creates a Debian 13 tree once, which is kept in a cache directory and never changed. Boots it in a container with a
# temporary layer on top, once for each of the two buses. Inside, cases.sh installs the package and uses it. The last
# line prints how many cases passed and failed.
#
# BACKUPD_TEST_BUSES=dbus-broker boots with that one only, BACKUPD_TEST_SUITE=bookworm another Debian;
# BACKUPD_TEST_CACHE=DIRECTORY keeps the tree elsewhere, BACKUPD_TEST_MIRROR=URL takes it from there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
readonly here suite=${BACKUPD_TEST_SUITE:-trixie} buses=${BACKUPD_TEST_BUSES:-dbus-daemon dbus-broker}
readonly cache=${BACKUPD_TEST_CACHE:-${XDG_CACHE_HOME:-/var/cache}/backupd-test-system}
# Timeouts for hanging steps, far above the time on a slow host: for creating the tree, and for one boot with all
# cases.
readonly TREE_SECONDS=1800 BOOT_SECONDS=1800

fail() {
    echo "test-system: $*" >&2
    exit 1
}
[ $# = 2 ] || fail "two packages are wanted"
[ "$(id -u)" = 0 ] || fail "booting a system in a container takes root: sudo make test-system"
for file in "$@"; do [ -f "$file" ] || fail "there is no package $file"; done
PATH=$PATH:/usr/sbin:/sbin
for program in debootstrap systemd-nspawn lintian losetup flock unshare setpriv; do
    command -v "$program" >/dev/null || fail "there is no $program: tests/setup.sh system installs it"
done
for system in cgroup2 overlay; do
    grep -qw "$system" /proc/filesystems || modprobe "$system" 2>/dev/null ||
        fail "this kernel has no $system, which a system in a container needs"
done

mkdir -p "$cache"
# One run at a time: an unfinished tree must not be used, and a used one must not be removed.
exec {lock}>"$cache/lock"
flock --nonblock "$lock" || {
    echo "waiting for another run to end"
    flock "$lock"
}

# --- Nothing stays ---

readonly work=$cache/work
children=()
# Runs in namespaces that end with their first process: their mounts are not visible here, and their processes end too.
# That process ends with this script, even if the script is killed.
contained() { # COMMAND...: in the background; $! is what to wait for
    setpriv --pdeathsig KILL -- unshare --mount --pid --fork --kill-child --mount-proc -- "$@" &
    children+=($!)
}
remove_remains() { # also those of a run that was killed
    rm -rf --one-file-system -- "$work" "$cache"/.#*.lck
    # A killed process stays in its control group until it is dead.
    # shellcheck disable=SC2016  # the inner shell's
    unshare --mount timeout 60 sh -euc '
        [ "$(stat --file-system --format=%T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
        cd /sys/fs/cgroup
        while [ -d backupd-test-system ]; do
            find backupd-test-system -depth -type d -exec rmdir {} + 2>/dev/null || sleep 0.1
        done'
}
cleanup() {
    local status=$?
    trap - EXIT INT TERM HUP
    for child in "${children[@]}"; do
        kill -KILL "$child" 2>/dev/null || true
        wait "$child" 2>/dev/null || true
    done
    remove_remains || true
    exit "$status"
}
trap cleanup EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
remove_remains
mkdir "$work"

# --- The tree ---

# The tree depends on the script that creates it.
key=$(sha256sum <"$here/tree.sh" | cut -c 1-16)
readonly tree=$cache/$suite-$key
if [ ! -d "$tree" ]; then
    echo "making a Debian tree, once: $tree"
    for old in "$cache/$suite"-*; do
        [ ! -d "$old" ] || rm -rf --one-file-system -- "$old"
    done
    contained timeout "$TREE_SECONDS" "$here/tree.sh" "$suite" "$tree" >"$cache/tree.log" 2>&1
    # bash handles signals during a wait, but not while a foreground command runs.
    wait $! || {
        tail -n 20 "$cache/tree.log" >&2
        fail "the tree could not be made; the whole output is in $cache/tree.log"
    }
fi

# --- The package by itself ---

passed=0 failed=0
result() { # STATUS SENTENCE
    if [ "$1" = 0 ]; then
        passed=$((passed + 1))
        echo "ok - $2"
    else
        failed=$((failed + 1))
        echo "not ok - $2"
    fi
}

echo "# lintian"
for file in "$@"; do
    status=0
    # lintian warns when it runs as root.
    lintian --allow-root --fail-on error,warning "$file" >"$work/lintian" 2>&1 || status=$?
    result "$status" "lintian finds nothing wrong with ${file##*/}"
    [ "$status" = 0 ] || sed 's/^/    /' "$work/lintian"
done

# --- The booted system ---

# A disk for the container, which cannot create one itself. It is detached at once, and removed when the last
# descriptor is closed.
truncate -s 64M "$work/disk"
loop=$(losetup --find --show "$work/disk") || fail "there is no loop device for a block device as target"
# shellcheck disable=SC2034  # only open
exec {disk}<>"$loop"
losetup --detach "$loop"

boot() { # BUS: prints what the cases say
    local bus=$1 shared=$work/$1 status=0 system ok
    mkdir -p "$shared/units"
    cp -a "$tree/etc/systemd/system/." "$here/backupd-tests.service" "$shared/units/"
    # As "systemctl enable" does it: the alias names the active one.
    [ "$bus" = dbus-daemon ] || ln -s "/usr/lib/systemd/system/$bus.service" "$shared/units/dbus.service"
    cp "$here"/*.sh "$shared/"
    cp "$package" "$shared/backupd.deb"
    cp "$next" "$shared/backupd-next.deb"
    : >"$shared/log"

    echo "# $bus"
    contained timeout --kill-after=10 "$BOOT_SECONDS" "$here/boot.sh" "$tree" "$shared" --bind="$loop" \
        --setenv=BACKUPD_TEST_BUS="$bus" --setenv=BACKUPD_TEST_DISK="$loop" >"$shared/console" 2>&1
    system=$!
    # Printed as it arrives, to the end.
    tail --pid="$system" --sleep-interval=0.2 --lines=+1 --follow "$shared/log" &
    children+=($!)
    wait "$system" || status=$?
    wait "${children[-1]}"
    ok=$(grep -c '^ok - ' "$shared/log" || true)
    passed=$((passed + ok))
    failed=$((failed + $(grep -c '^not ok - ' "$shared/log" || true)))
    if [ ! -e "$shared/ended" ] || [ "$ok" = 0 ]; then
        result 1 "the system with $bus boots and all its cases come to their end (status $status; 124: too late)"
        echo "    --- the last case and what it said"
        tail -n 30 "$shared/case" "$shared/output" 2>/dev/null | sed 's/^/    /'
        echo "    --- the end of its console"
        tail -n 30 "$shared/console" | sed 's/^/    /'
    fi
}

readonly package=$1 next=$2
for bus in $buses; do
    boot "$bus"
done

echo
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
