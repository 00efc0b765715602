#!/usr/bin/env bash
# Download and pack a data set, and leave it on the data volume: bash prepare.sh VOLUME_ID DATA_SET
# What is done already is not done again.
set -euo pipefail
volume=$1 data_set=$2
store=$data_set.store
cd "$(dirname "$0")/../../.."
# Nobody may be there when it ends, well or not, and a machine that waits costs. prepare starts it again.
sudo bash scripts/aws/instance/poweroff.sh never
trap 'sudo bash scripts/aws/instance/poweroff.sh 1h' EXIT
sudo bash scripts/aws/instance/mount.sh "$volume" /mnt/data
sudo chown "$(id -un)" /mnt/data
if ! (cd /mnt/data && sha256sum --check --quiet --status "$store.sha256" 2>/dev/null); then
    bash scripts/aws/instance/install.sh
    if [ "$data_set" = imagenette ]; then
        .venv/bin/python scripts/prepare_data.py imagenette data/imagenette
        .venv/bin/python scripts/prepare_data.py pack data/imagenette "data/$store"
    else
        .venv/bin/python -m pip install --quiet --disable-pip-version-check kaggle
        .venv/bin/python scripts/prepare_data.py "$data_set" data
    fi
    # The sums last: with them the store is whole.
    cp "data/$store" "/mnt/data/$store"
    sync /mnt/data/"$store"
    cp "data/$store.sha256" "/mnt/data/$store.sha256"
    (cd /mnt/data && sha256sum --check --quiet "$store.sha256")
fi
sudo umount /mnt/data # so that all of it is in the snapshot
