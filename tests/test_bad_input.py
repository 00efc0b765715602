"""What the stages answer to bad input: one line on stderr, exit code 2, and nothing touched."""

import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import quick_start
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from PIL import Image

import image_files
import utils

# 18 training images: two steps an epoch, some seconds in all.
SETTINGS = (
    *("--name", "run", "--epochs", "2", "--batch-size", "9", "--max-lr", "0.02", "--seed", "1"),
    *("--train-px", "32", "--val-px", "32", "--val-resize-px", "32", "--precision", "fp32"),
    *("--workers", "1", "--log-interval-s", "0.001", "--price-per-hour", "0"),
)
BAD_NAMES = {
    "upwards": "../x",
    "absolute": "/tmp/x",
    "nested": "a/b",
    "empty": "",
    "dot": ".",
    "dots": "..",
    "option": "-x",
    "two lines": "a\nb",
    "200 letters": 200 * "x",
}


def by_id(table: dict) -> dict:
    """A table of cases as arguments of pytest.mark.parametrize."""
    return {"ids": list(table), "argvalues": list(table.values())}


# ------------------------------------------------------------------------------ helpers


def command(stage: str, folder: Path, *options: object) -> list[str]:
    """A stage's command on the images and runs of a folder."""
    paths = ("--train-folder-name", "images/train", "--val-folder-name", "images/val")
    absolute = [str(folder / path) if "/" in path else path for path in paths]
    return [stage, *absolute, "--runs-folder", str(folder / "runs"), *SETTINGS, *map(str, options)]


def train(folder: Path, *options: object) -> subprocess.CompletedProcess[str]:
    return run_stage_command(*command("trainer.py", folder, *options))


def start_training(folder: Path, *options: object) -> subprocess.Popen[str]:
    return quick_start.Popen(
        [sys.executable, *command(str(REPOSITORY / "trainer.py"), folder, *options)],
        env=COMMAND_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def tree(folder: Path) -> dict[Path, str | None]:
    """Everything under a folder, with the hash of each file.

    Less the indexes of images: that they were checked stays true, however a run ends.
    """
    paths = (path for path in folder.rglob("*") if path.name != image_files.INDEX_NAME)
    found: dict[Path, str | None] = dict.fromkeys(paths)
    for path in found:
        if path.is_file():
            with path.open("rb") as file:
                found[path] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_refused(code: int, stderr: str, *texts: str) -> None:
    """Exit code 2 and one line that has all of the texts."""
    assert code == 2, stderr
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert "---" not in line, "a frame is left around the message"
    for text in texts:
        assert text in line


def flip_a_bit(path: Path) -> None:
    """Damage a file in a copy of its own, since others may be linked to it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    path.write_bytes(content)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


@pytest.fixture
def check_refused_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """Like a command and check_refused, in this process: 3 s less, of imports, in each of many."""

    def check(arguments: list[str], *texts: str) -> None:
        monkeypatch.setattr(sys, "argv", arguments)
        monkeypatch.setattr(utils.log, "handlers", [])
        stage = importlib.import_module(arguments[0].removesuffix(".py"))
        with pytest.raises(SystemExit) as stop:
            utils.run_stage(stage.main)
        check_refused(stop.value.code, capsys.readouterr().err, *texts)

    return check


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with images/train and images/val: 3 classes of 6 images each."""
    make_images(tmp_path / "images", images=6)
    return tmp_path


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    make_images(folder / "images", images=6)
    done = train(folder)
    assert done.returncode == 0, done.stderr
    yield folder / "runs/run"
    shutil.rmtree(folder)  # 600 MB, which pytest would keep


@pytest.fixture
def finished(folder: Path, finished_run: Path) -> Iterator[Path]:
    """The folder of images with that run beside them; its large files are hard links."""

    def link_or_copy(source: str, target: str) -> None:
        (os.link if source.endswith(".pt") else shutil.copy2)(source, target)

    shutil.copytree(finished_run, folder / "runs/run", copy_function=link_or_copy)
    yield folder
    shutil.rmtree(folder / "runs")


# ------------------------------------------------------------------------------ the command line

OPTIONS = {
    "unknown option": (["--bach-size", "8"], ["--bach-size", "--help lists the options"]),
    "stray word": (["fast"], ["fast"]),
    "no value": (["--epochs"], ["--epochs", "Missing value"]),
    "no number": (["--epochs", "x"], ["--epochs", "'x'"]),
    "no integer": (["--batch-size", "1.5"], ["--batch-size", "'1.5'"]),
    "no such precision": (["--precision", "fp8"], ["fp8", "'fp16', 'bf16'"]),
    "no such recipe": (
        ["--recipe", "nope"],
        ["nope", "'reference', 'fast', 'accurate', 'quickstart'"],
    ),
    "no such device": (["--device", "gpu"], ["gpu", "'cuda', 'cpu'"]),
    "no epochs": (["--epochs", "0"], ["epochs is 0", "above 0"]),
    "negative extra epochs": (["--extra-epochs", "-1"], ["extra_epochs is -1", "0 or more"]),
    "negative batch": (["--batch-size", "-3"], ["batch_size is -3", "above 0"]),
    "batch of one": (["--batch-size", "1"], ["batch_size is 1", "2 or more"]),
    "nan": (["--max-lr", "nan"], ["max_lr is nan", "above 0"]),
    "infinite": (["--max-lr", "inf"], ["max_lr is inf", "above 0"]),
    "no number at all": (["--max-lr", ""], ["--max-lr"]),
    "negative weight decay": (["--weight-decay", "-1"], ["weight_decay is -1", "0 or more"]),
    "momentum of one": (["--momentum", "1.0"], ["momentum is 1.0", "below 1"]),
    "pct_start": (["--pct-start", "1.5"], ["pct_start is 1.5", "between 0 and 1"]),
    "crop_min_scale": (["--crop-min-scale", "8"], ["crop_min_scale is 8", "at most 1"]),
    "no pixels": (["--train-px", "0"], ["train_px is 0", "above 0"]),
    "crop above resize": (["--val-px", "288"], ["val_resize_px is 256", "val_px, 288"]),
    "negative seed": (["--seed", "-1"], ["seed is -1", "0 or more"]),
    "negative workers": (["--workers", "-1"], ["workers is -1", "0 or more"]),
    "nan minutes": (["--checkpoint-minutes", "nan"], ["checkpoint_minutes is nan", "0 or more"]),
    "no log interval": (["--log-interval-s", "0"], ["log_interval_s is 0", "above 0"]),
    "finder's range": (["--first-lr", "1", "--last-lr", "0.1"], ["first_lr 1.0, last_lr 0.1"]),
    "finder's end": (["--last-lr", "inf"], ["last_lr inf", "below the last, the last finite"]),
    "too few steps": (["--steps", "3"], ["steps 3", "at least 20"]),
    "wrong weights": (["--weights", "worst"], ["worst", "'best', 'last'"]),
}
STAGES = {
    "finder's range": "lr_finder.py",
    "finder's end": "lr_finder.py",
    "too few steps": "lr_finder.py",
    "wrong weights": "generate_trace_model.py",
}
WRONG = {id_: ([STAGES.get(id_, "trainer.py"), *case[0]], case[1]) for id_, case in OPTIONS.items()}
WRONG |= {
    f"{stage} {id_}": ([stage, f"{option}={name}"], [f"{name!r} is no name for a run"])
    for stage, option in (
        *(("trainer.py", "--name"), ("lr_finder.py", "--name")),
        *(("generate_trace_model.py", "--name"), ("plot_metrics.py", "--names")),
    )
    for id_, name in BAD_NAMES.items()
    if (stage, name) != ("generate_trace_model.py", "")  # which is the most recent run
}


@pytest.mark.parametrize(("arguments", "texts"), **by_id(WRONG))
def test_a_wrong_option_is_refused(
    arguments: list[str],
    texts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    check_refused_here: Callable[..., None],
) -> None:
    monkeypatch.chdir(tmp_path)
    check_refused_here(arguments, *texts)
    assert not tree(tmp_path)


COMMANDS = {
    "unknown option": ("trainer.py", ["--bach-size", "8"], "--bach-size", True),
    "out of range": ("trainer.py", ["--epochs", "0"], "epochs is 0", False),
    "name upwards": ("trainer.py", ["--name", "../x"], "is no name", False),
    "no value": ("lr_finder.py", ["--epochs"], "--epochs", True),
    "name of two lines": ("lr_finder.py", ["--name", "a\nb"], "is no name", False),
    "absolute name": ("generate_trace_model.py", ["--name", "/tmp/x"], "is no name", False),
    "no run": ("generate_trace_model.py", [], "no run in runs/ yet: start one with", True),
    "nested name": ("plot_metrics.py", ["--names", "a/b"], "is no name", True),
}


@pytest.mark.parametrize(("stage", "options", "text", "from_nothing"), **by_id(COMMANDS))
def test_a_wrong_command_is_refused(
    stage: str, options: list[str], text: str, from_nothing: bool, tmp_path: Path
) -> None:
    """Each stage once from nothing: no library may add a line of its own."""
    done = run_stage_command(stage, *options, cwd=tmp_path, from_nothing=from_nothing)
    check_refused(done.returncode, done.stderr, text)
    assert not tree(tmp_path)


DEVICES = {
    "no GPU": ("trainer.py", ["--device", "cuda"], ["no GPU", "--device cpu"]),
    "no GPU, finder": ("lr_finder.py", ["--device", "cuda"], ["no GPU", "--device cpu"]),
    "fp16 on a CPU": ("trainer.py", ["--precision", "fp16"], ["fp16", "needs a GPU", "bf16"]),
}


@pytest.mark.parametrize(("stage", "options", "texts"), **by_id(DEVICES))
def test_a_device_that_is_not_there_is_refused(
    stage: str, options: list[str], texts: list[str], folder: Path
) -> None:
    before = tree(folder)
    done = run_stage_command(*command(stage, folder, *options))
    check_refused(done.returncode, done.stderr, *texts)
    assert tree(folder) == before


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\n(advice)"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
def test_too_little_gpu_memory_is_told_in_one_line(
    error: RuntimeError, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        utils.run_stage(main)
    check_refused(stop.value.code, capsys.readouterr().err, "too little memory", "--batch-size")


@pytest.mark.parametrize(
    "allocate",
    [lambda: np.empty((12, 224_000, 224_000, 3)), lambda: torch.empty(2**60, dtype=torch.uint8)],
    ids=["numpy", "torch"],
)
def test_too_little_main_memory_is_told_in_one_line(
    allocate: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        utils.run_stage(allocate)
    check_refused(stop.value.code, capsys.readouterr().err, "too little main memory", "--train-px")


def test_other_errors_are_not_taken_for_too_little_memory() -> None:
    def main() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal"):
        utils.run_stage(main)


# ------------------------------------------------------------------------------ images


def remove(*paths: str) -> Callable[[Path], None]:
    return lambda images: [shutil.rmtree(images / path) for path in paths]


def empty_class(images: Path) -> None:
    (images / "train/class_3").mkdir()


def class_with_a_text(images: Path) -> None:
    (images / "val/class_3").mkdir()
    (images / "val/class_3/notes.txt").write_text("no image")


FOLDERS = {
    "no training folder": (
        remove("train"),
        ["no folder", "images/train:", "prepare_data.py imagenet DIR", "--train-folder-name"],
    ),
    "no validation folder": (
        remove("val"),
        ["no folder", "images/val:", "`digits data/digits`", "--val-folder-name"],
    ),
    "no class folders": (
        remove("train/class_0", "train/class_1", "train/class_2"),
        ["images/train has no class folders", "images/train/<class>/"],
    ),
    "empty class": (empty_class, ["images/train/class_3 holds no image"]),
    "class without images": (class_with_a_text, ["images/val/class_3 holds no image"]),
    "class without training images": (
        remove("train/class_1"),
        ["class_1 is missing under", "images/train", "3 classes", "2 classes"],
    ),
    "class without validation images": (
        remove("val/class_0", "val/class_1"),
        ["class_0, class_1 are missing under", "images/val", "3 classes", "1 classes"],
    ),
}


@pytest.mark.parametrize(("spoil", "texts"), **by_id(FOLDERS))
def test_wrong_folders_are_refused(
    spoil: Callable[[Path], None], texts: list[str], folder: Path
) -> None:
    spoil(folder / "images")
    before = tree(folder)
    done = train(folder)
    check_refused(done.returncode, done.stderr, *texts)
    assert tree(folder) == before


BATCHES = {
    "above the data": (19, ["batch_size is 19", "has 18 images", "--batch-size 18 or less"]),
    "a last one of one": (17, ["batch_size 17", "single", "BatchNorm", "--batch-size 16"]),
}


@pytest.mark.parametrize(("size", "texts"), **by_id(BATCHES))
def test_a_batch_size_that_does_not_fit_is_refused(
    size: int, texts: list[str], folder: Path
) -> None:
    before = tree(folder)
    done = train(folder, "--batch-size", size)
    check_refused(done.returncode, done.stderr, *texts)
    assert tree(folder) == before


def spoil_images(images: Path) -> list[Path]:
    """Make three training and three validation images unreadable, each in another way."""
    spoiled = []
    for part in ("train", "val"):
        paths = [images / part / f"class_{label}/{part}_{label}.jpg" for label in range(3)]
        paths[0].write_text("no image")
        paths[1].write_bytes(paths[1].read_bytes()[:-200])
        paths[2].write_bytes(b"")
        spoiled += paths
    return spoiled


def test_unreadable_images_are_all_listed_and_refused(folder: Path) -> None:
    spoiled = spoil_images(folder / "images")
    before = tree(folder)
    done = train(folder)
    listed = [line.partition("cannot be read: ")[2] for line in done.stdout.splitlines()]
    reasons = 2 * ["not an image", " (", "empty"]
    for path, reason in zip(spoiled, reasons, strict=True):
        (line,) = [line for line in listed if line.startswith(f"{path} (")]
        assert reason in line
    check_refused(
        done.returncode, done.stderr, f"6 of 36 images cannot be read, listed above, the first "
        f"{spoiled[0]} (", "--skip-bad-images",
    )  # fmt: skip
    assert tree(folder) == before


def test_a_damaged_image_whose_name_is_no_text_is_told(folder: Path) -> None:
    """And the run goes on with a good copy in its place."""
    train_folder = folder / "images/train"
    path = train_folder / "class_1/\udcff.jpg"
    (train_folder / "class_1/train_0.jpg").rename(path)
    for number in range(30):  # so many that not each is read at the start
        shutil.copy(
            train_folder / "class_0/train_0.jpg", train_folder / f"class_0/more_{number}.jpg"
        )
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"\xff\xd9" * 8)  # its end is as it should be
    done = train(folder)
    text = f"cannot read {folder}/images/train/class_1/\\udcff.jpg (damaged inside or cut short"
    check_refused(done.returncode, done.stderr, text)
    assert f"error: {text}" in (folder / "runs/run/train.log").read_text()
    path.write_bytes(content)
    done = train(folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_damaged_image_among_those_that_tell_sets_apart_is_told_at_the_start(
    folder: Path,
) -> None:
    path = folder / "images/train/class_1/train_0.jpg"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + content[-2:])
    before = tree(folder)
    done = train(folder)
    check_refused(done.returncode, done.stderr, f"cannot read {path} (damaged inside or cut short")
    assert tree(folder) == before


def test_a_class_with_no_readable_image_is_refused(folder: Path) -> None:
    for path in (folder / "images/val/class_1").iterdir():
        path.write_bytes(b"")
    before = tree(folder)
    done = train(folder, "--skip-bad-images")
    check_refused(done.returncode, done.stderr, "no image in", "images/val/class_1 can be read")
    assert tree(folder) == before


# ------------------------------------------------------------------------------ signals


def test_a_stopped_run_goes_on_to_the_end_without_its_bad_images(folder: Path) -> None:
    spoiled = spoil_images(folder / "images")
    process = start_training(folder, "--skip-bad-images")
    for line in process.stdout:
        if "epoch 1/2  step 1/2" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (75, "")
    assert "interrupted in epoch 1, everything is saved" in rest
    run = folder / "runs/run"
    assert not (run / "result.json").exists()

    shutil.copy(folder / "images/train/class_0/train_1.jpg", spoiled[0])  # mended too late
    done = train(folder, "--skip-bad-images")
    assert (done.returncode, done.stderr) == (0, "")
    log = (run / "train.log").read_text()
    assert log.count("15 training and 15 validation images in 3 classes (6 left out as") == 2
    assert "resumed after 0 epochs and" in log
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(row["train_images"], row["val_images"]) for row in rows] == [(15, 15), (15, 15)]
    assert json.loads((run / "result.json").read_text())["val_images"] == 15
    shutil.rmtree(run)


def test_ctrl_c_during_the_check_of_the_images_ends_it_at_once(folder: Path) -> None:
    large = folder / "images/val/class_0/val_0.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    for number in range(5000):  # which take minutes
        os.link(large, large.with_name(f"link_{number}.jpg"))
    process = start_training(folder, "--skip-bad-images")
    for line in process.stdout:
        if "checked in" in line:
            break
    process.send_signal(signal.SIGINT)
    try:
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, stderr) == (75, "error: interrupted\n")
    assert not (folder / "runs").exists()


# ------------------------------------------------------------------------------ a run that is there


def test_other_settings_are_refused(finished: Path) -> None:
    before = tree(finished)
    done = train(finished, "--max-lr", "0.3", "--batch-size", "6", "--seed", "5")
    check_refused(
        done.returncode, done.stderr, "max_lr was 0.02, is 0.3", "batch_size was 9, is 6",
        "seed was 1, is 5", "another --name",
    )  # fmt: skip
    assert done.stderr.count(" was ") == 4  # and "was begun"
    assert tree(finished) == before


def test_settings_without_influence_are_accepted(finished: Path) -> None:
    before = tree(finished)
    done = train(finished, "--workers", "2", "--log-interval-s", "7", "--checkpoint-minutes", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert "run run is finished" in done.stdout
    assert tree(finished) == before


def test_other_images_are_refused(finished: Path) -> None:
    image = finished / "images/train/class_0/train_0.jpg"
    for name in ("train_6.jpg", "train_7.jpg"):
        shutil.copy(image, image.with_name(name))
    before = tree(finished)
    done = train(finished, "--extra-epochs", "1")
    check_refused(done.returncode, done.stderr, "the train images are not those", "--name")
    assert tree(finished) == before


def test_damaged_checkpoints_are_refused(finished: Path) -> None:
    checkpoints = list((finished / "runs/run/checkpoints").iterdir())
    assert len(checkpoints) == 2
    for path in checkpoints:
        flip_a_bit(path)
    before = tree(finished)
    done = train(finished)
    check_refused(done.returncode, done.stderr, "every checkpoint in", "is damaged", "--name")
    assert all(f"{path} is damaged" in done.stdout for path in checkpoints)
    assert tree(finished) == before


def test_from_the_checkpoint_before_a_damaged_one_the_rest_is_made_again(finished: Path) -> None:
    run = finished / "runs/run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    newest = max((run / "checkpoints").iterdir())
    flip_a_bit(newest)
    for name in ("config.json", "metrics.jsonl", "result.json"):
        (run / name).write_bytes(b"\xff{")
    done = train(finished)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{newest} is damaged" in done.stdout
    assert "resumed after 1 epochs and 2 steps" in done.stdout
    again = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["val_loss"] for row in again] == [row["val_loss"] for row in rows]
    assert json.loads((run / "config.json").read_text())["config"]["name"] == "run"
    assert json.loads((run / "result.json").read_text())["epochs"] == 2


def test_a_damaged_result_is_refused(finished: Path) -> None:
    (finished / "runs/run/result.json").write_text('{"epochs": 2, "wei')
    before = tree(finished)
    done = train(finished)
    check_refused(done.returncode, done.stderr, "runs/run/result.json is damaged: remove it")
    assert tree(finished) == before


@pytest.mark.parametrize("content", ["{}", "[]", '{"epochs": 2}'])
def test_a_result_that_says_nothing_is_made_again(content: str, finished: Path) -> None:
    path = finished / "runs/run/result.json"
    before = json.loads(path.read_text())
    path.write_text(content)
    done = train(finished)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(path.read_text())["val_top1"] == before["val_top1"]


def test_a_result_whose_checkpoints_are_gone_is_not_replaced(finished: Path) -> None:
    shutil.rmtree(finished / "runs/run/checkpoints")
    before = tree(finished)
    for options in ((), ("--max-lr", "0.3")):
        done = train(finished, *options)
        check_refused(
            done.returncode, done.stderr, "has the result of a finished run, but no checkpoint"
        )
    done = train(finished, "--dry-run")
    assert done.returncode == 2 and "PROBLEM  run" in done.stdout
    assert tree(finished) == before


def test_an_output_that_is_closed_is_no_traceback(folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", sys.executable, "trainer.py", "--epochs", "0"],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    check_refused(done.returncode, done.stderr, "epochs is 0")


FOUND = {
    "none": (None, "no {}: run python3 lr_finder.py"),
    "no JSON": ("{", "{} is damaged: remove it"),
    "no rate": ('{"steps": 20}', "{} has no suggested_max_lr: run python3 lr_finder.py"),
    "a rate that is none": ('{"suggested_max_lr": NaN}', "{} has no suggested_max_lr: run python3"),
    "settings that are none": (
        '{"suggested_max_lr": 0.1, "settings": 5}',
        "{} is damaged: run python3 lr_finder.py",
    ),
}


@pytest.mark.parametrize(("content", "text"), **by_id(FOUND))
def test_a_learning_rate_that_was_not_found_is_refused(
    content: str | None, text: str, folder: Path, check_refused_here: Callable[..., None]
) -> None:
    path = folder / "runs/run/lr_finder.json"
    path.parent.mkdir(parents=True)
    if content is not None:
        path.write_text(content)
    before = tree(folder)
    text = text.replace("{}", str(path))
    check_refused_here(command("trainer.py", folder, "--max-lr-from-finder"), text)
    assert tree(folder) == before


# ------------------------------------------------------------------------------ disks


def closed_folder(tmp_path: Path) -> Path:
    """A folder that nobody may write to: root, who may write to all, is refused by /sys."""
    if os.geteuid() == 0:
        return Path("/sys")
    (tmp_path / "closed").mkdir(mode=0o555)
    return tmp_path / "closed"


def file_for_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


UNWRITABLE = {"closed": closed_folder, "file": file_for_a_folder}


@pytest.mark.parametrize("make", **by_id(UNWRITABLE))
def test_a_runs_folder_that_cannot_be_written_to_is_refused(
    make: Callable[[Path], Path], folder: Path
) -> None:
    unwritable = make(folder)
    before = tree(folder)
    done = train(folder, "--runs-folder", unwritable)
    check_refused(
        done.returncode, done.stderr, f"cannot write to {unwritable}/run: ", "another --runs-folder"
    )
    assert tree(folder) == before


def test_too_small_a_disk_is_refused(folder: Path) -> None:
    disk = folder / "runs"
    disk.mkdir()
    arguments = [sys.executable, *command(str(REPOSITORY / "trainer.py"), folder)]
    mounting = 'mount -t tmpfs -o size=300m tmpfs "$0" && "$@"; code=$?; ls -A "$0"; exit $code'
    # A real one in a mount namespace where those are allowed, as in most containers they are not.
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0:
        arguments = ["unshare", "-rm", "sh", "-c", mounting, str(disk), *arguments]
    else:
        pretending = (
            "import collections, runpy, shutil, sys; sys.argv = sys.argv[1:];"
            "shutil.disk_usage = lambda _: collections.namedtuple('usage', 'free')(314_000_000);"
            "runpy.run_path(sys.argv[0], run_name='__main__')"
        )
        arguments[1:1] = ["-c", pretending]
    before = tree(folder)
    done = subprocess.run(
        arguments,
        env={**COMMAND_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    check_refused(done.returncode, done.stderr, f"{disk} has 31", " MB free", "needs 1,229 MB")
    assert done.stdout.splitlines()[-1].endswith(" s"), "the disk is still empty"
    assert tree(folder) == before


# ------------------------------------------------------------------------------ exports

EXPORTS = {
    "none": (lambda path: path.unlink(), "no {}: train the run first with python3 trainer.py"),
    "noise": (lambda path: replace(path, random.Random(0).randbytes(9999)), "{} is damaged"),
    "cut short": (lambda path: replace(path, path.read_bytes()[:-5000]), "{} is damaged"),
    "a flipped bit": (flip_a_bit, "{} is damaged"),
}


def export(folder: Path, app_folder: Path) -> subprocess.CompletedProcess[str]:
    return run_stage_command(
        *("generate_trace_model.py", "--runs-folder", folder / "runs", "--name", "run"),
        *("--app-folder", app_folder),
    )


@pytest.mark.parametrize(("damage", "text"), **by_id(EXPORTS))
def test_damaged_weights_are_not_exported(
    damage: Callable[[Path], None], text: str, finished: Path
) -> None:
    shutil.rmtree(finished / "runs/run/checkpoints")  # an export does not need them
    weights = finished / "runs/run/best.pt"
    damage(weights)
    before = tree(finished)
    done = export(finished, finished / "app")
    check_refused(done.returncode, done.stderr, text.replace("{}", str(weights)))
    assert tree(finished) == before


@pytest.mark.parametrize("make", **by_id(UNWRITABLE))
def test_an_app_folder_that_cannot_be_written_to_is_refused(
    make: Callable[[Path], Path], finished: Path
) -> None:
    shutil.rmtree(finished / "runs/run/checkpoints")
    unwritable = make(finished)
    before = tree(finished)
    done = export(finished, unwritable / "app")
    check_refused(
        done.returncode, done.stderr, f"cannot write to {unwritable}/app: ", "another --app-folder"
    )
    assert tree(finished) == before
