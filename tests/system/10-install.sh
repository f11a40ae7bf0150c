# The package is installed, and the first call starts the service.
# shellcheck shell=bash

test_the_system_runs_the_bus_under_test() {
    local runs
    runs=$(systemctl show --property=Id --value dbus.service)
    case $BUS in
    dbus-broker) [ "$runs" = dbus-broker.service ] ;;
    *) [ "$runs" = dbus.service ] ;;
    esac
}

test_the_package_installs_with_its_dependencies() {
    dpkg --install /backupd-tests/backupd.deb
    dpkg --audit
    [ -z "$(dpkg --verify backupd)" ]
}

test_installing_starts_nothing() {
    runs_not
    [ "$(systemctl is-enabled backupd.service || true)" = disabled ]
    [ "$(systemctl is-enabled backupd-backup@web.timer || true)" = disabled ]
}

test_the_installed_units_are_without_fault_and_their_exposure_at_most_one_point_three() {
    local said unit
    for unit in backupd.service backupd-look.socket backupd-look@1.service backupd-backup@web.service backupd-backup@web.timer; do
        said=$(systemd-analyze verify --man=no "$unit" 2>&1)
        [ -z "$said" ] || fail "$said"
    done
    for unit in backupd.service backupd-look@.service; do
        systemd-analyze security --offline=yes --threshold=13 "/usr/lib/systemd/system/$unit"
    done
}

test_manual_pages_completions_and_examples_are_there() {
    local page
    for page in man1/backupctl.1 man1/backupctl-create.1 man5/backupd.toml.5 man5/domainbackup.5 man8/backupd.8; do
        contains "$(gzip -dc "/usr/share/man/$page.gz")" .TH
    done
    bash -n /usr/share/bash-completion/completions/backupctl
    [ -s /usr/share/zsh/vendor-completions/_backupctl ]
    [ -s /usr/share/fish/vendor_completions.d/backupctl.fish ]
    [ -s /usr/share/doc/backupd/examples/polkit-rules/50-backupd-anna-web.rules ]
}

test_the_directory_for_domains_exists_before_the_service_runs() {
    [ -d /run/backupd/domains.d ]
    [ ! -e /var/lib/backupd ]
}

test_the_first_call_on_the_bus_starts_the_service() {
    as nobody backupctl domains
    runs || fail "the service is $(state)"
    owns_name
    [ "$(systemctl show --property=Type --value backupd.service)" = notify ]
}

test_the_socket_of_the_helper_is_there_with_the_service_and_for_root_alone() {
    systemctl --quiet is-active backupd-look.socket
    [ "$(stat --format '%U %a %F' /run/backupd/look.socket)" = "root 600 socket" ]
}

test_the_state_directory_is_for_root_alone() {
    [ "$(stat --format '%U %a' /var/lib/backupd)" = "root 700" ]
}

test_polkit_has_the_actions_of_the_service() {
    pkaction --action-id org.example.backup1.domain.backup
}
