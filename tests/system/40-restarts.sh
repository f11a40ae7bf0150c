# The service ends in the middle of a backup, and comes back knowing.
# shellcheck shell=bash

test_a_backup_outlives_the_service_being_killed() {
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

test_a_backup_that_ended_while_nobody_looked_has_its_true_outcome() {
    local id
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    stop_service
    ended() { contains "$(backup_job web)" '"status": "concluded"'; }
    # The speed is QEMU's: nobody else is there to change it.
    let_it_go web
    until_true "QEMU to have copied" ended
    backupctl watch "$id"
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_what_was_backed_up_is_known_after_a_restart() {
    local before
    before=$(backupctl jobs --all --json)
    contains "$before" completed
    stop_service
    [ "$(backupctl jobs --all --json)" = "$before" ]
    runs
}
