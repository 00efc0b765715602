"""Whether the cheap way to resize a training crop costs accuracy: the same runs with either way.

    python3 scripts/benchmark_resize.py --train-folder-name DIR/train --val-folder-name DIR/val \
        --train-px 64 --val-px 64 --val-resize-px 73 --batch-size 64 --epochs 3 --max-lr 0.05 \
        --seeds 2 --output resize.json

Bilinear is what data.fill_train does; the other is OpenCV's averaging over areas, which does not
alias. Validation is the same for both. Trains a run for each way and seed, in runs/NAME_WAY_SEED,
and prints right answers, and the images a second of the loader alone. --output takes a JSON file.
"""

import dataclasses
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any

import cv2

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import image_files
import trainer
from utils import (
    Config,
    ConfigOptions,
    UserError,
    as_arguments,
    check_config,
    describe_computer,
    keep_freed_memory,
    log,
    parse_options,
    read_json,
    run_folder,
    run_stage,
    start_log,
    versions,
    write_json,
)

WAYS = {"bilinear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA}


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """The settings of the runs, and how many there are."""

    config: ConfigOptions
    seeds: int = 2
    """runs of each way"""
    output: Path | None = None
    """JSON file to write"""


def train(way: str, arguments: list[str]) -> None:
    """The trainer, resizing in this way."""
    data.RESIZE = WAYS[way]
    sys.argv = ["trainer.py", *arguments]
    run_stage(trainer.main)


def load(way: str, options: BenchmarkOptions) -> float:
    """Images a second of the loader alone, over an epoch."""
    data.RESIZE = WAYS[way]
    images = image_files.open_image_set(options.config.train_folder_name, "train")
    started = time.perf_counter()
    loaded = sum(len(labels) for _, labels in data.train_batches(images, options.config, epoch=0))
    return loaded / (time.perf_counter() - started)


def main() -> None:
    """Train all runs, and compare."""
    options = parse_options(BenchmarkOptions, __doc__)
    if options.seeds < 1:
        raise UserError("seeds must be 1 or more")
    start_log(None)
    config = options.config
    check_config(config)
    keep_freed_memory()
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    for number in range(4):
        for way in WAYS:
            rate = load(way, options)
            if number:  # the first round fills the page cache
                rates[way].append(rate)
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for seed in range(options.seeds):
        for way in WAYS:
            name = f"{config.name}_{way}_{seed}"
            arguments = as_arguments(dataclasses.replace(config, name=name, seed=seed))
            process = context.Process(target=train, args=(way, arguments))
            process.start()
            process.join()
            if process.exitcode:
                raise UserError(f"the run {name} failed, see above", process.exitcode)
            result = read_json(run_folder(config.runs_folder, name) / "result.json")
            found[way].append({"seed": seed, **result})
    for way, results in found.items():
        log.info(
            "%-8s  top-1 %s  loader %s img/s",
            way,
            ", ".join(f"{result['val_top1']:.2f} %" for result in results),
            ", ".join(f"{rate:.0f}" for rate in rates[way]),
        )
    if options.output:
        write_json(
            options.output,
            {
                "settings": {
                    name: value
                    for name, value in dataclasses.asdict(config).items()
                    if "folder" not in name and value != getattr(Config(), name)
                },
                "results": found,
                "loader_img_per_s": rates,
                "hardware": describe_computer(),
                "versions": versions(),
            },
        )


if __name__ == "__main__":
    run_stage(main)
