"""What several processes cost and bring: the trainer's step alone, under torchrun, and shared.

    python3 scripts/benchmark_scaling.py --output scaling.json
    python3 scripts/benchmark_scaling.py --processes 1 2 4 8 --batch-size 448       on eight GPUs

The same batch of noise again and again, through engine.train_step and the agreement of the
processes that goes with each step; no loader. `plain` is python3 with all cores, the others are
torchrun with so many processes, which share batch and cores. All are started once, and take turns:
a round is a block of each, while the others wait, every second one in reverse, and its ratios are
of blocks that lie seconds apart, since a machine's speed drifts by more than torchrun with one
process is to cost: 1 % at most. The 95 % interval of the median ratio (bootstrap) says what the
rounds can tell apart. Prints what it finds; --output takes a JSON file with hardware and versions.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from benchmark_step import spread
from scipy import stats

sys.path.insert(0, str(Path(__file__).parent.parent))

import distributed
import engine
import preflight
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

FIRST_STEPS = 3  # which pick kernels and take memory
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
    steps: int = 5
    """timed steps of a block, after one that warms up"""
    rounds: int = 20
    """blocks of each"""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """arithmetic of the step; auto: as in the trainer"""
    sync_batchnorm: bool = False
    """synchronise BatchNorm's statistics"""
    output: Path | None = None
    """JSON file to write"""
    measured: bool = False
    """be one of the measured processes: a block for each line of the input, its time as a line"""


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


def measure(options: BenchmarkOptions) -> None:
    """Time a block for each line that the main process reads, to the end of its input."""
    distributed.start()
    config = make_config(options)
    with distributed.agreed():
        distributed.check_shares(config, config.batch_size)
        run = engine.new_run(config, CLASSES)
    run.model.train()
    size = len(distributed.share(np.arange(config.batch_size)))
    images = torch.randint(0, 256, (size, options.px, options.px, 3), dtype=torch.uint8)
    images, labels = images.to(run.device), torch.arange(size, device=run.device) % CLASSES

    def seconds(steps: int) -> float:
        started = time.monotonic()
        for _ in range(steps):
            distributed.any_of(False, False, False, False, False)  # as the trainer asks
            loss = engine.train_step(run, images, labels, 1e-3, config.batch_size)
        loss.item()  # waits for the device
        return time.monotonic() - started

    seconds(FIRST_STEPS)
    hardware = preflight.describe_hardware(run.device, run.precision)
    distributed.in_main(answer, {"hardware": hardware})
    while distributed.from_main(sys.stdin.readline):
        seconds(1)
        distributed.in_main(answer, {"seconds": seconds(options.steps)})
    distributed.wait_for_all()


def answer(record: dict[str, Any]) -> None:
    """Write a line for the one who measures."""
    print(json.dumps(record), flush=True)


class Contender:
    """`plain`, or so many processes under torchrun, which wait for their turn."""

    def __init__(self, name: str, options: BenchmarkOptions, errors: IO[str]) -> None:
        processes = 1 if name == "plain" else int(name)
        cores = len(os.sched_getaffinity(0))
        launcher = [sys.executable]
        if name != "plain":
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={name}"]
        settings = ("batch_size", "px", "steps", "precision")
        arguments = [
            text
            for key in settings
            for text in (f"--{key.replace('_', '-')}", str(getattr(options, key)))
        ]
        arguments += ["--sync-batchnorm"] * options.sync_batchnorm
        self.errors = errors
        self.process = subprocess.Popen(
            [*launcher, __file__, "--measured", *arguments],
            env={**os.environ, "OMP_NUM_THREADS": str(max(1, cores // processes))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self.hardware = self.answered()["hardware"]

    def answered(self) -> dict[str, Any]:
        """The next line of the main process; raises UserError if there is none."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        text = self.errors.read()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        raise UserError(lines[0].removeprefix("error: ") if lines else text[-2000:], EXIT_FAILED)

    def block(self) -> float:
        """Seconds that a block takes."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answered` says why
            self.process.stdin.write("a block\n")
            self.process.stdin.flush()
        return self.answered()["seconds"]

    def end(self) -> None:
        """Let it end, or make it."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun ends its processes
            self.process.wait()


@contextlib.contextmanager
def contenders(names: list[str], options: BenchmarkOptions) -> Iterator[dict[str, Contender]]:
    """All of them, started one after another."""
    with contextlib.ExitStack() as stack:
        started = {}
        for name in names:
            errors = stack.enter_context(tempfile.TemporaryFile("w+"))
            started[name] = Contender(name, options, errors)
            stack.callback(started[name].end)
        yield started


def ratios(rates: dict[str, list[float]], name: str) -> dict[str, Any]:
    """The rate over that of `plain`, round by round, and the 95 % interval of its median."""
    values = [rate / plain for rate, plain in zip(rates[name], rates["plain"], strict=True)]
    found: dict[str, Any] = spread(values, 4)
    if len(values) > 1:
        found_by = stats.bootstrap((values,), np.median, method="percentile", rng=0)
        interval = found_by.confidence_interval
        found["median_95_percent"] = [round(float(end), 4) for end in interval]
    return found


def main() -> None:
    """Measure in rounds, print, write; or be one of the measured processes."""
    options = parse_options(BenchmarkOptions, __doc__)
    if options.measured:
        measure(options)
        return
    start_log(None)
    config = make_config(options)
    if min(options.processes, default=0) < 1 or options.rounds < 1 or options.steps < 1:
        raise UserError("processes, rounds and steps must be 1 or more")
    counts = list(dict.fromkeys(options.processes))  # each once
    names = ["plain", *map(str, counts)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    with contenders(names, options) as started:
        for number in range(options.rounds):
            for name in names[:: -1 if number % 2 else 1]:
                rate = options.steps * config.batch_size / started[name].block()
                rates[name].append(round(rate, 3))
            record = {
                "settings": {
                    "batch_size": config.batch_size,
                    **{key: getattr(options, key) for key in ("px", "steps", "rounds")},
                    "sync_batchnorm": options.sync_batchnorm,
                },
                "hardware": {**started["plain"].hardware, "processes": counts},
                "versions": versions(),
                "img_per_s": {name: spread(values, 2) for name, values in rates.items()},
                "over_plain": {name: ratios(rates, name) for name in names[1:]},
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
            text += f", {ratio['median']:.3f} of plain ({ratio['min']:.3f} to {ratio['max']:.3f}"
            if "median_95_percent" in ratio:
                low, high = ratio["median_95_percent"]
                text += f"; the median {low:.3f} to {high:.3f}"
            text += ")"
        log.info("%s", text)


if __name__ == "__main__":
    run_stage(main)
