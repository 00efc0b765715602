"""scripts/benchmark_scaling.py: the real command, at the smallest size that says anything."""

import json
from pathlib import Path

from conftest import run_stage_command

SCRIPT = "scripts/benchmark_scaling.py"


def test_it_measures_a_plain_process_and_several(tmp_path: Path) -> None:
    output = tmp_path / "scaling.json"
    done = run_stage_command(
        *(SCRIPT, "--px", 32, "--batch-size", 4, "--steps", 1, "--rounds", 3),
        *("--processes", 2, 2, "--precision", "fp32", "--output", output),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert record["settings"]["batch_size"] == 4
    assert record["hardware"]["processes"] == [2]
    assert record["img_per_s"].keys() == {"plain", "2"}
    assert all(rate["median"] > 0 for rate in record["img_per_s"].values())
    rates = record["rounds_img_per_s"]
    assert len(rates["plain"]) == len(rates["2"]) == 3
    ratios = sorted(two / plain for two, plain in zip(rates["2"], rates["plain"], strict=True))
    over_plain = record["over_plain"]["2"]
    assert [over_plain[name] for name in ("min", "median", "max")] == [round(r, 4) for r in ratios]
    low, high = over_plain["median_95_percent"]
    assert over_plain["min"] <= low <= over_plain["median"] <= high <= over_plain["max"]
    assert "torchrun, 2 processes: " in done.stdout


def test_more_processes_than_images_end_with_one_line() -> None:
    done = run_stage_command(
        SCRIPT, "--batch-size", 2, "--processes", 2, "--rounds", 1, "--steps", 1
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: a batch of 2 images leaves one of 2 processes with 0 at once")
