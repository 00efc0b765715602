"""How well reading ahead hides the disk: the loader on a store in memory, and on one that is not.

    python3 scripts/benchmark_cold.py STORE --output cold.json

An instance with 16 GB of memory reads a store of 48 GB mostly from its disk. Each round loads
--images training pictures in random order, in a fresh process: with the store in the page cache;
dropped from it; and dropped from it with reading ahead. Hidden is how much of the rate that the
disk costs comes back by reading ahead. --device-img-per-s takes the batches at the pace of a GPU.

How slow the disk is can be chosen in two ways. --disk-latency-ms lets every read wait so long, as
over a network, by a file system in user space (FUSE; see requirements-bench.txt), whose own time on
the CPU counts as the disk's. A control group limits reads and bytes a second, and memory;
--in-memory-img-per-s then says what the same command measured outside of it. Prints the rounds;
--output takes a JSON file.
"""

import contextlib
import dataclasses
import errno
import functools
import math
import multiprocessing
import os
import stat
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import augment
import data
import image_files
from store import open_store
from utils import (
    Config,
    UserError,
    describe_computer,
    keep_freed_memory,
    log,
    parse_options,
    run_stage,
    start_log,
    versions,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """Which store, and how it is read."""

    store: tyro.conf.Positional[Path]
    """a store, as `prepare_data.py pack` writes it"""
    px: int = 160
    """side of the crops, in pixels"""
    workers: int = 2
    """threads that decode"""
    device_img_per_s: float = 0.0
    """pace at which a GPU takes the batches; 0: as fast as they come"""
    disk_latency_ms: float = 0.0
    """time that a read waits before the disk answers, in milliseconds; 0: the disk as it is"""
    images: int = 20_000
    """pictures in a round, at most those in the store"""
    batch_size: int = 448
    """images in a batch"""
    in_memory_img_per_s: float = 0.0
    """rate in memory, of an earlier run; 0: measured here, in memory for the whole store"""
    repeats: int = 3
    """rounds of each kind"""
    output: Path | None = None
    """JSON file to write"""


def load(connection: Any, options: BenchmarkOptions, read_ahead: int) -> None:
    """Load the pictures once; sends the images a second, and the megabytes read from the disk."""
    keep_freed_memory()
    images = image_files.open_image_set(str(options.store), "train")
    order = augment.epoch_order(0, 0, len(images))[: options.images]
    fill = functools.partial(data.fill_train, Config(), 0)
    before = disk_bytes()
    started = time.perf_counter()
    batches = data.batches(
        images, fill, order, options.batch_size, options.px, options.workers, read_ahead=read_ahead
    )
    loaded = 0
    step_end = started
    for _, labels in batches:
        loaded += len(labels)
        if options.device_img_per_s:
            # A step begins once its batch is there and the step before has ended.
            step_end = max(step_end, time.perf_counter()) + len(labels) / options.device_img_per_s
            time.sleep(max(0.0, step_end - time.perf_counter()))
    connection.send((loaded / (time.perf_counter() - started), (disk_bytes() - before) / 1e6))


def disk_bytes() -> int:
    """What this process has had read from the disk, in bytes; see proc(5)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))


def drop_from_page_cache(path: Path) -> None:
    """Have the kernel forget a file's pages; those that another process maps stay."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def serve_slowly(store: Path, folder: str, latency_ms: float) -> None:
    """Show a store as folder/store, each of whose reads takes `latency_ms` longer, until killed."""
    import mfusepy

    file = os.open(store, os.O_RDONLY)

    class SlowDisk(mfusepy.Operations):
        use_ns = True  # times in nanoseconds, as mfusepy wants it

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            if path == "/":
                return {"st_mode": stat.S_IFDIR | 0o755}
            if path != "/store":
                raise mfusepy.FuseOSError(errno.ENOENT)
            return {"st_mode": stat.S_IFREG | 0o444, "st_size": os.fstat(file).st_size}

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            time.sleep(latency_ms / 1000)
            return os.pread(file, size, offset)

    # The kernel keeps what was read in the page cache, as of any disk.
    mfusepy.FUSE(SlowDisk(), folder, foreground=True, ro=True, kernel_cache=True)


@contextlib.contextmanager
def slow_disk(store: Path, latency_ms: float) -> Iterator[Path]:
    """The store on a disk whose reads take longer; raises UserError where there can be none."""
    with tempfile.TemporaryDirectory() as folder:
        shown = Path(folder) / "store"
        process = multiprocessing.get_context("spawn").Process(
            target=serve_slowly, args=(store, folder, latency_ms)
        )
        process.start()
        try:
            while not shown.exists():
                if not process.is_alive():
                    raise UserError(
                        "no slow disk, see above: it needs mfusepy (requirements-bench.txt), "
                        "Debian's fuse3 and libfuse2, and the right to mount"
                    )
                time.sleep(0.1)
            yield shown
        finally:
            process.terminate()  # which unmounts it
            process.join()


def main() -> None:
    """Check the options, and measure on the disk that they ask for."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    first, end = open_store(options.store).parts["train"]
    for name in ("px", "workers", "images", "batch_size", "repeats"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}: it must be 1 or more")
    for name in ("device_img_per_s", "disk_latency_ms", "in_memory_img_per_s"):
        if not 0 <= getattr(options, name) < math.inf:
            raise UserError(f"{name} is {getattr(options, name)}: it must be 0 or more")
    options = dataclasses.replace(options, images=min(options.images, end - first))
    if not options.disk_latency_ms:
        measure(options)
        return
    with slow_disk(options.store, options.disk_latency_ms) as store:
        measure(dataclasses.replace(options, store=store))


def measure(options: BenchmarkOptions) -> None:
    """Measure the three kinds in turn."""
    kinds = {
        "in memory": (False, data.READ_AHEAD),
        "from disk, not read ahead": (True, 0),
        "from disk, read ahead": (True, data.READ_AHEAD),
    }
    if options.in_memory_img_per_s:
        kinds.pop("in memory")
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    context = multiprocessing.get_context("spawn")
    for number in range(options.repeats + 1):
        for name, (cold, read_ahead) in kinds.items():
            if cold:
                drop_from_page_cache(options.store)
            else:
                with open(options.store, "rb") as file:  # into the page cache
                    while file.read(1 << 24):
                        pass
            ours, theirs = context.Pipe()
            process = context.Process(target=load, args=(theirs, options, read_ahead))
            process.start()
            theirs.close()
            try:
                result = ours.recv()
            except EOFError:
                raise UserError(f"loading {name} failed, see above") from None
            process.join()
            if number:  # the first round warms up
                rounds[name].append(result)
                log.info("%-27s %6.0f img/s, %5.0f MB read from the disk", name, *result)
    rates = {name: [rate for rate, _ in found] for name, found in rounds.items()}
    rates.setdefault("in memory", [options.in_memory_img_per_s] * options.repeats)
    names = ("in memory", "from disk, not read ahead", "from disk, read ahead")
    hidden = [
        (ahead - cold) / (warm - cold)
        for warm, cold, ahead in zip(*(rates[name] for name in names), strict=True)
    ]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    log.info("medians: %s", {name: round(value) for name, value in medians.items()})
    log.info(
        "reading ahead hides %.0f %% of the difference (%.0f to %.0f)",
        100 * statistics.median(hidden), 100 * min(hidden), 100 * max(hidden),
    )  # fmt: skip
    if options.output:
        write_json(
            options.output,
            {
                "settings": {
                    name: getattr(options, name)
                    for name in (
                        *("px", "workers", "images", "batch_size"),
                        *("device_img_per_s", "disk_latency_ms"),
                    )
                },
                "store_bytes": options.store.stat().st_size,
                "img_per_s": {
                    name: {"median": medians[name], "rounds": values}
                    for name, values in rates.items()
                },
                "disk_mb": {name: [mb for _, mb in found] for name, found in rounds.items()},
                "hidden": {"median": statistics.median(hidden), "rounds": hidden},
                "hardware": describe_computer(),
                "versions": versions(),
            },
        )


if __name__ == "__main__":
    run_stage(main)
