#!/bin/sh
# Runs a program to which the journal is a socket of the test's:
#     unshare --mount -- sh journal.sh DIR PROGRAM ARGUMENT…
# DIR/journal/socket takes the place of journald's. A machine without systemd has no place for it: there it is made in
# an empty /run, which the program sees instead of the machine's.
set -e
if [ ! -d /run/systemd ]; then
    mount -t tmpfs -o mode=0755 tmpfs /run
    mkdir /run/systemd
fi
mount --bind "$1" /run/systemd
shift
exec "$@"
