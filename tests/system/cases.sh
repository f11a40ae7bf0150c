#!/bin/bash
# Runs inside the booted system: all cases of the files in this directory, in order. Each one continues with the state
# that the previous one left. A case is a function test_…, and its name is printed as a sentence.
#
#   cases.sh            all
#   cases.sh CASE       one of them, here and now
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
readonly here
export LC_ALL=C.UTF-8 SYSTEMD_PAGER='' HOME=/root
# A case waits for events with its own timeouts; this timeout is for a case that hangs.
readonly CASE_SECONDS=300

if [ $# = 1 ]; then
    # shellcheck source=fixture.sh
    . "$here/fixture.sh"
    for file in "$here"/[0-9]*.sh; do
        # shellcheck disable=SC1090
        . "$file"
    done
    trap 'echo "line $LINENO of ${BASH_SOURCE[0]##*/}: $BASH_COMMAND"' ERR
    set -eE
    "$1"
    exit
fi

status=0
for name in $(sed -n 's/^\(test_[a-z0-9_]*\)() *{.*/\1/p' "$here"/[0-9]*.sh); do
    sentence=${name#test_}
    sentence=${sentence//_/ }
    echo "$sentence" >"$here/case"
    began=$(date +%s.%N)
    if timeout --kill-after=10 "$CASE_SECONDS" bash "$here/cases.sh" "$name" >"$here/output" 2>&1; then
        result=ok
    else
        result="not ok" status=1
    fi
    echo "$result - $sentence ($(awk -v began="$began" -v now="$(date +%s.%N)" 'BEGIN { printf "%.1f", now - began }') s)"
    [ "$result" = ok ] || {
        sed 's/^/    /' "$here/output"
        echo "    --- the service's log"
        journalctl -u backupd.service --no-pager -n 15 -o cat | sed 's/^/    /'
    }
done
touch "$here/ended"
exit "$status"
