"""What feeding the model costs: the trainer's loop against the bare step, in turn, in one process.

    python3 scripts/benchmark_loop.py --train-folder-name DIR/train --val-folder-name DIR/val \
        --train-px 96 --batch-size 64 --blocks 6 --block-steps 50

A block trains on batches as the loader delivers them; the next one repeats the last batch, which
lies in memory already, as often. The ratio of the two times, pair by pair, is what the loader and
the loop cost. Prints a JSON object with the pairs, the hardware and the versions.
"""

import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import engine
import image_files
import preflight
from utils import ConfigOptions, UserError, check_config, parse_options, run_stage, start_log


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """The settings of the run, and how long to measure."""

    config: ConfigOptions
    blocks: int = 6
    """pairs of blocks"""
    block_steps: int = 50
    """steps of a block"""


def main() -> None:
    """Measure the pairs and print them."""
    options = parse_options(BenchmarkOptions, __doc__)
    if options.blocks < 1 or options.block_steps < 1:
        raise UserError("blocks and block_steps must be 1 or more")
    config = options.config
    check_config(config)
    start_log(None)
    train_set, _, _ = image_files.open_images(config)
    run = engine.new_run(config, len(train_set.classes))
    run.model.train()
    on_gpu = run.device.type == "cuda"
    epochs = (
        data.train_batches(train_set, config, epoch, pin=on_gpu) for epoch in itertools.count()
    )
    # Whole batches only: the last one of an epoch may be smaller.
    whole = (
        batch
        for batch in data.to_device(itertools.chain.from_iterable(epochs), run.device)
        if len(batch[1]) == config.batch_size
    )

    def seconds(batches, steps: int) -> tuple[float, data.Batch]:
        started = time.monotonic()
        for images, labels in itertools.islice(batches, steps):
            loss = engine.train_step(run, images, labels, 1e-3)
        loss.item()  # waits for the device
        return time.monotonic() - started, (images, labels)

    pairs = []
    with contextlib.closing(whole):
        _, batch = seconds(whole, 10)  # warms up
        for _ in range(options.blocks):
            seconds(whole, 3)  # uses up what the loader had in stock
            loop_s, batch = seconds(whole, options.block_steps)
            # No batch may be prepared beside the bare step: let the loader fill its stock.
            time.sleep(1)
            bare_s, _ = seconds(itertools.repeat(batch), options.block_steps)
            pairs.append((loop_s, bare_s))
    ratios = [loop_s / bare_s for loop_s, bare_s in pairs]
    print(
        json.dumps(
            {
                "loop_over_bare": {
                    "median": round(statistics.median(ratios), 4),
                    "min": round(min(ratios), 4),
                    "max": round(max(ratios), 4),
                },
                "bare_step_s": round(
                    statistics.median(bare_s for _, bare_s in pairs) / options.block_steps, 4
                ),
                "pairs_s": [[round(value, 2) for value in pair] for pair in pairs],
                "settings": {
                    name: getattr(config, name) for name in ("train_px", "batch_size", "workers")
                },
                "hardware": preflight.describe_hardware(run.device, run.precision),
                "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    run_stage(main)
