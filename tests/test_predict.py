"""Photos classified on the command line: a table, JSON, and what cannot be used."""

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, run_stage_command
from exports import BLUE, GREEN, MEAN, RED, STD, write_top_half_colour
from PIL import Image

from predict import find_pictures


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
    assert (done.returncode, done.stderr) == (0, "asking the most recent run: tiny\n")
    rows = [line.split()[:2] for line in done.stdout.splitlines()]
    assert rows == [
        ["photos/leaf.png", "green"],
        ["photos/poppy.JPG", "red"],
        ["photos/sea/wave.webp", "blue"],
    ]


def test_the_table_tells_as_many_classes_as_asked_for_in_percent(runs: Path) -> None:
    done = predict(runs, "photos/leaf.png", "--top", "2", "--name", "tiny")
    powers = [
        math.exp((value - mean) / std)
        for value, mean, std in zip((0, 1, 0), MEAN, STD, strict=True)
    ]
    red, green, _ = (100 * power / sum(powers) for power in powers)
    assert done.stdout == f"photos/leaf.png   green {green:.1f} %   red {red:.1f} %\n"


def test_json_has_a_line_a_picture_and_what_failed(runs: Path) -> None:
    photos = ("photos/poppy.JPG", "photos/notes.txt", "photos/leaf.png")
    done = predict(runs, "--json", *photos, "--name", "tiny")
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
        (line,) = [line for line in done.stderr.splitlines() if not line.startswith("asking the")]
        assert line.startswith("error: ") and words in line, line


def test_an_export_of_older_weights_is_told(runs: Path) -> None:
    path = runs / "tiny/export/model.json"
    described = {**json.loads(path.read_text()), "weights": "last"}
    described["weights_sha256"] = hashlib.sha256(b"the weights").hexdigest()
    path.write_text(json.dumps(described))
    warning = (
        f"{runs}/tiny/last.pt is not what was exported: python3 generate_trace_model.py "
        "--name tiny --weights last\n"
    )
    for weights, by, said in (
        (None, "--name", ""),
        (b"the weights", "--name", ""),
        (b"better ones", "--name", warning),
        (b"better ones", "--export", ""),
    ):
        if weights:
            (runs / "tiny/last.pt").write_bytes(weights)
        named = (by, "tiny" if by == "--name" else path.parent)
        done = predict(runs, "photos/leaf.png", *named)
        assert (done.returncode, done.stderr) == (0, said)
        assert done.stdout.startswith("photos/leaf.png   green ")


def test_odd_files_in_a_folder(runs: Path) -> None:
    photos = runs.parent / "photos"
    (photos / "album.jpg").mkdir()
    (photos / "leaf.png").rename(photos / "album.jpg" / "two\nlines.png")
    (photos / "poppy.JPG").rename(photos / os.fsdecode(b"\xff.jpg"))
    (photos / "back").symlink_to("..")
    (photos / "._leaf.png").write_bytes(b"what another system keeps beside a picture")
    (photos / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(photos / "pipe.png")
    (photos / ".trash").mkdir()
    (photos / ".trash/leaf.png").write_bytes(b"gone")
    (photos / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (photos / "large.tif").touch()
    os.truncate(photos / "large.tif", 2**40)  # a hole
    done = predict(runs, "photos", "--top", "1", "--name", "tiny")
    assert done.returncode == 1
    rows = [line.rsplit(maxsplit=3)[:2] for line in done.stdout.splitlines()]
    assert rows == [
        ["'photos/album.jpg/two\\nlines.png'", "green"],
        ["photos/sea/wave.webp", "blue"],
        ["'photos/\\udcff.jpg'", "red"],
    ]
    assert done.stderr.splitlines() == [
        "photos/gone.png: No such file or directory",
        "photos/large.tif: The picture has more than 20 MB.",
        "photos/phone.HEIC: This is a HEIC photo, which is not read here: send it as a JPEG "
        "(on an iPhone: Settings, Camera, Formats, Most Compatible).",
        "error: 3 of 6 pictures could not be used",
    ]


def test_a_folder_that_may_not_be_read_is_told(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        if str(path).endswith("sea"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", denied)  # root may read every folder
    with pytest.raises(PermissionError, match="sea"):
        list(find_pictures([runs.parent / "photos"]))


def test_a_terminal_without_the_letters_of_a_class_gets_their_numbers(runs: Path) -> None:
    path = runs / "tiny/export/model.json"
    described = json.loads(path.read_text())
    path.write_text(json.dumps({**described, "labels": ["rouge", "vert forêt", "bleu"]}))
    arguments = ("photos/leaf.png", "--top", "1", "--name", "tiny", "--runs-folder", runs)
    environment = {"PYTHONIOENCODING": "ascii"}
    done = run_stage_command("predict.py", *arguments, cwd=runs.parent, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(r"photos/leaf.png   vert for\xeat ")


def test_who_reads_the_answers_may_stop(runs: Path) -> None:
    command = [sys.executable, REPOSITORY / "predict.py", "photos", "--runs-folder", runs]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [*command, "--name", "tiny"], cwd=runs.parent, stdout=writing, stderr=subprocess.PIPE
    )
    os.close(writing)
    assert done.returncode == 1
    assert done.stderr == b"error: nobody reads this output any more\n"
