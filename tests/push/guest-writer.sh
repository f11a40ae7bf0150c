#!/bin/busybox sh
# shellcheck shell=dash
# The first process of the Linux guest of tests/push/guest_writes.rs: it writes to its disk all the time, from the end of
# the first 20 MiB to the start, each block durable before the next one, and reports the result on its serial port.
. /boot.sh
until [ -b /dev/vda ]; do usleep 10000; done
count=0
while :; do
    count=$((count + 1))
    block=$((319 - count % 320))
    if dd if=/dev/urandom of=/dev/vda bs=64k seek=$block count=1 conv=notrunc,fsync 2>/dev/null; then
        echo "written $count" >/dev/ttyS0
    else
        echo "failed $count" >/dev/ttyS0
    fi
done
