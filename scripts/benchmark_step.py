"""The training step against a plain PyTorch one: speed, memory and loss, in turn, in one process.

    python3 scripts/benchmark_step.py --output step.json
    python3 scripts/benchmark_step.py --px 128 --train-folder-name DIR/train --loss-curve 200

The reference is what a script without care for speed does: torchvision's resnet50 in eager mode,
its tensors (N, C, H, W), autocast to the precision of ours, float32 batches that come normalised
from the host, torch.optim.SGD without fused, a GradScaler where that is fp16. Ours is
engine.train_step on uint8 batches. Neither has a loader, but in the column of that name.

A block of the one and a block of the other, after a step that warms up, make a pair, and the ratio
is that of the pair. Each has the memory allocator as it comes with it: glibc's own settings, as
they adapt to large blocks, for the reference. Start-up and peak memory are those of fresh processes
which take three steps; what torch.compile has compiled is not taken over from earlier ones.
Prints what it finds, size by size; --output takes a JSON file with hardware and versions.
"""

import concurrent.futures
import contextlib
import copy
import ctypes
import dataclasses
import itertools
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision

sys.path.insert(0, str(Path(__file__).parent.parent))

import data
import engine
import image_files
import preflight
import utils
from utils import (
    MEAN,
    STD,
    Config,
    UserError,
    check_config,
    learning_rate,
    log,
    parse_options,
    run_stage,
    start_log,
    write_json,
)

FLOP_PER_IMAGE = 24.7e9  # forward and backward at 224 px: three times 4.1 G multiply-adds, by two
SMOOTHED_STEPS = 20  # of a loss curve


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, and how long."""

    px: tuple[int, ...] = (224, 192, 160, 128)
    """sides of the pictures, in pixels"""
    batch_size: int = 0
    """images in a step; 0: 448 on a GPU, 64 on a CPU"""
    pairs: int = 5
    """pairs of blocks for each size"""
    block_steps: int = 10
    """timed steps of a block"""
    compile: bool = False
    """ours through torch.compile"""
    precision: Literal["auto", "fp16", "bf16", "fp32"] = "auto"
    """arithmetic of both; auto: as in the trainer"""
    train_folder_name: str = ""
    """folder of training images, a folder a class: also measures ours as the loader feeds it"""
    workers: int = Config.workers
    """threads that decode images"""
    loss_curve: int = 0
    """steps of both on the same pictures, of the folder, at the last size"""
    curves: int = 4
    """loss curves of each, from weights 0.1 % apart"""
    output: Path | None = None
    """JSON file to write"""


# ------------------------------------------------------------------------------ the two steps

Step = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # batch, rate → loss


class Reference:
    """The plain step: float32 (N, 3, H, W) on the host, labels, learning rate → loss."""

    def __init__(self, num_classes: int, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        self.model = torchvision.models.resnet50(num_classes=num_classes).to(device).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, 0.9, weight_decay=1e-4)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def __call__(self, images: torch.Tensor, labels: torch.Tensor, rate: float) -> torch.Tensor:
        """One step; its mean loss, on the device."""
        self.optimizer.param_groups[0]["lr"] = rate
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        with engine.autocast(self.device, self.precision):
            loss = torch.nn.functional.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss.detach()


def host_batch(px: int, config: Config, plain: bool) -> data.Batch:
    """A batch of noise as the reference takes it, or as ours does; page-locked for a GPU."""
    random = torch.Generator().manual_seed(0)
    shape = (config.batch_size, px, px, 3)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
    labels = torch.randint(0, 1000, (config.batch_size,), generator=random)
    images = as_floats(images) if plain else images
    return (
        (images.pin_memory(), labels.pin_memory())
        if torch.cuda.is_available()
        else (
            images,
            labels,
        )
    )


def as_floats(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, H, W, 3) → float32 (N, 3, H, W), as torchvision's ToTensor and Normalize do it."""
    floats = images.permute(0, 3, 1, 2).float().div(255).contiguous()
    return torchvision.transforms.functional.normalize(floats, MEAN, STD)


def block(
    step: Step, batches: Iterator[data.Batch], steps: int, device: torch.device
) -> tuple[float, float]:
    """Seconds of `steps` steps, and of the one before them, waiting for the device at both ends."""
    started = time.monotonic()
    for images, labels in itertools.islice(batches, 1):
        step(images, labels, 1e-3).item()
    warm = time.monotonic()
    for images, labels in itertools.islice(batches, steps):
        loss = step(images, labels, 1e-3)
    loss.item()
    return time.monotonic() - warm, warm - started


def keep_freed_memory(ours: bool) -> None:
    """The allocator as the trainer has it, or as glibc's adapts to blocks of many megabytes."""
    if ours:
        utils.keep_freed_memory()
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(utils.M_MMAP_MAX, 65536)
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its highest
        mallopt(utils.M_TRIM_THRESHOLD, 64 << 20)  # twice that


# ------------------------------------------------------------------------------ measurements


def probe(plain: bool, px: int, config: Config) -> dict[str, float]:
    """Three steps in this fresh process: seconds to the end of the first, peak memory in bytes."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        batch = host_batch(px, config, plain)
        started = time.monotonic()
        if plain:
            device = engine.choose_device(config)
            step: Step = Reference(1000, device, engine.choose_precision(config, device))
            batches = itertools.repeat(batch)
        else:
            run = engine.new_run(config, 1000)
            run.model.train()
            step, device = ours(run), run.device
            batches = data.to_device(itertools.repeat(batch), device)
        step(*next(batches), 1e-3).item()
        first_step_s = time.monotonic() - started
        block(step, batches, 1, device)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
    return {"first_step_s": round(first_step_s, 2), "peak_bytes": peak_bytes}


def ours(run: engine.Run) -> Step:
    """engine.train_step of a run."""
    return lambda images, labels, rate: engine.train_step(run, images, labels, rate)


def peak_flops(run: engine.Run) -> tuple[float, str]:
    """The most arithmetic that a large product of matrices reaches in the step's precision."""
    side = 8192 if run.device.type == "cuda" else 4096
    factor = torch.randn(side, side, device=run.device).to(engine.DTYPES[run.precision])
    seconds = []
    before = torch.get_float32_matmul_precision()
    if run.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as cuDNN's convolutions of fp32 have it
    for _ in range(5):
        started = time.monotonic()
        product = factor @ factor
        product[0, 0].item()  # waits for the device
        seconds.append(time.monotonic() - started)
    torch.set_float32_matmul_precision(before)
    measured_by = f"the fastest of {len(seconds)} products {side} x {side} in {run.precision}"
    return 2 * side**3 / min(seconds), measured_by


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Median, least and largest."""
    parts = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in parts.items()}


def measure_size(
    px: int, options: BenchmarkOptions, run: engine.Run, reference: Reference, config: Config
) -> dict[str, Any]:
    """All pairs of one size, and with a folder as many blocks that the loader feeds."""
    steps, images = options.block_steps, options.block_steps * config.batch_size
    synthetic = data.to_device(itertools.repeat(host_batch(px, config, plain=False)), run.device)
    contenders: dict[str, tuple[Step, Iterator[data.Batch]]] = {
        "reference": (reference, itertools.repeat(host_batch(px, config, plain=True))),
        "ours": (ours(run), synthetic),
    }
    with contextlib.ExitStack() as stack:
        if options.train_folder_name:
            real = whole_batches(dataclasses.replace(config, train_px=px), run.device)
            stack.enter_context(contextlib.closing(real))
            contenders["ours_with_loader"] = ours(run), real
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(options.pairs + 1):
            for name, (step, batches) in contenders.items():
                keep_freed_memory(name != "reference")
                if name == "ours_with_loader":
                    block(step, batches, 3, run.device)  # uses up what the loader had in stock
                block_s, _ = block(step, batches, steps, run.device)
                seconds[name].append(block_s)
                if name == "ours_with_loader":
                    time.sleep(1)  # the loader fills its stock, not beside what is timed next
    # The first round picks kernels, compiles, and takes memory.
    seconds = {name: values[1:] for name, values in seconds.items()}
    rates = {name: [images / value for value in values] for name, values in seconds.items()}
    result: dict[str, Any] = {
        "px": px,
        **{f"{name}_img_per_s": spread(values, 2) for name, values in rates.items()},
        "ratio": spread(quotients(rates["ours"], rates["reference"]), 3),
    }
    if "ours_with_loader" in rates:
        result["kept_with_loader"] = spread(quotients(rates["ours_with_loader"], rates["ours"]), 3)
    return result


def quotients(numerators: list[float], denominators: list[float]) -> list[float]:
    """The one over the other, pair by pair."""
    return [above / below for above, below in zip(numerators, denominators, strict=True)]


def whole_batches(config: Config, device: torch.device) -> Iterator[data.Batch]:
    """Batches of real pictures without end; an epoch's last one is left out if it is smaller."""
    images = image_files.open_image_set(config.train_folder_name, "train")
    epochs = (
        data.train_batches(images, config, epoch, pin=device.type == "cuda")
        for epoch in itertools.count()
    )
    for batch in data.to_device(itertools.chain.from_iterable(epochs), device):
        if len(batch[1]) == config.batch_size:
            yield batch


def loss_curves(px: int, options: BenchmarkOptions, config: Config) -> dict[str, Any]:
    """Ours and the reference, several times each on the same pictures, and how far they part.

    The first of each begin from the same weights, the others each from weights that are 0.1 % off
    those: a change far below what anyone would call another start. Where the two steps train alike,
    it says nothing of a curve whose it is, and the mean curves of ours and of the reference lie no
    further apart than those of other halves of all curves, with one of the first two in each.
    """
    classes = len(image_files.open_image_set(config.train_folder_name, "train").classes)
    run = engine.new_run(config, classes)
    run.model.train()
    start = copy.deepcopy(run.state())
    steps, window = options.loss_curve, min(SMOOTHED_STEPS, options.loss_curve)
    # The recipe's learning rate for this batch size, through a whole OneCycle.
    schedule = Config(epochs=1, max_lr=Config.max_lr * config.batch_size / Config.batch_size)
    seeds = itertools.count(1)

    def curve(step: Step, model: torch.nn.Module, plain: bool, moved: bool) -> list[float]:
        if moved:
            move_weights(model, next(seeds))
        losses = []
        real = whole_batches(dataclasses.replace(config, train_px=px), torch.device("cpu"))
        with contextlib.closing(real) as batches:
            for number, (images, labels) in enumerate(itertools.islice(batches, steps)):
                pictures = as_floats(images) if plain else images.to(run.device)
                rate = learning_rate(schedule, number, steps)
                losses.append(step(pictures, labels.to(run.device), rate))
        return [round(loss.item(), 4) for loss in losses]

    losses: dict[str, list[list[float]]] = {"ours": [], "reference": []}
    for number in range(options.curves):
        run.load(copy.deepcopy(start))  # whose momentum the run goes on with as its own
        losses["ours"].append(curve(ours(run), run.model.model, False, number > 0))
        reference = Reference(classes, run.device, run.precision)
        reference.model.load_state_dict(start["model"])
        losses["reference"].append(curve(reference, reference.model, True, number > 0))
        log.info("loss curves: %d of %d of each", number + 1, options.curves)
    smoothed = torch.tensor([*losses["ours"], *losses["reference"]]).unfold(1, window, 1).mean(2)

    def apart(half: tuple[int, ...]) -> torch.Tensor:
        others = [number for number in range(len(smoothed)) if number not in half]
        return (smoothed[list(half)].mean(0) - smoothed[others].mean(0)).abs()

    # Each way to halve them once: the half of ours' first curve, which comes first for ours itself.
    # The reference's first began from the same weights: no half may have both.
    others = (number for number in range(1, len(smoothed)) if number != options.curves)
    rest = itertools.combinations(others, options.curves - 1)
    parted = [apart((0, *half)) for half in rest]
    means = [difference.mean().item() for difference in parted]
    as_far = sum(mean >= means[0] for mean in means)
    return {
        "px": px,
        "batch_size": config.batch_size,
        "max_lr": schedule.max_lr,
        "smoothed_over_steps": window,
        "ours_from_reference": {
            "mean": round(means[0], 4),
            "largest": round(parted[0].max().item(), 4),
        },
        "halves": len(means),
        "halves_at_least_as_far_apart": as_far,
        "mean_of_halves": {
            "median": round(statistics.median(means), 4),
            "max": round(max(means), 4),
        },
        "last_smoothed": {
            "ours": [round(x, 4) for x in smoothed[: options.curves, -1].tolist()],
            "reference": [round(x, 4) for x in smoothed[options.curves :, -1].tolist()],
        },
        "losses": losses,
    }


@torch.no_grad()
def move_weights(model: torch.nn.Module, seed: int) -> None:
    """Change each weight by 0.1 % of it, more or less."""
    random = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        noise = torch.randn(weight.shape, generator=random)
        weight.mul_(1 + 1e-3 * noise.to(weight.device))


# ------------------------------------------------------------------------------ the report


def tell_size(size: dict[str, Any]) -> None:
    """One size in a few lines."""
    ratio, kept = size["ratio"], size.get("kept_with_loader")
    log.info(
        "%d px: ours over the reference: %.2f (%.2f to %.2f)",
        size["px"], ratio["median"], ratio["min"], ratio["max"],
    )  # fmt: skip
    for name in ("reference", "ours"):
        rate = size[f"{name}_img_per_s"]
        log.info(
            "  %-9s  %7.1f img/s (%.1f to %.1f)  %4.1f %% of the arithmetic peak  %5.2f GB  "
            "first step after %.1f s",
            name, rate["median"], rate["min"], rate["max"], 100 * size[f"{name}_share_of_peak"],
            size[name]["peak_bytes"] / 1e9, size[name]["first_step_s"],
        )  # fmt: skip
    if kept:
        log.info(
            "  ours keeps %.1f %% (%.1f to %.1f) of that with the loader",
            *(100 * kept[part] for part in ("median", "min", "max")),
        )


def tell_curves(curves: dict[str, Any]) -> None:
    """How far the loss curves part, and how that compares with other halves of them."""
    own, each = curves["ours_from_reference"], len(curves["losses"]["ours"])
    log.info(
        "loss over %d steps, smoothed over %d, mean of %d curves each: ours from the reference "
        "%.3f on average, %.3f at most; %d of the %d ways to halve all curves lie at least as far "
        "apart, the median of them %.3f on average, the furthest %.3f",
        len(curves["losses"]["ours"][0]), curves["smoothed_over_steps"], each,
        own["mean"], own["largest"], curves["halves_at_least_as_far_apart"], curves["halves"],
        curves["mean_of_halves"]["median"], curves["mean_of_halves"]["max"],
    )  # fmt: skip
    for name, values in curves["last_smoothed"].items():
        log.info("  %-9s  ends at %s", name, ", ".join(f"{value:.3f}" for value in values))


def main() -> None:
    """Probe, measure, print, write."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if min(options.px, default=0) < 32 or options.pairs < 1 or options.block_steps < 1:
        raise UserError("sizes must be 32 px or more, pairs and block_steps 1 or more")
    if options.loss_curve < 0 or (options.loss_curve and not options.train_folder_name):
        raise UserError("loss_curve needs 1 step or more, and pictures: --train-folder-name")
    if options.curves < 2:
        raise UserError("curves must be 2 or more: one alone does not tell noise from difference")
    config = Config(
        batch_size=options.batch_size or (448 if torch.cuda.is_available() else 64),
        train_folder_name=options.train_folder_name,
        precision=options.precision,
        compile=options.compile,
        workers=options.workers,
    )
    check_config(config)
    if options.train_folder_name:
        images = len(image_files.open_image_set(options.train_folder_name, "train"))
        if images < config.batch_size:
            raise UserError(
                f"batch_size is {config.batch_size}, but {options.train_folder_name} has {images} "
                "images: use a smaller --batch-size"
            )
    log.info("start-up and memory, in fresh processes")
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        probes = {
            px: {
                name: pool.submit(probe, name == "reference", px, config).result()
                for name in ("reference", "ours")
            }
            for px in options.px
        }
    run = engine.new_run(config, 1000)
    run.model.train()
    flops, measured_by = peak_flops(run)
    log.info("arithmetic peak: %.3g FLOP/s, %s", flops, measured_by)
    record: dict[str, Any] = {
        "settings": {
            "batch_size": config.batch_size,
            "pairs": options.pairs,
            "block_steps": options.block_steps,
            "compile": options.compile,
            "workers": options.workers,
            "threads": torch.get_num_threads(),
        },
        "hardware": preflight.describe_hardware(run.device, run.precision),
        "versions": {"torch": torch.__version__, "torchvision": torchvision.__version__},
        "peak_flops": flops,
        "peak_flops_measured_by": measured_by,
        "flop_per_image_at_224_px": FLOP_PER_IMAGE,
        "sizes": [],
    }

    def write() -> None:  # after each part: an interruption loses but the one under way
        if options.output:
            write_json(options.output, record)

    reference = Reference(1000, run.device, run.precision)
    for px in options.px:
        size = {**measure_size(px, options, run, reference, config), **probes[px]}
        for name in ("reference", "ours"):
            rate = size[f"{name}_img_per_s"]["median"]
            share = rate * FLOP_PER_IMAGE * (px / 224) ** 2 / flops
            size[f"{name}_share_of_peak"] = round(share, 4)
        record["sizes"].append(size)
        tell_size(size)
        write()
    if options.loss_curve:
        del reference, run  # their memory is needed
        record["loss_curve"] = loss_curves(options.px[-1], options, config)
        tell_curves(record["loss_curve"])
        write()


if __name__ == "__main__":
    run_stage(main)
