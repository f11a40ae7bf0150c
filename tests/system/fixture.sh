# The common parts of the tests in the booted system: users, VMs, waiting. cases.sh sources this.
# shellcheck shell=bash

# The timeout for short operations: a slow host must not fail the tests.
readonly DEADLINE=120
# shellcheck disable=SC2034  # the cases'
readonly BUS=$BACKUPD_TEST_BUS DISK=$BACKUPD_TEST_DISK
readonly STORE=/var/lib/backupd/backups

fail() {
    echo "$*"
    return 1
}
until_true() { # WHAT COMMAND...
    local what=$1 end=$((SECONDS + DEADLINE))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "waited for $what, $DEADLINE s"
        sleep 0.05
    done
}
as() { # USER COMMAND...: as somebody without a session of their own
    local user=$1
    shift
    setpriv --reuid="$user" --regid="$(id -g "$user")" --init-groups --reset-env -- "$@"
}
status_of() { # COMMAND...: its exit status is printed instead of ending the test, after what it says
    local status=0
    "$@" || status=$?
    echo "status $status"
}
not() { # COMMAND...: bash's own "!" never ends a test
    local status=0
    "$@" || status=$?
    [ "$status" != 0 ] || fail "not expected to succeed: $*"
}
contains() { # TEXT PART
    case $1 in
    *"$2"*) ;;
    *) fail "'$2' is not in: $1" ;;
    esac
}

# --- The service ---

state() { systemctl show --property=ActiveState --value backupd.service; }
main_pid() { systemctl show --property=MainPID --value backupd.service; }
runs() { [ "$(state)" = active ]; }
runs_not() { [ "$(state)" = inactive ]; }
owns_name() { busctl --system --no-legend list --acquired | grep -q '^org\.example\.Backup1 '; }
stop_service() {
    systemctl stop backupd.service
    runs_not || fail "the service is $(state)"
}
job_number() { sed -n '0,/.*"id": *\([0-9]*\).*/s//\1/p'; }
# A backup that continues until it is cancelled or sped up: 128 KiB a second of 16 MiB.
start_slow_backup() { # DOMAIN: prints the job's number
    backupctl create "$1" --detach --json --incremental full --bandwidth 128K | job_number
}
finish_backup() { # ID
    backupctl speed "$1" 0
    backupctl watch "$1"
}

# --- Virtual machines ---

# Each has 16 MiB of data in a disk of 32 MiB, never starts its processor, and so never writes.
readonly DISK_BYTES=33554432
make_user() { # NAME
    id "$1" >/dev/null 2>&1 || useradd --create-home --shell /bin/bash "$1"
}
start_vm() { # NAME USER DIRECTORY: QEMU runs as that user; its disk is in the directory
    local name=$1 user=$2 disk=$3/$1.qcow2
    qemu-img create -q -f qcow2 "$disk" "$DISK_BYTES"
    qemu-io -f qcow2 -c 'write -q -P 7 0 8M' -c 'write -q -P 8 16M 8M' "$disk"
    chown "$user:" "$disk"
    # Only this user has access to its sockets, whose mode follows the umask.
    systemd-run --quiet --unit="vm-$name" --uid="$user" --property=RuntimeDirectory="vm-$name" \
        --property=RuntimeDirectoryMode=0700 --property=UMask=0077 \
        qemu-system-x86_64 -name "$name" -machine q35 -accel tcg -m 64 -S -display none -nodefaults \
        -no-user-config -qmp "unix:/run/vm-$name/service,server=on,wait=off" \
        -qmp "unix:/run/vm-$name/tests,server=on,wait=off" \
        -blockdev "driver=file,node-name=vda-file,filename=$disk" \
        -blockdev "driver=qcow2,node-name=vda-format,file=vda-file" \
        -device virtio-blk-pci,id=vda,drive=vda-format
    until_true "QEMU's monitor" test -S "/run/vm-$name/tests"
}
configure_vm() { # NAME
    echo "monitor = \"/run/vm-$1/service\"" >"/etc/backupd/domains.d/.$1"
    mv "/etc/backupd/domains.d/.$1" "/etc/backupd/domains.d/$1.toml"
}
knows() { # DOMAIN: the service has reached its QEMU
    backupctl domains | grep -Eq "^$1 +(running|paused)"
}
qmp() { # NAME COMMAND [ARGUMENTS]: prints QEMU's reply
    local line
    coproc QEMU { socat STDIO "UNIX-CONNECT:/run/vm-$1/tests"; }
    read -r -t "$DEADLINE" line <&"${QEMU[0]}"
    echo '{"execute": "qmp_capabilities"}' >&"${QEMU[1]}"
    read -r -t "$DEADLINE" line <&"${QEMU[0]}"
    echo "{\"execute\": \"$2\", \"arguments\": ${3:-{\}}}" >&"${QEMU[1]}"
    while read -r -t "$DEADLINE" line <&"${QEMU[0]}"; do
        case $line in *'"return"'* | *'"error"'*) break ;; esac
    done
    kill "$QEMU_PID"
    echo "$line"
}
backup_job() { # NAME: what QEMU says of the job that copies, and of no other
    qmp "$1" query-jobs | tr '}' '\n' | grep '"type": "backup"'
}
copies() { # NAME
    contains "$(backup_job "$1")" '"status": "running"'
}
let_it_go() { # NAME: its backup goes on at full speed, without the service
    local job
    job=$(backup_job "$1" | sed -n 's/.*"id": "\([^"]*\)".*/\1/p')
    contains "$(qmp "$1" block-job-set-speed "{\"device\": \"$job\", \"speed\": 0}")" '"return": {}'
}
has_nothing_of_ours() { # NAME
    local jobs nodes
    jobs=$(qmp "$1" query-jobs)
    nodes=$(qmp "$1" query-named-block-nodes)
    contains "$jobs" '"return": []'
    # The bitmaps of checkpoints stay on purpose.
    case $nodes in *'"node-name": "backupd-'*) fail "left in QEMU: $nodes" ;; esac
}
same_as_disk() { # NAME DIRECTORY IMAGE [FORMAT]: the machine doesn't write, so its file can be read while it is open
    qemu-img compare -U -q -f qcow2 -F "${4:-qcow2}" "$2/$1.qcow2" "$3" || fail "$3 is not what the disk of $1 holds"
}
newest_image() { # DOMAIN
    local newest
    # The time in a name has a resolution of one second.
    newest=$(ls -1dt "$STORE/$1"/2* | head -n 1)
    echo "$newest/vda.qcow2"
}
