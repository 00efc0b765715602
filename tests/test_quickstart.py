"""The whole path as a newcomer types it: bash scripts/quickstart.sh in a fresh checkout."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import REPOSITORY
from PIL import Image
from playwright.sync_api import Browser, expect
from test_app import browser, expect_answer, expect_text, open_page, start_app, upload

assert browser  # a fixture that the tests below ask for by its name


def quickstart(checkout: Path) -> str:
    done = subprocess.run(
        ["bash", "scripts/quickstart.sh"],
        cwd=checkout,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1100,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the repository without what its commands make, after one quickstart."""
    folder = tmp_path_factory.mktemp("quickstart") / "checkout"
    made = (".git", ".venv", "runs", "data", "examples", ".*_cache", "__pycache__")
    shutil.copytree(REPOSITORY, folder, ignore=shutil.ignore_patterns(*made))
    # The packages are there already: the tests run on them.
    (folder / ".venv").symlink_to(sys.prefix, target_is_directory=True)
    (folder / "first.log").write_text(quickstart(folder))
    yield folder
    shutil.rmtree(folder)


def check_result_and_files(checkout: Path) -> None:
    run = checkout / "runs/quickstart"
    result = json.loads((run / "result.json").read_text())
    assert result["val_images"] == 355
    assert result["val_top1"] >= 97
    files = (
        *("config.json", "metrics.jsonl", "train.log", "lr_finder.json", "lr_finder.png"),
        *("training_metrics.png", "best.pt", "last.pt", "export/model.pt", "export/model.onnx"),
        "export/model.json",
    )
    for file in files:
        assert (run / file).stat().st_size > 0, file
    assert len(list((run / "checkpoints").iterdir())) == 2
    for picture in ("lr_finder.png", "training_metrics.png"):
        with Image.open(run / picture) as image:
            image.verify()
    model = torchvision.models.resnet50(num_classes=10)
    model.load_state_dict(torch.load(run / "best.pt"), strict=True)

    output = (checkout / "first.log").read_text()
    assert "graph(%self.1 : __torch__.model.ResNet50Wrapper" in output
    assert output.count("% (right)") >= 4  # of six validation images; one may be hard
    for suggestion in ("gradio_deploy/app.py", "imagenette", "nohup python3 trainer.py"):
        assert suggestion in output
    for noise in ("Warning", "deprecated", "Traceback"):
        assert noise not in output


def check_a_second_time_trains_nothing(checkout: Path) -> None:
    kept = [
        path
        for folder in ("data", "runs/quickstart/checkpoints")
        for path in (checkout / folder).rglob("*")
    ] + [checkout / "runs/quickstart" / name for name in ("best.pt", "lr_finder.json")]
    before = [path.stat().st_mtime_ns for path in kept]
    output = quickstart(checkout)
    assert "is finished" in output
    assert "found before" in output
    assert "installing" not in output
    assert [path.stat().st_mtime_ns for path in kept] == before


def check_the_app_reads_digits_and_refuses_what_is_none(
    checkout: Path, browser: Browser, tmp_path: Path
) -> None:
    run = checkout / "runs/quickstart"
    description = json.loads((run / "export/model.json").read_text())
    digit = sorted((checkout / "data/digits/val/7").iterdir())[3]
    (tmp_path / "letter.jpg").write_text("Dear reader,")
    with start_app(checkout / "gradio_deploy") as app, open_page(browser, app.url) as page:
        expect_text(page, f"{description['val_top1']:.2f} %")
        upload(page, digit)
        expect_answer(page, "7")
        page.get_by_role("button", name="Remove Image").click()
        # Else the end of the removal may take the next upload away.
        expect(page.get_by_test_id("label-output-value")).to_have_count(0)
        upload(page, tmp_path / "letter.jpg")
        expect_text(page, "This is not a picture that can be read: send a JPEG, PNG or WebP file.")
        examples = page.locator("button.gallery-item")
        assert examples.count() == 6


@pytest.mark.timeout(1200)
def test_the_whole_path(checkout: Path, browser: Browser, tmp_path: Path) -> None:
    """One test, since one run takes minutes."""
    check_result_and_files(checkout)
    check_the_app_reads_digits_and_refuses_what_is_none(checkout, browser, tmp_path)
    check_a_second_time_trains_nothing(checkout)
