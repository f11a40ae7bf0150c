#!/bin/busybox sh
# shellcheck shell=dash
# The first process of the Linux guest of tests/freeze/guest.rs: it writes to a disk all the time, and runs an agent. The test
# reads its output from its serial port.
. /boot.sh
until [ -b /dev/vda ]; do usleep 10000; done
mount -t ext4 /dev/vda /data
port=
until [ -n "$port" ]; do
    port=$(grep -lx org.qemu.guest_agent.0 /sys/class/virtio-ports/*/name 2>/dev/null)
    usleep 10000
done
port=${port%/name}
qemu-ga -m virtio-serial -p "/dev/${port##*/}" &

# Directories and files of random content, each durable before the next one, so that the journal is in use.
count=0
while :; do
    count=$((count + 1))
    mkdir -p "/data/$((count % 7))"
    dd if=/dev/urandom of="/data/$((count % 7))/$((count % 40))" bs=16k count=2 conv=fsync 2>/dev/null
    rm -f "/data/$(((count + 3) % 7))/$(((count + 3) % 40))"
    echo "written $count" >/dev/ttyS0
done
