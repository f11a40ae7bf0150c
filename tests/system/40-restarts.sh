# The service ends in the middle of a backup, and the next one resumes it.
# shellcheck shell=bash

test_a_backup_continues_after_the_service_is_killed() {
    local id killed
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    killed=$(main_pid)
    kill -KILL "$killed"
    back() { runs && [ "$(main_pid)" != "$killed" ]; }
    until_true "the service to be started again" back
    copies web
    finish_backup "$id"
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_a_stop_leaves_the_backup_running_in_qemu_and_the_next_call_finds_it() {
    local id
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    stop_service
    copies web
    contains "$(backupctl show "$id")" running
    runs
    finish_backup "$id"
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_a_backup_that_ended_without_a_service_has_its_true_outcome() {
    local id
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    stop_service
    ended() { contains "$(backup_job web)" '"status": "concluded"'; }
    # QEMU keeps the bandwidth: no service runs to change it.
    let_it_go web
    until_true "QEMU to have copied" ended
    backupctl watch "$id"
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_backups_are_listed_after_a_restart() {
    local before
    before=$(backupctl jobs --all --json)
    contains "$before" completed
    stop_service
    [ "$(backupctl jobs --all --json)" = "$before" ]
    runs
}

# Plays a guest's agent, for one client at a time, as QEMU's socket does: it writes the received commands to a file.
# The service is killed while the guest is frozen.
start_agent() { # SOCKET
    cat >/srv/vm/agent <<'EOF'
#!/bin/bash
export LC_ALL=C
while read -r line; do
    case $line in
    *guest-sync-delimited*)
        id=${line##*\"id\":}
        printf '\xff{"return": %s}\n' "${id%%[!0-9]*}"
        ;;
    *fsfreeze-freeze*)
        echo freeze >>/run/agent-was-told
        systemctl kill --kill-whom=main --signal=KILL backupd.service
        echo '{"return": 1}'
        ;;
    *fsfreeze-status*)
        echo '{"return": "thawed"}'
        ;;
    *fsfreeze-thaw*)
        echo thaw >>/run/agent-was-told
        echo '{"return": 1}'
        ;;
    esac
done
EOF
    chmod 755 /srv/vm/agent
    systemd-run --quiet --unit=agent --property=SuccessExitStatus=143 socat "UNIX-LISTEN:$1,fork,max-children=1" EXEC:/srv/vm/agent
    until_true "the agent" test -S "$1"
}

is_undone() {
    knows web || return
    case $(qmp web query-named-block-nodes) in *'"node-name": "backupd-'*) return 1 ;; esac
}

main_pid_is_not() { [ "$(main_pid)" != "$1" ]; }
was_thawed() { [ "$(head -n 2 /run/agent-was-told | tr '\n' ' ')" = "freeze thaw " ]; }
log_has() { journalctl -u backupd.service -o cat | grep -Fq "$1"; }

test_a_guest_is_thawed_when_the_service_is_killed_with_it_frozen() {
    local killed
    start_agent /run/vm-web/agent
    {
        echo 'monitor = "/run/vm-web/service"'
        echo 'agent = "/run/vm-web/agent"'
    } >/etc/backupd/domains.d/.web
    mv /etc/backupd/domains.d/.web /etc/backupd/domains.d/web.toml
    # Its firmware finds nothing to boot: the VM runs without writing.
    contains "$(qmp web cont)" '"return": {}'
    until_true "the service to see it run" sh -c "backupctl domains | grep -Eq '^web +running'"
    killed=$(main_pid)
    contains "$(status_of backupctl create web --quiesce require 2>&1)" "status 1"
    # The caller may see the bus name disappear before systemd has noticed the end of the process, and before the guard
    # has thawed the guest.
    until_true "systemd to see the service killed" main_pid_is_not "$killed"
    until_true "the guest to be thawed" was_thawed
    # The guard works in the sandbox, and systemd lets it finish, so the thaw does not depend on the next service.
    until_true "the guard's line in the journal" log_has "the guard thaws the guest's file systems"
    # The call ended with the service: the next call starts the service again, which rolls back the unfinished backup.
    until_true "the backup to be undone" is_undone
    has_nothing_of_ours web
    contains "$(qmp web stop)" '"return": {}'
    systemctl stop agent.service
    configure_vm web
    until_true "the service to reach the machine" knows web
}
