#!/usr/bin/env bash
# The trainer, with the settings of aws.env, on the store where it is read fastest.
set -euo pipefail
cd "$(dirname "$0")/../../.."
data=/mnt/data/$STORE
for nvme in /opt/dlami/nvme /mnt/nvme; do
    if [ -e "$nvme/$STORE.sha256" ]; then data=$nvme/$STORE; fi
done
# Without its GPU, after an update of the driver perhaps, the machine is not worth its price.
# shellcheck disable=SC2086  # TRAINER_OPTIONS is several words
exec .venv/bin/python trainer.py --device cuda --runs-folder /mnt/runs --train-folder-name "$data" \
    --val-folder-name "$data" $TRAINER_OPTIONS "$@"
