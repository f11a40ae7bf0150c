# The idle service exits, and callers do not notice.
# shellcheck shell=bash

readonly IDLE_DROP_IN=/run/systemd/system/backupd.service.d

leave_after() { # SECONDS; these calls come more often than anybody's, so systemd is to start it as often as it takes
    sed -i "1i idle-exit-seconds = $1" /etc/backupd/backupd.toml
    mkdir -p "$IDLE_DROP_IN"
    printf '[Unit]\nStartLimitIntervalSec=0\n' >"$IDLE_DROP_IN/tests.conf"
    systemctl daemon-reload
    systemctl stop backupd.service
    trap leave_as_ever EXIT
}
leave_as_ever() {
    sed -i '/^idle-exit-seconds/d' /etc/backupd/backupd.toml
    rm -r "$IDLE_DROP_IN"
    systemctl daemon-reload
    systemctl stop backupd.service
}
has_left() { runs_not && [ "$(systemctl show --property=Result --value backupd.service)" = success ]; }
invocation() { systemctl show --property=InvocationID --value backupd.service; }
copied() { # DOMAIN: how many bytes QEMU has copied
    backup_job "$1" | sed -n 's/.*"current-progress": \([0-9]*\).*/\1/p'
}

test_the_idle_service_exits_and_the_next_call_starts_it() {
    leave_after 1
    backupctl domains
    local before
    before=$(invocation)
    until_true "the service to leave" has_left
    not owns_name
    backupctl domains
    runs
    [ "$(invocation)" != "$before" ]
}

test_no_call_is_lost_while_the_service_exits() {
    leave_after 0.05
    local before after i starts=0
    before=$(invocation)
    for i in {1..60}; do
        # At later and later moments of the exit.
        sleep "0.$(printf %03d $((i * 3)))"
        backupctl domains
        after=$(invocation)
        [ "$after" = "$before" ] || starts=$((starts + 1))
        before=$after
    done
    [ "$starts" -gt 5 ] || fail "it was started only $starts times: the calls never met it leaving"
}

test_the_service_stays_during_a_backup_and_exits_after_it() {
    leave_after 0.1
    local id pid first
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    pid=$(main_pid)
    first=$(copied web)
    # Seconds without a call.
    goes_on() { [ "$(copied web)" -gt $((first + 524288)) ]; }
    until_true "QEMU to have copied more" goes_on
    [ "$(main_pid)" = "$pid" ]
    finish_backup "$id"
    until_true "the service to leave" has_left
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_an_upgrade_does_not_start_an_idle_service() {
    leave_after 0.1
    backupctl domains
    until_true "the service to leave" has_left
    dpkg --install /backupd-tests/backupd-next.deb
    runs_not
    dpkg --install /backupd-tests/backupd.deb
    runs_not
    backupctl domains
}
