#!/usr/bin/env bash
# Run a command on its own, so that it goes on when the connection breaks, and follow what it says:
#   bash detached.sh NAME COMMAND...
# While it runs, the same again follows it. NAME.log has what it said, NAME.status its exit code.
set -euo pipefail
name=$1
shift
exec 9>>"$name.lock" # held by the command, and by what it starts, until they end
if flock --nonblock 9; then
    rm -f "$name.status"
    : >"$name.log"
    # In a shell that ends at once: else it would stay a child of tail below, which would wait for
    # it for ever.
    (
        # shellcheck disable=SC2016  # the inner shell expands it
        setsid bash -c 'name=$1; shift; status=0; "$@" || status=$?; echo $status >"$name.status"' \
            - "$name" "$@" >>"$name.log" 2>&1 </dev/null &
        echo $! >"$name.pid"
    )
fi
exec 9>&-
exec tail --lines=+1 --follow --pid="$(cat "$name.pid")" "$name.log"
