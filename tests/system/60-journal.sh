# The journal after all other cases.
# shellcheck shell=bash

# A backup that failed on purpose.
readonly WANTED='backupd-backup@no.x20such'

test_the_journal_has_no_errors() {
    local errors
    errors=$(journalctl --no-pager --boot --quiet --priority=err --output=short | grep -v "$WANTED" | head -n 20 || true)
    [ -z "$errors" ] || fail "$errors"
}

test_the_journal_has_no_warnings_about_the_service_except_the_provoked_ones() {
    local warnings kill="backupd.service: Main process exited, code=killed, status=9/KILL
backupd.service: Failed with result 'signal'."
    # The helper that got a malformed question: its instance has the number of the connection in its name.
    local malformed="backupd-look@.service: Failed with result 'exit-code'."
    warnings=$(journalctl --no-pager --boot --quiet --priority=warning --output=cat --grep='backupd|Backup1' |
        grep -v "$WANTED" | sed 's/^backupd-look@[^.]*\.service: /backupd-look@.service: /')
    [ "$warnings" = "$malformed
$kill
$kill" ] || fail "$warnings"
}
