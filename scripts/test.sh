#!/usr/bin/env bash
# Set up what the tests need, then run every one: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt

# The app is tested in a real browser.
browser=$(command -v chromium || command -v chromium-browser || command -v google-chrome || true)
if [ -z "$browser" ]; then
    if ! command -v apt-get >/dev/null; then
        echo "error: the tests need Chromium: install it, so that \`chromium\` is on the PATH" >&2
        exit 2
    fi
    sudo=$([ "$(id -u)" = 0 ] || echo sudo)
    $sudo apt-get update -qq
    $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null
fi

bin=.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" scripts/*.sh .ci/run
# A process a core, each with one thread: two processes of two threads would wait for each other.
exec env OMP_NUM_THREADS=1 "$bin/python" -m pytest -n auto --dist worksteal "$@"
