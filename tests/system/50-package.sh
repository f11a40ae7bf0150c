# The package is upgraded and removed while the service runs.
# shellcheck shell=bash

test_an_upgrade_restarts_the_service_and_its_backups_continue() {
    local id before
    id=$(start_slow_backup web)
    until_true "QEMU to copy" copies web
    before=$(main_pid)
    dpkg --install /backupd-tests/backupd-next.deb
    another() { runs && [ "$(main_pid)" != "$before" ]; }
    until_true "the new service to run" another
    copies web
    finish_backup "$id"
    same_as_disk web /srv/vm "$(newest_image web)"
    has_nothing_of_ours web
}

test_an_upgrade_waits_for_exports() {
    local before said id export
    before=$(main_pid)
    id=$(basename "$(dirname "$(newest_image web)")")
    # backupctl serves the disk until it gets SIGTERM.
    backupctl export "$id" --socket /run/export.nbd >/run/export.out 2>&1 &
    export=$!
    until_true "the disk to be served" test -S /run/export.nbd
    said=$(dpkg --install /backupd-tests/backupd.deb)
    contains "$said" "the previous version runs until"
    [ "$(main_pid)" = "$before" ]
    qemu-img info "nbd+unix:///vda?socket=/run/export.nbd"
    backupctl domains
    [ "$(main_pid)" = "$before" ]
    kill "$export"
    wait "$export" || true
    another() { runs && [ "$(main_pid)" != "$before" ]; }
    until_true "the new service to run" another
    dpkg --install /backupd-tests/backupd-next.deb
}

test_an_upgrade_does_not_start_a_stopped_service() {
    stop_service
    dpkg --install /backupd-tests/backupd.deb
    runs_not
    dpkg --install /backupd-tests/backupd-next.deb
    runs_not
}

test_an_upgrade_keeps_the_configuration() {
    echo '# changed' >>/etc/backupd/backupd.toml
    dpkg --install --force-confold /backupd-tests/backupd.deb
    grep -qx '# changed' /etc/backupd/backupd.toml
    dpkg --install --force-confold /backupd-tests/backupd-next.deb
    [ -e /etc/backupd/domains.d/web.toml ]
}

test_an_upgrade_from_a_version_without_the_helper_starts_the_helper() {
    local old=/root/old unit=/root/old/usr/lib/systemd/system before accepted
    dpkg-deb --raw-extract /backupd-tests/backupd.deb "$old"
    sed -i 's/^Version: .*/Version: 0.0.1/' "$old/DEBIAN/control"
    rm "$unit/backupd-look.socket" "$unit/backupd-look@.service"
    # Without the helper, the service needs the helper's capability.
    sed -i -e '/look\.socket/d' -e 's/^CapabilityBoundingSet=.*/& CAP_SYS_PTRACE/' "$unit/backupd.service"
    dpkg-deb --build -Znone "$old" "$old.deb"
    stop_service
    systemctl stop backupd-look.socket
    dpkg --install "$old.deb"
    rm -r "$old" "$old.deb"
    backupctl domains
    [ "$(systemctl show --property=LoadState --value backupd-look.socket)" = not-found ]
    not contains "$(systemctl show --property=Environment backupd.service)" BACKUPD_LOOK
    before=$(main_pid)
    dpkg --install /backupd-tests/backupd-next.deb
    another() { runs && [ "$(main_pid)" != "$before" ]; }
    until_true "the new service to run" another
    systemctl --quiet is-active backupd-look.socket
    until_true "the service to reach the VM" knows web
    accepted=$(systemctl show --property=NAccepted --value backupd-look.socket)
    backupctl create web --disk "vda=$DISK" --format raw
    [ "$(systemctl show --property=NAccepted --value backupd-look.socket)" -gt "$accepted" ]
}

can_be_started() { busctl --system --no-legend list --activatable | grep -q '^org\.example\.Backup1 '; }

test_removal_stops_the_service_and_its_timers_and_unregisters_the_name() {
    systemctl enable --now backupd-backup@web.timer
    backupctl domains
    runs
    local pid
    pid=$(main_pid)
    dpkg --remove backupd
    [ ! -e "/proc/$pid" ]
    not owns_name
    not can_be_started
    [ ! -e /run/backupd/look.socket ]
    not systemctl --quiet is-active backupd-backup@web.timer
    [ "$(systemctl show --property=LoadState --value backupd.service)" = not-found ]
    [ -z "$(systemctl --failed --no-legend --plain)" ]
}

test_removal_keeps_configuration_records_and_backups() {
    [ -e /etc/backupd/backupd.toml ]
    [ -e /etc/backupd/domains.d/web.toml ]
    same_as_disk web /srv/vm "$(newest_image web)"
}

test_a_reinstalled_package_keeps_its_records() {
    dpkg --install /backupd-tests/backupd-next.deb
    until_true "the service to reach the machine" knows web
}

test_purging_removes_the_records_and_never_a_backup() {
    local image
    image=$(newest_image web)
    dpkg --remove backupd
    contains "$(dpkg --purge backupd)" "/var/lib/backupd is kept"
    same_as_disk web /srv/vm "$image"
    [ "$(ls -A /var/lib/backupd)" = backups ] || fail "left: $(ls -A /var/lib/backupd)"
    [ ! -e /etc/backupd/backupd.toml ]
    [ ! -L /etc/systemd/system/timers.target.wants/backupd-backup@web.timer ]
}

test_purging_without_backups_leaves_no_file() {
    rm -r /var/lib/backupd/backups /etc/backupd/domains.d/web.toml
    dpkg --install /backupd-tests/backupd-next.deb
    backupctl domains
    dpkg --purge backupd
    [ ! -e /var/lib/backupd ] || fail "left: $(find /var/lib/backupd)"
    [ ! -e /etc/backupd ] || fail "left: $(find /etc/backupd)"
    systemctl stop vm-web.service
}
