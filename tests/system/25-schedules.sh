# Nightly backups by a timer for each VM.
# shellcheck shell=bash

readonly DROPINS=/etc/systemd/system

backups_of() { # DOMAIN: how many there are
    find "$STORE/$1" -mindepth 1 -maxdepth 1 -name '2*' | wc -l
}
dropin() { # UNIT LINE...
    local unit=$1
    shift
    mkdir -p "$DROPINS/$unit.d"
    printf '%s\n' "$@" >"$DROPINS/$unit.d/tests.conf"
    systemctl daemon-reload
}
no_dropins() {
    rm -rf "$DROPINS"/backupd-backup@*.d
    systemctl daemon-reload
}
failed_units() { systemctl --failed --no-legend --plain | cut -d ' ' -f 1; }

test_a_vm_is_backed_up_every_night_when_its_timer_is_enabled() {
    [ -z "$(systemctl list-timers --all --no-legend 'backupd-backup@*')" ]
    systemctl enable --now backupd-backup@web.timer
    contains "$(systemctl list-timers --no-legend)" backupd-backup@web.service
    [ -L /etc/systemd/system/timers.target.wants/backupd-backup@web.timer ]
}

test_the_unit_of_the_timer_ends_with_its_backup() {
    local before
    before=$(backups_of web)
    stop_service
    systemctl start backupd-backup@web.service
    [ "$(backups_of web)" = $((before + 1)) ]
    same_as_disk web /srv/vm "$(newest_image web)"
    [ "$(systemctl is-active backupd-backup@web.service || true)" = inactive ]
    contains "$(journalctl -u backupd-backup@web.service -o cat)" "of web completed"
    [ -z "$(failed_units)" ]
}

test_a_drop_in_adds_options_to_the_backup() {
    local newest
    dropin backupd-backup@web.service '[Service]' 'Environment="BACKUPCTL_ARGS=--format raw --bandwidth 1G"'
    systemctl start backupd-backup@web.service
    newest=$(newest_image web)
    same_as_disk web /srv/vm "${newest%.qcow2}.raw" raw
    no_dropins
    # The other cases expect a qcow2 image.
    systemctl start backupd-backup@web.service
}

test_a_failed_backup_fails_its_unit_and_triggers_on_failure() {
    local unit
    # The unit gets the unescaped name.
    unit=$(systemd-escape --template=backupd-backup@.service 'no such-machine $HOME')
    printf '%s\n' '[Service]' 'Type=oneshot' 'ExecStart=/bin/sh -c "echo %i >/run/told-of-failure"' >"$DROPINS/tell@.service"
    dropin "$unit" '[Unit]' 'OnFailure=tell@%p.service'
    contains "$(status_of systemctl start "$unit" 2>&1)" "status 1"
    [ "$(failed_units)" = "$unit" ] || fail "failed are: $(failed_units)"
    contains "$(journalctl -u "$unit" -o cat)" "no such-machine \$HOME"
    until_true "the administrator to be told" grep -qx backupd-backup /run/told-of-failure
    no_dropins
    rm "$DROPINS/tell@.service"
    systemctl reset-failed
}

test_a_missed_backup_runs_after_the_boot() {
    local before
    before=$(backups_of web)
    systemctl stop backupd-backup@web.timer
    # A missed backup starts after this delay, counted from the boot.
    dropin backupd-backup@web.timer '[Timer]' RandomizedDelaySec=0
    [ "$(backups_of web)" = "$before" ]
    # As if the host had been off since then.
    touch -d '3 days ago' /var/lib/systemd/timers/stamp-backupd-backup@web.timer
    systemctl start backupd-backup@web.timer
    one_more() { [ "$(backups_of web)" = $((before + 1)) ]; }
    until_true "the backup" one_more
    ended() { [ "$(systemctl is-active backupd-backup@web.service || true)" = inactive ]; }
    until_true "its end" ended
    no_dropins
    same_as_disk web /srv/vm "$(newest_image web)"
}

test_a_vm_is_not_backed_up_any_more_when_its_timer_is_disabled() {
    systemctl disable --now backupd-backup@web.timer
    [ -z "$(systemctl list-timers --all --no-legend 'backupd-backup@*')" ]
}
