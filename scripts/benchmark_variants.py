"""What each variant of a trials' plan costs: images a second in training, in turn, in one process.

    python3 scripts/benchmark_variants.py PLAN.toml --output variants.json

A variant's epoch is timed by some steps of it at every size that its crops have, on the plan's
training images as the loader delivers them, after a step that warms up. Its rate is that of its
whole run: all images over all time, each size with as many epochs as the variant has of it. In a
round each variant has its turn, and the ratio to the first is taken round by round, so that a pace
of the machine which drifts is the same for both. The first round compiles, and does not count.
Prints the table; --output takes a JSON file with all times, the hardware and the versions.
"""

import collections
import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision
import tyro
from benchmark_step import block, quotients, spread
from trials import choose, read_plan

sys.path.insert(0, str(Path(__file__).parent.parent))

import augment
import data
import engine
import preflight
from image_files import ImageSet, open_image_set
from utils import (
    Config,
    UserError,
    log,
    parse_options,
    run_stage,
    start_log,
    train_px,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """Which variants, and how long."""

    plan: tyro.conf.Positional[Path]
    """TOML file with the variants, as scripts/trials.py takes it"""
    variants: tuple[str, ...] = ()
    """names of the variants; all of the plan if none are named"""
    rounds: int = 5
    """turns of every variant"""
    block_steps: int = 5
    """timed steps of a turn at each size"""
    output: Path | None = None
    """JSON file to write"""


def epochs_at(config: Config) -> dict[int, list[int]]:
    """The epochs that have crops of each size in pixels, counted from 0."""
    epochs = collections.defaultdict(list)
    for epoch in range(config.epochs):
        epochs[train_px(config, epoch)].append(epoch)
    return epochs


def img_per_s(config: Config, step_s: dict[int, float]) -> float:
    """Images a second over a whole run, from the seconds that a step takes at each size."""
    total_s = sum(step_s[px] * len(epochs) for px, epochs in epochs_at(config).items())
    return config.epochs * config.batch_size / total_s


def turn(run: engine.Run, config: Config, images: ImageSet, steps: int) -> dict[int, float]:
    """Seconds that a step takes at each size, with the loader, over `steps` steps."""

    def step(images: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        mix = augment.draw_mix(config, 0, run.step, images.shape[1])
        return engine.train_step(run, images, labels, rate, mix=mix)

    step_s = {}
    for px, epochs in epochs_at(config).items():
        on_host = data.train_batches(images, config, epochs[0], pin=run.device.type == "cuda")
        with contextlib.closing(data.to_device(on_host, run.device)) as batches:
            seconds, _ = block(step, batches, steps, run.device)
        step_s[px] = seconds / steps
    return step_s


def summary(plan: dict[str, Config], turns: dict[str, list[dict[int, float]]]) -> dict[str, Any]:
    """Of each variant the rate, its ratio to the first's, and the seconds of a step, by rounds."""
    rates = {name: [img_per_s(plan[name], step_s) for step_s in turns[name]] for name in plan}
    first = next(iter(rates.values()))
    return {
        name: {
            "img_per_s": spread(rates[name], 2),
            "ratio": spread(quotients(rates[name], first), 3),
            "step_s": [{px: round(s, 4) for px, s in each.items()} for each in turns[name]],
        }
        for name in plan
    }


def main() -> None:
    """Give all variants their turns, print, write."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if options.rounds < 1 or options.block_steps < 1:
        raise UserError("rounds and block_steps must be 1 or more")
    plan = choose(options.plan, read_plan(options.plan), options.variants)
    sets, runs = {}, {}
    for name, config in plan.items():
        sets[name] = images = open_image_set(config.train_folder_name, "train")
        needed = (options.block_steps + 1) * config.batch_size
        if len(images) < needed:
            raise UserError(
                f"variant {name}: {options.block_steps} steps and one before them need {needed:,} "
                f"images, and {config.train_folder_name} has {len(images):,}: use fewer "
                "--block-steps, or a smaller batch_size in the plan"
            )
        runs[name] = engine.new_run(config, len(images.classes))
        runs[name].model.train()
    first = next(iter(runs.values()))
    record: dict[str, Any] = {
        "plan": options.plan.name,
        "rounds": 0,
        "block_steps": options.block_steps,
        "threads": torch.get_num_threads(),
        "hardware": preflight.describe_hardware(first.device, first.precision),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
    }
    turns: dict[str, list[dict[int, float]]] = {name: [] for name in plan}
    for number in range(options.rounds + 1):
        for name, config in plan.items():
            step_s = turn(runs[name], config, sets[name], options.block_steps)
            if number:  # the first round picks kernels, and compiles
                turns[name].append(step_s)
        log.info("%d of %d rounds", number, options.rounds)
        if number:
            record |= {"rounds": number, "variants": summary(plan, turns)}
            if options.output:
                write_json(options.output, record)
    for name, found in record["variants"].items():
        log.info(
            "%-50s  %7.1f img/s  %.3f of the first's (%.3f to %.3f)",
            name, found["img_per_s"]["median"],
            *(found["ratio"][part] for part in ("median", "min", "max")),
        )  # fmt: skip


if __name__ == "__main__":
    run_stage(main)
