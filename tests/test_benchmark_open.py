"""scripts/benchmark_open.py: the real command on a small folder and store."""

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_stage_command

SCRIPT = REPOSITORY / "scripts" / "benchmark_open.py"


def test_it_opens_both_and_leaves_nothing_behind(tmp_path: Path) -> None:
    disk, output = tmp_path / "disk", tmp_path / "open.json"
    disk.mkdir()
    options = ["--images", 50, "--classes", 7, "--repeats", 2, "--folder", disk]
    done = run_stage_command(SCRIPT, *options, "--output", output, from_nothing=True)
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    for name in ("folder", "store"):
        assert [one["images"] for one in record[name]] == [50, 50]
        assert all(0 < one["s"] < 60 and one["bytes"] >= 0 for one in record[name])
    # The first opening of a folder is followed by its check.
    assert ["check_s" in one for one in record["folder"]] == [True, False]
    assert record["settings"] == {"images": 50, "classes": 7}
    assert done.stdout.count("50 pictures after") == 4
    assert not list(disk.iterdir())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--images", "3"], "images as many as classes"),
        (["--repeats", "0"], "repeats and classes must be 1 or more"),
        (["--folder", "nowhere"], "no folder nowhere"),
    ],
)
def test_nonsense_ends_with_one_line(options: list[str], says: str) -> None:
    done = run_stage_command(SCRIPT, *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert says in line
