"""What a training run on ImageNet would cost: an estimate, computed from measured rates.

    python3 scripts/estimate_cost.py
    python3 scripts/estimate_cost.py --first-train-px 128 --train-px 192 --epochs-to-show 24 32 50

No run on ImageNet stands behind it. The hours of an epoch are its images over the lower of two
rates: that of the GPU, and that at which the instance's cores prepare images of that epoch's size.
The first is a published one of an A10G at 224 px, scaled by the pixels; the second is one core's,
as scripts/benchmark_data.py measured it, times the instance's vCPUs, each counted as a part of a
core. Validation adds 50,000 images an epoch. Prices are AWS's on demand in us-east-1, times the
share of it that the reference run paid for its spot instance.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import (
    RECIPES,
    Config,
    ConfigOptions,
    UserError,
    check_config,
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
# A validation image needs the forward pass alone: a third of the arithmetic.
VAL_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True)
class EstimateOptions:
    """The run, and the rates that the estimate rests on."""

    config: ConfigOptions
    epochs_to_show: tuple[int, ...] = (24, 32, 50)
    """lengths of the run, in epochs"""
    data_benchmark: Path = Path(__file__).parent.parent / "benchmarks" / "data.json"
    """what scripts/benchmark_data.py has written"""
    gpu_img_per_s: float = 810.0
    """training images a second of the GPU at 224 px; 810: an A10G with channels_last and fp16, over
    170 epochs (Sagar063/week9_ERAV4_ImageNet_ResNet-50_Model_Experiments, train_log.csv)"""
    core_per_vcpu: float = 0.5
    """measured cores that a vCPU of the instance is worth: two of them share a core"""
    spot_share: float = 0.396
    """spot price over the price on demand; 0.396: what the reference run paid"""


def core_rates(path: Path) -> dict[int, float]:
    """Images a second that one core prepares from a store, for each measured size in pixels."""
    record = read_json(path)
    if record is None:
        raise UserError(f"no {path}: run scripts/benchmark_data.py with --output {path}")
    rates = {
        row["px"]: row["img_per_s"]["ours, store"]["median"]
        for row in record["results"]
        if row["cores"] == 1
    }
    if not rates:
        raise UserError(f"{path} has no rate of one core: measure with --cores 1")
    return rates


def core_rate(rates: dict[int, float], px: int) -> float:
    """The rate at the next larger size that was measured, or at the largest."""
    return rates[min((size for size in rates if size >= px), default=max(rates))]


def hours(
    config: Config, gpu_rate: float, cores: float, rates: dict[int, float]
) -> tuple[float, float]:
    """Hours of the run, and the share of the training time in which the cores are the slower."""
    train_s = waiting_s = 0.0
    for epoch in range(config.epochs):
        px = train_px(config, epoch)
        gpu_s = TRAIN_IMAGES * (px / 224) ** 2 / gpu_rate
        cores_s = TRAIN_IMAGES / (cores * core_rate(rates, px))
        train_s += max(gpu_s, cores_s)
        waiting_s += max(gpu_s, cores_s) * (cores_s > gpu_s)
    val_s = VAL_IMAGES * (config.val_px / 224) ** 2 / gpu_rate * VAL_SHARE * config.epochs
    return (train_s + val_s) / 3600, waiting_s / train_s


def main() -> None:
    """Print the table."""
    options = parse_options(EstimateOptions, __doc__)
    for name in ("gpu_img_per_s", "core_per_vcpu", "spot_share"):
        if not getattr(options, name) > 0:
            raise UserError(f"{name} is {getattr(options, name)}: it must be above 0")
    rates = core_rates(options.data_benchmark)
    plans = {f"{options.config.train_px} px throughout": options.config}
    if not options.config.first_train_px and options.config == RECIPES["reference"]:
        growing = dataclasses.replace(options.config, first_train_px=128, train_px=192)
        plans = {"224 px throughout": options.config, "128 to 192 px": growing}
    elif options.config.first_train_px:
        plans = {f"{options.config.first_train_px} to {options.config.train_px} px": options.config}
    sizes = ", ".join(f"{rate:,.0f} img/s at {px} px" for px, rate in rates.items())
    print(
        f"ESTIMATE, not a measurement: GPU {options.gpu_img_per_s:.0f} img/s at 224 px; a vCPU "
        f"counts as {options.core_per_vcpu:g} cores, of which each prepares {sizes}"
    )
    print("\n| crops | epochs | instance | hours | spot | on demand | slower part |")
    print("|---|---|---|---|---|---|---|")
    for crops, plan in plans.items():
        for epochs in options.epochs_to_show:
            config = dataclasses.replace(plan, epochs=epochs)
            check_config(config)
            for instance, (vcpus, price) in INSTANCES.items():
                cores = vcpus * options.core_per_vcpu
                run_h, waiting = hours(config, options.gpu_img_per_s, cores, rates)
                slower = f"CPU in {100 * waiting:.0f} % of the time" if waiting else "GPU"
                print(
                    f"| {crops} | {epochs} | {instance} | {run_h:.1f} "
                    f"| ${run_h * price * options.spot_share:.2f} | ${run_h * price:.2f} "
                    f"| {slower} |"
                )


if __name__ == "__main__":
    run_stage(main)
