#!/usr/bin/env bash
# Download and pack a data set onto the data volume: bash prepare.sh VOLUME_ID DATA_SET
# What is done already is not done again.
set -euo pipefail
volume=$1 data_set=$2
cd "$(dirname "$0")/../../.."
sudo bash scripts/aws/instance/mount.sh "$volume" /mnt/data
sudo chown "$(id -un)" /mnt/data
bash scripts/aws/instance/install.sh
if [ "$data_set" = imagenette ]; then
    .venv/bin/python scripts/prepare_data.py imagenette data/imagenette
    .venv/bin/python scripts/prepare_data.py pack data/imagenette /mnt/data/imagenette.store
else
    .venv/bin/python -m pip install --quiet --disable-pip-version-check kaggle
    # The Kaggle CLI stands in .venv/bin.
    PATH=$PWD/.venv/bin:$PATH .venv/bin/python scripts/prepare_data.py "$data_set" data \
        --store "/mnt/data/$data_set.store"
fi
sudo umount /mnt/data # so that all of it is in the snapshot
