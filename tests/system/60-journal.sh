# What all that left in the journal.
# shellcheck shell=bash

test_the_journal_has_no_error_of_anybody() {
    local errors
    errors=$(journalctl --no-pager --boot --quiet --priority=err --output=short | head -n 20)
    [ -z "$errors" ] || fail "$errors"
}

test_the_journal_has_no_warning_about_the_service_but_of_the_kill() {
    local warnings
    warnings=$(journalctl --no-pager --boot --quiet --priority=warning --output=cat --grep='backupd|Backup1')
    [ "$warnings" = "backupd.service: Main process exited, code=killed, status=9/KILL
backupd.service: Failed with result 'signal'." ] || fail "$warnings"
}
