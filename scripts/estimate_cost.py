"""What a training run on ImageNet would cost: an estimate, computed from measured rates.

    python3 scripts/estimate_cost.py
    python3 scripts/estimate_cost.py --first-train-px 128 --train-px 192 --epochs-to-show 24 32 50
    python3 scripts/estimate_cost.py --step-benchmark step.json     with the rates of your GPU

The first table is by epochs, the second by accuracy: each recipe's epochs until one of --top1, from
the accuracies that its source published for runs of several lengths, in a straight line between two
of them. No run on ImageNet stands behind either.

The hours of an epoch are its images over the lower of two rates: that of the GPU, and that at which
the instance's cores prepare images of that epoch's size. The first is a published one of an A10G at
224 px, or what scripts/benchmark_step.py measured at the nearest size, scaled by the pixels, less
the arithmetic of Muon and what BlurPool moves in memory; the second is one core's, as
scripts/benchmark_data.py measured it, times the instance's vCPUs, each counted as a part of a core.
Validation adds 50,000 images an epoch, at the GPU's rate: what the cores prepare of them is not
measured, and where cores are few it takes somewhat longer. Prices are AWS's on demand in us-east-1,
times the share of it that the reference run paid for its spot instance.
"""

import dataclasses
import itertools
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import (
    RECIPES,
    Config,
    ConfigOptions,
    UserError,
    check_config,
    is_number,
    parse_options,
    read_json,
    run_stage,
    train_px,
)

TRAIN_IMAGES, VAL_IMAGES = 1_281_167, 50_000  # of ImageNet-1k
INSTANCES = {  # vCPUs, and US dollars an hour on demand
    "g5.xlarge": (4, 1.006),
    "g5.2xlarge": (8, 1.212),
    "g5.8xlarge": (32, 2.448),
}
FLOP_PER_IMAGE = 24.7e9  # of training at 224 px: three times 4.1 G multiply-adds, by two
# Of a step of Muon: five rounds of 4 m^2 n + 2 m^3 for each of 54 weights as m x n, m <= n.
FLOP_PER_MUON_STEP = 296e9
# BlurPool's means move 30 MB for an image of 224 px in fp16, forward and back: at half of an A10G's
# 600 GB/s, 8 % of the 1.2 ms that an image takes. By arithmetic, not measured on a GPU; taken
# for every GPU alike, that of --step-benchmark too.
BLUR_SHARE = 0.08
# A validation image needs the forward pass alone: a third of the arithmetic.
VAL_SHARE = 1 / 3
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PLAIN, AUGMENTED = "ours, store", "ours as accurate, store"  # scripts/benchmark_data.py's names


@dataclasses.dataclass(frozen=True)
class EstimateOptions:
    """The run, and the rates that the estimate rests on."""

    config: ConfigOptions
    epochs_to_show: tuple[int, ...] = (24, 32, 50)
    """lengths of the run, in epochs"""
    top1: tuple[float, ...] = (75.3, 78.0)
    """accuracies that the recipes are to reach, ImageNet top-1 in percent"""
    step_benchmark: Path | None = None
    """what scripts/benchmark_step.py has written on a GPU, to take in place of gpu_img_per_s"""
    data_benchmark: Path = BENCHMARKS / "data.json"
    """what scripts/benchmark_data.py has written"""
    augmented_data_benchmark: Path = BENCHMARKS / "data_augmented.json"
    """the same, for the share of a core's rate that TrivialAugment leaves"""
    gpu_img_per_s: float = 810.0
    """training images a second of the GPU at 224 px; 810: an A10G with channels_last and fp16, over
    170 epochs (Sagar063/week9_ERAV4_ImageNet_ResNet-50_Model_Experiments, train_log.csv)"""
    core_per_vcpu: float = 0.5
    """measured cores that a vCPU of the instance is worth: two of them share a core"""
    spot_share: float = 0.396
    """spot price over the price on demand; 0.396: what the reference run paid"""


class Rates(NamedTuple):
    """Images a second, by size in pixels."""

    gpu: dict[int, float]
    core: dict[int, float]
    core_augmented: dict[int, float]  # with TrivialAugment


def of_one_core(path: Path, kind: str, name: str) -> dict[int, float]:
    """What scripts/benchmark_data.py measured on one core, for each size in pixels.

    `kind` is img_per_s, of a pipeline, or ratios, of two of them.
    """
    record = read_json(path)
    if record is None:
        raise UserError(f"no {path}: run scripts/benchmark_data.py with --output {path}")
    try:
        found = {
            _positive(row["px"]): _positive(row[kind][name]["median"])
            for row in record["results"]
            if row["cores"] == 1 and name in row[kind]
        }
    except (TypeError, KeyError):
        raise UserError(f"{path} is not what scripts/benchmark_data.py --output writes") from None
    if not found:
        raise UserError(f"{path} has not {name!r} on one core: measure that with --cores 1")
    return found


def _positive(value: Any) -> float:
    if not (is_number(value) and value > 0):
        raise TypeError
    return value


def core_rate(rates: dict[int, float], px: int) -> float:
    """The rate at the next larger size that was measured, or at the largest."""
    return rates[min((size for size in rates if size >= px), default=max(rates))]


def gpu_rates(options: EstimateOptions) -> dict[int, float]:
    """Training images a second of the GPU, for each size in pixels that is known."""
    if options.step_benchmark is None:
        return {224: options.gpu_img_per_s}
    record = read_json(options.step_benchmark)
    try:
        if record["hardware"]["gpu"] is None:
            raise UserError(f"{options.step_benchmark} was measured without a GPU")
        sizes = {
            _positive(row["px"]): _positive(row["ours_img_per_s"]["median"])
            for row in record["sizes"]
        }
    except (TypeError, KeyError):
        raise UserError(
            f"{options.step_benchmark} is not what scripts/benchmark_step.py --output writes"
        ) from None
    if not sizes:
        raise UserError(f"{options.step_benchmark} has no size: its measurement was broken off")
    return sizes


def gpu_rate(rates: dict[int, float], px: int) -> float:
    """The rate at the nearest size that is known, scaled by the pixels."""
    nearest = min(rates, key=lambda size: abs(size - px))
    return rates[nearest] * (nearest / px) ** 2


def hours(config: Config, rates: Rates, cores: float) -> tuple[float, float]:
    """Hours of the run, and the share of the training time in which the cores are the slower."""
    core = rates.core_augmented if config.trivial_augment else rates.core
    train_s = waiting_s = 0.0
    for epoch in range(config.epochs):
        px = train_px(config, epoch)
        more = BLUR_SHARE if config.blurpool else 0.0
        if config.optimizer == "muon":
            more += FLOP_PER_MUON_STEP / (config.batch_size * FLOP_PER_IMAGE * (px / 224) ** 2)
        gpu_s = TRAIN_IMAGES / gpu_rate(rates.gpu, px) * (1 + more)
        cores_s = TRAIN_IMAGES / (cores * core_rate(core, px))
        train_s += max(gpu_s, cores_s)
        waiting_s += max(gpu_s, cores_s) * (cores_s > gpu_s)
    val_s = VAL_IMAGES / gpu_rate(rates.gpu, config.val_px) * VAL_SHARE * config.epochs
    return (train_s + val_s) / 3600, waiting_s / train_s


def epochs_until(published: tuple[tuple[int, float], ...], top1: float) -> int | None:
    """The length of a run that ends at `top1` percent; None if no published one got so far."""
    if published and top1 <= published[0][1]:
        return published[0][0]  # the shortest that is known
    for (epochs, low), (more_epochs, high) in itertools.pairwise(published):
        if low < top1 <= high:
            return math.ceil(epochs + (top1 - low) / (high - low) * (more_epochs - epochs))
    return None


def tell_lengths(options: EstimateOptions, rates: Rates) -> None:
    """Print the table by epochs."""
    plans = {f"{options.config.train_px} px throughout": options.config}
    if not options.config.first_train_px and options.config == RECIPES["reference"].config:
        growing = dataclasses.replace(options.config, first_train_px=128, train_px=192)
        plans = {"224 px throughout": options.config, "128 to 192 px": growing}
    elif options.config.first_train_px:
        plans = {f"{options.config.first_train_px} to {options.config.train_px} px": options.config}
    print("\n| crops | epochs | instance | hours | spot | on demand | slower part |")
    print("|---|---|---|---|---|---|---|")
    for (crops, plan), epochs in itertools.product(plans.items(), options.epochs_to_show):
        config = dataclasses.replace(plan, epochs=epochs)
        check_config(config)
        for instance in INSTANCES:
            print(
                f"| {crops} | {epochs} | {instance} | {cells(options, rates, config, instance)} |"
            )


def cells(options: EstimateOptions, rates: Rates, config: Config, instance: str) -> str:
    """Hours, price and what limits them, of a run on an instance, as cells of a table."""
    vcpus, price = INSTANCES[instance]
    cores = vcpus * options.core_per_vcpu
    run_h, waiting = hours(config, rates, cores)
    slower = f"CPU in {100 * waiting:.0f} % of the time" if waiting else "GPU"
    spot = run_h * price * options.spot_share
    return f"{run_h:.1f} | ${spot:.2f} | ${run_h * price:.2f} | {slower}"


def tell_accuracies(options: EstimateOptions, rates: Rates) -> None:
    """Print the table by accuracy, on the smallest instance."""
    instance = next(iter(INSTANCES))
    print(f"\nOn a {instance}, with the crops and validation of each recipe:")
    print(
        "\n| recipe | top-1 | epochs | hours | spot | on demand | slower part | accuracies from |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for (name, recipe), top1 in itertools.product(RECIPES.items(), options.top1):
        if not recipe.published:
            continue
        epochs = epochs_until(recipe.published, top1)
        if epochs is None:
            print(
                f"| {name} | {top1:g} % | not known to get there | | | | | {recipe.published_by} |"
            )
            continue
        config = dataclasses.replace(recipe.config, epochs=epochs)
        print(
            f"| {name} | {top1:g} % | {epochs} | {cells(options, rates, config, instance)} "
            f"| {recipe.published_by} |"
        )


def main() -> None:
    """Print the table."""
    options = parse_options(EstimateOptions, __doc__)
    for name in ("gpu_img_per_s", "core_per_vcpu", "spot_share"):
        if not getattr(options, name) > 0:
            raise UserError(f"{name} is {getattr(options, name)}: it must be above 0")
    usual = RECIPES[options.config.recipe].config
    if options.config.epochs != usual.epochs or options.config.extra_epochs:
        raise UserError("epochs are those of --epochs-to-show here: give their number with that")
    core = of_one_core(options.data_benchmark, "img_per_s", PLAIN)
    shares = of_one_core(options.augmented_data_benchmark, "ratios", f"{AUGMENTED} / {PLAIN}")
    augmented = {px: share * core_rate(core, px) for px, share in shares.items()}
    rates = Rates(gpu_rates(options), core, augmented)
    gpu, plain, augmented = (
        ", ".join(f"{rate:,.0f} img/s at {px} px" for px, rate in of.items()) for of in rates
    )
    print(
        f"ESTIMATE, not a measurement: GPU {gpu}, scaled by the pixels; a vCPU "
        f"counts as {options.core_per_vcpu:g} cores, of which each prepares {plain}, and with "
        f"TrivialAugment {augmented}"
    )
    tell_lengths(options, rates)
    tell_accuracies(options, rates)


if __name__ == "__main__":
    run_stage(main)
