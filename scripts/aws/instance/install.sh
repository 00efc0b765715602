#!/usr/bin/env bash
# What Ubuntu lacks, and .venv: bash install.sh
set -euo pipefail
cd "$(dirname "$0")/../../.."
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
    # cloud-init and Ubuntu's own updates may be at the packages too; the lists' lock has no timeout.
    if command -v cloud-init >/dev/null; then cloud-init status --wait >/dev/null || true; fi
    for _ in $(seq 30); do
        if sudo apt-get -qq -o DPkg::Lock::Timeout=300 update; then break; fi
        sleep 10
    done
    sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq -o DPkg::Lock::Timeout=300 install -y \
        python3-venv >/dev/null
fi
bash scripts/setup.sh requirements.txt
