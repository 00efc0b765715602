#!/usr/bin/env bash
# After the trainer: where it will not be started again, stop the machine in ten minutes.
# systemd tells how it ended; see resnet50-trainer.service for what is started again.
set -euo pipefail
case ${EXIT_CODE:-}/${EXIT_STATUS:-} in
exited/75) exit 0 ;; # interrupted with everything saved
exited/*) ;;         # finished, failed, or out of budget
*) exit 0 ;;         # killed, or stopped before it began
esac
if [ "$WHEN_DONE" = stop ]; then
    systemd-run --quiet --on-active=10min --unit=resnet50-poweroff systemctl poweroff
fi
