"""scripts/benchmark_memory.py: the real command on small pictures."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_images, run_stage_command

SCRIPT = REPOSITORY / "scripts" / "benchmark_memory.py"


def test_it_reads_the_memory_of_every_epoch_of_every_run(tmp_path: Path) -> None:
    make_images(tmp_path / "images", classes=2, images=4)
    output = tmp_path / "memory.json"
    done = run_stage_command(
        *(SCRIPT, tmp_path / "images", "--workers", 1, 2, "--epochs", 2, "--batch-size", 4),
        *("--output", output),
        from_nothing=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert set(record["anonymous_bytes_after_epochs"]) == {"1", "2"}
    for values in record["anonymous_bytes_after_epochs"].values():
        # At the least the weights, their gradients and their momentum, in float32.
        assert len(values) == 2 and min(values) > 3 * 4 * 23_500_000
    assert done.stdout.count("after epoch") == 4


def test_ended_early_it_ends_its_trainer_too(tmp_path: Path) -> None:
    make_images(tmp_path / "images", classes=2, images=4)
    command = [sys.executable, SCRIPT, tmp_path / "images", "--epochs", "100", "--batch-size", "4"]
    benchmark = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY)
    benchmark.stdout.readline()  # an epoch is over
    (trainer,) = Path(f"/proc/{benchmark.pid}/task/{benchmark.pid}/children").read_text().split()
    benchmark.send_signal(signal.SIGTERM)
    benchmark.communicate(timeout=60)
    assert benchmark.returncode == 75
    deadline = time.monotonic() + 10
    while Path(f"/proc/{trainer}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{trainer}").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["nowhere"], "no folder or store nowhere"),
        (["nowhere", "--workers", "0"], "workers and epochs must be 1 or more"),
    ],
)
def test_nonsense_ends_with_one_line(options: list[str], says: str) -> None:
    done = run_stage_command(SCRIPT, *options, from_nothing=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line
