#!/usr/bin/env bash
# Stop the machine in a while, or not at all: sudo bash poweroff.sh 10min|2h|never
# The last one counts.
set -euo pipefail
systemctl stop resnet50-poweroff.timer 2>/dev/null || true
if [ "$1" != never ]; then
    systemd-run --quiet --on-active="$1" --unit=resnet50-poweroff systemctl poweroff
fi
