#!/usr/bin/env bash
# Install, look whether the machine can do the job, and start the trainer for good:
#   bash bootstrap.sh
# From then on systemd starts it at every start of the machine.
set -euo pipefail
cd "$(dirname "$0")/../../.."
bash scripts/aws/instance/install.sh
set -a
# shellcheck disable=SC1091
. ./aws-instance.env
set +a
sudo --preserve-env bash scripts/aws/instance/start.sh
echo "looking whether this machine can do the job ..."
bash scripts/aws/instance/train.sh --dry-run
sed -e "s|@USER@|$(id -un)|" -e "s|@FOLDER@|$PWD|" \
    scripts/aws/instance/resnet50-trainer.service >resnet50-trainer.service
sudo systemctl daemon-reload
sudo systemctl enable --now "$PWD/resnet50-trainer.service"
