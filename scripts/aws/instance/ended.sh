#!/usr/bin/env bash
# After the trainer: where it will not be started again, stop the machine in ten minutes.
# systemd tells how it ended; see resnet50-trainer.service for what is started again.
set -euo pipefail
case ${EXIT_CODE:-}/${EXIT_STATUS:-}/${SERVICE_RESULT:-} in
exited/75/* | exited/78/*) again=yes ;; # interrupted with everything saved; its mirror does not answer
# Finished, failed, or out of budget; 77: /mnt/runs keeps what was not copied. What comes before the
# trainer has failed, or SIGTERM met it before it began.
*/success | */exit-code) again=no ;;
*) again=yes ;; # killed
esac
# What ends so at every start would pay for ever.
if [ $again = yes ]; then
    if [ "$(systemctl show --property NRestarts --value resnet50-trainer)" -lt 10 ]; then exit 0; fi
fi
if [ "${WHEN_DONE:-stop}" = stop ]; then bash scripts/aws/instance/poweroff.sh 10min; fi
