#!/usr/bin/env bash
# Make .venv and install a requirements file into it: bash scripts/setup.sh requirements.txt
# Done already, it ends at once. PYTHON names another interpreter than python3, for a new .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=$1
python=${PYTHON:-python3}

if [ ! -x .venv/bin/python ]; then
    if ! "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))'; then
        echo "error: $python is $("$python" --version): Python 3.11, 3.12 or 3.13 is needed" \
            "(TorchScript ends there); name one with PYTHON=python3.13" >&2
        exit 2
    fi
    "$python" -m venv .venv
fi
# The stamp is written last, so that a broken-off installation is done again.
stamp=.venv/installed-${requirements%.txt}
wanted=$(cat requirements*.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $requirements into .venv (some minutes and 6 GB, most of it PyTorch) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    # requirements-dev.txt holds requirements.txt.
    echo "$wanted" | tee "$stamp" >.venv/installed-requirements
fi
