#!/bin/bash
# Boots a tree with the tests in it, and ends when these have ended.
#
#   boot.sh TREE SHARED ARGUMENT...     further arguments are systemd-nspawn's
#
# SHARED is a directory that becomes /backupd-tests: in SHARED/units are the units of the system. Called by run.sh, in
# namespaces that end with it.
set -euo pipefail
readonly tree=$1 shared=$2
shift 2

# systemd in the system takes a tree of control groups of version 2. Where this machine's is another one, it is mounted
# here, and has no controllers; it does without.
[ "$(stat --file-system --format=%T /sys/fs/cgroup)" = cgroup2fs ] || mount -t cgroup2 cgroup2 /sys/fs/cgroup
readonly group=/sys/fs/cgroup/backupd-test-system
mkdir -p "$group"
echo $$ >"$group/cgroup.procs"

# What the system writes is memory, and gone with it; the tree stays as it is. bpf(2): systemd keeps a service from
# devices with it. Landlock: the service confines programs with it.
SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1 exec systemd-nspawn --quiet --boot --register=no --keep-unit --private-network \
    --volatile=overlay --directory="$tree" --machine=backupd-test-system --console=read-only \
    --system-call-filter="bpf landlock_create_ruleset landlock_add_rule landlock_restrict_self" \
    --bind="$shared:/backupd-tests" --bind="$shared/units:/etc/systemd/system" "$@" systemd.wants=backupd-tests.service
