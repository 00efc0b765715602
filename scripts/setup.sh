#!/usr/bin/env bash
# Make .venv and install a requirements file into it: bash scripts/setup.sh requirements.txt
# Done already, it ends at once. PYTHON names the interpreter to make .venv with.
set -euo pipefail
cd "$(dirname "$0")/.."
requirements=$1

fits() { # Python 3.11 to 3.13: TorchScript ends there
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

if [ ! -x .venv/bin/python ]; then
    pythons=(python3 python3.13 python3.12 python3.11)
    if [ -n "${PYTHON:-}" ]; then pythons=("$PYTHON"); fi
    for python in "${pythons[@]}"; do
        if fits "$python"; then break; fi
    done
    if ! fits "$python"; then
        echo "error: no Python 3.11, 3.12 or 3.13 found: install one, or name it: PYTHON=/its/path" >&2
        exit 2
    fi
    "$python" -m venv .venv || {
        rm -rf .venv
        echo "error: $python cannot make .venv: on Debian and Ubuntu, apt install python3-venv" >&2
        exit 2
    }
elif ! fits .venv/bin/python; then
    echo "error: .venv has another Python than 3.11, 3.12 or 3.13: remove it, and try again" >&2
    exit 2
fi
# The stamp is written last, so that a broken-off installation is done again.
stamp=.venv/installed-${requirements%.txt}
wanted=$({ .venv/bin/python -V && cat requirements*.txt; } | sha256sum) # a newer Python finds no packages
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing $requirements into .venv (some minutes and 6 GB, most of it PyTorch) ..."
    .venv/bin/python -m ensurepip >/dev/null # where making .venv was broken off before it
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$requirements"
    # requirements-dev.txt holds requirements.txt.
    echo "$wanted" | tee "$stamp" >.venv/installed-requirements
fi
