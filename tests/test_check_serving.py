"""What is served against the model: that it is equal, and that it is noticed where it is not."""

import json
from pathlib import Path

from conftest import run_stage_command
from test_generate_trace_model import export, runs  # noqa: F401


def check(runs: Path, tmp_path: Path):
    return run_stage_command(
        *("scripts/check_serving.py", "--runs-folder", runs, "--name", "tiny", "--count", 9),
        *("--output", tmp_path / "serving.json"),
    )


def test_all_give_the_models_answers(runs: Path, tmp_path: Path) -> None:
    assert export(runs, tmp_path, "--formats", "torchscript", "onnx", "pt2").returncode == 0
    done = check(runs, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "serving.json").read_text())
    assert figures["photos"] == 9 and figures["grey_levels_apart"] <= 1
    servers = ["TorchScript", ".pt2", "ONNX Runtime", "predict.py", "app", "Lambda"]
    assert figures["same_top5"] == dict.fromkeys(servers, 9)

    path = runs / "tiny/export/model.json"
    content = path.read_text()
    described = json.loads(content)
    described["mean"] = described["mean"][::-1]
    path.write_text(json.dumps(described))
    try:
        done = check(runs, tmp_path)
    finally:
        path.write_text(content)
    assert done.returncode == 1
    assert done.stderr == "error: what is served differs from what was measured\n"
    figures = json.loads((tmp_path / "serving.json").read_text())
    assert figures["grey_levels_apart"] > 1
