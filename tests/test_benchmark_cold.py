import json
import subprocess
import sys
from pathlib import Path

from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images

KINDS = {"in memory", "from disk, not read ahead", "from disk, read ahead"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def test_it_measures_all_three_kinds(tmp_path: Path) -> None:
    make_images(tmp_path / "source")
    store, output = tmp_path / "small.store", tmp_path / "cold.json"
    packed = run("scripts/prepare_data.py", "pack", tmp_path / "source", store)
    assert packed.returncode == 0, packed.stderr
    command = ("scripts/benchmark_cold.py", store, "--px", 32, "--batch-size", 4, "--repeats", 2)
    answer = run(*command, "--output", output)
    assert answer.returncode == 0, answer.stderr
    record = json.loads(output.read_text())
    assert set(record["img_per_s"]) == KINDS
    for kind in KINDS:
        rates = record["img_per_s"][kind]
        assert len(rates["rounds"]) == 2
        assert min(rates["rounds"]) <= rates["median"] <= max(rates["rounds"])
    warm, cold, ahead = (
        record["img_per_s"][kind]["rounds"]
        for kind in ("in memory", "from disk, not read ahead", "from disk, read ahead")
    )
    assert record["hidden"]["rounds"] == [
        (c - b) / (a - b) for a, b, c in zip(warm, cold, ahead, strict=True)
    ]
    assert record["store_bytes"] == store.stat().st_size
    assert "torch" in record["versions"] and record["hardware"]["cpu_cores"] >= 1


def test_another_file_is_refused() -> None:
    answer = run("scripts/benchmark_cold.py", "README.md")
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: README.md is no store")
    assert len(answer.stderr.splitlines()) == 1
