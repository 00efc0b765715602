#!/usr/bin/env bash
# What Ubuntu lacks, and .venv: bash install.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    # cloud-init may be at the packages too.
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y \
        python3-venv >/dev/null
fi
bash scripts/setup.sh requirements.txt
