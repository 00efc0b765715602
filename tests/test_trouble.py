"""What goes wrong inside a run: numbers that are none, memory, disks, open files, clocks."""

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import quick_start
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from test_preflight import SlowStore
from test_trainer import (  # noqa: F401 (fixtures are among them)
    _remove_checkpoints,
    as_options,
    images,
    outcome,
    plain_settings,
    run_folder,
    settings,
    train,
)

import checkpoint
import engine
import sessions
import utils
from utils import Config, UserError

Settings = dict[str, object]


def program(fault: str) -> str:
    """The trainer, into which some lines of Python put a fault first."""
    lines = (
        "import sys, time, torch, data, engine, trainer, utils",
        fault,
        "utils.run_stage(trainer.main)",
    )
    return "\n".join(lines)


def train_with(fault: str, settings: Settings, *options: str) -> subprocess.CompletedProcess:
    """The trainer with a fault, in a process of its own."""
    return quick_start.run(
        [sys.executable, "-c", program(fault), *as_options(settings), *options],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        timeout=200,
    )


def error_line(done: subprocess.CompletedProcess, exit_code: int) -> str:
    assert done.returncode == exit_code, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line


# ------------------------------------------------------------------------------ numbers

# The fourth batch that is trained on makes the loss NaN; the clock of the day leaps as it likes.
NAN_AT_STEP_4 = """
calls, whole = [], data.normalize
def normalize(*arguments):
    calls.append(None)
    return whole(*arguments) * (float("nan") if len(calls) == 4 else 1)
data.normalize = normalize
"""
LEAPING_CLOCK = """
import itertools
leaps = itertools.cycle([10**9, -10**9, 0])
clock = time.time
time.time = lambda: clock() + next(leaps)
"""


# One epoch of 7 steps, so that the fourth batch is a training one, saved after every step.
ONE_EPOCH = {"epochs": 1, "batch_size": 3, "checkpoint_minutes": 0}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """Such a run that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("one_epoch")
    make_images(folder / "images", classes=3, images=7)
    settings = {**plain_settings(folder / "images", folder / "runs"), **ONE_EPOCH}
    train(settings)
    yield settings
    shutil.rmtree(folder)  # 600 MB, which pytest would keep


def test_a_nan_stops_at_its_step_and_the_same_command_goes_on_from_before_it(
    settings: Settings, one_epoch: Settings
) -> None:
    settings = {**settings, **ONE_EPOCH}
    line = error_line(train_with(NAN_AT_STEP_4, settings), 1)
    assert "the loss is not a number any more by step 4, in epoch 1" in line
    assert "--max-lr" in line and "same command goes on" in line
    state = checkpoint.load_latest(run_folder(settings) / "checkpoints")
    assert state is not None and state["step"] == 3
    assert all(weight.isfinite().all() for weight in state["model"].values())
    assert "the loss is not a number" in (run_folder(settings) / "train.log").read_text()
    assert sessions.read(run_folder(settings))[-1]["ended"] == "failed"

    done = train_with(LEAPING_CLOCK, settings)
    assert done.returncode == 0, done.stderr
    assert "resumed after 0 epochs and 3 steps" in done.stdout
    assert outcome(settings) == outcome(one_epoch)


def scaled_run(settings: Settings, scale: float) -> tuple[engine.Run, torch.Tensor, torch.Tensor]:
    """A run with loss scaling, which a CPU has too, and a batch."""
    run = engine.new_run(Config(**settings), 3)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    run.model.train()
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return run, batch, torch.arange(8) % 3


def test_skipped_steps_are_counted_and_a_few_are_allowed(settings: Settings) -> None:
    run, batch, labels = scaled_run(settings, scale=2.0**127)
    in_a_row = []
    while not in_a_row or in_a_row[-1]:  # gradients overflow float32 until the scale fits
        engine.train_step(run, batch, labels, 1e-3)
        engine.refuse_trouble(run, engine.trouble_seen(run))
        in_a_row.append(engine.trouble_seen(run)[1])
        assert len(in_a_row) < engine.SKIPS_ALLOWED
    assert in_a_row == [*range(1, len(in_a_row)), 0]
    assert len(in_a_row) > 1
    assert engine.trouble_seen(run) == [len(in_a_row) - 1, 0, 0]


def test_steps_skipped_one_after_another_end_the_run(settings: Settings) -> None:
    run, batch, labels = scaled_run(settings, scale=2.0**16)
    before = run.model.model.fc.weight.detach().clone()
    run.model.model.fc.weight.register_hook(lambda gradient: gradient * float("nan"))
    for _ in range(engine.SKIPS_ALLOWED - 1):
        assert engine.train_step(run, batch, labels, 1e-3).isfinite()
        engine.refuse_trouble(run, engine.trouble_seen(run))
    engine.train_step(run, batch, labels, 1e-3)
    with pytest.raises(UserError, match="skipped 10 steps in a row by step 10, in epoch 1"):
        engine.refuse_trouble(run, engine.trouble_seen(run))
    assert torch.equal(run.model.model.fc.weight, before)  # as a skipped step leaves it


def test_a_row_of_skipped_steps_is_counted_beyond_an_epoch(settings: Settings) -> None:
    fault = """
new_run = engine.new_run
def scaled(*arguments):
    run = new_run(*arguments)
    run.scaler = torch.amp.GradScaler("cpu")
    run.model.model.fc.weight.register_hook(lambda gradient: gradient * float("nan"))
    return run
engine.new_run = scaled
"""
    line = error_line(train_with(fault, {**settings, "epochs": 20}), 1)  # of three steps each
    assert "skipped 10 steps in a row by step 10, in epoch 4" in line


def test_weights_that_are_not_numbers_are_never_saved(tmp_path: Path) -> None:
    good = {"step": 1, "history": [], "model": {"weight": torch.ones(5), "count": torch.tensor(3)}}
    path = checkpoint.save(tmp_path, good)
    spoilt = {**good, "step": 2, "model": {"weight": torch.tensor([1.0, float("inf")])}}
    with pytest.raises(UserError, match="after step 2 there are weights that are not numbers"):
        checkpoint.save(tmp_path, spoilt)
    assert list(tmp_path.iterdir()) == [path]


# ------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("name", sorted(utils.RESULT_SETTINGS))
def test_a_setting_that_changes_the_result_is_refused_on_resume(name: str) -> None:
    config = dataclasses.replace(Config(), extra_epochs=5)  # a second extension is refused too
    before = dataclasses.asdict(config)
    value = before[name]
    other = {bool: lambda: not value, str: lambda: "bf16"}.get(type(value), lambda: value + 1)()
    changed = dataclasses.replace(config, **{name: other})
    with pytest.raises(UserError, match=rf"\({name} was {value}, is {other}\)"):
        checkpoint.check_settings({"config": before}, changed)


@pytest.mark.parametrize("name", sorted(utils.FREE_SETTINGS))
def test_any_other_setting_may_change(name: str) -> None:
    value = getattr(Config(), name)
    changed = dataclasses.replace(Config(), **{name: value * 2 if value else 1})
    checkpoint.check_settings({"config": dataclasses.asdict(Config())}, changed)


# ------------------------------------------------------------------------------ resources


# As on a GPU with memory for 100 images of training, or for 5 of validation.
SMALL_GPU = """
train_step, evaluate = engine.train_step, engine.evaluate
def small_step(run, images, *arguments, **more):
    if len(images) > 100:
        if len(images) > 120:
            raise RuntimeError("FIND was unable to find an engine to execute this computation")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return train_step(run, images, *arguments, **more)
def small_evaluate(model, batches, *arguments):
    def checked():
        for images, labels in batches:
            if len(images) > 5:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            yield images, labels
    return evaluate(model, checked(), *arguments)
engine.train_step, engine.evaluate = small_step, small_evaluate
"""


def test_too_little_memory_names_a_batch_that_fits(settings: Settings, tmp_path: Path) -> None:
    make_images(tmp_path / "many", classes=2, images=64)
    settings = {
        **settings,
        **{f"{part}_folder_name": str(tmp_path / "many" / part) for part in ("train", "val")},
        **{"batch_size": 128, "val_batch_size": 16, "epochs": 1},
    }
    for options in (["--dry-run"], []):
        line = error_line(train_with(SMALL_GPU, settings, *options), 2)
        assert line == (
            "error: batch_size is 128: it does not fit into the GPU's memory at 32 px; "
            "--batch-size 98 would, as was tried just now, with --max-lr 0.0153 to go with it"
        )
    # Nothing was changed by itself, and what it named trains, up to the validation.
    assert not list(run_folder(settings).glob("checkpoints/*.pt"))
    line = error_line(train_with(SMALL_GPU, {**settings, "batch_size": 98}), 2)
    assert line == (
        "error: val_batch_size is 16: it does not fit into the GPU's memory at 32 px; "
        "--val-batch-size 5 would, as was tried just now"
    )
    done = train_with(SMALL_GPU, {**settings, "batch_size": 98, "val_batch_size": 5})
    assert done.returncode == 0, done.stderr
    assert "resumed after 0 epochs and 2 steps" in done.stdout  # which were not lost


def test_a_run_that_has_begun_is_told_to_compute_its_batches_in_parts(
    settings: Settings, tmp_path: Path
) -> None:
    make_images(tmp_path / "many", classes=2, images=110)
    settings = {
        **settings,
        **{f"{part}_folder_name": str(tmp_path / "many" / part) for part in ("train", "val")},
        **{"batch_size": 110, "val_batch_size": 5, "epochs": 1, "checkpoint_minutes": 1e-9},
    }
    advice = "--micro-batch-size 96 would, as was tried just now, and goes on with this run"
    first = SMALL_GPU.replace("    if len(images) > 100:", "    if len(images) > 100 and run.step:")
    assert advice in error_line(train_with(first, settings), 2)
    # Its first epoch has not ended, but there is a checkpoint, with its batch_size.
    assert list(run_folder(settings).glob("checkpoints/*.pt"))
    for options in (["--dry-run"], []):
        assert advice in error_line(train_with(SMALL_GPU, settings, *options), 2)
    done = train_with("", {**settings, "micro_batch_size": 96})
    assert done.returncode == 0, done.stderr
    assert "resumed after 0 epochs and 1 steps" in done.stdout


# Of the network a part alone is compiled, by a compiler that takes its time.
SLOW_COMPILER = """
import os, pathlib
check = engine.compiled
def compiled(model, device):
    check(model, device)
    pathlib.Path(os.environ["SLOW"]).touch()
    part = torch.compile(lambda images: images.cos(), dynamic=False)
    return lambda images: model(part(images))
engine.compiled = compiled
"""
COMPILER = """#!/bin/bash
if [ -e "$SLOW" ]; then touch "$SLOW.held"; sleep 60; fi
exec g++ "$@"
"""


def test_a_signal_that_the_compiler_gets_too_stops_the_run_saved(
    settings: Settings, tmp_path: Path
) -> None:
    slow, compiler = tmp_path / "slow", tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    process = quick_start.Popen(
        [sys.executable, "-c", program(SLOW_COMPILER), *as_options(settings), "--compile"],
        cwd=REPOSITORY,
        env={
            **COMMAND_ENVIRONMENT,
            **{"SLOW": str(slow), "CXX": str(compiler)},
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        },
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not slow.with_suffix(".held").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # Ctrl-C goes to all in the same way
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert "Error" not in stderr  # PyTorch may warn that it finds no CUDA
    assert "interrupted in epoch 1, everything is saved after step 0" in stdout
    assert list(run_folder(settings).glob("checkpoints/*.pt"))


def test_without_anybody_who_reads_the_screen_the_run_goes_on(settings: Settings) -> None:
    process = quick_start.Popen(
        [sys.executable, REPOSITORY / "trainer.py", *as_options({**settings, **ONE_EPOCH})],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline()
    process.stdout.close()  # as `| head -n 1` does, and `| tee` at Ctrl-C
    assert process.wait(120) == 0
    assert process.stderr and process.stderr.read() == ""
    assert "finished in" in (run_folder(settings) / "train.log").read_text()


def test_a_disk_that_fails_under_a_store_ends_the_run_saved(
    settings: Settings, tmp_path: Path
) -> None:
    """As a volume does that is detached: the pictures that memory has not kept are not read."""
    make_images(tmp_path / "large", images=40, px=224)
    store = tmp_path / "large.store"
    done = run_stage_command("scripts/prepare_data.py", "pack", tmp_path / "large", store)
    assert done.returncode == 0, done.stderr
    (tmp_path / "disk").mkdir()
    with SlowStore(store, tmp_path / "disk")(first_ms=1, again_ms=0) as shown:
        settings |= {"train_folder_name": shown, "val_folder_name": shown, "log_interval_s": 1e-9}
        process = quick_start.Popen(
            [sys.executable, REPOSITORY / "trainer.py", *as_options(settings)],
            cwd=REPOSITORY,
            env=COMMAND_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stderr
        while "step 1/15" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        Path(f"{store}.fails").touch()
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2, stderr
    (line,) = stderr.splitlines()
    assert "was not read (Input/output error), which is the disk's or the system's fault" in line
    assert checkpoint.load_latest(run_folder(settings) / "checkpoints")["step"] >= 1


def test_too_few_open_files_are_told_before_training(settings: Settings) -> None:
    few = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))"
    line = error_line(train_with(few, settings), 2)
    assert "this shell allows 60 open files, 1 workers need 65" in line and "ulimit -n" in line
    assert not run_folder(settings).exists()


# A disk of its own, filled once a checkpoint is on it, and emptied again.
FULL_DISK = """
set -eu
mount -t tmpfs -o size=1400m tmpfs "$DISK"
"$@" & trainer=$!
while ! ls "$DISK"/runs/run/checkpoints/epochs-*.pt >/dev/null 2>&1; do sleep 0.05; done
dd if=/dev/zero of="$DISK/filler" bs=1M 2>/dev/null || true
code=0; wait $trainer || code=$?
echo "exit $code"
(cd "$DISK/runs/run/checkpoints" && sha256sum epochs-*.pt)
rm "$DISK/filler"
"$@"
cp -r "$DISK/runs" "$KEPT"
"""


def test_a_full_disk_ends_with_a_clear_line_and_training_goes_on_after_room_is_made(
    settings: Settings, one_epoch: Settings, tmp_path: Path
) -> None:
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    on_disk = {**settings, **ONE_EPOCH, "runs_folder": str(disk / "runs")}
    command = [sys.executable, str(REPOSITORY / "trainer.py"), *as_options(on_disk)]
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "bash", "-c", FULL_DISK, "disk", *command],
        env={**COMMAND_ENVIRONMENT, "DISK": str(disk), "KEPT": str(kept)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {disk}/runs/run/")
    assert line.endswith(": No space left on device: make room, and give the same command again")
    assert "exit 2\n" in done.stdout
    sums = re.findall(
        r"^([0-9a-f]{64})  epochs-000-step-\d{8}-([0-9a-f]{16})\.pt$", done.stdout, re.M
    )
    assert sums and all(digest.startswith(beginning) for digest, beginning in sums)
    assert "resumed after 0 epochs and " in done.stdout
    assert outcome({**settings, "runs_folder": str(kept)}) == outcome(one_epoch)
