"""What a run is made of, its one train step and its one evaluation.

Training, the LR finder, evaluate.py and the benchmarks all run these.
"""

import contextlib
import copy
import dataclasses
import math
import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import augment
import data
import distributed
from model import ResNet50Wrapper
from muon import Muon
from utils import EXIT_FAILED, Config, UserError, keep_freed_memory

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# Steps in a row that fp16's loss scaling may skip: it halves its scale at each, and a sound run
# needs a few at its beginning, then one now and then. After 166 the scale would be 0 for good.
SKIPS_ALLOWED = 10


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
    loss: str = "cross_entropy"  # or bce
    label_smoothing: float = 0.0
    micro_batch_size: int = 0  # most images that are computed at once; 0: all of a batch
    # The training model through torch.compile, for batches of this size; None, 0: never.
    compiled: Callable[[torch.Tensor], torch.Tensor] | None = None
    compiled_batch_size: int = 0
    step: int = 0  # optimizer steps since the beginning
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # a row an epoch
    best: torch.Tensor | None = None  # best.pt as it is to be: the bytes, of the best epoch so far
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
            "best": self.best,
            "epoch_s": self.epoch_s,
            "elapsed_s": self.elapsed_s,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to where a checkpoint was saved; raises UserError for an older version's."""
        if layout(state["optimizer"]) != layout(self.optimizer.state_dict()):
            raise UserError(
                "the checkpoint is of an older version, whose optimizer kept other things: go on "
                "with that version, or start another run with --name"
            )
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
        self.best = state.get("best")  # which older versions did not keep


def layout(optimizer: dict[str, Any]) -> list[tuple[bool, list[int]]]:
    """Of an optimizer's state, which weights it treats alike, and whether Muon's keys are there."""
    return [("own_momentum" in group, group["params"]) for group in optimizer["param_groups"]]


# ------------------------------------------------------------------------------ a new run


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
    model = ResNet50Wrapper(num_classes, config.zero_init_residual, config.blurpool)
    if config.loss == "bce":
        torch.nn.init.constant_(model.model.fc.bias, -math.log(max(num_classes - 1, 1)))
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
    run.loss = config.loss
    if config.average_steps:
        run.average = Average(model, config.average_steps)
    if config.compile:
        run.compiled = compiled(training_model, device)
        images, parts = distributed.division(config)
        run.compiled_batch_size = -(-images // parts)
    return run


def new_optimizer(model: ResNet50Wrapper, config: Config, precision: str) -> torch.optim.Optimizer:
    """SGD, or what orthogonalises its steps, with the weights that are treated alike together."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        is_matrix = parameter.ndim > 1
        decay = config.weight_decay if is_matrix or config.decay_norm_and_bias else 0.0
        groups[decay, 1.0 if is_matrix else config.norm_and_bias_lr].append(parameter)
    described = [
        # The decay of a step is that of the other weights, whatever the factor.
        {"params": parameters, "weight_decay": decay / factor, "lr_factor": factor}
        for (decay, factor), parameters in groups.items()
    ]
    # Fused: one pass over the weights instead of four.
    options = {"lr": config.max_lr, "momentum": config.momentum, "fused": True}
    if config.optimizer == "sgd":
        return torch.optim.SGD(described, **options)
    return Muon(described, torch.float32 if precision == "fp32" else torch.bfloat16, **options)


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


def is_of_compiler(error: RuntimeError) -> bool:
    """Whether torch.compile raised it: nothing of the step under way has been done."""
    return isinstance(error, torch._dynamo.exc.TorchDynamoException)


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
        # Checkpoints were once without the factor.
        group["lr"] = learning_rate * group.get("lr_factor", 1.0)
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
    """The loss of logits (N, C), where images were mixed with labels in the same shares."""
    loss_of = binary_cross_entropy if run.loss == "bce" else torch.nn.functional.cross_entropy
    own = loss_of(logits, labels, label_smoothing=run.label_smoothing)
    if mix is None:
        return own
    others = loss_of(logits, partners, label_smoothing=run.label_smoothing)
    return mix.own_share * own + (1 - mix.own_share) * others


def binary_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float
) -> torch.Tensor:
    """Each class by itself, as present or not: the sum over classes of logits (N, C), mean over N.

    Wightman et al., arXiv 2110.00476, take the mean over classes too.
    """
    targets = torch.full_like(logits, label_smoothing / logits.shape[1])
    targets.scatter_(1, labels[:, None], 1 - label_smoothing + label_smoothing / logits.shape[1])
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits, targets, reduction="sum"
    ) / len(logits)


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
