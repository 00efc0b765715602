"""What saving costs: how long a checkpoint holds training up, and how much it slows it down.

    python3 scripts/benchmark_save.py --output save.json

Trains ResNet-50 on a batch of noise, through the trainer's own step and saver. The pause is the
time that the call to save takes, between two steps; durable is the checkpoint when it is on the
disk. Then minutes with a checkpoint at their beginning and minutes without take turns: the share of
steps by which the former fall short of the latter, pair by pair, is what saving costs. A minute
before the first checkpoint shows whether those without are slower than before there was any.
Prints what it finds; --output takes a JSON file with hardware and versions.
"""

import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import checkpoint
import engine
import preflight
from utils import (
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


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to train, and how long."""

    px: int = 128
    """side of the pictures, in pixels"""
    batch_size: int = 0
    """images in a step; 0: 448 on a GPU, 16 on a CPU"""
    saves: int = 10
    """checkpoints whose pause is measured"""
    pairs: int = 5
    """pairs of a minute with a checkpoint and one without"""
    interval_s: float = 60.0
    """seconds of such a minute"""
    folder: Path | None = None
    """where to save; a temporary folder if not given"""
    output: Path | None = None
    """JSON file to write"""


def main() -> None:
    """Measure the pauses, then the minutes."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if min(options.saves, options.pairs) < 1 or options.interval_s <= 0:
        raise UserError("saves and pairs must be 1 or more, interval_s above 0")
    for wanted in (options.folder, options.output and options.output.parent):
        if wanted is not None:
            wanted.mkdir(parents=True, exist_ok=True)
    batch_size = options.batch_size or (448 if torch.cuda.is_available() else 16)
    config = Config(batch_size=batch_size, train_px=options.px)
    check_config(config)
    run = engine.new_run(config, 1000)
    # As within the second epoch.
    weights = bytearray(checkpoint.encode(run.model.model.state_dict()))
    run.best, run.epoch_s = torch.frombuffer(weights, dtype=torch.uint8), 1.0
    run.model.train()
    random = torch.Generator().manual_seed(0)
    shape = (batch_size, options.px, options.px, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random).to(run.device)
    labels = torch.randint(0, 1000, (batch_size,), generator=random).to(run.device)

    def train(seconds: float) -> None:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            engine.train_step(run, images, labels, 1e-6).item()

    def steps_per_s(seconds: float, saver: checkpoint.BackgroundSaver | None = None) -> float:
        started, first = time.monotonic(), run.step
        if saver:
            saver.save(run.state())
        train(seconds - (time.monotonic() - started))
        return (run.step - first) / (time.monotonic() - started)

    train(options.interval_s / 6)  # warms up
    at_first = steps_per_s(options.interval_s)
    log.info("%.3f steps/s before the first checkpoint", at_first)
    pauses_s, durable_s, pairs = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        saver = checkpoint.BackgroundSaver(Path(folder))
        for _ in range(options.saves):
            train(1)
            started = time.monotonic()
            saver.save(run.state())
            pauses_s.append(time.monotonic() - started)
            saver.wait()
            durable_s.append(time.monotonic() - started)
        size_bytes = max(
            path.stat().st_size for path in Path(folder).glob("checkpoints/epochs-*.pt")
        )
        tell("pause", pauses_s)
        tell("durable after", durable_s)
        for _ in range(options.pairs):
            rates = []
            for used in (saver, None):
                rates.append(steps_per_s(options.interval_s, used))
                saver.wait()
            pairs.append(rates)
            log.info("%.3f steps/s with a checkpoint, %.3f without", *rates)
    lost = [1 - with_save / without for with_save, without in pairs]
    log.info(
        "a checkpoint every %.0f s costs %.2f %% (%.2f to %.2f)",
        options.interval_s,
        *(100 * value for value in (statistics.median(lost), min(lost), max(lost))),
    )
    if options.output:
        record: dict[str, Any] = {
            "settings": {
                "px": options.px,
                "batch_size": batch_size,
                "interval_s": options.interval_s,
            },
            "checkpoint_bytes": size_bytes,
            "pauses_s": [round(value, 4) for value in pauses_s],
            "durable_s": [round(value, 3) for value in durable_s],
            "steps_per_s_before_the_first": round(at_first, 4),
            "steps_per_s_with_and_without": [[round(rate, 4) for rate in pair] for pair in pairs],
            "lost": {"median": statistics.median(lost), "pairs": lost},
            "hardware": preflight.describe_hardware(run.device, run.precision),
            "versions": versions(),
        }
        write_json(options.output, record)


def tell(what: str, seconds: list[float]) -> None:
    """Median and extremes of some seconds."""
    middle, least, most = statistics.median(seconds), min(seconds), max(seconds)
    log.info("%s: %.3f s (%.3f to %.3f)", what, middle, least, most)


if __name__ == "__main__":
    run_stage(main)
