#!/bin/sh
# Runs a program with the test's socket as the journal:
#     unshare --mount -- sh journal.sh DIR PROGRAM ARGUMENT…
# DIR/journal/socket replaces journald's socket. On a host without systemd, it is placed in an empty /run, which the
# program sees instead of the host's.
set -e
if [ ! -d /run/systemd ]; then
    mount -t tmpfs -o mode=0755 tmpfs /run
    mkdir /run/systemd
fi
mount --bind "$1" /run/systemd
shift
exec "$@"
