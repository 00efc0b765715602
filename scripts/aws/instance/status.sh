#!/usr/bin/env bash
# How the training is: the service, the newest run's last lines, what it cost.
set -uo pipefail
cd "$(dirname "$0")/../../.." || exit
echo "service: $(systemctl is-active resnet50-trainer)"
log=$(find /mnt/runs -mindepth 2 -maxdepth 2 -name train.log -printf '%T@ %p\n' 2>/dev/null |
    sort -rn | head -n 1 | cut -d ' ' -f 2-)
if [ -n "$log" ]; then
    tail -n 3 "$log"
    .venv/bin/python scripts/cost_report.py "$(dirname "$log")"
else
    journalctl -u resnet50-trainer -n 20 --no-pager -o cat 2>/dev/null
fi
