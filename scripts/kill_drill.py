"""Proof by destruction: a run that is killed all the time ends as one that nobody disturbed.

    python3 scripts/kill_drill.py --kills 300 --output kill_drill.json

Trains tiny pictures, which it makes, with the real `python3 trainer.py` on the CPU: once
undisturbed, then killed by SIGKILL: a third of the kills at random moments, a third while a
checkpoint is being written (its temporary file is left behind), a third while a run resumes, before
its first step. From start to start the worker threads and the minutes between checkpoints change.

After each kill every checkpoint must be whole, what was saved must not go back, at most two save
intervals of steps may be lost (one, and the one in which a checkpoint was being written), and
metrics.jsonl must hold the undisturbed run's rows, from the first one on. A run that ends is
compared with the undisturbed one, bit for bit, and another one begins. 300 kills take about half an
hour on two cores and 1.5 GB of disk. Exit code 0: all of it held; 1: the line says what did not,
and the files are kept.
"""

import dataclasses
import hashlib
import io
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
from utils import (
    EXIT_FAILED,
    UserError,
    describe_computer,
    format_duration,
    log,
    parse_options,
    read_json,
    read_metrics,
    run_stage,
    start_log,
    versions,
    write_json,
)

REPOSITORY = Path(__file__).resolve().parent.parent
RANDOM, SAVING, RESUMING = "at random moments", "while saving", "while resuming"
CLASSES, IMAGES_PER_CLASS, BATCH_SIZE, EPOCHS = 3, 10, 8, 6
STEPS_PER_EPOCH = 4  # three batches of 8, one of 6
# A save after every step; at most one or two of an epoch's; at the end of an epoch only.
CHECKPOINT_MINUTES = (0.0, 0.01, 10.0)
WORKERS = (0, 1, 2, 4)
TIMES = ("train_s", "val_s", "img_per_s")  # fields of a metrics row that no two runs share
HANGS_S = 300  # without a step or an end
STEP = re.compile(r"epoch (\d+)/\d+  step (\d+)/\d+  ")


@dataclasses.dataclass(frozen=True)
class DrillOptions:
    """How often to kill, and where."""

    kills: int = 300
    """SIGKILLs, a third of each kind; those that missed their moment are not counted"""
    seed: int = 0
    """seed of the moments, kinds and settings"""
    folder: Path | None = None
    """folder to work in, below which one is made and removed; the system's temporary one if none"""
    output: Path | None = None
    """JSON file to write"""


@dataclasses.dataclass
class Drill:
    """What has been seen and done so far."""

    folder: Path
    draws: random.Random
    start_s: float = 0.0  # from the start of a process to its first step, undisturbed
    training_s: float = 0.0  # from there to the end of a run
    write_s: float = 0.0  # a temporary file's life
    missed: int = 0  # kills that did not hit what they were meant to
    runs: int = 0  # compared with the undisturbed one
    standing: tuple[int, int] | None = None  # epochs and steps saved of the run under way
    steps_twice: list[int] = dataclasses.field(default_factory=list)  # a number a kill


def failed(text: str) -> UserError:
    """What the drill found."""
    return UserError(text, EXIT_FAILED)


# ------------------------------------------------------------------------------ the runs


def make_images(folder: Path) -> None:
    """Write folder/train and folder/val: grey noise, brighter from class to class, as JPEGs."""
    noise = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(CLASSES):
            class_folder = folder / part / f"class_{label}"
            class_folder.mkdir(parents=True)
            for image in range(IMAGES_PER_CLASS):
                pixels = noise.integers(50 * label, 50 * label + 120, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(class_folder / f"{image}.jpg")


def start(drill: Drill, name: str, workers: int, minutes: float) -> subprocess.Popen[bytes]:
    """Start the real trainer on a run, as a user would, its output at the end of NAME.txt."""
    settings = {
        "name": name,
        "runs-folder": drill.folder / "runs",
        "train-folder-name": drill.folder / "images/train",
        "val-folder-name": drill.folder / "images/val",
        "epochs": EPOCHS,
        "batch-size": BATCH_SIZE,
        "max-lr": 0.005,
        "train-px": 32,
        "val-px": 32,
        "val-resize-px": 36,
        "precision": "fp32",
        "device": "cpu",
        "log-interval-s": 1e-9,  # a line a step
        "workers": workers,
        "checkpoint-minutes": minutes,
    }
    options = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    with open(drill.folder / f"{name}.txt", "ab") as output:
        return subprocess.Popen(
            [sys.executable, "trainer.py", *options],
            cwd=REPOSITORY,
            # Sums on a CPU depend on the number of threads.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_until(
    process: subprocess.Popen[bytes], done: Callable[[], bool], timeout_s: float = HANGS_S
) -> float:
    """Seconds until something is done or the process has ended; raises UserError if neither."""
    started = time.monotonic()
    while process.poll() is None and not done():
        if time.monotonic() - started > timeout_s:
            raise failed(f"the trainer did nothing for {timeout_s:.0f} s")
        time.sleep(0.002)
    return time.monotonic() - started


def last_step(run: Path, offset: int) -> int | None:
    """The last step that train.log tells of beyond `offset` bytes, counted over the whole run."""
    train_log = run / "train.log"
    if not train_log.exists():
        return None
    with open(train_log, "rb") as file:
        file.seek(offset)
        told = STEP.findall(file.read().decode())
    return (int(told[-1][0]) - 1) * STEPS_PER_EPOCH + int(told[-1][1]) if told else None


def size(path: Path) -> int:
    """A file's size in bytes, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def half_written(run: Path) -> set[str]:
    """Names of the temporary files of checkpoints."""
    return {path.name for path in (run / "checkpoints").glob(".epochs-*.tmp")}


def train_undisturbed(drill: Drill) -> dict[str, Any]:
    """Train a run from beginning to end, and take the times of a start and of writing."""
    run = drill.folder / "runs" / "undisturbed"
    written_s: list[float] = []
    process = start(drill, run.name, workers=1, minutes=10.0)
    try:
        drill.start_s = wait_until(process, lambda: last_step(run, 0) is not None)
        started = time.monotonic()
        while process.poll() is None:
            wait_until(process, lambda: bool(half_written(run)))
            written_s.append(wait_until(process, lambda: not half_written(run)))
        drill.training_s = time.monotonic() - started
    finally:
        process.kill()
        process.wait()
    refuse_failure(drill, run, process)
    drill.write_s = statistics.median(written_s)
    return outcome(run)


def refuse_failure(drill: Drill, run: Path, process: subprocess.Popen[bytes]) -> None:
    """Raise UserError if a trainer ended with an error of its own."""
    if process.returncode:
        lines = (drill.folder / f"{run.name}.txt").read_text().splitlines() or ["no output"]
        raise failed(f"{run.name} ended with exit code {process.returncode}: {lines[-1]}")


def outcome(run: Path) -> dict[str, Any]:
    """All that two equal runs share, a finished one's: SHA-256 sums, rows and counts."""
    state = checkpoint.load_latest(run / "checkpoints")

    def digest(named: Iterable[tuple[object, torch.Tensor]]) -> str:
        whole = hashlib.sha256()
        for name, tensor in named:
            whole.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            whole.update(tensor.contiguous().numpy().tobytes())
        return whole.hexdigest()

    def weights(name: str) -> dict[str, torch.Tensor]:
        return torch.load(run / name, map_location="cpu", weights_only=True)

    is_statistic = re.compile("running_|num_batches").search
    return {
        "epochs": len(state["history"]),
        "step": state["step"],
        "weights": digest(item for item in state["model"].items() if not is_statistic(item[0])),
        "BatchNorm statistics": digest(
            item for item in state["model"].items() if is_statistic(item[0])
        ),
        "momentum": digest(
            (number, slot["momentum_buffer"])
            for number, slot in state["optimizer"]["state"].items()
        ),
        "scaler": state["scaler"],
        "last.pt": digest(weights("last.pt").items()),
        "best.pt": digest(weights("best.pt").items()),
        "metrics": without_times(read_metrics(run / "metrics.jsonl")),
        "result": {
            key: value
            for key, value in read_json(run / "result.json").items()
            if key not in ("elapsed_s", "price_usd")
        },
    }


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics but for what no two runs share."""
    return [{key: row[key] for key in row if key not in TIMES} for row in rows]


# ------------------------------------------------------------------------------ the kills


def kill_once(drill: Drill, run: Path, kind: str, expected: dict[str, Any]) -> bool | None:
    """Start the trainer and kill it; raises UserError if anything is not as it must be.

    Returns whether the kill hit what it was meant to; None if the run had ended before.
    """
    draws, train_log = drill.draws, run / "train.log"
    workers, minutes = draws.choice(WORKERS), draws.choice(CHECKPOINT_MINUTES)
    offset, leftovers = size(train_log), half_written(run)
    saves_let_pass = draws.randrange(3)
    share = draws.random()  # of the time in which the kill is to fall
    seen: set[str] = set()  # temporary files

    def is_saving() -> bool:
        seen.update(half_written(run) - leftovers)
        return len(seen) > saves_let_pass

    process = start(drill, run.name, workers, minutes)
    started = time.monotonic()
    try:
        delay_s = {
            RANDOM: share * (drill.start_s + drill.training_s / 2),
            SAVING: share * drill.write_s,
            RESUMING: share * drill.start_s,
        }[kind]
        if kind == SAVING:
            wait_until(process, is_saving)
        due = time.monotonic() + delay_s
        wait_until(process, lambda: time.monotonic() >= due)
    finally:
        process.kill()
        process.wait()
    lived_s = time.monotonic() - started
    if process.returncode != -signal.SIGKILL:
        refuse_failure(drill, run, process)
        return None
    reached = last_step(run, offset)
    if kind == SAVING:
        was_hit = bool(half_written(run) - leftovers)
    else:
        was_hit = kind == RANDOM or reached is None

    where = f"after {len(drill.steps_twice) + 1} kills, the last one {kind}"
    drill.standing = check_files(run, drill.standing, expected, where)
    saved_epochs, saved_steps = drill.standing or (0, 0)
    twice = max(0, (reached or 0) - saved_steps)
    most = 2 * (1 if minutes == 0 else STEPS_PER_EPOCH)
    if twice > most:
        raise failed(f"{where}: {twice} steps are lost, at most {most} may be")
    drill.steps_twice.append(twice)
    log.info(
        "kill %3d  %-17s  after %4.1f s, %d workers, %g min: at %s, %s goes on after %d epochs and "
        "%d steps%s",
        len(drill.steps_twice), kind, lived_s, workers, minutes,
        "no step yet" if reached is None else f"step {reached}", run.name,
        saved_epochs, saved_steps, "" if was_hit else "; missed its moment",
    )  # fmt: skip
    return was_hit


def check_files(
    run: Path, before: tuple[int, int] | None, expected: dict[str, Any], where: str
) -> tuple[int, int] | None:
    """Look at all that a killed run left; its new standing. Raises UserError for what is wrong."""
    for path in (run / "checkpoints").glob("epochs-*.pt"):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[: checkpoint.HASH_DIGITS] != path.stem[-16:]:
            raise failed(f"{where}: {path} is damaged")
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    state = checkpoint.load_latest(run / "checkpoints")
    now = None if state is None else (len(state["history"]), state["step"])
    if before is not None and (now is None or now < before):
        raise failed(f"{where}: the run went back from {before} epochs and steps to {now}")
    metrics = run / "metrics.jsonl"
    text = metrics.read_text() if metrics.exists() else ""
    rows = without_times(read_metrics(metrics)) if text else []
    epochs = now[0] if now else 0
    if text and not text.endswith("\n"):
        raise failed(f"{where}: {metrics} ends in half a line")
    if rows != expected["metrics"][: len(rows)] or abs(len(rows) - epochs) > 1:
        raise failed(f"{where}: {metrics} has other rows than the undisturbed run at {epochs}")
    for name in ("config.json", "result.json"):
        read_json(run / name)  # whole, where it is there at all
    return now


def finish_run(drill: Drill, run: Path) -> None:
    """Let a run come to its end."""
    process = start(drill, run.name, drill.draws.choice(WORKERS), 10.0)
    try:
        wait_until(process, lambda: False)
    finally:
        process.kill()
        process.wait()
    refuse_failure(drill, run, process)


def compare(drill: Drill, run: Path, expected: dict[str, Any]) -> None:
    """Compare a run that has ended with the undisturbed one, and remove it; raises UserError."""
    found = outcome(run)
    different = [part for part, value in expected.items() if found[part] != value]
    if different:
        raise failed(f"{run.name} has ended with other {', '.join(different)} than undisturbed")
    drill.runs += 1
    drill.standing = None
    log.info("%s has ended, equal to the undisturbed run in %s", run.name, ", ".join(expected))
    shutil.rmtree(run)


def carry_out(options: DrillOptions, folder: Path) -> dict[str, Any]:
    """The whole drill in a folder of its own; what it did and found, as a record."""
    started = time.monotonic()
    drill = Drill(folder, random.Random(options.seed))
    make_images(folder / "images")
    expected = train_undisturbed(drill)
    shutil.rmtree(folder / "runs" / "undisturbed")
    log.info(
        "undisturbed: %d steps in %.1f s, of which the start takes %.1f s; %.2f s to write a "
        "checkpoint; seed %d",
        expected["step"], drill.start_s + drill.training_s, drill.start_s, drill.write_s,
        options.seed,
    )  # fmt: skip
    kinds = (RANDOM, SAVING, RESUMING)
    left = {kind: (options.kills + 2 - number) // 3 for number, kind in enumerate(kinds)}
    asked = dict(left)
    run = folder / "runs" / "disturbed_1"
    while any(left.values()):
        possible = [kind for kind in kinds if left[kind]]
        if drill.standing is None:  # there is nothing to resume yet
            possible = [kind for kind in possible if kind != RESUMING] or [RANDOM]
        kind = drill.draws.choice(possible)
        was_hit = kill_once(drill, run, kind, expected)
        if was_hit is None:
            compare(drill, run, expected)
            run = folder / "runs" / f"disturbed_{drill.runs + 1}"
        elif was_hit and left[kind]:
            left[kind] -= 1
        else:
            drill.missed += 1
    finish_run(drill, run)
    compare(drill, run, expected)
    return {
        "kills": asked,
        "more_kills_that_missed_their_moment": drill.missed,
        "steps": {
            "of_a_run": expected["step"],
            "done_twice": sum(drill.steps_twice),
            "done_twice_after_one_kill": max(drill.steps_twice, default=0),
        },
        "runs_compared": drill.runs,
        "seed": options.seed,
        "seconds": time.monotonic() - started,
        "outcome": expected,
        "hardware": describe_computer(),
        "versions": versions(),
    }


def main() -> None:
    """Carry out the drill, say what it found, and clean up if all held."""
    options = parse_options(DrillOptions, __doc__)
    start_log(None)
    if options.kills < 1:
        raise UserError(f"kills is {options.kills}: it must be 1 or more")
    for wanted in (options.folder, options.output and options.output.parent):
        if wanted:
            wanted.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="kill_drill_", dir=options.folder))
    log.info("working in %s", folder)
    try:
        record = carry_out(options, folder)
    except UserError as error:
        raise failed(f"{error}; all files are in {folder}") from None
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        raise
    shutil.rmtree(folder)
    for kind, kills in record["kills"].items():
        log.info("%-33s %5d", f"kills {kind}", kills)
    log.info(
        "%-33s %5d", "more that missed their moment", record["more_kills_that_missed_their_moment"]
    )
    log.info("%-33s %5d", "steps done twice, in all", record["steps"]["done_twice"])
    log.info("%-33s %5d", "… after one kill, at most", record["steps"]["done_twice_after_one_kill"])
    log.info("%-33s %5d", "runs equal to the undisturbed one", record["runs_compared"])
    log.info("all held, in %s", format_duration(record["seconds"]))
    if options.output:
        write_json(options.output, record)


if __name__ == "__main__":
    run_stage(main)
