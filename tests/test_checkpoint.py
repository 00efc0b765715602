"""Saving, loading, and what a damaged or crowded folder does to them."""

import hashlib
import os
import random
import shutil
import subprocess
import sys
import types
from concurrent.futures import wait
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

import checkpoint
from utils import Config, UserError, read_metrics


def make_state(step: int, epochs: int = 0) -> dict:
    torch.manual_seed(step)
    return {
        "step": step,
        "history": [{"epoch": epoch + 1, "val_top1": 50.0} for epoch in range(epochs)],
        "epoch_s": 0.0,
        "average": None,
        "model": {"weight": torch.randn(20, 30), "steps": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(5)}}, "param_groups": [{}]},
    }


def same(left: object, right: object) -> bool:
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def test_what_is_saved_is_loaded_and_bears_its_hash(tmp_path: Path) -> None:
    state = make_state(7, epochs=1)
    path = checkpoint.save(tmp_path, state)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f"epochs-001-step-00000007-{digest[:16]}.pt"
    assert same(checkpoint.load_latest(tmp_path), state)


def test_an_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert checkpoint.load_latest(tmp_path / "none") is None


def test_the_newest_is_loaded_and_two_are_kept(tmp_path: Path) -> None:
    (tmp_path / ".epochs-000-step-00000001-0123456789abcdef.pt.tmp").write_bytes(b"half")
    # The same step before and after its validation: the finished epoch makes the later one.
    for step, epochs in ((9, 0), (10, 0), (10, 1), (100_000_000, 1)):
        checkpoint.save(tmp_path, make_state(step, epochs))
        assert same(checkpoint.load_latest(tmp_path), make_state(step, epochs))
    names = sorted(path.name[:-20] for path in tmp_path.iterdir())
    assert names == ["epochs-001-step-00000010", "epochs-001-step-100000000"]


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_checkpoint_is_left_aside(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, make_state(1))
    path = checkpoint.save(tmp_path, make_state(2))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[random.Random(0).randrange(len(content))] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-1], "empty": b""}[damage])
    assert same(checkpoint.load_latest(tmp_path), make_state(1))
    assert path.name in caplog.text

    for other in tmp_path.iterdir():
        other.write_bytes(b"x")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoint.load_latest(tmp_path)


def test_background_saving_keeps_the_state_of_the_moment(tmp_path: Path) -> None:
    saver = checkpoint.BackgroundSaver(tmp_path)
    state = make_state(3)
    saver.save(state)
    state["model"]["weight"].zero_()
    saver.wait()
    assert same(checkpoint.load_latest(tmp_path / "checkpoints"), make_state(3))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]  # no epoch has ended


def test_weights_are_those_that_a_checkpoint_stands_for(tmp_path: Path) -> None:
    """best.pt is what the run has for its best, last.pt that of the last epoch that has ended."""
    saver = checkpoint.BackgroundSaver(tmp_path)

    def encoded(weight: int) -> torch.Tensor:
        content = checkpoint.encode({"weight": torch.tensor(weight)})
        return torch.frombuffer(bytearray(content), dtype=torch.uint8)

    ended = {**make_state(3, epochs=1), "best": encoded(1)}

    def kept(**changed: object) -> list[int]:
        saver.save({**ended, **changed})
        saver.wait()
        return weights()

    def weights() -> list[int]:
        files = (tmp_path / "best.pt", tmp_path / "last.pt")
        return [torch.load(file)["weight"].item() for file in files]

    assert kept(model={"weight": torch.tensor(2)}) == [1, 2]
    assert kept(average={"weight": torch.tensor(3)}) == [1, 3]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.pt")}
    assert kept(average={"weight": torch.tensor(3)}) == [1, 3]
    assert times == {path: path.stat().st_mtime_ns for path in times}  # a mirror copies no equal
    assert kept(epoch_s=0.1, average={"weight": torch.tensor(4)}) == [1, 3]  # within an epoch

    # Where the checkpoint cannot be saved, the epoch will be trained again.
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").touch()
    with pytest.raises(NotADirectoryError):
        kept(best=encoded(5))
    assert weights() == [1, 3]

    # Going on within an epoch, best.pt is mended, of whatever attempt it was, or if it is lost.
    for damage in (b"x", None):
        (tmp_path / "best.pt").write_bytes(damage) if damage else (tmp_path / "best.pt").unlink()
        checkpoint.write_results(tmp_path, {**ended, "epoch_s": 0.1})
        assert weights() == [1, 3]
    # A version that kept none has written the file itself.
    del ended["best"]
    checkpoint.write_results(tmp_path, ended)
    assert torch.load(tmp_path / "best.pt")["weight"] == 1


def test_an_epoch_s_row_is_written_once_its_weights_are(tmp_path: Path) -> None:
    """Else an export in between would give the weights before it this accuracy."""
    saver = checkpoint.BackgroundSaver(tmp_path)

    def save(epochs: int, **changed: object) -> None:
        saver.save({**make_state(3 * epochs, epochs), **changed})
        saver.wait()

    def rows() -> list[int]:
        return [row["epoch"] for row in read_metrics(tmp_path / "metrics.jsonl")]

    save(1)
    save(1, epoch_s=0.1)
    assert rows() == [1]
    shutil.move(tmp_path / "checkpoints", tmp_path / "aside")
    (tmp_path / "checkpoints").touch()  # the checkpoint cannot be written
    with pytest.raises(NotADirectoryError):
        save(2)
    assert rows() == [1]
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "last.pt").unlink()
    (tmp_path / "last.pt").mkdir()  # the weights cannot
    with pytest.raises(IsADirectoryError):
        save(2)
    assert rows() == [1]
    (tmp_path / "last.pt").rmdir()
    save(2)
    assert rows() == [1, 2]
    checkpoint.write_results(tmp_path, {**make_state(3, 1), "epoch_s": 0.1})
    assert rows() == [1]  # where a run goes on from an earlier state


def test_what_is_said_to_be_saved_is_on_the_disk(tmp_path: Path) -> None:
    """A mirror is told then, and copies what it finds: the checkpoint, and the epoch's weights."""
    found = []

    def look() -> None:
        state = checkpoint.load_latest(tmp_path / "checkpoints")
        found.append((state["step"], (tmp_path / "last.pt").exists()))

    saver = checkpoint.BackgroundSaver(tmp_path, look)
    for step, epochs in ((3, 0), (5, 1)):
        saver.save(make_state(step, epochs))
        saver.wait()
    assert found == [(3, False), (5, True)]


def test_a_save_that_has_failed_is_told_without_waiting_for_the_next(tmp_path: Path) -> None:
    saver = checkpoint.BackgroundSaver(tmp_path)
    (tmp_path / "checkpoints").touch()
    saver.check()
    saver.save(make_state(3))
    wait([saver._underway])
    with pytest.raises(NotADirectoryError):
        saver.check()
    saver.check()  # once


def test_a_failed_background_save_is_raised_at_the_next_call(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    saver = checkpoint.BackgroundSaver(tmp_path)
    saver.save(make_state(1))
    with pytest.raises(NotADirectoryError):
        saver.save(make_state(2))


def test_a_checkpoint_that_the_disk_has_no_room_for_is_not_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint.save(tmp_path, make_state(1))
    room = types.SimpleNamespace(free=path.stat().st_size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: room)
    monkeypatch.setattr(checkpoint, "write_atomically", None)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoint.save(tmp_path, make_state(2))
    assert checkpoint.generations(tmp_path) == [path]


def test_a_folder_that_was_removed_is_made_again(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "removed" / "checkpoints", make_state(1))
    assert same(checkpoint.load_latest(path.parent), make_state(1))


def test_settings_that_change_the_result_may_not_change() -> None:
    began = {"config": vars(Config())}
    checkpoint.check_settings(began, Config(workers=3, log_interval_s=1, device="cpu"))
    with pytest.raises(UserError, match=r"max_lr was 0.175, is 0.2; seed was 0, is 1"):
        checkpoint.check_settings(began, Config(max_lr=0.2, seed=1))
    # A setting that the older version had not yet was as by default.
    older = {"config": {k: v for k, v in vars(Config()).items() if k != "blurpool"}}
    checkpoint.check_settings(older, Config())
    with pytest.raises(UserError, match="blurpool was False, is True"):
        checkpoint.check_settings(older, Config(blurpool=True))
    # A run may be extended, and not again by another number.
    checkpoint.check_settings(began, Config(extra_epochs=5))
    with pytest.raises(UserError, match="extra_epochs was 5, is 6"):
        checkpoint.check_settings({"config": vars(Config(extra_epochs=5))}, Config(extra_epochs=6))


@pytest.mark.parametrize("tidy", [True, False])
def test_saving_after_a_damaged_checkpoint_keeps_the_whole_ones(tmp_path: Path, tidy: bool) -> None:
    """Where it is still there too, as one that could not be read: it seems to be the newest."""
    checkpoint.save(tmp_path, make_state(5))
    checkpoint.save(tmp_path, make_state(9)).write_bytes(b"damaged")
    assert same(checkpoint.load_latest(tmp_path, tidy), make_state(5))
    checkpoint.save(tmp_path, make_state(7))
    assert sorted(path.name[:25] for path in tmp_path.iterdir()) == [
        "epochs-000-step-00000005-",
        "epochs-000-step-00000007-",
    ]


def test_a_save_further_on_than_a_damaged_checkpoint_keeps_the_whole_one(tmp_path: Path) -> None:
    """What was loaded is at step 1, the damaged one at 2: its place is not a generation's."""
    whole = checkpoint.save(tmp_path, make_state(1))
    checkpoint.save(tmp_path, make_state(2)).write_bytes(b"damaged")
    assert checkpoint.load_latest(tmp_path)["step"] == 1
    newest = checkpoint.save(tmp_path, make_state(3))
    assert checkpoint.generations(tmp_path) == [newest, whole]


@pytest.mark.parametrize("changed", [("train",), ("val",), ("train", "val")])
def test_a_run_goes_on_with_its_own_images_only(changed: tuple[str, ...]) -> None:
    images = {"train": "1f", "val": "2f"}
    checkpoint.check_images({"images": images}, dict(images))
    others = {**images, **dict.fromkeys(changed, "3f")}
    with pytest.raises(UserError, match=f"the {' and '.join(changed)} images are not those"):
        checkpoint.check_images({"images": images}, others)


def test_a_run_belongs_to_one_process(tmp_path: Path) -> None:
    first = checkpoint.lock(tmp_path)
    with pytest.raises(UserError, match="another process trains in"):
        checkpoint.lock(tmp_path)
    first.close()
    checkpoint.lock(tmp_path).close()


def test_what_another_process_saved_meanwhile_is_not_undone(tmp_path: Path) -> None:
    checkpoint.check_newest(tmp_path, None)
    checkpoint.save(tmp_path, make_state(5))
    state = checkpoint.load_latest(tmp_path)
    checkpoint.check_newest(tmp_path, state)
    checkpoint.save(tmp_path, make_state(5, epochs=1))
    for outdated in (None, state):
        with pytest.raises(UserError, match="another process has just saved"):
            checkpoint.check_newest(tmp_path, outdated)


def test_what_another_process_has_just_removed_takes_no_room(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_bytes(bytes(1000))
    (tmp_path / "best.pt").symlink_to("nothing")  # for stat the same
    free, needed = checkpoint.check_room(tmp_path, 1000, 1000)
    assert needed == 5000 and free > 0


def test_what_stays_beside_the_checkpoints_leaves_them_no_room(tmp_path: Path) -> None:
    size = checkpoint.save(tmp_path / "checkpoints", make_state(1)).stat().st_size
    (tmp_path / "export").mkdir()
    for name in ("export/model.pt", "mine.pt"):
        (tmp_path / name).write_bytes(bytes(10**6))
    assert checkpoint.check_room(tmp_path, 10**6, 10**6)[1] == 6 * 10**6 - size


def test_saving_beside_training_starts_no_threads_of_its_own(tmp_path: Path) -> None:
    """More threads of OpenMP than cores sleep between operations, which slows training down."""
    code = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
import pathlib, checkpoint
from torch.nn.functional import conv2d
model = {"weight": torch.randn(2048, 2048, 3, 3).to(memory_format=torch.channels_last)}
conv2d(torch.randn(8, 2048, 9, 9), model["weight"][:64])
saver = checkpoint.BackgroundSaver(pathlib.Path(sys.argv[2]))
best = model["weight"].flatten().view(torch.uint8)
state = {"step": 1, "history": [{}], "epoch_s": 0.0, "model": model, "average": None, "best": best}
saver.save({**state, "model": {}, "best": None})
saver.wait()
before = os.listdir("/proc/self/task")
assert len(before) > 1
saver.save(state)
saver.wait()
assert os.listdir("/proc/self/task") == before
"""
    command = [sys.executable, "-c", code, REPOSITORY, tmp_path]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "2"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
