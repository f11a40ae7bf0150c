#!/bin/sh
# Starts polkitd with other actions and rules than the host's, on the bus of DBUS_SYSTEM_BUS_ADDRESS:
#     unshare --mount -- sh polkitd.sh ACTIONS RULES EMPTY
# The three directories replace those that polkitd reads. All users must be able to read them.
set -e
mount --bind "$1" /usr/share/polkit-1/actions
mount --bind "$2" /etc/polkit-1/rules.d
for place in /usr/share/polkit-1/rules.d /usr/local/share/polkit-1/rules.d /run/polkit-1/rules.d \
    /etc/polkit-1/actions /usr/local/share/polkit-1/actions /run/polkit-1/actions; do
    if [ -d "$place" ]; then mount --bind "$3" "$place"; fi
done
exec /usr/lib/polkit-1/polkitd --no-debug
