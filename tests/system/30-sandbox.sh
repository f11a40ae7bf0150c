# The sandbox is active, and every feature works in it.
# shellcheck shell=bash

# Runs a shell script in the service's sandbox: with the installed unit's settings and another program.
in_sandbox() { # SCRIPT
    local unit=/run/systemd/system/backupd-probe.service
    sed -e 's/^Type=.*/Type=oneshot/' -e '/^BusName=\|^Restart\|^WatchdogSec=\|^RuntimeDirectory\|^\[Install\]\|^WantedBy=/d' \
        -e 's|^ExecStart=.*|ExecStart=/bin/bash /run/probe|' \
        -e '/^\[Service\]/a StandardOutput=append:/run/probe.out\nStandardError=append:/run/probe.out' \
        /usr/lib/systemd/system/backupd.service >"$unit"
    printf '%s\n' "$1" >/run/probe
    : >/run/probe.out
    systemctl daemon-reload
    local status=0
    systemctl start backupd-probe.service || status=$?
    cat /run/probe.out
    rm "$unit"
    systemctl daemon-reload
    [ "$status" = 0 ] || systemctl reset-failed backupd-probe.service
    return "$status"
}

test_home_and_temporary_directories_are_hidden() {
    touch /tmp/of-others /var/tmp/of-others /root/of-root /home/anna/of-anna
    local seen
    seen=$(in_sandbox 'ls -A /home /root /run/user /tmp /var/tmp; true')
    case $seen in *of-*) fail "$seen" ;; esac
    contains "$seen" /home
}

test_only_the_directories_of_stores_are_writable() {
    mkdir -p /media /srv /mnt /var/backups /opt
    in_sandbox '
        status=0
        for place in /srv /mnt /media /var/backups /var/lib/backupd; do
            touch $place/probe && rm $place/probe || status=1
        done
        for place in / /etc /usr /opt /var /var/lib /run /run/backupd /usr/lib /usr/bin /boot /home /tmp /root /dev/shm /etc/backupd /sys; do
            if touch $place/probe 2>/dev/null; then echo "can write to $place"; status=1; fi
        done
        exit $status'
}

test_files_in_the_directories_of_stores_cannot_be_executed() {
    in_sandbox '
        status=0
        for place in /srv /mnt /media /var/backups /var/lib/backupd; do
            cp /bin/true $place/probe || status=1
            if $place/probe 2>/dev/null; then echo "can run what is in $place"; status=1; fi
            rm $place/probe
        done
        exit $status'
}

test_block_devices_can_be_opened_and_other_devices_not() {
    mknod /dev/probe-kvm c 10 232
    mknod /dev/probe-mem c 1 1
    mknod /dev/probe-tun c 10 200
    in_sandbox "
        status=0
        exec 3<>$DISK || status=1
        for device in /dev/probe-*; do
            if (exec 3<\$device) 2>/run/backupd-error; then echo \"can open \$device\"; status=1; fi
        done
        exit \$status"
    rm /dev/probe-*
}

test_later_mounts_appear_in_the_sandbox() {
    runs
    mkdir -p /mnt/usb
    mount -t tmpfs tmpfs /mnt/usb
    backupctl create web --to /mnt/usb
    same_as_disk web /srv/vm /mnt/usb/vda.qcow2
    # QEMU up to version 8 keeps a backup's files open while the VM is paused.
    case $(qemu-system-x86_64 --version) in
    *"version "[78].*) umount --lazy /mnt/usb ;;
    *) umount /mnt/usb ;;
    esac
}

test_a_block_device_is_a_target() {
    backupctl create web --disk "vda=$DISK" --format raw
    # The device is larger than the disk.
    cmp --bytes="$DISK_BYTES" <(qemu-img convert -U -f qcow2 -O raw /srv/vm/web.qcow2 /run/web.raw && cat /run/web.raw) "$DISK"
    rm /run/web.raw
}

test_a_block_device_that_a_qemu_has_open_through_another_node_is_refused() {
    # As under libvirt, which gives each QEMU a /dev of its own. The service does not know this machine.
    cp --archive "$DISK" /dev/node-of-other
    systemd-run --quiet --unit=vm-other qemu-system-x86_64 -name other -machine q35 -accel tcg -m 64 -S -display none \
        -nodefaults -no-user-config -qmp unix:/run/vm-other,server=on,wait=off \
        -blockdev driver=host_device,node-name=vda,filename=/dev/node-of-other -device virtio-blk-pci,drive=vda
    until_true "QEMU's monitor" test -S /run/vm-other
    local said before
    before=$(sha256sum <"$DISK")
    said=$(status_of backupctl create web --disk "vda=$DISK" --format raw 2>&1)
    contains "$said" "status 1"
    contains "$said" "open in another QEMU"
    contains "$said" "process $(systemctl show --property=MainPID --value vm-other.service), qemu-system-x86_64"
    [ "$(sha256sum <"$DISK")" = "$before" ]
    systemctl stop vm-other.service
    rm /dev/node-of-other
    backupctl create web --disk "vda=$DISK" --format raw
}

test_the_service_itself_cannot_inspect_a_qemu_process() {
    local qemu
    qemu=$(systemctl show --property=MainPID --value vm-web.service)
    readlink "/proc/$qemu/fd/0"
    in_sandbox "
        status=0
        if readlink /proc/$qemu/fd/0; then echo 'can look into QEMU'; status=1; fi
        if cat /proc/$qemu/environ; then echo 'can read its memory'; status=1; fi
        exit \$status"
}

test_without_the_helper_no_existing_target_is_overwritten() {
    local said before
    systemctl stop backupd-look.socket
    [ ! -e /run/backupd/look.socket ]
    before=$(sha256sum <"$DISK")
    said=$(status_of backupctl create web --disk "vda=$DISK" --format raw 2>&1)
    contains "$said" "status 1"
    contains "$said" "cannot find out whether other VMs"
    contains "$said" "systemctl restart backupd-look.socket"
    [ "$(sha256sum <"$DISK")" = "$before" ]
    backupctl create web
    # As the error advises.
    systemctl restart backupd-look.socket
    backupctl create web --disk "vda=$DISK" --format raw
}

test_an_error_of_the_helper_reaches_the_journal() {
    # The length of the question, which is too long, and the version of the protocol.
    printf '\377\377\377\377\1\0\0\0' | socat -t "$DEADLINE" - UNIX-CONNECT:/run/backupd/look.socket
    helper_log_has() { journalctl --unit='backupd-look@*' --priority=warning -o cat | grep -Fx "$1"; }
    until_true "the helper's line in the journal" helper_log_has "4294967295 bytes, more than 1048576"
}

test_the_helper_leaves_no_residue() {
    no_helper_runs() { [ -z "$(systemctl list-units --no-legend --all 'backupd-look@*')" ]; }
    until_true "the helpers to have ended" no_helper_runs
    [ -z "$(systemctl --failed --no-legend --plain)" ]
}

test_a_path_in_home_is_refused_by_name() {
    local said
    said=$(status_of backupctl create web --to /home/anna 2>&1)
    contains "$said" "status 1"
    contains "$said" /home/anna
    [ ! -e /home/anna/vda.qcow2 ]
    has_nothing_of_ours web
}

test_a_path_in_tmp_is_refused_and_not_created_in_the_private_tmp() {
    local said
    said=$(status_of backupctl create web --to /tmp 2>&1)
    contains "$said" "status 1"
    contains "$said" /tmp
    [ -z "$(find / -xdev -name 'vda.qcow2' -newer /run/probe -path '*tmp*' 2>/dev/null)" ]
}

test_an_open_file_in_home_is_a_target() {
    as anna mkdir /home/anna/backups
    chmod 700 /home/anna
    as anna backupctl create web --to /home/anna/backups --own-files --no-ask-password
    same_as_disk web /srv/vm /home/anna/backups/vda.qcow2
    [ "$(stat --format %U /home/anna/backups/vda.qcow2)" = anna ]
}

test_the_disk_of_a_vm_in_home_is_refused_as_target() {
    # Only the process itself can check: the service cannot access the path.
    start_vm desktop anna /home/anna
    configure_vm desktop
    until_true "the service to reach the machine" knows desktop
    local said
    said=$(status_of backupctl create web --disk vda=/home/anna/desktop.qcow2 --own-files --reuse-external 2>&1)
    contains "$said" "status 1"
    contains "$said" "disk of a running"
}

test_a_vm_with_its_disk_in_home_is_backed_up() {
    backupctl create desktop
    same_as_disk desktop /home/anna "$(newest_image desktop)"
    rm /etc/backupd/domains.d/desktop.toml
    systemctl stop vm-desktop.service
}

test_a_store_elsewhere_requires_a_drop_in() {
    local said
    said=$(status_of backupctl create web --to /opt 2>&1)
    contains "$said" "status 1"
    contains "$said" /opt
    mkdir -p /etc/systemd/system/backupd.service.d
    printf '[Service]\nReadWritePaths=/opt\n' >/etc/systemd/system/backupd.service.d/stores.conf
    systemctl daemon-reload
    systemctl restart backupd.service
    until_true "the service to reach the machine" knows web
    backupctl create web --to /opt
    same_as_disk web /srv/vm /opt/vda.qcow2
    rm -r /etc/systemd/system/backupd.service.d
    systemctl daemon-reload
    systemctl restart backupd.service
    until_true "the service to reach the machine" knows web
}

# Prints a key from the status of the service's storage daemon.
engine_status() { # KEY
    sed -n "s/^$1:[[:space:]]*//p" "/proc/$(pidof qemu-storage-daemon)/status"
}

test_a_program_that_reads_images_has_no_rights() {
    local id export set
    id=$(basename "$(dirname "$(newest_image web)")")
    backupctl export "$id" --socket /run/confined.nbd >/run/export.out 2>&1 &
    export=$!
    until_true "the disk to be served" test -S /run/confined.nbd
    until_true "its content" qemu-img info nbd+unix:///vda?socket=/run/confined.nbd
    for set in CapInh CapPrm CapEff CapAmb; do
        [ "$(engine_status $set)" = 0000000000000000 ] || fail "$set is $(engine_status $set)"
    done
    [ "$(engine_status NoNewPrivs)" = 1 ]
    # The unit's filter, and the daemon's own.
    [ "$(engine_status Seccomp_filters)" -gt 1 ]
    [ "$(cat "/proc/$(pidof qemu-storage-daemon)/oom_score_adj")" = 1000 ]
    not contains "$(journalctl --unit backupd.service --grep Landlock)" "no Landlock"
    # By which the service knows that the program works.
    contains "$(in_sandbox "cat /proc/$(pidof qemu-storage-daemon)/io")" "rchar: "
    kill "$export"
    wait "$export" || true
}
