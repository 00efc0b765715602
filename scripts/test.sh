#!/usr/bin/env bash
# Set up what the tests need, then run every one: bash scripts/test.sh [pytest's arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh requirements-dev.txt
bin=.venv/bin

# SkyPilot checks scripts/sky.yaml, from an environment of its own. The stamp is written last.
if ! cmp -s requirements-sky.txt .venv-sky/installed; then
    echo "installing requirements-sky.txt into .venv-sky (half a minute and 330 MB) ..."
    "$bin/python" -m venv --clear .venv-sky
    .venv-sky/bin/python -m pip install --quiet --disable-pip-version-check --no-compile \
        -r requirements-sky.txt
    cp requirements-sky.txt .venv-sky/installed
fi

# The app is tested in a real browser. A snap's would not see the tests' files under /tmp.
has_browser() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        case $(command -v "$name" || true) in "" | /snap/*) ;; *) return 0 ;; esac
    done
    return 1
}
sudo=$([ "$(id -u)" = 0 ] || command -v sudo || true)
if ! has_browser; then
    # Debian has Chromium; where the packages have none but a snap, Playwright brings its own.
    if ! { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null ||
        ! has_browser; then
        "$bin/python" -m playwright install --with-deps chromium
    fi
fi
# Saving is tested with the faults that strace puts into its system calls; the AWS scripts on machines
# of their own, with systemd, sshd and a network; slow disks in user space.
missing=()
for needed in strace:strace ip:iproute2 /usr/sbin/sshd:openssh-server \
    /lib/systemd/systemd:systemd fusermount3:fuse3; do
    command -v "${needed%:*}" >/dev/null || missing+=("${needed#*:}")
done
if ! ldconfig -p | grep -q libfuse.so.2; then missing+=(libfuse2); fi
if [ ${#missing[@]} -gt 0 ]; then
    { $sudo apt-get update -qq && $sudo env DEBIAN_FRONTEND=noninteractive \
        apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >/dev/null
fi

# Full, a disk fails hundreds of tests with words that say little.
temporary=${TMPDIR:-/tmp}
if [ "$(df -Pk "$temporary" | awk 'NR == 2 { print $4 }')" -lt 8000000 ]; then
    echo "the tests write up to 8 GB into $temporary: make room there, or name another TMPDIR" >&2
    exit 1
fi

"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/shellcheck" scripts/*.sh scripts/aws/instance/*.sh .ci/run
# Processes of one thread each: two processes of two threads would wait for each other. One more than
# there are cores, since some of the tests wait for time-outs, servers and machines.
exec env OMP_NUM_THREADS=1 "$bin/python" -m pytest -n $(($(nproc) + 1)) --dist worksteal "$@"
