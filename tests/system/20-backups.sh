# The permissions of callers, domains and targets under the example rules of the package.
# shellcheck shell=bash

readonly EXAMPLES=/usr/share/doc/backupd/examples/polkit-rules

test_a_vm_whose_sockets_belong_to_another_user_is_connected() {
    make_user vm
    make_user anna
    make_user bert
    install -d -o vm -m 700 /srv/vm
    start_vm web vm /srv/vm
    configure_vm web
    until_true "the service to reach the machine" knows web
}

test_a_backup_by_root_equals_the_disk() {
    backupctl create web
    same_as_disk web /srv/vm "$(newest_image web)"
    [ "$(stat --format '%U %a' "$(newest_image web)")" = "root 600" ]
    has_nothing_of_ours web
}

test_a_backup_is_verified_and_restored() {
    local id
    id=$(basename "$(dirname "$(newest_image web)")")
    backupctl verify "$id"
    # A path that the service's sandbox hides.
    mkdir -p /root/restored
    backupctl restore "$id" --to /root/restored
    same_as_disk web /srv/vm /root/restored/vda.qcow2
    rm -r /root/restored
}

test_an_ordinary_user_is_refused_without_a_rule() {
    contains "$(status_of as anna backupctl create web --no-ask-password 2>&1)" "status 4"
    has_nothing_of_ours web
}

test_an_ordinary_user_whom_a_rule_allows_makes_a_backup() {
    local rules
    for rules in 50-backupd-anna-web.rules 50-backupd-anna-export-own-files.rules; do
        # The file appears atomically, because polkit reads it at once.
        install -m 644 "$EXAMPLES/$rules" "/etc/polkit-1/rules.d/$rules.new"
        mv "/etc/polkit-1/rules.d/$rules.new" "/etc/polkit-1/rules.d/$rules"
    done
    allowed() { as anna backupctl create web --no-ask-password; }
    # polkit reads the rule a moment after the change.
    until_true "polkit to know the rule" allowed
    same_as_disk web /srv/vm "$(newest_image web)"
}

test_another_user_is_still_refused() {
    contains "$(status_of as bert backupctl create web --no-ask-password 2>&1)" "status 4"
}

test_a_user_who_may_use_the_store_may_not_name_a_path() {
    contains "$(status_of as anna backupctl create web --to /mnt --no-ask-password 2>&1)" "status 4"
    [ -z "$(ls -A /mnt)" ]
}
