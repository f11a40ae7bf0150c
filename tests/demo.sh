#!/bin/bash
# Backs up a real VM from scratch; `make demo` runs this.
#
# Builds the service and starts it on a private bus with polkit. Starts a small VM with two disks (no guest system, no
# KVM), backs it up as an ordinary user during writes, and compares the images with the disks. Everything is in one
# temporary directory, which is removed at the end; DEMO_KEEP=1 keeps it.
#
# The comparison proves that both images are of one point in time, the start of the backup.
#   vda  is overwritten during the backup: its image equals a copy of the disk from before, and not the disk after.
#   vdb  is written before the backup, by the machine, and left alone then: its image equals the disk after.
#
# Then it makes two incremental backups, lists all three, compares a restore with the disks, and deletes a backup.
set -euo pipefail
cd "$(dirname "$0")/.."

readonly CARGO=${CARGO:-cargo} TARGET=${CARGO_TARGET_DIR:-target}
# The bandwidth in bytes a second: slow enough to show progress.
readonly BANDWIDTH=$((80 << 20))
readonly DEADLINE=60

if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[0m'); else bold='' plain=''; fi
step() { printf '\n%s%s%s\n' "$bold" "$*" "$plain"; }
fail() {
    echo "demo: $*" >&2
    exit 1
}

if [ "${1:-}" != --built ]; then
    tests/setup.sh
    step "Building"
    # A debug build, as for the tests: an optimised one takes five times as long to compile, and QEMU copies the data anyway.
    "$CARGO" build --locked
    if [ "$(id -u)" != 0 ]; then
        # A private system bus with polkit needs root, as do callers of other users.
        command -v sudo >/dev/null || fail "the rest needs root; run tests/demo.sh --built as root"
        exec sudo -- env QEMU="${QEMU:-}" CARGO_TARGET_DIR="$TARGET" DEMO_KEEP="${DEMO_KEEP:-}" tests/demo.sh --built
    fi
fi
[ "$(id -u)" = 0 ] || fail "run as root"
PATH=$PATH:/usr/sbin:/sbin

# --- Everything started here ends here ---

pids=()
ended() { # PID: it was waited for, so its number may be another's now
    local i
    for i in "${!pids[@]}"; do
        if [ "${pids[i]}" = "$1" ]; then unset "pids[i]"; fi
    done
}
stop() { # PID: ends one of ours and waits for it
    kill "$1" 2>/dev/null || true
    wait "$1" 2>/dev/null || true
    ended "$1"
}
cleanup() {
    local status=$? started=("${pids[@]}") i log
    trap - EXIT INT TERM
    # An interruption is not a failure.
    if [ "$status" != 0 ] && [ "$status" -lt 128 ]; then
        for log in "$dir"/*.log; do
            [ -s "$log" ] && printf '\n--- the end of %s\n' "$log" && tail -n 15 "$log"
        done
    fi >&2
    for ((i = ${#started[@]} - 1; i >= 0; i--)); do stop "${started[i]}"; done
    if [ -n "${DEMO_KEEP:-}" ]; then
        echo "Kept: $dir"
    else
        rm -rf -- "$dir"
    fi
    exit "$status"
}
dir=$(mktemp -d "${TMPDIR:-/tmp}/backupd-demo.XXXXXX")
trap cleanup EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
# Ordinary users call from here.
chmod 755 "$dir"

start() { # NAME COMMAND...: beside the demo, with its output in NAME.out and NAME.log; ends with this script
    local name=$1
    shift
    # "<&0": without it, bash gives a background process no standard input.
    setpriv --pdeathsig KILL -- "$@" <&0 >"$dir/$name.out" 2>"$dir/$name.log" &
    pids+=($!)
}
until_true() { # WHAT COMMAND...
    local what=$1 end=$((SECONDS + DEADLINE))
    shift
    until "$@"; do
        [ "$SECONDS" -lt "$end" ] || fail "waited for $what, $DEADLINE s"
        sleep 0.05
    done
}
as() { # USER COMMAND...
    local user=$1
    shift
    setpriv --reuid="$user" --regid="$(id -g "$user")" --clear-groups -- "$@"
}

# --- Bus, polkit, service ---

step "A private system bus, with the bus policy that is shipped, and polkit on it"
sed "s|@socket@|$dir/bus|; s|@policy@|$PWD/dbus/org.example.Backup1.conf|" tests/common/system-bus.conf >"$dir/bus.conf"
start dbus-daemon dbus-daemon --nofork --nopidfile --nosyslog --config-file="$dir/bus.conf"
export DBUS_SYSTEM_BUS_ADDRESS=unix:path=$dir/bus
until_true "the bus" test -S "$dir/bus"

mkdir "$dir/actions" "$dir/rules" "$dir/empty"
cp polkit/org.example.backup1.policy /usr/share/polkit-1/actions/org.freedesktop.policykit.policy "$dir/actions/"
cat >"$dir/rules/50-demo.rules" <<'RULES'
// The administrator of this demo lets one ordinary user back up one machine.
polkit.addRule(function(action, subject) {
    if (action.id == "org.example.backup1.domain.backup" && action.lookup("domain_name") == "demo" &&
        subject.user == "nobody") {
        return polkit.Result.YES;
    }
});
RULES
start polkitd unshare --mount -- sh tests/common/polkitd.sh "$dir/actions" "$dir/rules" "$dir/empty"
gdbus wait --system --timeout "$DEADLINE" org.freedesktop.PolicyKit1
echo "DBUS_SYSTEM_BUS_ADDRESS=$DBUS_SYSTEM_BUS_ADDRESS"

step "The service"
mkdir "$dir/domains.d"
cat >"$dir/backupd.toml" <<CONFIG
state-directory = "$dir/state"
domain-directories = ["$dir/domains.d"]
[store.default]
path = "$dir/backups"
CONFIG
# Other users may have no access to the build directory.
install -m 755 "$TARGET/debug/backupctl" "$dir/backupctl"
start backupd "$TARGET/debug/backupd" --config "$dir/backupd.toml"
gdbus wait --system --timeout "$DEADLINE" org.example.Backup1
echo "backupd --config $dir/backupd.toml"

# --- The machine ---

step "A virtual machine with two disks, 256 MiB and 64 MiB of data in them"
qemu-img create -q -f qcow2 "$dir/vda.qcow2" 512M
qemu-img create -q -f qcow2 "$dir/vdb.qcow2" 128M
fill=()
for i in {0..15}; do fill+=(-c "write -q -P $((i + 1)) $((i * 24))M 16M"); done
qemu-io -f qcow2 "${fill[@]}" "$dir/vda.qcow2"
cp --sparse=always "$dir/vda.qcow2" "$dir/vda-before.qcow2"

disk() { # ID: arguments for one disk
    printf '%s\n' -blockdev "driver=file,node-name=$1-file,filename=$dir/$1.qcow2" \
        -blockdev "driver=qcow2,node-name=$1-format,file=$1-file" \
        -device "virtio-blk-pci,id=$1,drive=$1-format"
}
mapfile -t disks < <(disk vda && disk vdb)
qemu=${QEMU:-qemu-system-x86_64}
# QEMU's human monitor reads the demo's writes from this pipe. The pipe is open in both directions, so that neither
# side waits for the other to open it, nor sees its end before the demo's.
mkfifo "$dir/monitor.in"
exec {monitor}<>"$dir/monitor.in"
start qemu "$qemu" -name demo -machine q35 -accel tcg -m 64 -S -display none -nodefaults -no-user-config \
    -qmp "unix:$dir/demo.qmp,server=on,wait=off" -monitor stdio "${disks[@]}" <&"$monitor"
vm=${pids[-1]}
until_true "QEMU" test -S "$dir/demo.qmp"

said() { tr -d '\r' <"$dir/qemu.out"; }
monitor() { printf '%s\n' "$1" >&"$monitor"; }
synced=0
sync_monitor() { # until QEMU has done all that it was told: it says the sum, and only the sum, on a line of its own
    synced=$((synced + 1))
    monitor "print /d 900000+$synced"
    until_true "QEMU's monitor" says_line "$((900000 + synced))"
}
says_line() { said | grep -qx -- "$1"; }
guest_write() { # DISK PATTERN OFFSET LENGTH: through the device, as a guest would
    monitor "qemu-io -d /machine/peripheral/$1/virtio-backend \"write -q -P $2 $3 $4\""
}
for i in {0..3}; do guest_write vdb $((i + 100)) "$((i * 20))M" 16M; done
sync_monitor

# One file configures the domain. Its name is the domain's, and it appears atomically.
echo "monitor = \"$dir/demo.qmp\"" >"$dir/demo.new"
mv "$dir/demo.new" "$dir/domains.d/demo.toml"
knows_demo() { "$dir/backupctl" domains 2>/dev/null | grep -Eq 'demo.*(running|paused)'; }
until_true "the service to know the machine" knows_demo
echo "$ backupctl domains"
"$dir/backupctl" domains

# --- The backup ---

step "Somebody without authorisation is refused"
echo "$ backupctl create demo --no-ask-password    (as the user daemon)"
status=0
as daemon "$dir/backupctl" create demo --no-ask-password || status=$?
[ "$status" = 4 ] || fail "exit status $status, not 4"

step "The user nobody, whom polkit's rule allows, backs it up, while the VM goes on writing"
start signals dbus-monitor --address "$DBUS_SYSTEM_BUS_ADDRESS" \
    "type='signal',path_namespace='/org/example/Backup1'"
signals=${pids[-1]}
listens() { grep -qs 'member=NameLost' "$dir/signals.out"; }
until_true "the bus's monitor" listens

copies() {
    monitor "info block-jobs"
    said | grep -q 'Type backup'
}
write_meanwhile() { # only when QEMU says that it copies: the instant has been
    until_true "QEMU to copy" copies
    for i in {0..63}; do
        guest_write vda 238 "$((i * 6))M" 1M
        sleep 0.02
    done
    monitor "qemu-io -d /machine/peripheral/vda/virtio-backend flush"
}
write_meanwhile &
writer=$!
pids+=("$writer")
echo "$ backupctl create demo --bandwidth $BANDWIDTH"
as nobody "$dir/backupctl" create demo --bandwidth "$BANDWIDTH" || fail "the backup ended with status $?"
wait "$writer"
ended "$writer"
sync_monitor

step "The signals"
announced() { grep -q 'member=JobEnded' "$dir/signals.out"; }
until_true "JobEnded" announced
stop "$signals"
awk '
    function show() {
        if (member == "PropertiesChanged") changes++
        else if (member != "") printf "%8.3f s  %-18s %-30s %s\n", when - first, member, path, arguments
        member = ""
    }
    function field(name,  text) {
        text = $0
        if (!sub(".*[ ;]" name "=", "", text)) return ""
        sub("[ ;].*", "", text)
        return text
    }
    /^signal / {
        show()
        path = field("path")
        if (path !~ /^\/org\/example\/Backup1/) next
        member = field("member"); when = field("time"); arguments = ""
        if (!first) first = when
        next
    }
    /^ +(string|uint32|uint64|object path)/ && member != "PropertiesChanged" {
        value = $0
        sub(/^ +(string|uint32|uint64|object path) /, "", value)
        arguments = arguments (arguments == "" ? "" : ", ") value
    }
    END { show(); printf "and %d times PropertiesChanged\n", changes }
' "$dir/signals.out"

# --- Two more, each of what changed ---

newest() {
    find "$dir/backups/demo" -mindepth 1 -maxdepth 1 -name '[0-9]*' -printf '%T@ %f\n' | sort -n | tail -n 1 | cut -d ' ' -f 2
}
first=$(newest)
for change in 1 2; do
    step "4 MiB are written, and backed up: only what changed is copied"
    guest_write vda $((200 + change)) "$((300 + change * 20))M" 4M
    sync_monitor
    echo "$ backupctl create demo"
    as nobody "$dir/backupctl" create demo || fail "the backup ended with status $?"
done

# --- The proof ---

step "The VM is stopped, and each image is compared with its disk"
monitor quit
wait "$vm" || fail "QEMU ended with status $?"
ended "$vm"
image() { # DISK: of the first backup
    local found=$dir/backups/demo/$first/$1.qcow2
    [ -f "$found" ] || fail "an image of $1 expected, and there is no $found"
    echo "$found"
}
vda=$(image vda)
vdb=$(image vdb)
compare() { qemu-img compare -q -f qcow2 -F qcow2 "$1" "$2"; }
compare "$vda" "$dir/vda-before.qcow2" || fail "the image of vda is not what the disk held at the point in time"
echo "vda: identical to the disk at the start of the backup"
! compare "$vda" "$dir/vda.qcow2" || fail "the disk vda was not written to meanwhile: that proves nothing"
echo "vda: without the 64 MiB that were written meanwhile, which are on the disk"
compare "$vdb" "$dir/vdb.qcow2" || fail "the image of vdb is not what the disk holds"
echo "vdb: identical to the disk"

# --- Use of the backups ---

step "The list of the backups"
echo "$ backupctl backups demo"
"$dir/backupctl" backups demo

step "All of them are verified, from the store alone: without the service, and without rights on the VM"
echo "$ backupctl verify --all --from $dir/backups"
"$dir/backupctl" verify --all --from "$dir/backups"

step "The last one is restored, and compared with the disks as they are now"
last=$(newest)
mkdir "$dir/restored"
echo "$ backupctl restore $last --from $dir/backups --to $dir/restored"
"$dir/backupctl" restore "$last" --from "$dir/backups" --to "$dir/restored"
for id in vda vdb; do
    compare "$dir/restored/$id.qcow2" "$dir/$id.qcow2" || fail "what was restored of $id is not what the disk holds"
    echo "$id: identical to the disk"
done

step "The first is deleted; its dependent is made independent before, and stays"
echo "$ backupctl delete --merge $first"
"$dir/backupctl" delete --merge "$first"
"$dir/backupctl" backups demo
compare "$dir/backups/demo/$last/vda.qcow2" "$dir/vda.qcow2" || fail "the last backup does not show what it did"
echo "the last one: still identical to the disk"

step "Prune would remove those that no rule keeps"
echo "$ backupctl prune demo --keep-last 1 --dry-run"
"$dir/backupctl" prune demo --keep-last 1 --dry-run

step "The files"
echo "the service's store     $dir/backups"
(cd "$dir/backups" && find . -type f -printf '    %10s bytes  %P\n' | sort -k 3)
echo "the VM's disks          $dir/vda.qcow2 $dir/vdb.qcow2"
echo "the service's log       $dir/backupd.log"
echo
[ -n "${DEMO_KEEP:-}" ] || echo "All of it is removed now; DEMO_KEEP=1 make demo keeps it."
