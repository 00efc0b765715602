"""Train ResNet-50 on a folder of images, from random weights to the last evaluation.

    nohup python3 trainer.py > train.log 2>&1 &       the reference recipe, on ImageNet-1k
    python3 trainer.py --recipe fast                  75.3 % for a tenth of the price: a target
    python3 trainer.py --recipe quickstart            the embedded digits, minutes on a CPU
    python3 trainer.py --dry-run                      the settings, the schedule, time and price
    torchrun --standalone --nproc_per_node=4 trainer.py      the same run on four GPUs

The reference recipe's target is the published run's 75.32 % top-1 and 92.59 % top-5 in 50 epochs
on one A10G for $26.41; this code has not been run on ImageNet yet.

Reads a folder of training and one of validation images. Writes into runs/<name>/: config.json,
metrics.jsonl, train.log, checkpoints/, best.pt and last.pt (weights under torchvision's names) and
result.json; sessions.jsonl tells what each start cost. The same command again goes on where the run
was. Exit code 75 says that a signal, or EC2's notice that it takes the instance, stopped it with
everything saved, 76 that its budget is spent.
"""

import contextlib
import copy
import dataclasses
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import tqdm

import augment
import checkpoint
import data
import distributed
import image_files
import interruption
import mirror
import preflight
import sessions
from model import ResNet50Wrapper, load_weights
from muon import Muon
from utils import (
    EXIT_BUDGET,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Config,
    ConfigOptions,
    UserError,
    check_config,
    format_duration,
    keep_freed_memory,
    learning_rate,
    log,
    parse_options,
    read_json,
    run_folder,
    run_stage,
    save_config,
    start_log,
    steps_per_epoch,
    total_epochs,
    train_px,
    write_atomically,
    write_json,
    write_metrics,
)

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Steps in a row that fp16's loss scaling may skip: it halves its scale at each, and a sound run
# needs a few at its beginning, then one now and then. After 166 the scale would be 0 for good.
SKIPS_ALLOWED = 10


@dataclasses.dataclass(frozen=True)
class TrainerOptions:
    """What the trainer is asked to do."""

    config: ConfigOptions
    dry_run: bool = False
    """train nothing: print settings, schedule, what was checked (GPU, disks, mirror, clock, budget)
    and an estimate of time, memory and price; exit code 2 if there is a problem"""


class Average:
    """The exponential moving average of a model's weights and BatchNorm statistics.

    `half_life` is in steps. It begins as the model, and looks back a tenth of the way at first.
    """

    def __init__(self, model: ResNet50Wrapper, half_life: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay = 0.5 ** (1 / half_life)
        pairs = zip(self.model.state_dict().values(), model.state_dict().values(), strict=True)
        self.pairs = [pair for pair in pairs if pair[0].is_floating_point()]

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take in the model as it is after optimizer step `step`, counted from 1."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        averages, values = zip(*self.pairs, strict=True)
        torch._foreach_lerp_(averages, values, weight)


@dataclasses.dataclass
class Run:
    """Where a run stands: beside its settings, all that its future depends on."""

    model: ResNet50Wrapper
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    precision: str  # of the forward pass: fp16, bf16 or fp32
    totals: dict[str, torch.Tensor]  # sums over the epoch under way, on the device
    training_model: torch.nn.Module  # the model, or what shares its gradients between processes
    average: Average | None = None  # of the model, which is validated and kept in its place
    label_smoothing: float = 0.0
    micro_batch_size: int = 0  # most images that are computed at once; 0: all of a batch
    # The training model through torch.compile, for batches of this size; None, 0: never.
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
    compiled_batch_size: int = 0
    step: int = 0  # optimizer steps since the beginning
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # a row an epoch
    epoch_s: float = 0.0  # seconds of training in the epoch under way
    elapsed_s: float = 0.0  # seconds of training and validation in all
    spent_usd: float = 0.0  # price of all starts so far
    # The trouble on its way from a GPU, and what tells that it has arrived.
    arriving: tuple[torch.Tensor, torch.cuda.Event] | None = None

    @property
    def kept(self) -> ResNet50Wrapper:
        """What is validated and kept of it: the average, if there is one."""
        return self.average.model if self.average else self.model

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it, the same on any number of processes; all have to ask."""
        return {
            "model": self.model.model.state_dict(),
            "average": self.average and self.average.model.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "totals": totals_of_all(self.totals),
            "step": self.step,
            "history": self.history,
            "epoch_s": self.epoch_s,
            "elapsed_s": self.elapsed_s,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was saved."""
        self.model.model.load_state_dict(state["model"])
        if self.average:
            self.average.model.model.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        if state["scaler"] and self.scaler.is_enabled():  # it is off in fp32 and bf16
            self.scaler.load_state_dict(state["scaler"])
        for name, total in state["totals"].items():
            # What was counted is one process's to keep, or it would be counted again by each.
            if distributed.is_main() or name == "trouble":
                self.totals[name].copy_(total)
        for name in ("step", "history", "epoch_s", "elapsed_s"):
            setattr(self, name, state[name])


class Interrupted(Exception):
    """The run was asked to stop, and the step under way has ended."""


# ------------------------------------------------------------------------------ the step


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The arithmetic of a forward pass: fp16, bf16 or fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def train_step(
    run: Run,
    images: torch.Tensor,
    labels: torch.Tensor,
    learning_rate: float,
    batch_size: int | None = None,
    mix: augment.Mix | None = None,
) -> torch.Tensor:
    """One optimizer step on a batch on the device: images uint8 (N, H, W, 3), labels int64 (N,).

    Where several processes share a batch, these are this one's of its `batch_size` images. The
    gradient is that of the mean loss over the whole batch, however it is divided, after it was
    mixed as `mix` says. Returns the mean loss of these images, a scalar on the device, and adds
    loss, counts and trouble to run.totals, both without waiting for the device.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    run.optimizer.zero_grad(set_to_none=True)
    batch_size = batch_size or len(labels)
    parts = distributed.micro_batches(batch_size, run.micro_batch_size)
    loss = torch.zeros((), device=run.device)
    images = data.normalize(images, DTYPES[run.precision])
    partners = labels if mix is None else augment.mix_pairs(images, labels, mix)
    whole = images, labels, partners
    divided = zip(*(tensor.tensor_split(parts) for tensor in whole), strict=True)
    for part, (some, their_labels, partners_labels) in enumerate(divided, start=1):
        # A smaller last batch is not worth a compilation of its own.
        model = run.compiled if len(some) == run.compiled_batch_size else run.training_model
        with distributed.adds_up(run.training_model, part == parts):
            with autocast(run.device, run.precision):
                logits = model(some).float()
            mean = mean_loss(run, logits, their_labels, partners_labels, mix)
            # DistributedDataParallel takes the mean over the processes.
            share = len(some) * distributed.processes() / batch_size
            run.scaler.scale(mean * share).backward()
        loss += mean.detach() * (len(some) / len(labels))
        right = their_labels if mix is None or mix.own_share >= 0.5 else partners_labels
        add_to_totals(run.totals, mean.detach(), logits.detach(), right)
    scale = run.scaler.scale(torch.ones_like(loss))  # 1 where there is no scaling
    run.scaler.step(run.optimizer)
    run.scaler.update()
    skipped = run.scaler.scale(torch.ones_like(loss)) < scale
    run.step += 1
    if run.average:
        run.average.follow(run.step)
    add_trouble(run.totals["trouble"], loss, skipped)
    return loss


def mean_loss(
    run: Run,
    logits: torch.Tensor,
    labels: torch.Tensor,
    partners: torch.Tensor,
    mix: augment.Mix | None,
) -> torch.Tensor:
    """Cross entropy of logits (N, C), where images were mixed with labels in the same shares."""
    smoothing = run.label_smoothing
    own = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
    if mix is None:
        return own
    others = torch.nn.functional.cross_entropy(logits, partners, label_smoothing=smoothing)
    return mix.own_share * own + (1 - mix.own_share) * others


def new_totals(device: torch.device) -> dict[str, torch.Tensor]:
    """Sums over images: the loss; right answers, right among the first five, and all images.

    Beside them the trouble: skipped steps, those among them since the last good one, and steps
    whose loss was not a number.
    """
    return {
        "loss": torch.zeros((), dtype=torch.float64, device=device),
        "counts": torch.zeros(3, dtype=torch.int64, device=device),
        "trouble": torch.zeros(3, dtype=torch.int64, device=device),
    }


def add_to_totals(
    totals: dict[str, torch.Tensor], loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
) -> None:
    """Count a batch: its mean loss, and where the right class stands among its logits (N, C)."""
    ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    totals["loss"] += loss.double() * len(labels)
    totals["counts"][0] += ranked[:, 0].sum()
    totals["counts"][1] += ranked.sum()
    totals["counts"][2] += len(labels)


def add_trouble(trouble: torch.Tensor, loss: torch.Tensor, skipped: torch.Tensor) -> None:
    """Count a step that was skipped, and a loss that is not a number; all on the device."""
    trouble[0] += skipped
    trouble[1] = torch.where(skipped, trouble[1] + 1, 0)
    trouble[2] += ~loss.isfinite()


def trouble_seen(run: Run) -> list[int]:
    """The trouble so far; on a GPU that of some steps ago, for which nothing has to wait."""
    if run.device.type != "cuda":
        return run.totals["trouble"].tolist()
    if run.arriving is None:
        copied = run.totals["trouble"].to("cpu", non_blocking=True)
        run.arriving = copied, torch.cuda.current_stream(run.device).record_event()
    copied, arrived = run.arriving
    if not arrived.query():
        return [0, 0, 0]
    run.arriving = None
    return copied.tolist()


def refuse_trouble(run: Run, trouble: list[int]) -> None:
    """Stop a run whose loss is not a number any more, or whose steps are skipped one after another.

    A loss that is not a number ends a run at once, for BatchNorm's statistics are spoilt by then.
    Going back to the last checkpoint by itself would not help: the same steps would follow. Raises
    UserError.
    """
    _, skipped_in_a_row, not_numbers = trouble
    if not_numbers:
        what = "the loss is not a number any more"
    elif skipped_in_a_row >= SKIPS_ALLOWED:
        what = f"fp16's loss scaling skipped {skipped_in_a_row} steps in a row"
    else:
        return
    raise UserError(
        f"{what} by step {run.step}, in epoch {len(run.history) + 1}: try a lower --max-lr or "
        "another --precision under another --name; the last checkpoint is kept, and the same "
        "command goes on from there, to the same end unless the hardware had erred",
        EXIT_FAILED,
    )


def totals_of_all(totals: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The totals of all processes together; all skip the same steps."""
    summed = {name: distributed.summed(totals[name]) for name in ("loss", "counts")}
    return {**summed, "trouble": distributed.largest(totals["trouble"])}


def read_totals(totals: dict[str, torch.Tensor], prefix: str) -> dict[str, Any]:
    """The totals as part of a metrics row: mean loss, accuracy in percent, and the counts."""
    correct1, correct5, images = totals["counts"].tolist()  # waits for the device
    return {
        f"{prefix}_loss": totals["loss"].item() / images,
        f"{prefix}_top1": 100 * correct1 / images,
        f"{prefix}_top5": 100 * correct5 / images,
        f"{prefix}_correct1": correct1,
        f"{prefix}_correct5": correct5,
        f"{prefix}_images": images,
    }


def logits_of(
    model: Callable[[torch.Tensor], torch.Tensor],
    batches: Iterator[data.Batch],
    device: torch.device,
    precision: str,
    heed: distributed.Heed,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Logits, float32 (N, C), and labels of each batch, both on the device.

    The model is given the normalised images, (N, 3, H, W); calls `heed` before each batch.
    """
    with contextlib.closing(data.to_device(batches, device)) as on_device:
        for images, labels in distributed.heeded(on_device, heed):
            if not len(labels):  # of a batch with fewer images than processes
                continue
            with torch.inference_mode(), autocast(device, precision):
                logits = model(data.normalize(images, DTYPES[precision])).float()
            yield logits, labels


def evaluate(
    model: ResNet50Wrapper,
    batches: Iterator[data.Batch],
    device: torch.device,
    precision: str,
    heed: distributed.Heed,
) -> dict[str, Any]:
    """val_loss, val_top1 and val_top5 with their counts; calls `heed` before each batch."""
    model.eval()
    totals = new_totals(device)
    for logits, labels in logits_of(model, batches, device, precision, heed):
        add_to_totals(totals, torch.nn.functional.cross_entropy(logits, labels), logits, labels)
    return read_totals(totals_of_all(totals), "val")


# ------------------------------------------------------------------------------ an epoch


def train_epoch(
    run: Run, config: Config, train_set: image_files.ImageSet, heed: distributed.Heed
) -> None:
    """Train what is left of the epoch under way; calls `heed` before and after each step."""
    epoch, steps = len(run.history), steps_per_epoch(config, train_set)
    first_step = run.step - epoch * steps
    batches = data.train_batches(train_set, config, epoch, first_step, run.device.type == "cuda")
    run.model.train()
    clock = time.monotonic()
    with (
        Progress(run, config, train_set) as progress,
        contextlib.closing(data.to_device(batches, run.device)) as batches,
    ):
        for images, labels in distributed.heeded(batches, heed):
            batch = run.step - epoch * steps
            batch_size = min(config.batch_size, len(train_set) - batch * config.batch_size)
            rate = learning_rate(config, run.step, steps)
            mix = augment.draw_mix(config, epoch, batch, images.shape[1])
            train_step(run, images, labels, rate, batch_size, mix)
            now = time.monotonic()
            run.epoch_s += now - clock
            run.elapsed_s += now - clock
            clock = now
            progress.tell(now)
    if run.device.type == "cuda":
        torch.cuda.synchronize()  # the steps still under way belong to this epoch's time
        run.epoch_s += time.monotonic() - clock
        run.elapsed_s += time.monotonic() - clock


def train_epochs(
    run: Run,
    config: Config,
    folder: Path,
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
    save: Callable[[], None],
    heed: distributed.Heed,
) -> None:
    """Train and validate the epochs that are left, each saved at its end."""
    while len(run.history) < total_epochs(config):
        train_epoch(run, config, train_set, heed)
        finish_epoch(run, config, folder, val_set, heed)
        save()
        distributed.in_main(write_metrics, folder / "metrics.jsonl", run.history)
        if config.tensorboard:
            distributed.in_main(write_tensorboard, folder, run.history)


class Progress:
    """Says every few seconds how an epoch is going: a bar on a terminal, else a line in the log."""

    def __init__(self, run: Run, config: Config, train_set: image_files.ImageSet) -> None:
        self.run, self.config, self.train_set = run, config, train_set
        self.steps = steps_per_epoch(config, train_set)
        self.epoch = len(run.history)
        self.told_at, self.told_step = time.monotonic(), run.step

    def __enter__(self) -> "Progress":
        done = self.run.step - self.epoch * self.steps
        title = f"epoch {self.epoch + 1}/{total_epochs(self.config)}"
        hidden = not sys.stdout.isatty() or not distributed.is_main()
        self.bar = tqdm.tqdm(
            total=self.steps, initial=done, desc=title, disable=hidden, file=sys.stdout, leave=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def tell(self, now: float) -> None:
        """Write a line if one is due; the only place in an epoch that waits for the device.

        Loss and top-1 are those of the main process's images, for which it waits for no other.
        """
        run, config = self.run, self.config
        self.bar.update()
        if now - self.told_at < config.log_interval_s or not distributed.is_main():
            return
        totals = read_totals(run.totals, "train")
        step_s = (now - self.told_at) / (run.step - self.told_step)
        self.told_at, self.told_step = now, run.step
        val_s = run.history[-1]["val_s"] if run.history else 0.0
        left_epochs = total_epochs(config) - self.epoch
        left_s = steps_left(config, self.epoch, run.step, self.steps) * step_s
        left_s += left_epochs * val_s
        parts = [
            f"loss {totals['train_loss']:.2f}",
            f"top-1 {totals['train_top1']:.1f} %",
            f"lr {learning_rate(config, run.step, self.steps):.3g}",
            f"{config.batch_size / step_s:.0f} img/s",
            f"ETA {format_duration(left_s)}",
        ]
        if config.price_per_hour:
            whole = run.spent_usd + config.price_per_hour * left_s / 3600
            parts.append(f"${run.spent_usd:.2f} of ${whole:.2f}")
        self.bar.set_postfix_str("  ".join(parts))
        where = f"epoch {self.epoch + 1}/{total_epochs(config)}"
        log.debug(
            "%s  step %d/%d  %s",
            where,
            run.step - self.epoch * self.steps,
            self.steps,
            "  ".join(parts),
        )


def finish_epoch(
    run: Run,
    config: Config,
    folder: Path,
    val_set: image_files.ImageSet,
    heed: distributed.Heed,
) -> None:
    """Validate, add the epoch's row to the history and the screen, and keep its weights."""
    totals = totals_of_all(run.totals)
    train, trouble = read_totals(totals, "train"), totals["trouble"].tolist()
    with distributed.agreed():
        refuse_trouble(run, trouble)
    distributed.copy_from_main(run.model.buffers())
    if run.average:
        distributed.copy_from_main(run.average.model.buffers())
    started = time.monotonic()
    val_batches = data.val_batches(val_set, config, pin=run.device.type == "cuda")
    run.model.eval()  # an error of memory asks whether it was in training
    val = evaluate(run.kept, val_batches, run.device, run.precision, heed)
    val_s = time.monotonic() - started
    steps = run.step // (len(run.history) + 1)
    row = {
        "epoch": len(run.history) + 1,
        **train,
        **val,
        "learning_rate": learning_rate(config, run.step, steps),
        "train_px": train_px(config, len(run.history)),
        "skipped_steps": trouble[0],
        "train_s": run.epoch_s,
        "val_s": val_s,
        "img_per_s": train["train_images"] / run.epoch_s,
    }
    improved = row["val_top1"] > max((row["val_top1"] for row in run.history), default=-1.0)
    weights = checkpoint.encode(run.kept.model.state_dict())
    for name in ("last.pt", "best.pt") if improved else ("last.pt",):
        distributed.in_main(write_atomically, folder / name, weights)
    run.history.append(row)
    run.elapsed_s += val_s
    run.epoch_s = 0.0
    for total in run.totals.values():
        total.zero_()
    run.totals["trouble"][1] = trouble[1]  # a row of skipped steps may go on in the next epoch
    log.info(
        "epoch %d/%d  train loss %.4f top-1 %.2f %% top-5 %.2f %%  val loss %.4f top-1 %.2f %% "
        "top-5 %.2f %%  lr %.7f  %.0f s + %.0f s  %.0f img/s%s%s",
        row["epoch"], total_epochs(config), row["train_loss"], row["train_top1"],
        row["train_top5"], row["val_loss"], row["val_top1"], row["val_top5"],
        row["learning_rate"], row["train_s"], val_s, row["img_per_s"], "  best" * improved,
        f"  {trouble[0]} steps skipped by fp16's loss scaling" * bool(trouble[0]),
    )  # fmt: skip


# ------------------------------------------------------------------------------ before training


def open_images(
    config: Config, state: dict[str, Any] | None
) -> tuple[image_files.ImageSet, image_files.ImageSet, list[str]]:
    """As image_files.open_images; the main process checks the files for all others."""
    with distributed.agreed():
        known = state and state["images"]["skipped"]
        opened = distributed.in_main(image_files.open_images, config, known)
    skipped = distributed.from_main(lambda: opened[2])
    with distributed.agreed():
        return opened if distributed.is_main() else image_files.open_images(config, skipped)


def steps_left(config: Config, epoch: int, step: int, steps_per_epoch: int) -> float:
    """Steps from `step`, in `epoch`, to the end of the run, as so many of that epoch's size.

    A step takes as long as it has pixels, so that later, larger ones count for more than one.
    """
    px = train_px(config, epoch)
    later = range(epoch + 1, total_epochs(config))
    shares = sum((train_px(config, other) / px) ** 2 for other in later)
    return (epoch + 1) * steps_per_epoch - step + shares * steps_per_epoch


def take_max_lr(config: Config, folder: Path, state: dict[str, Any] | None) -> Config:
    """The settings with the LR finder's max_lr, where that was asked for.

    A run that has begun keeps the one that it began with, whatever was found since.
    """
    if not config.max_lr_from_finder:
        return config
    if state is not None:
        return dataclasses.replace(config, max_lr=state["config"]["max_lr"])
    path = folder / "lr_finder.json"
    found = read_json(path)
    rate = found.get("suggested_max_lr") if isinstance(found, dict) else None
    if not isinstance(rate, int | float):
        what = f"no {path}" if found is None else f"{path} has no suggested_max_lr"
        raise UserError(f"{what}: run python3 lr_finder.py first, with the settings of this run")
    config = dataclasses.replace(config, max_lr=rate)
    check_config(config)
    return config


def choose_device(config: Config) -> torch.device:
    """The device that the settings ask for; raises UserError if it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device is cuda, but PyTorch sees no GPU: check nvidia-smi, or --device cpu"
        )
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True  # picks the fastest kernels for the sizes it meets
    return distributed.choose_gpu()


def choose_precision(config: Config, device: torch.device) -> str:
    """fp16, bf16 or fp32: what was asked for, or what the device is fast at."""
    if config.precision == "fp16" and device.type == "cpu":
        raise UserError("precision is fp16, which needs a GPU: use bf16, fp32 or auto on a CPU")
    if config.precision != "auto":
        return config.precision
    if device.type == "cuda":
        return "fp16"
    # Other CPUs emulate bf16, more slowly than they compute in fp32.
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return "bf16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"


def new_run(config: Config, num_classes: int) -> Run:
    """A run at its beginning; the first weights depend on the seed alone."""
    device = choose_device(config)
    precision = choose_precision(config, device)
    keep_freed_memory()
    torch.manual_seed(config.seed)
    model = ResNet50Wrapper(num_classes, config.zero_init_residual)
    model = model.to(device, memory_format=torch.channels_last)
    if config.sync_batchnorm:
        distributed.synchronise_batchnorm(model, device)
    optimizer = new_optimizer(model, config, precision)
    # The fused step may skip its first call, when fp16 overflows, and would leave the momentum as
    # it found the memory.
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    training_model = distributed.data_parallel(model, device)
    totals, micro = new_totals(device), config.micro_batch_size
    run = Run(model, optimizer, scaler, device, precision, totals, training_model)
    run.micro_batch_size, run.label_smoothing = micro, config.label_smoothing
    if config.average_steps:
        run.average = Average(model, config.average_steps)
    if config.compile:
        run.compiled = compiled(training_model, device)
        share = len(distributed.share(np.arange(config.batch_size)))
        run.compiled_batch_size = -(-share // distributed.micro_batches(config.batch_size, micro))
    return run


def new_optimizer(model: ResNet50Wrapper, config: Config, precision: str) -> torch.optim.Optimizer:
    """SGD, or what orthogonalises its steps, with the weights that are treated alike together."""
    is_muon = config.optimizer == "muon"
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        is_hidden = parameter.ndim == 4 and parameter.shape[1] > 3
        decays = parameter.ndim > 1 or config.decay_norm_and_bias
        groups[is_muon and is_hidden, decays].append(parameter)
    described = [
        {
            "params": parameters,
            "momentum": 0.0 if is_orthogonal else config.momentum,
            "orthogonal_momentum": config.momentum if is_orthogonal else 0.0,
            "weight_decay": config.weight_decay if decays else 0.0,
            "nesterov": is_muon and not is_orthogonal,
        }
        for (is_orthogonal, decays), parameters in groups.items()
    ]
    # Fused: one pass over the weights instead of four.
    if not is_muon:
        return torch.optim.SGD(described, config.max_lr, fused=True)
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return Muon(described, dtype, lr=config.max_lr, fused=True)


def compiled(
    model: torch.nn.Module, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The model through torch.compile, which shares its weights and leaves their names alone.

    Compiled at the first batch of every size. Raises UserError where nothing can be compiled.
    """
    # One for each size of the pictures, where the default would give up at eight.
    torch._dynamo.config.recompile_limit = 64
    try:
        torch.compile(torch.sin)(torch.ones(8, device=device))  # needs what the model will need
    except (RuntimeError, subprocess.SubprocessError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise UserError(
            f"torch.compile does not work here ({reason}): install a C++ compiler and Python's "
            "headers (apt-get install g++ python3-dev), or leave out --compile"
        ) from None
    return torch.compile(model, dynamic=False)


def resume(run: Run, state: dict[str, Any], folder: Path) -> None:
    """Take a run to where its checkpoint was saved."""
    run.load(state)
    distributed.in_main(write_metrics, folder / "metrics.jsonl", run.history)
    log.info("resumed after %d epochs and %d steps", len(run.history), run.step)
    if state["precision"] != run.precision:
        log.warning("it began in %s: its results will differ a little", state["precision"])


def dry_run(
    run: Run,
    config: Config,
    folder: Path,
    state: dict[str, Any] | None,
    images: dict[str, Any],
    train_set: image_files.ImageSet,
    val_set: image_files.ImageSet,
) -> NoReturn:
    """Check and estimate all that can be before training, and end with the exit code for it."""
    steps = steps_per_epoch(config, train_set)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        mix = augment.draw_mix(config, 0, run.step, images.shape[1])
        train_step(run, images, labels, learning_rate(config, run.step, steps), mix=mix).item()

    run.model.train()
    with contextlib.suppress(torch.OutOfMemoryError):  # and with it the memory of the failed step
        sys.exit(
            preflight.dry_run(config, folder, run.device, state, images, train_set, val_set, step)
        )
    raise UserError(advise_batch_size(run, config, "batch_size"))


# ------------------------------------------------------------------------------ too little memory


def advise_batch_size(run: Run, config: Config, setting: str) -> str:
    """What to do about a setting of a batch, for which the GPU's memory is too small.

    Tries ever smaller batches, each an eighth smaller, with this run, which is over.
    """
    size = asked = getattr(config, setting)
    # The last evaluation is in fp32.
    precision = "fp32" if len(run.history) == total_epochs(config) else run.precision
    px = config.val_px if setting == "val_batch_size" else config.train_px
    while size > 2:
        size = max(2, size * 7 // 8)
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            images = torch.zeros(size, px, px, 3, dtype=torch.uint8, device=run.device)
            labels = torch.zeros(size, dtype=torch.int64, device=run.device)
            if setting != "val_batch_size":
                train_step(run, images, labels, 0.0).item()
            else:
                evaluate(run.model, iter([(images, labels)]), run.device, precision, bool)
        except torch.OutOfMemoryError:
            continue
        advice = f"--{setting.replace('_', '-')} {size} would, as was tried just now"
        if setting == "batch_size":
            advice += f", with --max-lr {config.max_lr * size / asked:.3g} to go with it"
            advice += ", under another --name" * bool(run.history)
        break
    else:
        advice = "no smaller one would either: see what else uses the memory"
    return f"{setting} is {asked}: it does not fit into the GPU's memory at {px} px; {advice}"


# ------------------------------------------------------------------------------ after training


def report(
    run: Run,
    config: Config,
    folder: Path,
    val_set: image_files.ImageSet,
    heed: distributed.Heed,
) -> None:
    """Evaluate the best weights once more, as read from the disk and in fp32; write result.json."""

    def load() -> ResNet50Wrapper:
        try:
            return load_weights(folder / "best.pt", len(val_set.classes))
        except (ValueError, FileNotFoundError) as error:
            raise UserError(f"{error}: the last evaluation needs it", EXIT_FAILED) from None

    model = distributed.from_main(load)
    model = model.to(run.device, memory_format=torch.channels_last)
    val_batches = data.val_batches(val_set, config, pin=run.device.type == "cuda")
    torch.backends.cudnn.allow_tf32 = False  # which a GPU would otherwise take for fp32
    val = evaluate(model, val_batches, run.device, "fp32", heed)
    best = max(run.history, key=lambda row: row["val_top1"])  # the first of equals, as saved
    result = {
        "epochs": total_epochs(config),
        "weights": "best.pt",
        "epoch": best["epoch"],
        **val,
        "protocol": f"shorter side to {config.val_resize_px} px, centre crop {config.val_px} px, "
        "one view, fp32",
        "elapsed_s": run.elapsed_s,
        "price_usd": run.spent_usd,
    }
    distributed.in_main(write_json, folder / "result.json", result)
    log.info(
        "finished in %s%s: best.pt, of epoch %d, has loss %.4f, top-1 %.2f %% and top-5 %.2f %% on "
        "%s validation images",
        format_duration(run.elapsed_s), f" for ${run.spent_usd:.2f}" * bool(run.spent_usd),
        best["epoch"],
        val["val_loss"], val["val_top1"], val["val_top5"], f"{val['val_images']:,}",
    )  # fmt: skip


def write_tensorboard(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write the whole history as TensorBoard's scalars: one file, however often it was resumed."""
    from torch.utils.tensorboard import SummaryWriter  # slow to import, and rarely asked for

    shutil.rmtree(folder / "tensorboard", ignore_errors=True)
    with SummaryWriter(folder / "tensorboard") as writer:
        for row in history:
            for key, value in row.items():
                writer.add_scalar(key.replace("_", "/", 1), value, row["epoch"])


def say_interrupted(
    run: Run, config: Config, requests: interruption.Requests, session: sessions.Session
) -> int:
    """Say and note why the run stops, and that it is saved; returns the exit code."""
    epoch = min(len(run.history) + 1, total_epochs(config))
    saved = f"in epoch {epoch}, everything is saved after step {run.step}"
    if not requests.stop:
        session.ending = sessions.BUDGET
        log.info(
            "the budget of $%.2f is spent, with $%.2f, %s: a higher --budget-usd goes on",
            config.budget_usd, run.spent_usd, saved,
        )  # fmt: skip
        return EXIT_BUDGET
    session.ending = sessions.EC2_NOTICE if requests.notice else sessions.SIGNAL
    interruption.tell_saved(requests)
    log.info("interrupted %s: the same command goes on", saved)
    return EXIT_INTERRUPTED


# ------------------------------------------------------------------------------ the stage


def over(config: Config, folder: Path, state: dict[str, Any] | None) -> int | None:
    """The exit code of a run that may not go on, finished or out of budget, and says so; or None.

    Raises UserError for settings that differ from its checkpoint's.
    """
    if state is not None:
        checkpoint.check_settings(state, config)
        finished = preflight.tell_finished(folder, config, state)
        if finished:
            log.info("%s", finished)
            return 0
    return EXIT_BUDGET if sessions.budget_is_spent(folder, config) else None


def main() -> None:
    """Train a run to its end, from wherever it stands."""
    requests = interruption.note_signals(nothing_to_save=True)
    distributed.start()
    in_main, from_main = distributed.in_main, distributed.from_main
    with distributed.agreed():
        options = parse_options(TrainerOptions, __doc__)
        start_log(None)
        check_config(options.config)
        distributed.refuse_several("--dry-run", options.dry_run)
        choose_precision(options.config, choose_device(options.config))
        folder = run_folder(options.config.runs_folder, options.config.name)
        copies = in_main(mirror.start, "" if options.dry_run else options.config.mirror, folder)

    state = from_main(checkpoint.load_latest, folder / "checkpoints", tidy=not options.dry_run)
    config = from_main(take_max_lr, options.config, folder, state)
    if state is not None:
        # Settings that are younger than the checkpoint do at their defaults what was done before.
        state["config"] = {**dataclasses.asdict(Config()), **state["config"]}
    exit_code = None if options.dry_run else from_main(over, config, folder, state)
    if exit_code is not None:
        copies.finish(mirror.COMPLETED_S)
        distributed.wait_for_all()
        sys.exit(exit_code)
    train_set, val_set, skipped = open_images(config, state)
    images = {"train": train_set.fingerprint(), "val": val_set.fingerprint(), "skipped": skipped}
    with distributed.agreed():
        if state is not None and not options.dry_run:
            checkpoint.check_images(state, images)
        distributed.check_shares(config, len(train_set))
        run = new_run(config, len(train_set.classes))
    distributed.check_same(images=images, precision=run.precision)
    hardware = preflight.describe_hardware(run.device, run.precision)
    if options.dry_run:
        preflight.describe_run(config, hardware, train_set, val_set, skipped)
        dry_run(run, config, folder, state, images, train_set, val_set)

    with distributed.agreed():
        preflight.check_open_files(config.workers)
        sizes = preflight.WEIGHTS_BYTES, preflight.checkpoint_bytes(config)
        in_main(checkpoint.prepare_folder, folder, *sizes)
        lock = in_main(checkpoint.lock, folder)
        checkpoint.check_newest(folder / "checkpoints", state)  # nor may another machine's be newer
        in_main(start_log, folder / "train.log")
        in_main(save_config, folder, config, train_set.classes, hardware)
    preflight.describe_run(config, hardware, train_set, val_set, skipped)
    if state is not None:
        resume(run, state, folder)

    distributed.once_a_machine(interruption.watch_ec2, requests)
    stands = run.step, len(run.history)
    session = in_main(sessions.Session, folder, config.price_per_hour, hardware, *stands)
    run.spent_usd = session.beat(*stands) or 0.0
    copies.copy()  # what the last start did not come to copy
    saver = in_main(checkpoint.BackgroundSaver, folder / "checkpoints", copies.copy)
    identity = {"config": dataclasses.asdict(config), "images": images, "precision": run.precision}
    saved_step, saved_at = run.step, time.monotonic()

    def save() -> None:
        nonlocal saved_step, saved_at
        state = run.state()
        # What a GPU has counted but not yet told; the copies of the state wait for it too.
        refuse_trouble(run, state["totals"]["trouble"].tolist())
        session.beat(run.step, len(run.history), now=True)
        saver.save({**state, **identity})
        saved_step, saved_at = run.step, time.monotonic()

    def heed(failure: Exception | None) -> None:
        """Raise what some process ran into; stop or save, as asked or due: all at the same step."""
        try:
            saver.check()
            refuse_trouble(run, trouble_seen(run))
        except (UserError, OSError) as error:
            failure = failure or error
        run.spent_usd = session.beat(run.step, len(run.history)) or 0.0
        over_budget = 0 < config.budget_usd <= run.spent_usd
        seconds = time.monotonic() - saved_at
        due = run.step > saved_step and seconds >= 60 * config.checkpoint_minutes
        failed, stop, over_budget, asked, due = distributed.any_of(
            failure is not None, requests.stop, over_budget, requests.save, due
        )
        if failed:
            distributed.raise_in_all(failure)
        requests.stop |= stop
        if stop or over_budget:
            raise Interrupted
        if asked:
            requests.save = False  # before saving: a request that comes meanwhile is another one
            started = time.monotonic()
            save()
            saver.wait()
            seconds = time.monotonic() - started
            log.info("saved after step %d, as asked, in %.1f s", run.step, seconds)
        elif due:
            save()

    requests.nothing_to_save = False
    short_of_memory = False
    exit_code = 0
    last_copies_s = mirror.INTERRUPTED_S
    with contextlib.ExitStack() as at_end:  # each is called, whatever the others raise
        at_end.callback(lock.close)
        at_end.callback(lambda: copies.finish(last_copies_s))
        at_end.callback(session.end)
        at_end.callback(saver.wait)
        try:
            train_epochs(run, config, folder, train_set, val_set, save, heed)
            run.model.eval()
            report(run, config, folder, val_set, heed)
            last_copies_s = mirror.FINISHED_S
            session.ending = sessions.FINISHED
        except Interrupted:
            save()
            saver.wait()
            last_copies_s = mirror.INTERRUPTED_S if requests.stop else mirror.FINISHED_S
            exit_code = say_interrupted(run, config, requests, session)
        except UserError as error:
            if error.exit_code == EXIT_USER_ERROR:  # an image; the run goes on once it is mended
                save()
            raise
        except RuntimeError as error:
            distributed.refuse_lost(error)
            # Of several processes, the others wait for this step.
            if not isinstance(error, torch.OutOfMemoryError) or distributed.processes() > 1:
                raise
            short_of_memory = True
            if not run.model.training:  # in validation; a step broken off would be half done
                save()
    if short_of_memory:  # by now the error is gone, and with it the memory of the step that failed
        setting = "micro_batch_size" if config.micro_batch_size else "batch_size"
        setting = setting if run.model.training else "val_batch_size"
        raise UserError(advise_batch_size(run, config, setting))
    distributed.wait_for_all()  # torchrun ends the main process if another ends before it
    sys.exit(exit_code)


if __name__ == "__main__":
    run_stage(main)
