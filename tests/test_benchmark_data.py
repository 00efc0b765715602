"""scripts/benchmark_data.py: the real command on a few pictures, and what it refuses."""

import json
import os
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_images, run_stage_command

SCRIPT = REPOSITORY / "scripts" / "benchmark_data.py"
sys.path.insert(0, str(SCRIPT.parent))

import benchmark_data  # noqa: E402


def test_it_measures_all_pipelines_that_are_installed(tmp_path: Path) -> None:
    make_images(tmp_path / "images", classes=2, images=3, px=64)
    output = tmp_path / "data.json"
    done = run_stage_command(
        *(SCRIPT, tmp_path / "images/train", "--images", 16, "--repeats", 1, "--px", 32),
        *("--cores", 0, "--seconds", 0.2, "--max-side", 48, "--output", output),
        timeout=240,
        from_nothing=True,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert set(record) == {"command", "pictures", "settings", "results", "hardware", "versions"}
    assert {"images": 16, "distinct": 6}.items() <= record["pictures"].items()
    assert 0 < record["pictures"]["packed_mean_bytes"] < record["pictures"]["mean_bytes"]
    assert record["settings"] == {
        **{"max_side": 48, "quality": 90, "batch_size": 256, "seconds": 0.2}
    }
    cores = len(os.sched_getaffinity(0))
    assert record["hardware"]["cpu_cores"] == cores
    assert {"python", "torch", "torchvision", "simplejpeg"} <= set(record["versions"])

    (result,) = record["results"]
    assert set(result) == {"px", "cores", "img_per_s", "ratios"}
    assert (result["px"], result["cores"]) == (32, cores)
    rates = result["img_per_s"]
    for name in benchmark_data.PIPELINES:
        module = benchmark_data.NEEDS.get(name)
        there = module is None or benchmark_data.installed(module)
        assert (name in rates) == there
        assert (f"{name} is not installed" in done.stdout) != there
    assert len(set(rates) - set(benchmark_data.NEEDS)) == 5
    for row in (*rates.values(), *result["ratios"].values()):
        assert row["rounds"] == [row["median"]] == [row["min"]] == [row["max"]]
        assert row["median"] > 0
    pairs = [pair for pair in benchmark_data.RATIOS if set(pair) <= set(rates)]
    assert len(pairs) >= 3
    assert set(result["ratios"]) == {f"{one} / {other}" for one, other in pairs}
    for one, other in pairs:
        expected = rates[one]["median"] / rates[other]["median"]
        assert result["ratios"][f"{one} / {other}"]["median"] == pytest.approx(expected)
    assert f"32 px, {cores} cores:" in done.stdout


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--pipelines", "ours, stroe"], "no pipeline 'ours, stroe': there are torchvision, orig"),
        ([], "no pictures in {}/<class>/"),
        (["--images", "0"], "images is 0: it must be above 0"),
    ],
)
def test_nonsense_ends_with_one_line(options: list[str], says: str, tmp_path: Path) -> None:
    done = run_stage_command(SCRIPT, tmp_path, *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says.replace("{}", str(tmp_path)) in line


def test_a_picture_that_cannot_be_packed_ends_it_with_a_line(tmp_path: Path) -> None:
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "bad.jpg").write_bytes(b"no picture")
    done = run_stage_command(SCRIPT, tmp_path, "--images", 1)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "cannot be read" in done.stderr
