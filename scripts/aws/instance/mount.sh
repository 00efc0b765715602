#!/usr/bin/env bash
# Mount an EBS volume: sudo bash mount.sh VOLUME_ID FOLDER
# It gets a file system only if there is nothing on it at all; what is there is never formatted.
set -euo pipefail
volume=$1 folder=$2
# NVMe devices bear the volume's id without its dash as their serial number.
device=/dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_${volume/-/}
if mountpoint -q "$folder"; then exit 0; fi
for _ in $(seq 120); do # it may still be on its way
    if [ -e "$device" ]; then break; fi
    sleep 1
done
if [ ! -e "$device" ]; then
    echo "error: volume $volume is not attached to this instance: no $device" >&2
    exit 2
fi
# As after a formatting that was broken off.
advice="if nothing there is to be kept, detach and delete it, and the same command makes another"
# blkid ends with 2 where it knows nothing of what is on a device.
status=0
found=$(blkid --probe --output export "$device") || status=$?
if [ "$status" = 2 ] && ! cmp -s --bytes=1048576 "$device" /dev/zero; then
    echo "error: volume $volume holds something that is no file system: left as it is; $advice" >&2
    exit 2
elif [ "$status" = 2 ]; then
    mkfs.ext4 -q -m 0 "$device"
elif [ "$status" != 0 ] || ! grep -q ^USAGE=filesystem <<<"$found"; then
    echo "error: volume $volume has no file system of its own (${found//$'\n'/, }): left as it is;" \
        "$advice" >&2
    exit 2
fi
mkdir -p "$folder"
mount "$device" "$folder"
