#!/bin/bash
# Boots a tree with the tests in it, and ends when the tests have ended.
#
#   boot.sh TREE SHARED ARGUMENT...     further arguments are systemd-nspawn's
#
# SHARED is a directory that becomes /backupd-tests: in SHARED/units are the units of the system. Called by run.sh, in
# namespaces that end with it.
set -euo pipefail
readonly tree=$1 shared=$2
shift 2

# systemd in the container requires control groups of version 2. On a host with version 1, a version 2 tree is mounted
# here. It has no controllers, and systemd works without them.
[ "$(stat --file-system --format=%T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
readonly group=/sys/fs/cgroup/backupd-test-system
mkdir -p "$group"
echo $$ >"$group/cgroup.procs"

# The container writes to memory only, so the tree stays unchanged. bpf(2): systemd restricts a service's devices with
# it. Landlock: the service confines programs with it.
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec systemd-nspawn --quiet --boot --register=no --keep-unit --private-network \
    --volatile=overlay --directory="$tree" --machine=backupd-test-system --console=read-only \
    --system-call-filter="bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self" \
    --bind="$shared:/backupd-tests" --bind="$shared/units:/etc/systemd/system" "$@" systemd.wants=backupd-tests.service
