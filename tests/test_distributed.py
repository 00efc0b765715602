"""Several processes share a run: real torchrun, gloo on the CPU, tiny images.

What they compute is compared with a single process, in float64 where it is compared number by
number: a fresh network in float32 magnifies the last digit's rounding.
"""

import dataclasses
import itertools
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images
from test_trainer import as_options, brute_force_correct, outcome, run_folder

import augment
import checkpoint
import data
import distributed
import engine
import image_files
import model
import trainer
from utils import Config, UserError, learning_rate

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
TOLERANCE = 1e-6  # of a norm: the loss is in float32
MIXED = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0}  # three steps have both, as is asserted


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 training images, in batches of 8, 8 and 7, and 21 for validation, of three classes."""
    folder = tmp_path_factory.mktemp("images")
    make_images(folder, classes=3, images=7)
    make_images(folder / "more", classes=1, images=2, seed=1)
    for path in folder.glob("more/train/class_0/*"):
        path.rename(folder / "train/class_0" / f"more_{path.name}")
    return folder


def plain_settings(images: Path, runs_folder: Path) -> dict[str, object]:
    return {
        "runs_folder": str(runs_folder),
        "name": "run",
        "train_folder_name": str(images / "train"),
        "val_folder_name": str(images / "val"),
        "epochs": 2,
        "batch_size": 8,
        "val_batch_size": 8,
        "max_lr": 0.005,
        "train_px": 32,
        "val_px": 32,
        "val_resize_px": 36,
        "precision": "fp32",
        "device": "cpu",
        "workers": 1,
    }


@pytest.fixture
def settings(images: Path, tmp_path: Path) -> Iterator[dict[str, object]]:
    yield plain_settings(images, tmp_path / "runs")
    for path in tmp_path.rglob("*.pt"):  # pytest would keep them
        path.unlink()


def start(processes: int, *command: object, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*TORCHRUN, f"--nproc_per_node={processes}", *options, *map(str, command)],
        cwd=REPOSITORY,
        env={**COMMAND_ENVIRONMENT, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    stdout, stderr = process.communicate(timeout=150)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


# ------------------------------------------------------------------------------ the arithmetic


def in_float64() -> None:
    """Let the trainer compute in float64, all but the loss."""
    engine.DTYPES["fp32"] = torch.float64
    engine.ResNet50Wrapper = lambda *arguments: model.ResNet50Wrapper(*arguments).double()


def steps_of(
    config: Config, train_set: image_files.ImageSet, steps: int, frozen: bool = False
) -> dict[str, Any]:
    """So many steps of an epoch: the first one's gradients, the weights, and what was counted.

    Frozen, BatchNorm normalises by its running statistics, whatever is computed at once.
    """
    run = engine.new_run(config, 3)
    run.model.train(not frozen)
    gradients = {}
    batches = data.train_batches(train_set, config, epoch=0)
    for images, labels in itertools.islice(batches, steps):
        size = min(8, 23 - 8 * run.step)
        mix = augment.draw_mix(config, 0, run.step, 32)
        engine.train_step(run, images, labels, 0.01, size, mix)
        if run.step == 1:
            named = run.model.named_parameters()
            gradients = {name: weight.grad.clone() for name, weight in named}
    distributed.copy_from_main(run.model.buffers())
    run.state()  # a checkpoint, after which the count goes on as before
    totals = run.state()["totals"]
    return {"gradients": gradients, "weights": run.model.state_dict(), "totals": totals}


class Colours(torch.nn.Module):
    """Normalised, a picture's colours are its logits."""

    def __init__(self) -> None:
        super().__init__()
        pool = torch.nn.AdaptiveAvgPool2d(1)
        self.model = torch.nn.Sequential(torch.nn.BatchNorm2d(3), pool, torch.nn.Flatten())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.model(images)


def finished_epoch(config: Config) -> dict[str, Any]:
    """An epoch's row, and BatchNorm's statistics after it; before, each process had its own."""
    val_set = image_files.open_image_set(config.val_folder_name, "val")
    net, cpu = Colours(), torch.device("cpu")
    totals, average = engine.new_totals(cpu), engine.Average(net, 2.0)
    run = engine.Run(net, None, None, cpu, "fp32", totals, net, average)
    statistics = [*run.model.buffers(), *run.kept.buffers()]
    for place, tensor in enumerate(statistics):
        tensor.fill_(1 + place + distributed.number())
    run.step, run.epoch_s = 3, 1.0
    run.totals["counts"] += 1
    run.totals["trouble"][0] += 1  # a step that all have skipped
    trainer.finish_epoch(run, config, val_set, bool)
    return {"row": run.history[0], "statistics": [tensor.tolist() for tensor in statistics]}


def compute(config: Config) -> dict[str, Any]:
    """All that does not depend on the number of processes."""
    in_float64()
    train_set, val_set, _ = image_files.open_images(config)
    synchronised = dataclasses.replace(config, sync_batchnorm=True, **MIXED)
    in_parts = dataclasses.replace(config, micro_batch_size=2)
    torch.manual_seed(5)
    net = engine.ResNet50Wrapper(3, True)
    torch.nn.init.normal_(net.model.fc.weight)  # else it says the same of each picture
    net.train()(torch.randn(16, 3, 32, 32, dtype=torch.float64))
    results = {
        "synchronised": steps_of(synchronised, train_set, steps=3),
        "in parts": steps_of(in_parts, train_set, steps=1, frozen=True),
        "validation": [
            engine.evaluate(
                net,
                data.val_batches(val_set, dataclasses.replace(config, val_batch_size=size)),
                torch.device("cpu"),
                "fp32",
                bool,
            )
            for size in (8, 3)  # of 3, two of four processes have none
        ],
    }
    return results


def alone_and_together(folder: Path, config: Config) -> None:
    """What each process of torchrun does: computes, and asks the others some questions."""
    distributed.start()
    seen: list[list[int]] = []

    def note(_: object, index: int, out: Any) -> None:
        seen[-1].append(index)

    train_set = image_files.open_image_set(config.train_folder_name, "train")
    for epoch in range(2):
        order = augment.epoch_order(0, epoch, 23)
        seen.append([])
        for _ in data.batches(train_set, note, order, 8, 1, workers=0):
            seen.append([])
        seen.pop()
    told = []
    for rank in (None, 0, 1):
        try:
            with distributed.agreed():
                if distributed.number() == rank:
                    raise UserError(f"trouble of {rank}", 7)
            told.append("none")
        except UserError as error:
            told.append(f"{error} {error.exit_code}")
    once: list[str] = []
    distributed.once_a_machine(once.append, "of one machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", "0")
        distributed.once_a_machine(once.append, "of a machine each")
    record = {
        "once": once,
        "seen": seen,
        "told": told,
        "flags": distributed.any_of(distributed.number() == 1, False),
        "from_main": distributed.from_main(lambda: f"of {distributed.number()}"),
        "finished": finished_epoch(config),
    }
    (folder / f"{distributed.number()}.json").write_text(json.dumps(record))
    results = compute(config)
    if distributed.is_main():
        torch.save(results, folder / "results")


@pytest.fixture(scope="module")
def alone(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    config = Config(**{**plain_settings(images, Path("unused")), "zero_init_residual": True})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine.DTYPES, "fp32", torch.float32)  # what in_float64 changes is undone
        patch.setattr(engine, "ResNet50Wrapper", engine.ResNet50Wrapper)
        results = compute(config)
        train_set = image_files.open_image_set(config.train_folder_name, "train")
        return {**results, "frozen": steps_of(config, train_set, steps=1, frozen=True)}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative distance of two tensors of the same name."""
    return max(
        (ours[name].double() - theirs[name].double()).norm().item()
        / (theirs[name].double().norm().item() + 1e-12)
        for name in theirs
    )


def check_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert distance(ours["gradients"], theirs["gradients"]) < TOLERANCE
    assert distance(ours["weights"], theirs["weights"]) < TOLERANCE
    for name in ("counts", "trouble"):
        assert ours["totals"][name].tolist() == theirs["totals"][name].tolist()
    loss, expected = ours["totals"]["loss"].item(), theirs["totals"]["loss"].item()
    assert math.isclose(loss, expected, rel_tol=TOLERANCE)


def test_gradients_added_up_in_parts_are_those_of_the_whole_batch(alone: dict[str, Any]) -> None:
    check_equal(alone["in parts"], alone["frozen"])
    assert distance(alone["synchronised"]["gradients"], alone["frozen"]["gradients"]) > 0.01


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_compute_what_one_does(
    count: int, alone: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """Gradients, weights, running statistics, counts; and each image once, in the same batch."""
    config = Config(**{**plain_settings(images, Path("unused")), "zero_init_residual": True})
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, test_distributed\nfrom utils import Config\n"
        f"config = {config!r}\n"
        f"test_distributed.alone_and_together(pathlib.Path({str(tmp_path)!r}), config)\n"
    )
    done = end(start(count, script))
    assert done.returncode == 0, done.stderr
    records = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(count)]
    for epoch in range(2):
        order = augment.epoch_order(0, epoch, 23).tolist()
        for batch, size in enumerate((8, 8, 7)):
            shares = [record["seen"][3 * epoch + batch] for record in records]
            assert list(itertools.chain(*shares)) == order[8 * batch : 8 * batch + size]
            assert max(map(len, shares)) - min(map(len, shares)) <= 2
            assert all(len(share) % 2 == 0 for share in shares[:-1])  # no pair is torn apart
    finished = finished_epoch(config)
    for rank, record in enumerate(records):
        ours, theirs = record["finished"]["row"], finished["row"]
        assert record["finished"]["statistics"] == finished["statistics"]
        assert math.isclose(ours["val_loss"], theirs["val_loss"], rel_tol=1e-5)  # in float32
        assert ours["val_correct1"] == theirs["val_correct1"]
        assert (ours["train_images"], theirs["train_images"]) == (count, 1)
        assert ours["skipped_steps"] == theirs["skipped_steps"] == 1
        assert record["once"] == ["of one machine"] * (rank == 0) + ["of a machine each"]
        assert record["flags"] == [True, False]
        assert record["from_main"] == "of 0"
        main_says = ["none", "trouble of 0 7", "process 1: trouble of 1 7"]
        assert record["told"] == (main_says if rank == 0 else ["none", " 7", " 7"])

    together = torch.load(tmp_path / "results")
    mixed = dataclasses.replace(config, **MIXED)
    drawn = [augment.draw_mix(mixed, 0, step, 32) for step in range(3)]
    assert {mix.box is None for mix in drawn if mix is not None} == {False, True}
    check_equal(together["synchronised"], alone["synchronised"])
    check_equal(together["in parts"], alone["frozen"])
    for ours, theirs in zip(together["validation"], alone["validation"], strict=True):
        assert math.isclose(ours.pop("val_loss"), theirs["val_loss"], rel_tol=TOLERANCE)
        assert ours.items() <= theirs.items()
        assert 0 < ours["val_correct1"] < ours["val_images"] == 21


@pytest.mark.parametrize(
    ("changes", "count", "says"),
    [
        ({"batch_size": 8}, 9, r"a batch of 8 images leaves one of 9 processes with 0 at once"),
        ({"batch_size": 8}, 4, r"last batch of 5 images .* with 0 at once, .* needs 2: use 2 proc"),
        (
            {"batch_size": 8},
            3,
            "last batch of 5 .* with 1 at once, .* use 2 proc.*--sync-batchnorm",
        ),
        ({"batch_size": 8, "sync_batchnorm": True}, 4, "last batch of 5 .* with 0 .* use 3 proc"),
        ({"batch_size": 9, "micro_batch_size": 2}, 1, "of 9 .* 1 at once.*larger --micro-batch-si"),
        ({"batch_size": 7, "micro_batch_size": 3}, 2, "of 7 .* 1 at once.*larger --micro-batch-si"),
        ({"batch_size": 4, "sync_batchnorm": True}, 1, "last batch of 1 .* needs 2: use"),
        ({"batch_size": 8, "sync_batchnorm": True}, 3, ""),
        ({"batch_size": 8}, 2, ""),
        ({"batch_size": 7, "micro_batch_size": 3}, 1, ""),
    ],
)
def test_batches_that_batchnorm_cannot_normalise_are_refused(
    changes: dict[str, Any], count: int, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distributed, "processes", lambda: count)
    if not says:
        distributed.check_shares(Config(**changes), 21)
        return
    with pytest.raises(UserError, match=says):
        distributed.check_shares(Config(**changes), 21)


def test_a_single_process_has_nothing_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a single process asked others")

    for name in ("init_process_group", "all_reduce", "broadcast", "all_gather_object"):
        monkeypatch.setattr(torch.distributed, name, refuse)
    monkeypatch.setenv("WORLD_SIZE", "1")  # as torchrun sets it for one
    distributed.start()
    net, cpu = torch.nn.Linear(1, 1), torch.device("cpu")
    assert distributed.data_parallel(net, cpu) is net
    tensor = torch.ones(3)
    assert distributed.summed(tensor) is tensor
    assert distributed.any_of(True, False) == [True, False]
    assert distributed.from_main(lambda: 5) == 5
    distributed.copy_from_main([tensor])
    distributed.wait_for_all()
    with pytest.raises(UserError, match="as it is"), distributed.agreed():
        raise UserError("as it is")


@pytest.mark.parametrize("error", [UserError("damaged"), OSError(5, "Input/output error")])
def test_what_reading_a_batch_raises_is_heard_by_all_before_it_ends_one(error: Exception) -> None:
    def batches() -> Iterator[int]:
        yield 7
        raise error

    heard: list[Exception | None] = []
    taken = distributed.heeded(batches(), heard.append)
    assert (next(taken), heard) == (7, [None])
    with pytest.raises(type(error)):
        next(taken)
    assert heard == [None, error]
    heard.clear()
    assert list(distributed.heeded(iter([1, 2]), heard.append)) == [1, 2]
    assert heard == [None] * 3  # the end too


def test_each_process_has_the_gpu_of_its_number_on_its_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second machine's processes, 4 to 7 of all, where each has four GPUs, or two."""
    chosen: list[int] = []
    monkeypatch.setattr(distributed, "processes", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    gpus = 4
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    for number in range(4):
        monkeypatch.setenv("RANK", str(4 + number))
        monkeypatch.setenv("LOCAL_RANK", str(number))
        assert distributed.choose_gpu() == torch.device("cuda", number)
    assert chosen == [0, 1, 2, 3]
    gpus = 2
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.choose_gpu() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="has 2 GPUs for more processes: use --nproc_per_node=2"):
        distributed.choose_gpu()


@pytest.mark.parametrize(
    ("size", "more", "says"),
    [
        ("2", {}, "WORLD_SIZE is set to '2', and RANK, MASTER_ADDR, MASTER_PORT not: unset it"),
        ("two", {}, "WORLD_SIZE is set to 'two', and RANK"),
        ("0", dict.fromkeys(("RANK", "MASTER_ADDR", "MASTER_PORT"), "0"), "is set to '0': unset"),
    ],
)
def test_a_variable_that_torchrun_has_not_set_is_told(
    size: str, more: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WORLD_SIZE": size, **more}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        distributed.start()


def test_the_others_wait_for_the_main_process_beyond_their_usual_time(tmp_path: Path) -> None:
    script = tmp_path / "slow.py"
    script.write_text(
        "import time, distributed\n"
        "distributed.WAIT_S = 10\n"
        "distributed.start()\n"
        "heard = distributed.from_main(lambda: time.sleep(13) or 5)\n"
        "print(f'heard {heard}\\n', end='')\n"  # in one piece
    )
    done = end(start(2, script))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["heard 5"] * 2


def test_what_is_not_the_main_processs_ends_all_in_one_line(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """As where a second machine has other images, and so perhaps another network."""
    script = tmp_path / "other.py"
    script.write_text(
        "import os, engine, image_files, trainer, utils\n"
        "def fail(*_):\n"
        "    raise AssertionError('a network is built')\n"
        "engine.new_run = fail\n"
        "if os.environ['RANK'] == '1':\n"
        "    image_files.ImageSet.fingerprint = lambda _: 'another'\n"
        "utils.run_stage(trainer.main)\n"
    )
    done = end(start(2, script, *as_options(settings)))
    assert done.returncode != 0
    (line,) = errors(done)
    host = socket.gethostname()
    assert line == (
        f"error: process 1: images of {host} is not that of the main process's machine: give both "
        "the same"
    )
    assert f'File "{script}"' not in done.stderr  # as in a traceback


def test_a_last_checkpoint_that_cannot_be_written_is_no_finished_run(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """The disk is full at the end, and slow to say so: the result waits for the checkpoint."""
    script = tmp_path / "full.py"
    script.write_text(
        "import time, checkpoint, trainer, utils\n"
        "def save(folder, state):\n"
        "    time.sleep(3)\n"
        "    raise OSError(28, 'No space left on device', str(folder))\n"
        "checkpoint.save = save\n"
        "utils.run_stage(trainer.main)\n"
    )
    once = {**settings, "epochs": 1, "checkpoint_minutes": 1000}
    done = end(start(2, script, *as_options(once)))
    assert done.returncode != 0
    (line,) = errors(done)
    assert "No space left on device" in line
    assert f'File "{script}"' not in done.stderr
    folder = run_folder(settings)
    session = json.loads((folder / "sessions.jsonl").read_text().splitlines()[-1])
    assert session["ended"] != "finished" and not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("failure", "words"),
    [("utils.UserError('a mistake', 1)", "error: a mistake"), ("RuntimeError('odd')", ".*: odd")],
)
def test_a_process_that_fails_takes_no_leave_of_the_others(
    failure: str, words: str, tmp_path: Path
) -> None:
    """What waits at its end stands for NCCL, which waits for those who wait for this process."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import atexit, time, distributed, utils\n"
        "def main():\n"
        "    distributed.start()\n"
        "    if distributed.number():\n"
        "        atexit.register(time.sleep, 600)\n"
        f"        raise {failure}\n"
        "    distributed.any_of(False)\n"
        "utils.run_stage(main)\n"
    )
    done = end(start(2, script))
    assert done.returncode == 1
    assert any(re.fullmatch(words, line) for line in done.stderr.splitlines()), done.stderr


# ------------------------------------------------------------------------------ real runs


def workers(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """Process ids of torchrun's processes by their number."""
    found = {}
    for children in Path(f"/proc/{torchrun.pid}/task").glob("*/children"):
        for pid in children.read_text().split():
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            rank = next((part for part in environment if part.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank.removeprefix(b"RANK="))] = int(pid)
    return found


def wait_for(process: subprocess.Popen[str], folder: Path, words: str, seen: int = 0) -> str:
    """Wait until train.log says something beyond its first `seen` characters; the whole log."""
    deadline = time.monotonic() + 90
    while process.poll() is None and time.monotonic() < deadline:
        path = folder / "train.log"
        text = path.read_text() if path.exists() else ""
        if words in text[seen:]:
            return text
        time.sleep(0.01)
    raise AssertionError(f"{words!r} was not said: {process.communicate(timeout=60)}")


def test_a_run_that_loses_a_process_goes_on_by_itself(settings: dict[str, object]) -> None:
    """Number 1 is killed: bit for bit the run that lost none."""
    settings["log_interval_s"] = 1e-9
    options = ("--zero-init-residual",)  # a fresh network's running statistics let it explode
    undisturbed = {**settings, "name": "undisturbed"}
    done = end(start(2, "trainer.py", *as_options(undisturbed), *options))
    assert done.returncode == 0, done.stderr
    said = (run_folder(undisturbed) / "train.log").read_text()
    assert "2 processes share each batch of 8, so that max_lr stays as it is" in said
    assert done.stdout.count("epoch 2/2  train loss") == 1  # one of them speaks
    expected = outcome(undisturbed)
    net = torchvision.models.resnet50(num_classes=3)
    net.load_state_dict(torch.load(run_folder(undisturbed) / "best.pt"))
    assert expected["result"]["val_correct1"] == brute_force_correct(net, settings)
    assert [row["train_images"] for row in expected["rows"]] == [23, 23]

    killed = {**settings, "name": "killed", "checkpoint_minutes": 0}
    folder = run_folder(killed)
    command = ("trainer.py", *as_options(killed), *options)
    process = start(2, *command, options=("--max-restarts=1",))
    wait_for(process, folder, "epoch 1/2  step 2/3")
    os.kill(workers(process)[1], signal.SIGKILL)
    done = end(process)
    assert done.returncode == 0, done.stderr
    assert (folder / "train.log").read_text().count("resumed after") == 1
    assert outcome(killed) == expected


def test_a_run_goes_on_with_fewer_processes(settings: dict[str, object], tmp_path: Path) -> None:
    """On four, stopped; on two, stopped by one of them; on one: as on one all the time.

    The real trainer, but in float64, so that no rounding hides a difference.
    """
    script = tmp_path / "trainer_in_float64.py"
    script.write_text(
        "import model, test_distributed, trainer, utils\n"
        "test_distributed.in_float64()\n"
        "trainer.load_weights = lambda *arguments: model.load_weights(*arguments).double()\n"
        "utils.run_stage(trainer.main)\n"
    )
    settings |= {"sync_batchnorm": "True", "zero_init_residual": "True", "epochs": 2}
    options = as_options({**settings, "log_interval_s": 1e-9})
    options = [option for option in options if option != "True"]
    folder = run_folder(settings)

    def stop(count: int, words: str, signalled: Callable[[Any], int]) -> dict[str, Any]:
        seen = len((folder / "train.log").read_text()) if folder.exists() else 0
        process = start(count, script, *options)
        wait_for(process, folder, words, seen)
        os.kill(signalled(process), signal.SIGTERM)
        done = end(process)
        assert done.returncode != 0
        assert "exitcode  : 75" in done.stderr or "got signal: 15" in done.stderr, done.stderr
        assert "everything is saved after step" in (folder / "train.log").read_text()
        state = checkpoint.load_latest(folder / "checkpoints")
        assert state is not None
        return state

    first = stop(4, "epoch 1/2  step 1/3", lambda process: process.pid)
    second = stop(2, "epoch 2/2  step 1/3", lambda process: workers(process)[1])
    assert 1 <= first["step"] < second["step"] <= 6
    assert first.keys() == second.keys()
    single = ["whole" if option == "run" else option for option in options]
    for arguments in (options, single):
        done = end(start(1, script, *arguments))
        assert done.returncode == 0, done.stderr
    several, one = outcome(settings), outcome({**settings, "name": "whole"})
    for ours, theirs in zip(several["rows"], one["rows"], strict=True):
        for name in ("epoch", "learning_rate", "train_px", "train_images", "val_images"):
            assert ours[name] == theirs[name]
        for name in ("train_loss", "val_loss"):
            assert math.isclose(ours[name], theirs[name], rel_tol=1e-5)
    config = Config(epochs=2, max_lr=0.005)
    assert several["rows"][0]["learning_rate"] == learning_rate(config, 3, 3)
    paths = [folder / "last.pt", folder.with_name("whole") / "last.pt"]
    ours, theirs = (torch.load(path) for path in paths)
    torch.manual_seed(0)
    first_weights = model.ResNet50Wrapper(3, True).model.state_dict()
    for name, weight in theirs.items():
        moved = (weight - first_weights[name]).double().norm()
        assert (ours[name] - weight).double().norm() <= 1e-4 * moved + 1e-9, name


@pytest.mark.parametrize(
    ("command", "what"),
    [(["trainer.py", "--dry-run"], "--dry-run"), (["lr_finder.py"], "LR finder")],
)
def test_what_is_for_one_process_is_refused_in_one_line(
    settings: dict[str, object], command: list[str], what: str
) -> None:
    done = end(start(2, *command, *as_options(settings)))
    assert done.returncode != 0
    (line,) = errors(done)
    assert f"{what} is for one process: start it with python3" in line
    assert not Path(str(settings["runs_folder"])).exists()


def test_an_image_that_one_process_cannot_read_stops_all_saved(
    settings: dict[str, object], tmp_path: Path
) -> None:
    """Number 1 finds it damaged in the second step: one line, and the first step is saved."""
    make_images(tmp_path / "images", classes=3, images=16)
    settings = {**settings, **plain_settings(tmp_path / "images", tmp_path / "runs")}
    looked_at = np.linspace(0, 47, image_files.FINGERPRINT_IMAGES).astype(int)  # at the start
    second_half = augment.epoch_order(0, 0, 48)[12:16]  # of the second batch
    index = next(index for index in second_half.tolist() if index not in looked_at)
    train_set = image_files.open_image_set(str(settings["train_folder_name"]), "train")
    path = train_set.path(index)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + whole[-2:])
    done = end(start(2, "trainer.py", *as_options({**settings, "workers": 0})))
    assert done.returncode != 0
    (line,) = errors(done)
    assert line.startswith(f"error: process 1: cannot read {path} (")
    state = checkpoint.load_latest(run_folder(settings) / "checkpoints")
    assert state is not None
    assert state["step"] == 1
    assert line in (run_folder(settings) / "train.log").read_text()
