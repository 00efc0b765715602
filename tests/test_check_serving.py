"""What is served against the model: that it is equal, and that it is noticed where it is not."""

import json
from pathlib import Path
from typing import Any

import pytest
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

    def with_reversed(*fields: str) -> dict[str, Any]:
        path = runs / "tiny/export/model.json"
        content = path.read_text()
        described = json.loads(content)
        path.write_text(json.dumps({**described, **{key: described[key][::-1] for key in fields}}))
        try:
            done = check(runs, tmp_path)
        finally:
            path.write_text(content)
        assert done.returncode == 1
        assert done.stderr == "error: what is served differs from what was measured\n"
        return json.loads((tmp_path / "serving.json").read_text())

    assert with_reversed("mean")["grey_levels_apart"] > 1
    figures = with_reversed("classes", "labels")
    assert figures["grey_levels_apart"] <= 1
    files = dict.fromkeys(("TorchScript", ".pt2", "ONNX Runtime"), 9)
    others = dict.fromkeys(("predict.py", "app", "Lambda"), 0)
    assert figures["same_top5"] == files | others


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--count", 0), "count is 0: it must be 1 or more"),
        (("--name", "other"), "/other/config.json: name a run with --name"),
        (("--output", "nowhere/serving.json"), "no folder for --output nowhere/serving.json"),
    ],
)
def test_mistakes_get_one_line(runs: Path, options: tuple[object, ...], said: str) -> None:
    done = run_stage_command(
        *("scripts/check_serving.py", "--runs-folder", runs, "--name", "tiny", *options)
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and line.endswith(said)


def test_what_cannot_be_compared_is_told(runs: Path, tmp_path: Path) -> None:
    assert export(runs, tmp_path).returncode == 0
    weights = runs / "tiny/best.pt"
    content = weights.read_bytes()
    weights.write_bytes(content + b"x")
    try:
        done = check(runs, tmp_path)
    finally:
        weights.write_bytes(content)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert "best.pt is not what was exported: python3 generate_trace_model.py" in done.stderr
    (runs / "tiny/export/model.pt").write_bytes(b"x")
    for said in ("export again with", "names no ONNX file in its own folder: export again with"):
        done = check(runs, tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
        assert f"{said} python3 generate_trace_model.py\n" in done.stderr
        path = runs / "tiny/export/model.json"
        described = json.loads(path.read_text())
        described["formats"].pop("onnx", None)
        path.write_text(json.dumps(described))
