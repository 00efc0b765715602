#!/usr/bin/env bash
# Install, look whether the machine can do the job, and start the trainer for good:
#   bash bootstrap.sh
# From then on systemd starts it at every start of the machine.
set -euo pipefail
cd "$(dirname "$0")/../../.."
here=scripts/aws/instance
set -a
# shellcheck disable=SC1091
. ./aws-instance.env
set +a
sudo bash $here/poweroff.sh never # a run that had ended may have asked for it
# Started by the bootstrap before this one, whose end nobody saw: launch stops it for other settings.
case $(systemctl is-active resnet50-trainer) in
active | activating)
    echo "training runs here already"
    exit 0
    ;;
esac
failed() {
    if [ "$WHEN_DONE" = stop ]; then
        sudo bash $here/poweroff.sh 10min
        echo "this machine stops in ten minutes, unless launch is given again"
    fi
}
trap failed ERR
# First, since EC2 may take the machine during the rest: given back, it goes on by itself.
sed -e "s|@USER@|$(id -un)|" -e "s|@FOLDER@|$PWD|" \
    $here/resnet50-trainer.service >resnet50-trainer.service
sudo systemctl daemon-reload
sudo systemctl enable "$PWD/resnet50-trainer.service"
bash $here/install.sh
sudo --preserve-env bash $here/start.sh
echo "looking whether this machine can do the job ..."
bash $here/train.sh --dry-run
sudo systemctl start resnet50-trainer
