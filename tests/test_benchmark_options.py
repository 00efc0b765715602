"""Numbers that a benchmark cannot measure with end it with one line, before it does anything."""

import contextlib
import json
import os
import platform
import sys
import types
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, run_stage_command

sys.path.insert(0, str(REPOSITORY / "scripts"))

import benchmark_lambda


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["loop", "--blocks", 0], "blocks and block_steps must be 1 or more"),
        (["loop", "--block-steps", -1], "blocks and block_steps must be 1 or more"),
        (["pack", "nowhere", "--blocks", 0], "blocks and workers must be 1 or more"),
        (["pack", "nowhere", "--workers", 0], "blocks and workers must be 1 or more"),
        (["lambda", "--photo", "x", "--starts", 0], "starts must be 1 or more"),
        (["lambda", "--photo", "x", "--pictures", 0], "pictures must be 2 or more"),
        (["lambda", "--photo", "x", "--pictures", 1], "pictures must be 2 or more"),
        (["pack", "x", "--quality", 900], "max_side must be 0 or more, quality 1 to 100"),
        (["pack", "x", "--folder", "no"], "no folder no: make it, or name another with --folder"),
        (["resize", "--seeds", 0], "seeds must be 1 or more"),
        (["resize", "--epochs", 0], "epochs is 0: it must be above 0"),
    ],
)
def test_none_of_them_is_measured_in_no_blocks(options: list[object], says: str) -> None:
    name, *rest = options
    done = run_stage_command(REPOSITORY / f"scripts/benchmark_{name}.py", *rest)
    assert (done.returncode, done.stderr) == (2, f"error: {says}\n")


def test_lambdas_figures_name_the_interpreter_that_ran(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(export: Path, folder: Path) -> Path:
        zipfile.ZipFile(folder / "function.zip", "w").close()
        return folder / "function.zip"

    @contextlib.contextmanager
    def started(*_: Any) -> Iterator[types.SimpleNamespace]:
        yield types.SimpleNamespace(ask=lambda event: (200, {}))

    monkeypatch.setattr(benchmark_lambda, "find_export", lambda options: tmp_path)
    monkeypatch.setattr(benchmark_lambda, "build_package", build)
    monkeypatch.setattr(benchmark_lambda, "install_client", lambda folder: None)
    monkeypatch.setattr(benchmark_lambda.lambda_runtime, "started", started)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    (tmp_path / "photo.jpg").write_bytes(b"x")
    paths = ["--photo", tmp_path / "photo.jpg", "--output", tmp_path / "lambda.json"]
    options = ["--python", sys.executable, "--pictures", 2]
    monkeypatch.setattr("sys.argv", ["benchmark_lambda.py", *map(str, paths + options)])
    benchmark_lambda.main()
    figures = json.loads((tmp_path / "lambda.json").read_text())
    assert figures["versions"]["python"] == platform.python_version()
    assert figures["settings"]["pictures"] == 2
