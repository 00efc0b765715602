"""What several processes cost and bring: the trainer's step alone, under torchrun, and shared.

    python3 scripts/benchmark_scaling.py --output scaling.json
    python3 scripts/benchmark_scaling.py --processes 1 2 4 8 --batch-size 448       on eight GPUs

The same batch of noise again and again, through trainer.train_step and the agreement of the
processes that goes with each step; no loader. `plain` is python3 with all cores, the others are
torchrun with so many processes, which share batch and cores. A round measures each once, one after
another, each in fresh processes; the ratios are those of a round. torchrun with one process is to
cost 1 % at most. Prints what it finds; --output takes a JSON file with hardware and versions.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed
import preflight
import trainer
from utils import (
    EXIT_FAILED,
    Config,
    UserError,
    check_config,
    log,
    parse_options,
    run_stage,
    start_log,
    versions,
    write_json,
)

WARM_STEPS = 3
CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and how long."""

    processes: tuple[int, ...] = (1, 2)
    """numbers of processes to start by torchrun"""
    batch_size: int = 0
    """images in a step, over all processes; 0: 448 on a GPU, 32 on a CPU"""
    px: int = 128
    """side of the pictures, in pixels"""
    steps: int = 20
    """timed steps"""
    rounds: int = 5
    """how often each is measured"""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """arithmetic of the step; auto: as in the trainer"""
    sync_batchnorm: bool = False
    """synchronise BatchNorm's statistics"""
    output: Path | None = None
    """JSON file to write"""
    measure_to: Path | None = None
    """measure this process, and those that torchrun started beside it, and write to this file"""


def make_config(options: BenchmarkOptions) -> Config:
    """The trainer's settings."""
    config = Config(
        batch_size=options.batch_size or (448 if torch.cuda.is_available() else 32),
        train_px=options.px,
        precision=options.precision,
        sync_batchnorm=options.sync_batchnorm,
    )
    check_config(config)
    return config


def measure(options: BenchmarkOptions, path: Path) -> None:
    """Time the steps of this process and those beside it; the main one writes the result."""
    distributed.start()
    config = make_config(options)
    with distributed.agreed():
        distributed.check_shares(config, config.batch_size)
        run = trainer.new_run(config, CLASSES)
    run.model.train()
    size = len(distributed.share(np.arange(config.batch_size)))
    images = torch.randint(0, 256, (size, options.px, options.px, 3), dtype=torch.uint8)
    images, labels = images.to(run.device), torch.arange(size, device=run.device) % CLASSES
    for step in range(WARM_STEPS + options.steps):
        if step == WARM_STEPS:
            started = time.monotonic()
        distributed.any_of(False, False, False, False, False)  # as the trainer asks
        loss = trainer.train_step(run, images, labels, 1e-3, config.batch_size)
        if step in (WARM_STEPS - 1, WARM_STEPS + options.steps - 1):
            loss.item()  # waits for the device
    seconds = time.monotonic() - started
    record = {
        "img_per_s": round(options.steps * config.batch_size / seconds, 3),
        "hardware": preflight.describe_hardware(run.device, run.precision),
    }
    distributed.in_main(write_json, path, record)
    distributed.wait_for_all()


def start(name: str, options: BenchmarkOptions) -> dict[str, Any]:
    """Measure `plain`, or so many processes under torchrun; raises UserError if they fail."""
    processes = 1 if name == "plain" else int(name)
    cores = len(os.sched_getaffinity(0))
    launcher = [sys.executable]
    if name != "plain":
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={name}"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "measured.json"
        settings = {
            "batch-size": options.batch_size,
            "px": options.px,
            "steps": options.steps,
            "precision": options.precision,
            "measure-to": path,
        }
        arguments = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        arguments += ["--sync-batchnorm"] * options.sync_batchnorm
        done = subprocess.run(
            [*launcher, __file__, *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))},
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
            raise UserError(
                lines[0].removeprefix("error: ") if lines else done.stderr[-2000:], EXIT_FAILED
            )
        return json.loads(path.read_text())


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, least and largest."""
    parts = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in parts.items()}


def main() -> None:
    """Measure in rounds, print, write; or be one of the measured processes."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if options.measure_to is not None:
        measure(options, options.measure_to)
        return
    config = make_config(options)
    if min(options.processes, default=0) < 1 or options.rounds < 1 or options.steps < 1:
        raise UserError("processes, rounds and steps must be 1 or more")
    names = ["plain", *map(str, options.processes)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.rounds):
        for name in names:
            measured = start(name, options)
            rates[name].append(measured["img_per_s"])
        record = {
            "settings": {
                "batch_size": config.batch_size,
                **{key: getattr(options, key) for key in ("px", "steps", "rounds")},
                "sync_batchnorm": options.sync_batchnorm,
            },
            "hardware": {**measured["hardware"], "processes": list(options.processes)},
            "versions": versions(),
            "img_per_s": {name: spread(values, 2) for name, values in rates.items()},
            "over_plain": {
                name: spread(
                    [rate / plain for rate, plain in zip(values, rates["plain"], strict=True)], 4
                )
                for name, values in rates.items()
                if name != "plain"
            },
            "rounds_img_per_s": rates,
        }
        if options.output:  # after each round: an interruption loses but the one under way
            write_json(options.output, record)
    for name in names:
        rate = record["img_per_s"][name]
        what = "plain" if name == "plain" else f"torchrun, {name} processes"
        text = f"{what}: {rate['median']:.2f} img/s ({rate['min']:.2f} to {rate['max']:.2f})"
        if name != "plain":
            ratio = record["over_plain"][name]
            text += f", {ratio['median']:.3f} of plain ({ratio['min']:.3f} to {ratio['max']:.3f})"
        log.info("%s", text)


if __name__ == "__main__":
    run_stage(main)
