#!/bin/busybox sh
# shellcheck shell=dash
# The first process of the Linux of tests/power_cuts.rs: it mounts the disks, starts a bus and polkit, and then runs
# each line from its second serial port. After the output of a line it prints "= " and the exit status.
. /boot.sh
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
ln -s /proc/self/fd /dev/fd
until [ -b /dev/vdc ]; do usleep 10000; done

stty -F /dev/ttyS1 raw -echo
exec </dev/ttyS1 >/dev/ttyS1 2>&1
# Each mount replays its journal. The service keeps its catalog in the default store's file system; the other store has
# its own. File names are durable after a second at most, as in a long backup: only then can a cut leave a file with
# its name and without its content.
mount -t ext4 -o commit=1 /dev/vda /var/lib/backupd
mount -t xfs /dev/vdb /store
echo 100 >/proc/sys/fs/xfs/xfssyncd_centisecs
mount -t ext4 /dev/vdc /machine

export DBUS_SYSTEM_BUS_ADDRESS=unix:path=/run/bus RUST_BACKTRACE=1 RUST_LOG=backupd=debug,info
dbus-daemon --nofork --nopidfile --nosyslog --config-file=/etc/bus.conf </dev/null >/dev/ttyS0 2>&1 &
until [ -S /run/bus ]; do usleep 10000; done
/usr/lib/polkit-1/polkitd --no-debug </dev/null >/dev/ttyS0 2>&1 &

# start_service [VARIABLE=VALUE]: returns when it answers
start_service() {
    env "$@" /usr/libexec/backupd </dev/null >/dev/ttyS0 2>&1 &
    service=$!
    until backupctl domains >/dev/null 2>&1; do
        kill -0 "$service" || return
        usleep 100000
    done
}

# A VM without a guest, which never writes by itself. Its disks keep their content over a power cut.
start_machine() { # BYTES of each disk
    local bytes=$1 disk file
    mkfifo /run/qmp.in /run/qmp.out
    set --
    for disk in vda vdb; do
        file=/machine/$disk.qcow2
        [ -e "$file" ] || qemu-img create -q -f qcow2 "$file" "$bytes" || return
        set -- "$@" -blockdev "driver=file,node-name=$disk-file,filename=$file" \
            -blockdev "driver=qcow2,node-name=$disk-format,file=$disk-file" \
            -device "virtio-blk-pci,id=$disk,drive=$disk-format"
    done
    qemu-system-x86_64 -name web -uuid 5d3c4d2e-8f0b-4b4e-9c57-0a4c2b8f1e11 -machine q35 -accel tcg -m 16 -S \
        -display none -nodefaults -no-user-config -qmp unix:/run/monitor,server=on,wait=off \
        -chardev pipe,id=tests,path=/run/qmp -mon chardev=tests,mode=control "$@" </dev/null >/dev/null 2>/dev/ttyS0 &
    # Open in both directions, so that it does not wait for a reader.
    exec 3<>/run/qmp.in 4<>/run/qmp.out
    read -r reply <&4
    qmp '{"execute": "qmp_capabilities"}' || return
    mkdir -p /run/domains.d
    echo 'monitor = "/run/monitor"' >/run/domains.d/.web
    mv /run/domains.d/.web /run/domains.d/web.toml
}
qmp() { # COMMAND: true if QEMU answers with nothing
    echo "$1" >&3
    while read -r reply <&4; do
        case $reply in
        '{"return": {}}'* | '{"return": ""}'*) return 0 ;;
        *'"return"'* | *'"error"'*)
            echo "$reply"
            return 1
            ;;
        esac
    done
}
# Writes as a guest would: DISK COMMAND, such as "write -P 1 0 64k"
guest() {
    qmp '{"execute": "human-monitor-command", "arguments": {"command-line":
        "qemu-io -d /machine/peripheral/'"$1"'/virtio-backend \"'"$2"'\""}}'
}
until_known() {
    until backupctl domains | grep -Eq '^web +(running|paused)'; do usleep 100000; done
}
# Its output does not go to a terminal, and is printed only if it fails.
quietly() { # COMMAND...
    "$@" >/tmp/said 2>&1 || {
        cat /tmp/said
        return 1
    }
}
# Prints the output of sha256sum(1) for each disk of a restored backup.
restore() { # ID
    rm -rf /tmp/restored
    mkdir /tmp/restored
    quietly backupctl restore "$1" --to /tmp/restored --format raw || return
    (cd /tmp/restored && sha256sum -- *)
}
# Prints possible residue of a backup: everything in a VM's directory except the directories of backups.
leftovers() {
    for store in /var/lib/backupd/backups /store; do
        for path in "$store"/*/* "$store"/*/.[!.]*; do
            case ${path##*/} in
            '*' | '.[!.]*') ;;
            [0-9]*) [ -f "$path/manifest.json" ] || echo "$path" ;;
            *) echo "$path" ;;
            esac
        done
    done
}

echo "= 0"
while read -r line; do
    eval "$line" </dev/null
    echo "= $?"
done
