import json
from pathlib import Path

from conftest import run_stage_command


def test_it_measures_every_format_on_each_number_of_threads(tmp_path: Path) -> None:
    output = tmp_path / "new" / "latency.json"
    command = ("scripts/benchmark_export.py", "--px", 32, "--pictures", 10, "--threads", 1, 2)
    done = run_stage_command(*command, "--output", output, from_nothing=True)
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads(output.read_text())
    formats = ("eager", "torchscript", "onnx", "pt2")
    assert [(row["threads"], row["format"]) for row in record["results"]] == [
        (threads, name) for threads in (1, 2) for name in formats
    ]
    for row in record["results"]:
        assert 0 < row["p5_ms"] <= row["median_ms"] <= row["p95_ms"]
        assert f"{row['format']:<12} {row['median_ms']:7.1f} ms" in done.stdout
    assert {"torch", "onnxruntime"} <= record["versions"].keys()
    assert "cpu" in record["hardware"]


def test_half_a_block_is_refused() -> None:
    done = run_stage_command("scripts/benchmark_export.py", "--pictures", 15)
    assert done.returncode == 2
    assert done.stderr.startswith("error: pictures must be a multiple of 10")
