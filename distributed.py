"""What the processes of one run must agree on: who they are, when to stop, what they counted.

    torchrun --standalone --nproc_per_node=4 trainer.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 trainer.py

torchrun starts the processes, a GPU each, and tells each its number. All compute the same steps: a
process takes its part of each batch, and DistributedDataParallel adds the gradients up. The main
process, number 0, is the only one that reads and writes the run's folder. In a single process
every function here answers at once, and no group is ever started.

Beside the group of DistributedDataParallel (NCCL on GPUs) there is one of gloo for what the hosts
tell each other, so that no question waits for a GPU. What waits for another process gives up after
WAIT_S: then that one is alive but stuck. One that has ended is noticed at once, by torchrun too.
Hence one that fails ends at once, and takes no leave of the others, for which NCCL might wait.
"""

import atexit
import contextlib
import datetime
import itertools
import logging
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils import EXIT_FAILED, Config, UserError, end_at_once, log

WAIT_S = 600  # for another process in the middle of training
LONG_WAIT_S = 4 * 3600  # while one fetches a run, checks images, or copies to a mirror

Value = TypeVar("Value")
_hosts: dist.ProcessGroup | None = None  # the gloo group; None in a single process
_patient_hosts: dist.ProcessGroup | None = None  # the same, which waits for LONG_WAIT_S

# ------------------------------------------------------------------------------ who there is


def start() -> None:
    """Find the other processes, where torchrun has started several; else do nothing.

    Raises UserError where WORLD_SIZE is set, but not by torchrun.
    """
    global _hosts, _patient_hosts  # noqa: PLW0603 (a process has one of each)
    size = os.environ.get("WORLD_SIZE", "1")
    if size == "1":
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing or not size.isdecimal() or int(size) == 0:
        beside = f", and {', '.join(missing)} not" if missing else ""
        raise UserError(f"WORLD_SIZE is set to {size!r}{beside}: unset it, or start by torchrun")
    timeout = datetime.timedelta(seconds=WAIT_S)
    store, rank, count = next(rendezvous("env://", timeout=timeout))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(
        backend, store=_fresh(store, rank, count), rank=rank, world_size=count, timeout=timeout
    )
    _hosts = dist.new_group(backend="gloo", timeout=timeout)
    # A time-out given to monitored_barrier is process 0's alone: the others go by the group's.
    long_timeout = datetime.timedelta(seconds=LONG_WAIT_S)
    _patient_hosts = dist.new_group(backend="gloo", timeout=long_timeout)
    # gloo's threads would take an ending process down with SIGABRT.
    atexit.register(dist.destroy_process_group)
    sys.excepthook = _end_with_traceback
    if not is_main():  # it repeats nothing that the main one says
        log.addFilter(lambda record: record.levelno >= logging.WARNING)


def _end_with_traceback(*error: Any) -> None:
    sys.__excepthook__(*error)
    end_at_once(EXIT_FAILED)


def _fresh(store: dist.Store, rank: int, count: int) -> dist.Store:
    """torchrun's store, in a place of its own for this start.

    torchrun keeps its store when it restarts the processes, with the addresses of those that are
    gone (PyTorch's issue 135712), and each machine counts restarts for itself. So the main process
    names a place, and tells it to those who are here now: what earlier ones left, nobody answers.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"here/{rank}", mine)
        place = store.get(mine).decode()  # waits
        store.set(f"{place}/{rank}", "")
        return dist.PrefixStore(place, store)
    missing, deadline = set(range(1, count)), time.monotonic() + WAIT_S
    while missing:
        for other in sorted(missing):
            if store.check([f"here/{other}"]):
                store.set(store.get(f"here/{other}").decode(), mine)
            if store.check([f"{mine}/{other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise UserError(f"processes {sorted(missing)} of this run do not answer", EXIT_FAILED)
        time.sleep(0.02)
    return dist.PrefixStore(mine, store)


def processes() -> int:
    """How many there are in all, on all machines."""
    return 1 if _hosts is None else dist.get_world_size()


def number() -> int:
    """Which one this is, from 0."""
    return 0 if _hosts is None else dist.get_rank()


def is_main() -> bool:
    """Whether this is the process that writes."""
    return number() == 0


def number_here() -> int:
    """Which one of its machine's processes this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0")) if processes() > 1 else 0


def choose_gpu() -> torch.device:
    """This process's GPU; raises UserError if there are more processes than GPUs."""
    if processes() == 1:
        return torch.device("cuda")
    gpus = torch.cuda.device_count()
    if number_here() >= gpus:
        raise UserError(
            f"this machine ({socket.gethostname()}) has {gpus} GPUs for more processes: use "
            f"--nproc_per_node={gpus}, or --device cpu"
        )
    torch.cuda.set_device(number_here())
    return torch.device("cuda", number_here())


def refuse_several(what: str, is_asked: bool) -> None:
    """Raise UserError if several processes are asked for something that one does."""
    if is_asked and processes() > 1:
        raise UserError(f"{what} is for one process: start it with python3 instead of torchrun")


def describe(config: Config) -> str:
    """The processes, and how they share the work."""
    normalised = "synchronised" if config.sync_batchnorm else "each process's own"
    return (
        f"{processes()} processes share each batch of {config.batch_size}, so that max_lr stays as "
        f"it is; BatchNorm's statistics are {normalised}"
    )


# ------------------------------------------------------------------------------ what each computes


def _cuts(batch_size: int) -> list[int]:
    """Where each process's part of a batch begins, and the last one ends.

    All but the end are even, so that no pair of images that are mixed is torn apart.
    """
    count, pairs = processes(), -(-batch_size // 2)
    return [min(batch_size, 2 * (number * pairs // count)) for number in range(count + 1)]


def share(batch: np.ndarray) -> np.ndarray:
    """This process's part of a batch; the parts differ by two images at most."""
    cuts = _cuts(len(batch))
    return batch[cuts[number()] : cuts[number() + 1]]


def _share_sizes(batch_size: int) -> list[int]:
    return [end - start for start, end in itertools.pairwise(_cuts(batch_size))]


def micro_batches(batch_size: int, micro_batch_size: int) -> int:
    """In how many parts each process computes its share of a batch: the same number in all."""
    largest_share = max(_share_sizes(batch_size))
    return -(-largest_share // (micro_batch_size or largest_share))


def division(config: Config) -> tuple[int, int]:
    """How many images of a whole batch this process computes, and in how many parts."""
    parts = micro_batches(config.batch_size, config.micro_batch_size)
    return len(share(np.arange(config.batch_size))), parts


def check_shares(config: Config, images: int) -> None:
    """Refuse to compute fewer images at once than BatchNorm needs; raises UserError.

    Two of a process, for its own statistics; one, where they are those of all processes.
    """
    count = processes()
    needed = 1 if config.sync_batchnorm and count > 1 else 2
    for what, size in (("a", config.batch_size), ("the last", images % config.batch_size)):
        parts = micro_batches(size, config.micro_batch_size) if size else 1
        least = min(_share_sizes(size)) // parts
        if not size or least >= needed:
            continue
        most = size // 2 if needed == 2 else -(-size // 2)  # a pair of images each
        advice = f"use {most} processes or fewer"
        if parts > 1:
            advice = "use a larger --micro-batch-size"
        if least and count > 1:
            advice += ", or --sync-batchnorm for a run that has not begun"
        raise UserError(
            f"{what} batch of {size} images leaves one of {count} processes with {least} at once, "
            f"and BatchNorm needs {needed}: {advice}"
        )


def data_parallel(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """The model as it is to be trained: its gradients become the mean over the processes.

    Its weights are those of the main process. BatchNorm's running statistics stay each process's
    own until `copy_from_main`: nothing in a training step reads them.
    """
    if processes() == 1:
        return model
    parallel = torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )
    parallel.broadcast_buffers = False  # the argument has another name in newer versions
    return parallel


def adds_up(model: torch.nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
    """In it, the gradients of a `data_parallel` model are added to; after the last, exchanged."""
    return contextlib.nullcontext() if processes() == 1 or is_last else model.no_sync()


def synchronise_batchnorm(model: torch.nn.Module, device: torch.device) -> None:
    """Let BatchNorm normalise by the images of all processes; names and weights stay."""
    if processes() == 1:
        return
    if device.type == "cuda":
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return
    for module in model.modules():
        if type(module) is torch.nn.BatchNorm2d:
            module.__class__ = _SyncBatchNormOnCpu


class _SyncBatchNormOnCpu(torch.nn.BatchNorm2d):
    """BatchNorm over all processes, for (N, C, H, W) on the CPU, which PyTorch's own refuses."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The same shape and dtype; computed in float32 at least."""
        if not self.training:
            return super().forward(images)
        wide = images if images.dtype == torch.float64 else images.float()
        values = _Sum.apply(torch.tensor(float(wide[:, 0].numel())))
        mean = _Sum.apply(wide.sum((0, 2, 3))) / values
        centred = wide - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / values
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * values / (values - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(images.dtype)


class _Sum(torch.autograd.Function):
    """The sum over the processes, of which each has a part of the loss."""

    @staticmethod
    def forward(_: Any, tensor: torch.Tensor) -> torch.Tensor:
        return summed(tensor)

    @staticmethod
    def backward(_: Any, gradient: torch.Tensor) -> torch.Tensor:
        return summed(gradient)


# ------------------------------------------------------------------------------ what all know


def summed(tensor: torch.Tensor, operation: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """The sum over the processes, on any device; the tensor itself in a single one."""
    if processes() == 1:
        return tensor
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, operation)
    return total


def largest(tensor: torch.Tensor) -> torch.Tensor:
    """The maximum over the processes."""
    return summed(tensor, dist.ReduceOp.MAX)


def any_of(*flags: bool) -> list[bool]:
    """For each flag, whether some process has it set. A fraction of a millisecond for the host."""
    if processes() == 1:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(found, dist.ReduceOp.MAX, _hosts)
    return found.bool().tolist()


def copy_from_main(tensors: Iterable[torch.Tensor]) -> None:
    """Give these tensors the main process's values, in place."""
    for tensor in tensors if processes() > 1 else ():
        dist.broadcast(tensor, 0)


def in_main(function: Callable[..., Value], *arguments: Any) -> Value:
    """Call a function in the main process only; the others get something that does nothing."""
    return function(*arguments) if is_main() else _Nothing()  # type: ignore[return-value]


def once_a_machine(function: Callable[..., object], *arguments: Any) -> None:
    """Call a function in the first process of each machine only."""
    if number_here() == 0:
        function(*arguments)


class _Nothing:
    """Stands for what only the main process has: each of its methods does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def from_main(function: Callable[..., Value], *arguments: Any, **options: Any) -> Value:
    """What a function returns in the main process, to all; what it raises there ends all."""
    found = [None]
    with agreed():
        if is_main():
            found = [function(*arguments, **options)]
    if processes() > 1:
        dist.broadcast_object_list(found, 0, _hosts)
    return found[0]


def check_same(**values: Any) -> None:
    """Raise UserError in all processes if a value of one is another than the main process's."""
    of_main = from_main(lambda: values)
    with agreed():
        for name, expected in of_main.items():
            if values[name] != expected:
                raise UserError(
                    f"{name} of {socket.gethostname()} is not that of the main process's machine: "
                    "give both the same"
                )


# ------------------------------------------------------------------------------ how they end


def wait_for_all() -> None:
    """Return once all processes are here, however long one of them works on its own."""
    if processes() > 1:
        dist.monitored_barrier(_patient_hosts, datetime.timedelta(seconds=LONG_WAIT_S))


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Lets all processes go on once each has done what is inside; what one raises ends all."""
    if processes() == 1:
        yield
        return
    failure: BaseException | None = None
    try:
        yield
    except (Exception, SystemExit) as error:
        failure = error
    try:
        wait_for_all()
    except RuntimeError as error:
        if failure is not None:
            raise failure from None
        refuse_lost(error)
        raise
    raise_in_all(failure)


def raise_in_all(failure: BaseException | None) -> None:
    """Raise in each process what one of them has run into; all have to call it.

    The main process says it; in the others the error has no text.
    """
    if processes() == 1:
        if failure is not None:
            raise failure
        return
    mine = None
    if isinstance(failure, SystemExit):
        mine = "", failure.code
    elif failure is not None:
        mine = str(failure) or repr(failure), getattr(failure, "exit_code", EXIT_FAILED)
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, mine, _hosts)
    first = next((place for place, what in enumerate(found) if what is not None), None)
    if first is None:
        return
    if failure is not None and (is_main() or not isinstance(failure, UserError)):
        raise failure
    text, exit_code = found[first]
    raise UserError(f"process {first}: {text}" if is_main() else "", exit_code)


def refuse_lost(error: RuntimeError) -> None:
    """Raise UserError if an error says that another process has ended, or does not answer."""
    if processes() > 1 and (
        isinstance(error, dist.DistError) or re.search("gloo|monitoredBarrier", str(error))
    ):
        raise UserError(
            "another process of this run has ended, or does not answer: its own words, or "
            "torchrun's, say why; the same command goes on from the last checkpoint",
            EXIT_FAILED,
        ) from None


Heed = Callable[[Exception | None], object]


def heeded(batches: Iterator[Value], heed: Heed) -> Iterator[Value]:
    """The same batches; `heed` is called before each and at the end, with what reading one raised.

    Every process takes as many, so that all can stop before the same step.
    """
    end = object()
    while True:
        batch, failure = end, None
        try:
            batch = next(batches, end)
        except (UserError, OSError) as error:
            failure = error
        heed(failure)
        if failure is not None:
            raise failure
        if batch is end:
            return
        yield batch
