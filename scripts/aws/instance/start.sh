#!/usr/bin/env bash
# Before the trainer, at every start of the machine: mount the volumes, and copy the store to the
# local NVMe disk where there is one. It is empty after a stop.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=scripts/aws/instance
failed() { if [ "$WHEN_DONE" = stop ]; then bash $here/poweroff.sh 10min; fi; }
trap failed ERR # without it a machine that cannot train would wait, and cost, for ever
bash $here/mount.sh "$DATA_VOLUME" /mnt/data
bash $here/mount.sh "$RUNS_VOLUME" /mnt/runs
chown "$TRAINER_USER" /mnt/runs

nvme=/opt/dlami/nvme # where the Deep Learning AMI mounts it by itself
if ! mountpoint -q $nvme; then
    nvme=/mnt/nvme
    device=$(find /dev/disk/by-id -name 'nvme-Amazon_EC2_NVMe_Instance_Storage_*' | sort | head -n 1)
    if [ -n "$device" ] && ! mountpoint -q $nvme; then
        mkdir -p $nvme
        if ! blkid --probe "$device" >/dev/null; then mkfs.ext4 -q -m 0 "$device" || true; fi
        mount "$device" $nvme || echo "the local disk cannot be used: training reads the volume"
    fi
fi
# Between two starts without a stop it is there already. The trainer checks each picture it reads.
if mountpoint -q $nvme && ! cmp -s "/mnt/data/$STORE.sha256" "$nvme/$STORE.sha256"; then
    echo "copying $STORE to $nvme"
    if [ ! -e "/mnt/data/$STORE" ]; then
        echo "there is no $STORE on the volume with the data"
    elif cp "/mnt/data/$STORE" "$nvme/$STORE" && cp "/mnt/data/$STORE.sha256" $nvme; then
        echo "copied"
    else
        echo "no room there: training reads the volume"
        rm -f "$nvme/$STORE" "$nvme/$STORE.sha256"
    fi
fi
