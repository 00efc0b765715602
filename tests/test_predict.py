"""Photos classified on the command line: a table, JSON, and what cannot be used."""

import json
from pathlib import Path

import pytest
from conftest import run_stage_command
from exports import BLUE, GREEN, RED, write_top_half_colour
from PIL import Image


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A run with an export, and a folder of pictures beside it."""
    export = tmp_path / "runs/tiny/export"
    export.mkdir(parents=True)
    write_top_half_colour(export)
    (tmp_path / "runs/tiny/config.json").write_text("{}")
    (tmp_path / "photos/sea").mkdir(parents=True)
    for name, colour in (("poppy.JPG", RED), ("leaf.png", GREEN), ("sea/wave.webp", BLUE)):
        Image.new("RGB", (64, 48), colour).save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("milk, eggs, flour")
    return tmp_path / "runs"


def predict(runs: Path, *arguments: object):
    return run_stage_command("predict.py", *arguments, "--runs-folder", runs, cwd=runs.parent)


def test_a_folder_becomes_a_table(runs: Path) -> None:
    done = predict(runs, "photos", "--top", "1")
    assert (done.returncode, done.stderr) == (0, "")
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert rows == [
        ["photos/leaf.png", "green"],
        ["photos/poppy.JPG", "red"],
        ["photos/sea/wave.webp", "blue"],
    ]


def test_json_has_a_line_a_picture_and_what_failed(runs: Path) -> None:
    done = predict(runs, "--json", "photos/poppy.JPG", "photos/notes.txt", "photos/leaf.png")
    assert done.returncode == 1
    assert done.stderr == "error: 1 of 3 pictures could not be used\n"
    red, notes, green = map(json.loads, done.stdout.splitlines())
    assert notes["file"] == "photos/notes.txt" and "not a picture" in notes["error"]
    for answer, label, class_id in ((red, "red", "n01"), (green, "green", "n02")):
        best = answer["predictions"][0]
        assert (best["label"], best["class"]) == (label, class_id)
        assert sum(one["probability"] for one in answer["predictions"]) == pytest.approx(1)
        assert len(answer["predictions"]) == 3


def test_mistakes_get_one_line(runs: Path) -> None:
    photo = "photos/leaf.png"
    (runs / "empty").mkdir()
    for arguments, words in (
        ([], "no pictures: name files or folders"),
        (["photos/none.jpg"], "no such file or folder: photos/none.jpg"),
        (["runs/empty"], "no pictures in runs/empty"),
        ([photo, "--top", "0"], "top is 0"),
        ([photo, "--name", "other"], "runs/other/export/model.json is missing: make it with"),
        ([photo, "--export", "photos"], "photos/model.json is missing"),
    ):
        done = predict(runs, *arguments)
        assert (done.returncode, done.stdout) == (2, ""), arguments
        (line,) = done.stderr.splitlines()
        assert words in line, line
