"""What is checked and estimated before money is spent: `python3 trainer.py --dry-run`.

It prints the settings and the schedule, then a line for each check: `ok`, `WARNING` or `PROBLEM`,
what was found, and what to do about it. It reads pictures at random, from the disk and not from
memory, and times some training steps; from both it estimates hours and price. Nothing is left
behind but the index of a folder's images. The exit code is 2 if there is a problem, else 0.

The trainer makes some of the checks at each start, and refuses what cannot work.
"""

import contextlib
import ctypes
import dataclasses
import functools
import itertools
import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import checkpoint
import data
import distributed
import image_files
import interruption
import mirror
import sessions
from utils import (
    EXIT_USER_ERROR,
    Config,
    UserError,
    check_writable,
    describe_computer,
    format_duration,
    is_number,
    learning_rate,
    log,
    read_json,
    steps_per_epoch,
    total_epochs,
    train_px,
)

WEIGHTS_BYTES = 4 * 25_600_000  # ResNet-50 in float32
OPEN_FILES = 64  # of a process with PyTorch, beside one for each thread that decodes

OK, WARNING, PROBLEM = "ok", "WARNING", "PROBLEM"

TIMED_STEPS = 12
# After which slow steps are no longer repeated; without the first, which may compile for minutes,
# while the loader fills its stock.
TIMED_S = 30.0
READ_S = 3.0  # of each of the two readings of the disk
# What a training image of 224 px takes while a CPU computes in bf16; in fp32 130 MB. The growth of
# the process from batches of 8 to 32; on a GPU it is the GPU's own memory.
ACTIVATIONS_BYTES = 70e6
WRITTEN_BYTES = 64 << 20  # to measure the disk of the runs
# A volume that fetches places from a snapshot when they are first read is far slower then than ever
# after; elsewhere the first reading may have to find the file too, which doubles its time at most.
LAZY_RATIO = 4
LOST_ALLOWED = 0.02  # share of the run's time that waiting for a disk may cost
OTHERS_BYTES = 1.5e9  # of a GPU's memory; CUDA itself takes up to a gigabyte of it
CLOCK_ALLOWED_S, CLOCK_REFUSED_S = 60.0, 900.0  # S3 refuses requests that are 15 minutes off


class Finding(NamedTuple):
    """What a check has found: OK, WARNING or PROBLEM, and a line that says it."""

    level: str
    text: str


class Timing(NamedTuple):
    """Means of some training steps, in seconds."""

    step_s: float  # with all that it waits for
    busy_s: float  # without waiting for images
    steps: int


class Reading(NamedTuple):
    """Pictures read at random from the disk: at first, and then the same ones again."""

    indexes: np.ndarray  # of the pictures, which are in memory now
    mean_bytes: float
    first: float  # pictures a second
    again: float

    @property
    def is_lazy(self) -> bool:
        """Whether the second reading was faster than a disk explains."""
        return self.again > LAZY_RATIO * self.first


# ------------------------------------------------------------------------------ at each start


def check_open_files(workers: int) -> None:
    """Refuse a limit of open files that training would run into; raises UserError."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = OPEN_FILES + workers
    if allowed != resource.RLIM_INFINITY and allowed < needed:
        raise UserError(
            f"this shell allows {allowed} open files, {workers} workers need {needed}: allow more "
            "with `ulimit -n 1024`, or use fewer --workers"
        )


def tell_finished(folder: Path, config: Config, state: dict[str, Any]) -> str:
    """What to say of a run that has nothing left to do; empty while there is something."""
    epochs = total_epochs(config)
    # Where one was lost, going on writes it anew from the checkpoint.
    whole = all((folder / name).exists() for name in ("config.json", "metrics.jsonl"))
    if len(state["history"]) < epochs or not whole:
        return ""
    result = read_json(folder / "result.json")
    if not isinstance(result, dict) or result.get("epochs") != epochs:
        return ""
    if not all(is_number(result.get(name)) for name in ("val_top1", "epoch")):
        return ""  # damaged
    extend = "" if config.extra_epochs else " To extend it: add --extra-epochs N, once."
    return (
        f"run {config.name} is finished: {epochs} epochs, {result['val_top1']:.2f} % top-1 with "
        f"the weights of epoch {result['epoch']}.{extend} To repeat it: --name ANOTHER, or remove "
        f"{folder}"
    )


def refuse_lost_checkpoints(folder: Path, state: dict[str, Any] | None) -> None:
    """Raise UserError where a finished run's result is all that is left: it would be replaced."""
    if state is None and (folder / "result.json").exists():
        raise UserError(
            f"{folder} has the result of a finished run, but no checkpoint: bring those back, or "
            f"begin another run with --name, or remove {folder}"
        )


def describe_hardware(device: torch.device, precision: str) -> dict[str, Any]:
    """What the run is made on, for config.json."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "gpu": gpu.name if gpu else None,
        "gpu_memory_bytes": gpu.total_memory if gpu else None,
        "instance_type": interruption.instance_type(),
        "precision": precision,
        "processes": distributed.processes(),
        **describe_computer(),
    }


def describe_run(
    config: Config,
    hardware: dict[str, Any],
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
    skipped: list[str],
) -> None:
    """Say what is about to be trained, on which images and hardware."""
    log.info(
        "run %s: %s training and %s validation images in %s classes%s; %s steps of %d an epoch",
        config.name, f"{len(train_set):,}", f"{len(val_set):,}",
        f"{len(train_set.classes):,}", f" ({len(skipped)} left out as unreadable)" * bool(skipped),
        f"{steps_per_epoch(config, train_set):,}", config.batch_size,
    )  # fmt: skip
    log.info(
        "%s, %s, %d decoding threads on %d cores",
        hardware["gpu"] or hardware["cpu"], hardware["precision"], config.workers,
        hardware["cpu_cores"],
    )  # fmt: skip
    if hardware["processes"] > 1:
        log.info("%s", distributed.describe(config))
    if config.max_lr_from_finder:
        log.info("max_lr: %.3g, which the LR finder gave when the run began", config.max_lr)
    if config.compile:
        log.info("the first step of each size of the crops is compiled, which can take minutes")
        images, parts = distributed.division(config)
        if larger := images % parts:
            log.info(
                "only the larger parts of a batch, %d of %d, are compiled: choose a "
                "--micro-batch-size that divides %d",
                larger, parts, images,
            )  # fmt: skip


# ------------------------------------------------------------------------------ the dry run


def dry_run(
    config: Config,
    folder: Path,
    device: torch.device,
    state: dict[str, Any] | None,
    images: dict[str, Any],
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
    step: Callable[[torch.Tensor, torch.Tensor], object],
) -> int:
    """Print the settings, the schedule, the checks, and the estimate of time, memory and price.

    Args:
        config: the settings
        folder: the run's
        device: where the model is
        state: the run's newest checkpoint, if there is one
        images: fingerprints of the two sets, as a checkpoint has them
        train_set: the training images
        val_set: the validation images
        step: one training step on a batch on the device, which ends when the device has done it

    Returns the exit code. Raises UserError for an image that cannot be read or an address that is
    none, and what a step raises.
    """
    print_settings(config, train_set)
    log.info("checks:")
    found: dict[str, Finding] = {}

    def tell(check: str, finding: Finding | None) -> None:
        if finding is not None:
            found[check] = finding
            log.info("  %-7s  %-7s  %s", finding.level, check, finding.text)

    access = mirror.try_access(config.mirror, folder) if config.mirror else None
    tell("run", check_run(config, folder, state, images, access))
    tell("machine", check_machine(config))
    tell("gpu", check_gpu(config, device))
    tell("memory", check_memory(config, device))
    tell("files", check_limits(config))
    tell("room", check_room(config, folder))
    tell("mirror", check_mirror(config, access))
    tell("clock", check_clock(access.clock_ahead_s if access else None))

    epochs_done, steps_done = stands_at(state, access)
    if PROBLEM in (found["gpu"].level, found["memory"].level):
        log.info("no step is timed before that is mended")
    elif epochs_done < total_epochs(config):
        reading = read_at_random(config, train_set)
        timings = time_sizes(config, device, train_set, reading.indexes, epochs_done, step)
        tell("loader", check_loader(timings))
        epochs_s = epoch_seconds(config, train_set, val_set, timings, epochs_done)
        kept = share_kept(config, device, reading, len(train_set))
        waits_s = disk_waits(reading, len(train_set), epochs_s, kept)
        tell("disk", check_disk(config, reading, len(train_set), timings, epochs_s, waits_s))
        # Of the epoch under way, a part is done.
        share_done = steps_done / steps_per_epoch(config, train_set) - epochs_done
        left_s = sum(epochs_s) + sum(waits_s) - min(1.0, max(0.0, share_done)) * epochs_s[0]
        spent_usd = sessions.price_usd(sessions.read(folder, access.sessions if access else b""))
        tell("budget", check_budget(config, spent_usd, left_s))
        log.info("%s", tell_estimate(config, device, left_s, sum(waits_s), len(epochs_s)))
    log.info("%s", summary(found))
    return EXIT_USER_ERROR if PROBLEM in {finding.level for finding in found.values()} else 0


def print_settings(config: Config, train_set: image_files.ImageSet) -> None:
    """Print every setting, and the schedule of the epochs."""
    steps = steps_per_epoch(config, train_set)
    log.info("settings:")
    for field, value in dataclasses.asdict(config).items():
        log.info("  %-20s %s", field, value)
    log.info("learning rate at the end of each epoch, and side of its training crops:")
    for epoch in range(total_epochs(config)):
        # At its end, an extra epoch's cycle begins already.
        cycle = config if epoch >= config.epochs else dataclasses.replace(config, extra_epochs=0)
        rate = learning_rate(cycle, (epoch + 1) * steps, steps)
        log.info("  epoch %3d  %.7f  %d px", epoch + 1, rate, train_px(config, epoch))


def summary(found: dict[str, Finding]) -> str:
    """The last line: how many problems and warnings there are, and which."""
    parts = []
    for level, word in ((PROBLEM, "problem"), (WARNING, "warning")):
        checks = [check for check, finding in found.items() if finding.level == level]
        if checks:
            plural = "s" * (len(checks) > 1)
            parts.append(f"{len(checks)} {word}{plural} ({', '.join(checks)})")
    if not parts:
        return "dry run: all checks are ok"
    return f"dry run: {' and '.join(parts)}, see the checks above"


# ------------------------------------------------------------------------------ the run


def stands_at(state: dict[str, Any] | None, access: mirror.Access | None) -> tuple[int, int]:
    """Finished epochs and steps from which the command would go on."""
    if state is not None:
        return len(state["history"]), state["step"]
    there = access.checkpoints if access else []
    return mirror.age(there[0]) if there else (0, 0)


def check_run(
    config: Config,
    folder: Path,
    state: dict[str, Any] | None,
    images: dict[str, Any],
    access: mirror.Access | None,
) -> Finding:
    """Whether the command would begin the run, go on with it, find it finished, or refuse."""
    there = access.checkpoints[:1] if access else []
    try:
        if (folder / ".lock").exists():
            checkpoint.lock(folder).close()
        if state is None:
            if there:
                return Finding(
                    OK,
                    f"no checkpoint in {folder}: {there[0]} of the mirror is fetched, and the run "
                    f"goes on after epoch {mirror.age(there[0])[0]} of {total_epochs(config)}",
                )
            refuse_lost_checkpoints(folder, state)
            return Finding(OK, f"no checkpoint in {folder} yet: the run begins")
        checkpoint.check_settings(state, config)
        checkpoint.check_images(state, images)
        if access:
            mirror.refuse_other(config.mirror, config.name, access.other_settings)
    except UserError as error:
        return Finding(PROBLEM, str(error))
    standing = (len(state["history"]), state["step"])
    if there and mirror.age(there[0]) > standing:
        return Finding(
            PROBLEM,
            f"the mirror holds this run further on ({there[0]}) than {folder} does: move that "
            "folder away to go on with the mirror's, or take another --mirror",
        )
    finished = tell_finished(folder, config, state)
    if finished:
        return Finding(OK, finished)
    return Finding(
        OK,
        f"goes on from the checkpoint in {folder}: {standing[0]} of {total_epochs(config)} epochs "
        f"are finished, {standing[1]:,} steps taken",
    )


def check_mirror(config: Config, access: mirror.Access | None) -> Finding | None:
    """Whether the mirror can be listed, written, read and tidied; what is missing is named."""
    if access is None:
        return None
    if not access.refused:
        text = f"{config.mirror} can be listed, written, read and tidied"
        return Finding(OK, text)
    failures = ", ".join(f"cannot {action} ({why})" for action, why in access.refused.items())
    text = f"{config.mirror}: {failures}: {access.advice}"
    if access.left_behind:
        text += f"; {access.left_behind} of a few bytes is left there"
    return Finding(PROBLEM, text)


# ------------------------------------------------------------------------------ the machine


def check_machine(config: Config) -> Finding | None:
    """Which EC2 instance this is, and whether EC2 may take it; nothing elsewhere."""
    service = interruption.metadata_service()
    if service is None:
        return None
    try:
        kind, zone, life_cycle = (
            service.text(f"/latest/meta-data/{item}")
            for item in ("instance-type", "placement/availability-zone", "instance-life-cycle")
        )
    except interruption.OddAnswer as odd:
        return Finding(
            WARNING,
            f"EC2's metadata service answers oddly ({odd}), so that its notice of interruption "
            "would be missed: in a container, set the instance's hop limit to 2",
        )
    text = f"EC2 {kind} in {zone}, {life_cycle}"
    if life_cycle != "spot":
        return Finding(OK, text)
    if not config.mirror:
        return Finding(
            WARNING,
            f"{text}: EC2 may take it, perhaps with its disk: copy the checkpoints elsewhere with "
            "--mirror s3://BUCKET/PREFIX",
        )
    return Finding(OK, f"{text}: EC2 may take it; the same command goes on elsewhere")


def check_gpu(config: Config, device: torch.device) -> Finding:
    """Whether the driver and PyTorch see the GPU, and whether its memory is free."""
    if config.device == "cpu":
        return Finding(OK, f"none, as --device cpu asks; {describe_computer()['cpu']}")
    gpus, trouble = driver_gpus()
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        others_bytes = total_bytes - free_bytes - torch.cuda.memory_reserved(device)
        text = f"{torch.cuda.get_device_name(device)}, {total_bytes / 1e9:.1f} GB"
        text += f", driver {gpus[0][1]}" if gpus else ""
        if others_bytes > OTHERS_BYTES:
            return Finding(
                WARNING,
                f"{text}: another process seems to use {others_bytes / 1e9:.1f} GB of its memory: "
                "see nvidia-smi, and end it",
            )
        return Finding(OK, f"{text}, {free_bytes / 1e9:.1f} GB free")
    if gpus:
        name, driver = gpus[0]
        return Finding(
            PROBLEM,
            f"the driver ({driver}) sees {name}, PyTorch does not ({torch_complaint()}): it would "
            "train on the CPU; --device cpu says that this is meant",
        )
    if trouble:
        return Finding(
            PROBLEM,
            f"nvidia-smi fails ({trouble}): restart the machine or install its driver again; "
            "without a GPU, say --device cpu",
        )
    return Finding(
        WARNING,
        f"none: it would train on the CPU, {describe_computer()['cpu']}; --device cpu says that "
        "this is meant",
    )


def refuse_lost_gpu(config: Config, device: torch.device) -> None:
    """Refuse to train on the CPU of a machine whose GPU is paid for; raises UserError.

    Who hides the GPU from PyTorch means the CPU.
    """
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if config.device == "auto" and device.type == "cpu" and not hidden:
        finding = check_gpu(config, device)
        if finding.level == PROBLEM:
            raise UserError(finding.text)


def driver_gpus() -> tuple[list[tuple[str, str]], str]:
    """Name and driver version of each GPU by nvidia-smi, and what it complains of."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        return [], ""
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], type(error).__name__
    rows = [tuple(line.rsplit(", ", 1)) for line in done.stdout.splitlines()]
    if done.returncode or any(len(row) != 2 for row in rows):
        said = (done.stdout + done.stderr).split("\n")[0].strip()
        return [], said or f"exit code {done.returncode}"
    return rows, ""


def torch_complaint() -> str:
    """Why PyTorch sees no GPU, with what to do."""
    if torch.version.cuda is None:
        return "this build of it is for the CPU: install the one for CUDA, as pytorch.org says"
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return f"CUDA_VISIBLE_DEVICES is {os.environ['CUDA_VISIBLE_DEVICES']!r}: unset it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        # The driver is too old, most often: PyTorch's words say for which version.
        return (
            f"{str(error).splitlines()[0].rstrip('.')}: update the driver, or take a PyTorch "
            f"for an older CUDA than {torch.version.cuda}"
        )
    return "no reason given"


def check_memory(config: Config, device: torch.device) -> Finding:
    """Whether main memory takes the batches, the copies of a checkpoint and, on a CPU, a step."""
    available_bytes = available_memory()
    needed_bytes = needed_memory(config, device)
    text = f"{available_bytes / 1e9:.1f} GB available, training takes {needed_bytes / 1e9:.1f} GB"
    if available_bytes < needed_bytes:
        return Finding(
            PROBLEM,
            f"{text} or more: use smaller --batch-size and --val-batch-size, or a machine with "
            "more of it",
        )
    return Finding(OK, f"{text}, the rest keeps images")


def needed_memory(config: Config, device: torch.device) -> float:
    """Bytes of the batches under way, of a checkpoint's copies, and of a step on a CPU."""
    train_px2, val_px2 = config.train_px**2, config.val_px**2
    batch_bytes = 3 * max(config.batch_size * train_px2, config.val_batch_size * val_px2)
    # The copy of the state, its encoding as it grows, and the mirror's.
    needed = (data.DECODED_AHEAD + 2) * batch_bytes + 4 * checkpoint_bytes(config)
    if device.type == "cpu":
        at_once = min(config.batch_size, config.micro_batch_size or config.batch_size)
        needed += at_once * ACTIVATIONS_BYTES * train_px2 / 224**2
    return needed


def available_memory() -> int:
    """Bytes of main memory that this process may still take, or have the kernel keep files in."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(line for line in lines if line.startswith("MemAvailable"))
    found = [1024 * int(available.split()[1])]
    for path in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container: versions 2 and 1
        with contextlib.suppress(OSError, ValueError):  # "max", and no control group at all
            found.append(int((Path("/sys/fs/cgroup") / path).read_text()))
    return min(found)


def checkpoint_bytes(config: Config) -> int:
    """Of weights, momentum, the best epoch's weights and, where there is one, the average."""
    return (4 if config.average_steps else 3) * WEIGHTS_BYTES


def check_limits(config: Config) -> Finding:
    """Whether enough files may be open."""
    try:
        check_open_files(config.workers)
    except UserError as error:
        return Finding(PROBLEM, str(error))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = "any number" if allowed == resource.RLIM_INFINITY else f"{allowed:,}"
    return Finding(OK, f"{number} may be open")


def check_room(config: Config, folder: Path) -> Finding:
    """Whether the disk of the runs takes the checkpoints, and how fast."""
    try:
        sizes = WEIGHTS_BYTES, checkpoint_bytes(config)
        free_bytes, needed_bytes = checkpoint.check_room(folder, *sizes)
        existing = check_writable(folder, "--runs-folder")
        with tempfile.TemporaryFile(dir=existing) as file:
            content = os.urandom(1 << 20)
            started = time.monotonic()
            for _ in range(WRITTEN_BYTES >> 20):
                file.write(content)
            file.flush()
            os.fsync(file.fileno())
            rate = WRITTEN_BYTES / (time.monotonic() - started)
    except UserError as error:
        return Finding(PROBLEM, str(error))
    return Finding(
        OK,
        f"{free_bytes / 1e9:.1f} GB free in {existing}, checkpoints need "
        f"{needed_bytes / 1e9:.1f} GB; writing one takes about {sizes[1] / rate:.1f} s",
    )


class _Timex(ctypes.Structure):
    """The beginning of adjtimex(2)'s structure, whose whole is smaller than this."""

    _fields_ = (
        *(("modes", ctypes.c_uint), ("offset", ctypes.c_long), ("freq", ctypes.c_long)),
        *(("maxerror", ctypes.c_long), ("esterror", ctypes.c_long), ("status", ctypes.c_int)),
        ("rest", ctypes.c_char * 256),
    )


STA_UNSYNC = 0x40


def check_clock(ahead_s: float | None) -> Finding:
    """Whether the clock is right: by the mirror's answers where it has one, else by the kernel."""
    advice = "turn on chrony or systemd-timesyncd (S3 refuses a clock that is 15 minutes off)"
    if ahead_s is not None:
        if abs(ahead_s) <= CLOCK_ALLOWED_S:
            return Finding(OK, "that of the mirror's store, to a minute")
        way = "ahead of" if ahead_s > 0 else "behind"
        return Finding(
            PROBLEM if abs(ahead_s) > CLOCK_REFUSED_S else WARNING,
            f"{format_duration(abs(ahead_s))} {way} that of the mirror's store: {advice}",
        )
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    timex = _Timex(modes=0)
    if Path("/run/systemd/timesync/synchronized").exists() or (
        ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) >= 0 and not timex.status & STA_UNSYNC
    ):
        return Finding(OK, f"{now}, kept by a time service")
    return Finding(WARNING, f"{now}, but no time service is known to keep it: {advice}")


# ------------------------------------------------------------------------------ the disk


def read_at_random(config: Config, train_set: image_files.ImageSet) -> Reading:
    """Read pictures as training does, from places that are drawn anew each time, twice.

    Before each reading the kernel is told to forget them. Which ones were read last stay in
    memory. Raises UserError for one that cannot be read.
    """
    drawn = np.random.default_rng().permutation(len(train_set))
    drawn = drawn[: TIMED_STEPS * config.batch_size]
    train_set.forget(drawn)
    count, read_bytes, first_s = read_some(train_set, drawn, config.workers)
    drawn = drawn[:count]
    train_set.forget(drawn)
    again, _, again_s = read_some(train_set, drawn, config.workers)
    return Reading(drawn[:again], read_bytes / count, count / first_s, again / again_s)


def read_some(
    image_set: image_files.ImageSet, indexes: np.ndarray, threads: int
) -> tuple[int, int, float]:
    """Read images for READ_S at most: how many, their bytes, and the seconds."""

    def size(index: int) -> int:
        try:
            return len(image_set.read(index)[0])
        except (ValueError, OSError) as error:
            if fault := image_files.system_fault(image_set.path(index), error):
                raise UserError(fault) from None
            raise UserError(
                f"cannot read {image_set.path(index)} ({error}): mend it; `python3 "
                "scripts/prepare_data.py verify` finds all such files"
            ) from None

    count = read_bytes = 0
    # Asked for in blocks, as the loader does; small ones on a slow disk, which has to deliver what
    # it was asked for before the time is up.
    block = 8
    started = now = time.monotonic()
    with ThreadPoolExecutor(max(1, threads), "read") as pool:
        while count < len(indexes) and now - started < READ_S:
            some = indexes[count : count + block]
            image_set.read_ahead(some)
            read_bytes += sum(pool.map(size, some.tolist()))
            count += len(some)
            before, now = now, time.monotonic()
            if now - before < READ_S / 20:
                block *= 2
    return count, read_bytes, now - started


def share_kept(config: Config, device: torch.device, reading: Reading, images: int) -> float:
    """Share of the images that the page cache keeps from one epoch to the next, at most 1."""
    free_bytes = max(0, available_memory() - needed_memory(config, device))
    return min(1.0, free_bytes / (reading.mean_bytes * images))


def disk_waits(reading: Reading, images: int, epochs_s: list[float], kept: float) -> list[float]:
    """Seconds that each epoch waits for the disk, beside what it takes with images in memory.

    The first epoch reads every image from the disk, the later ones what memory does not keep, and
    by then a volume has loaded.
    """
    later = reading.again if reading.is_lazy else reading.first
    disk_s = [images / reading.first] + [images * (1 - kept) / later] * (len(epochs_s) - 1)
    return [max(0.0, read_s - epoch_s) for read_s, epoch_s in zip(disk_s, epochs_s, strict=True)]


def check_disk(
    config: Config,
    reading: Reading,
    images: int,
    timings: dict[int, Timing],
    epochs_s: list[float],
    waits_s: list[float],
) -> Finding:
    """Whether the images come from the disk as fast as the steps use them."""
    needed = config.batch_size / min(timing.busy_s for timing in timings.values())
    whole_bytes = reading.mean_bytes * images

    def rate(images_a_second: float) -> str:
        megabytes = images_a_second * reading.mean_bytes / 1e6
        return f"{images_a_second:,.0f} images ({megabytes:,.1f} MB) a second"

    text = f"{rate(reading.first)} at random from the disk, the steps use {needed:,.0f}"
    lost_s = sum(waits_s)
    if lost_s <= LOST_ALLOWED * sum(epochs_s):
        return Finding(OK, text)
    lost = f"the run would wait {format_duration(lost_s)} for them"
    if config.price_per_hour:
        lost += f", for ${config.price_per_hour * lost_s / 3600:.2f}"
    level = PROBLEM if lost_s > sum(epochs_s) else WARNING
    if reading.is_lazy:
        return Finding(
            level,
            f"{text}, and the same places read again give {rate(reading.again)}, as on a volume "
            f"that still loads from its snapshot: {lost}. At most {whole_bytes / 1e9:,.1f} GB are "
            f"yet to load, {format_duration(images / reading.first)} at this rate: read all of it "
            "once before the GPU is paid for, restore the volume with an initialization rate "
            "(EBS: 100 to 300 MiB/s), or copy the images to the machine's own NVMe disk",
        )
    return Finding(
        level,
        f"{text}: {lost}: copy the images to the machine's own NVMe disk, give the volume more "
        "reads and bytes a second, or pack them smaller with `python3 scripts/prepare_data.py "
        "pack`",
    )


# ------------------------------------------------------------------------------ time and price


def time_sizes(
    config: Config,
    device: torch.device,
    train_set: image_files.ImageSet,
    indexes: np.ndarray,
    epochs_done: int,
    step: Callable[[torch.Tensor, torch.Tensor], object],
) -> dict[int, Timing]:
    """Time steps at each size of crops that is left, on images that are in memory."""
    timings = {}
    for px in sorted(
        {train_px(config, epoch) for epoch in range(epochs_done, total_epochs(config))}
    ):
        timing = time_steps(config, px, device, train_set, indexes, step)
        timings[px] = timing
        log.info(
            "%d px: %.3f s a step (%.0f img/s), from %d timed steps",
            px, timing.step_s, config.batch_size / timing.step_s, timing.steps,
        )  # fmt: skip
    return timings


def time_steps(
    config: Config,
    px: int,
    device: torch.device,
    train_set: image_files.ImageSet,
    indexes: np.ndarray,
    step: Callable[[torch.Tensor, torch.Tensor], object],
) -> Timing:
    """Time some steps at one size, with all that they wait for."""
    steps = min(TIMED_STEPS, steps_per_epoch(config, train_set))
    order = np.resize(indexes, steps * config.batch_size)  # repeated where they are few
    fill = functools.partial(data.fill_train, config, 0)
    batches = data.batches(
        train_set, fill, order, config.batch_size, px, config.workers, pin=device.type == "cuda"
    )
    ends, busy_s = [time.monotonic()], []  # of the steps
    with contextlib.closing(data.to_device(batches, device)) as on_device:
        for images, labels in on_device:
            started = time.monotonic()
            step(images, labels)
            ends.append(time.monotonic())
            busy_s.append(ends[-1] - started)
            if len(busy_s) >= 4 and ends[-1] - ends[1] > TIMED_S:
                break
    # From one end to the next, which is what the model or the loader takes, whichever is slower;
    # the first half warms up, and has batches that were ready before.
    seconds = [later - earlier for earlier, later in itertools.pairwise(ends)]
    seconds, busy_s = (values[len(values) // 2 :] for values in (seconds, busy_s))
    return Timing(sum(seconds) / len(seconds), sum(busy_s) / len(busy_s), len(seconds))


def check_loader(timings: dict[int, Timing]) -> Finding:
    """Whether the images are ready when a step wants them."""
    waiting = {px: 1 - timing.busy_s / timing.step_s for px, timing in timings.items()}
    px = max(waiting, key=waiting.__getitem__)
    text = f"the steps wait for images {100 * waiting[px]:.0f} % of the time at {px} px"
    if waiting[px] <= 0.1:
        return Finding(OK, text)
    return Finding(
        WARNING,
        f"{text}, with these in memory: give it as many --workers as there are cores, a machine "
        "with more of them, or smaller pictures, by `python3 scripts/prepare_data.py pack`",
    )


def epoch_seconds(
    config: Config,
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
    timings: dict[int, Timing],
    epochs_done: int,
) -> list[float]:
    """Seconds of each epoch that is left, with its validation, where images are in memory."""
    # A validation image costs about a third of a training image of its size: there is no backward
    # pass. The last epoch has train_px in any case.
    val_share = (config.val_px / config.train_px) ** 2 / 3
    image_s = timings[config.train_px].step_s / config.batch_size
    val_s = len(val_set) * image_s * val_share
    steps = steps_per_epoch(config, train_set)
    return [
        steps * timings[train_px(config, epoch)].step_s + val_s
        for epoch in range(epochs_done, total_epochs(config))
    ]


def tell_estimate(
    config: Config, device: torch.device, left_s: float, waiting_s: float, epochs: int
) -> str:
    """Time, memory and price of what is left."""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_reserved(device)
    else:
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    text = f"estimate: {format_duration(left_s / epochs)} an epoch, {format_duration(left_s)} for "
    plural = "s" * (epochs > 1)
    whole = epochs == total_epochs(config)
    text += f"{epochs} epoch{plural}" if whole else f"the {epochs} epoch{plural} left"
    if waiting_s:
        text += f" ({format_duration(waiting_s)} of it waiting for the disk)"
    memory = "GPU memory besides CUDA's own" if device.type == "cuda" else "main memory"
    text += f", {peak_bytes / 1e9:.1f} GB of {memory}"
    if config.price_per_hour:
        price = config.price_per_hour * left_s / 3600
        text += f", ${price:.2f} at ${config.price_per_hour:.2f} an hour"
    return text


def check_budget(config: Config, spent_usd: float, left_s: float) -> Finding | None:
    """Whether what is spent and what is left to spend stay within the budget."""
    if not config.budget_usd:
        return None
    price = spent_usd + config.price_per_hour * left_s / 3600
    text = f"${price:.2f} of ${config.budget_usd:.2f}"
    if spent_usd:
        text += f", of which ${spent_usd:.2f} are spent"
    above = price - config.budget_usd
    if above <= 0:
        return Finding(OK, text)
    return Finding(
        PROBLEM,
        f"{text}: ${above:.2f} too much, so that the run would stop before its end: raise "
        "--budget-usd, or choose fewer --epochs, smaller crops or a cheaper machine",
    )
