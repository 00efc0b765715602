import json
import statistics
from pathlib import Path

import pytest
from conftest import run_stage_command


def test_it_measures_pauses_and_what_a_checkpoint_costs(tmp_path: Path) -> None:
    output = tmp_path / "save.json"
    command = ("scripts/benchmark_save.py", "--px", 32, "--batch-size", 2, "--saves", 2)
    brief = ("--pairs", 2, "--interval-s", 2, "--folder", tmp_path, "--output", output)
    done = run_stage_command(*command, *brief, from_nothing=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert (
        record["checkpoint_bytes"] > 12 * 25_557_032
    )  # weights, momentum and best weights, in float32
    assert len(record["pauses_s"]) == len(record["durable_s"]) == 2
    for pause_s, durable_s in zip(record["pauses_s"], record["durable_s"], strict=True):
        assert 0 < pause_s < durable_s
    assert record["steps_per_s_before_the_first"] > 0
    lost = [1 - first / second for first, second in record["steps_per_s_with_and_without"]]
    assert record["lost"]["pairs"] == pytest.approx(lost, abs=1e-3)
    assert record["lost"]["median"] == statistics.median(record["lost"]["pairs"])
    assert list(tmp_path.iterdir()) == [output]  # the checkpoints are gone


def test_no_saves_are_refused() -> None:
    done = run_stage_command("scripts/benchmark_save.py", "--saves", 0)
    assert done.returncode == 2
    assert done.stderr == "error: saves and pairs must be 1 or more, interval_s above 0\n"
