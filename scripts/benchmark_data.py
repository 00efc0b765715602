"""How fast a machine prepares training images: ours beside what people would use instead.

    python3 scripts/benchmark_data.py PHOTOS --output data.json

PHOTOS is a folder of class folders. Its JPEGs are repeated until there are --images of them, and
lie three times in a temporary folder: as they are, as a store packed to --max-side and --quality,
and as FFCV's file with the same settings. Each pipeline then makes random crops of them without
end, in a process of its own that is bound to the cores named: --seconds as a warm-up, then as long
against the clock, --repeats times. One round of each in turn, so that what the machine does beside
meets all alike, while the other processes are stopped by a signal. The pictures are in the page
cache. A ratio is that of two pipelines within a round.

FFCV and DALI take part where they are installed (requirements-bench.txt). Prints a table; --output
takes a JSON file with all rounds, hardware and versions.
"""

import dataclasses
import functools
import importlib.util
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import (
    MEAN,
    RECIPES,
    STD,
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

BATCH_SIZE = 256
EPOCHS = 20  # one after another as one, for real ones are 400 times as long


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to measure, on which pictures, and how often."""

    photos: tyro.conf.Positional[Path]
    """folder of class folders of JPEGs"""
    px: tuple[int, ...] = (224, 160, 128)
    """sides of the crops, in pixels"""
    cores: tuple[int, ...] = (1, 0)
    """cores to use; 0: all"""
    images: int = 3000
    """pictures, none twice before all were used once"""
    seconds: float = 3.0
    """length of a round, up to the end of a batch"""
    repeats: int = 5
    """rounds of each pipeline"""
    max_side: int = 400
    """longer side of the packed pictures, in pixels"""
    quality: int = 90
    """JPEG quality of the packed pictures"""
    pipelines: tuple[str, ...] = ()
    """only these, by their names in the table; none: all that are installed"""
    output: Path | None = None
    """JSON file to write"""


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the same pictures lie."""

    originals: Path  # folder of class folders
    store: Path
    unpacked: Path  # the store's training pictures as files
    ffcv: Path


# ------------------------------------------------------------------------------ pipelines

# Given where the pictures lie, the side of the crops and the cores: the sizes of batches as they
# become ready, without end. Packages are imported there, for each runs in a process of its own.
Pipeline = Callable[[Places, int, int], Iterator[int]]


def torchvision_originals(places: Places, px: int, cores: int) -> Iterator[int]:
    """The reference run's: ImageFolder on Pillow, a worker process a core, floats."""
    import torch
    import torchvision
    from torchvision.transforms import v2

    transform = v2.Compose(
        [
            v2.RandomResizedCrop(px),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    loader = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset(
            [torchvision.datasets.ImageFolder(places.originals, transform)] * EPOCHS
        ),
        BATCH_SIZE,
        shuffle=True,
        num_workers=cores,
        persistent_workers=True,
    )
    while True:
        yield from (len(labels) for _, labels in loader)


def ours(folder_name: str, px: int, cores: int, recipe: str = "reference") -> Iterator[int]:
    """data.train_batches on a folder or a store, a thread a core, with a recipe's augmentation."""
    import augment
    import data
    import image_files

    images = image_files.open_image_set(folder_name, "train")
    config = dataclasses.replace(
        RECIPES[recipe].config, train_px=px, batch_size=BATCH_SIZE, workers=cores
    )
    fill = functools.partial(data.fill_train, config, 0)
    order = np.concatenate([augment.epoch_order(0, epoch, len(images)) for epoch in range(EPOCHS)])
    while True:
        batches = data.batches(images, fill, order, BATCH_SIZE, px, cores)
        yield from (len(labels) for _, labels in batches)


def ours_originals(places: Places, px: int, cores: int) -> Iterator[int]:
    """Ours on the folder of originals."""
    return ours(str(places.originals), px, cores)


def ours_store(places: Places, px: int, cores: int) -> Iterator[int]:
    """Ours on the store."""
    return ours(str(places.store), px, cores)


def ours_accurate(places: Places, px: int, cores: int) -> Iterator[int]:
    """Ours on the store with accurate's augmentation, but for what the device does: mixing."""
    return ours(str(places.store), px, cores, "accurate")


def decode_only(places: Places, px: int, cores: int) -> Iterator[int]:
    """The limit: our decoder on the store, whole pictures, a thread a core, nothing else."""
    import image_files

    images = image_files.open_image_set(str(places.store), "train")
    pool = ThreadPoolExecutor(cores)

    def some(start: int) -> int:
        indexes = range(start, min(start + 16, len(images)))
        for index in indexes:
            image_files.decode_plain_jpeg(images.read(index)[0])
        return len(indexes)

    while True:
        tasks = [pool.submit(some, start) for start in range(0, len(images), 16)]
        yield from (task.result() for task in tasks)


def ffcv(places: Places, px: int, cores: int) -> Iterator[int]:
    """FFCV on its own file, uint8 out."""
    from ffcv.fields.decoders import IntDecoder, RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    images = len(list(places.unpacked.glob("*/*")))
    loader = Loader(
        str(places.ffcv),
        batch_size=BATCH_SIZE,
        num_workers=cores,
        os_cache=True,
        order=OrderOption.RANDOM,
        indices=np.tile(np.arange(images), EPOCHS),
        pipelines={
            "image": [
                RandomResizedCropRGBImageDecoder((px, px)),
                RandomHorizontalFlip(),
                ToTensor(),
            ],
            "label": [IntDecoder(), ToTensor()],
        },
    )
    while True:
        yield from (len(labels) for _, labels in loader)


def dali(places: Places, px: int, cores: int) -> Iterator[int]:
    """DALI without a GPU on the store's pictures as files: fused decoding of crops, uint8 out."""
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=BATCH_SIZE, num_threads=cores, device_id=None)
    def pipeline() -> tuple[Any, Any]:
        jpegs, labels = fn.readers.file(
            file_root=str(places.unpacked), random_shuffle=True, name="reader"
        )
        images = fn.decoders.image_random_crop(
            jpegs, random_aspect_ratio=(3 / 4, 4 / 3), random_area=(0.08, 1.0)
        )
        images = fn.resize(images, size=(px, px), interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip()), labels

    built = pipeline()
    built.build()
    while True:
        built.run()
        yield BATCH_SIZE


PIPELINES: dict[str, Pipeline] = {
    "torchvision, originals": torchvision_originals,
    "ours, originals": ours_originals,
    "ours, store": ours_store,
    "ours as accurate, store": ours_accurate,
    "FFCV, its file": ffcv,
    "DALI CPU, store's pictures": dali,
    "decode only, store": decode_only,
}
NEEDS = {"FFCV, its file": "ffcv", "DALI CPU, store's pictures": "nvidia.dali"}
OURS = ("ours, originals", "ours, store", "ours as accurate, store", "decode only, store")
# What is quoted: the first against the second.
RATIOS = (
    ("ours, store", "FFCV, its file"),
    ("ours, store", "DALI CPU, store's pictures"),
    ("ours, store", "torchvision, originals"),
    ("ours, originals", "torchvision, originals"),
    ("ours, store", "decode only, store"),
    ("ours as accurate, store", "ours, store"),
)


def serve(
    connection: Connection, name: str, places: Places, px: int, cores: int, seconds: float
) -> None:
    """Set up a pipeline on so many cores; each message is answered by the images a second."""
    os.setsid()  # so that it is stopped together with its own processes
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    if name in OURS:
        keep_freed_memory()  # as the trainer does
    batch_sizes = PIPELINES[name](places, px, cores)

    def images_per_s() -> float:
        started, images = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - started) < seconds:
            images += next(batch_sizes)
        return images / elapsed

    images_per_s()  # compiles, fills caches
    connection.send(None)
    while connection.recv():
        connection.send(images_per_s())
    os._exit(0)  # whatever threads and processes it has


# ------------------------------------------------------------------------------ the measurement


def lay_out(options: BenchmarkOptions, folder: Path, with_ffcv: bool) -> Places:
    """The pictures, repeated, as a folder, a store, the store's files, and FFCV's file."""
    places = Places(
        folder / "source" / "train", folder / "store.zip", folder / "unpacked", folder / "data.ffcv"
    )
    photos = sorted(path for path in options.photos.glob("*/*") if path.is_file())
    if not photos:
        raise UserError(f"no pictures in {options.photos}/<class>/: name a folder that has some")
    for number in range(options.images):
        photo = photos[number % len(photos)]
        path = places.originals / photo.parent.name / f"{number // len(photos):04d}_{photo.name}"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, path)
    for photo in photos[: options.images]:  # a store has validation pictures too
        path = folder / "source" / "val" / photo.parent.name / photo.name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(photo, path)
    prepare = Path(__file__).parent / "prepare_data.py"
    settings = ("--max-side", str(options.max_side), "--quality", str(options.quality))
    packing = subprocess.run(
        [sys.executable, prepare, "pack", folder / "source", places.store, *settings],
        stdout=subprocess.DEVNULL,
    )
    if packing.returncode:
        raise UserError(f"the pictures of {options.photos} could not be packed, see above")
    with zipfile.ZipFile(places.store) as archive:
        members = [name for name in archive.namelist() if name.startswith("train/")]
        archive.extractall(folder / "whole", members)
    (folder / "whole" / "train").rename(places.unpacked)
    if with_ffcv:
        process = multiprocessing.get_context("spawn").Process(
            target=write_ffcv, args=(places, options)
        )
        process.start()
        process.join()
        if process.exitcode:
            raise UserError("FFCV could not write its file, see above: leave it out of --pipelines")
    return places


def write_ffcv(places: Places, options: BenchmarkOptions) -> None:
    """The originals as FFCV's file, with the settings of the store."""
    import torchvision
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    image = RGBImageField(
        write_mode="jpg", max_resolution=options.max_side, jpeg_quality=options.quality
    )
    writer = DatasetWriter(str(places.ffcv), {"image": image, "label": IntField()}, num_workers=1)
    writer.from_indexed_dataset(torchvision.datasets.ImageFolder(places.originals))


def measure(
    names: list[str], places: Places, px: int, cores: int, options: BenchmarkOptions
) -> dict[str, list[float]]:
    """Images a second of each pipeline, round by round."""
    context = multiprocessing.get_context("spawn")
    servers = {}
    for name in names:
        connection, theirs = context.Pipe()
        process = context.Process(
            target=serve, args=(theirs, name, places, px, cores, options.seconds)
        )
        process.start()
        theirs.close()  # so that a process that dies is noticed
        try:
            connection.recv()  # warmed up
        except EOFError:
            raise UserError(f"{name} failed, see above: choose others with --pipelines") from None
        os.killpg(process.pid, signal.SIGSTOP)  # some prepare more, or spin
        servers[name] = process, connection
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(options.repeats):
        for name, (process, connection) in servers.items():
            connection.send(True)
            os.killpg(process.pid, signal.SIGCONT)
            rates[name].append(connection.recv())
            os.killpg(process.pid, signal.SIGSTOP)
    for process, connection in servers.values():
        connection.send(False)
        os.killpg(process.pid, signal.SIGCONT)
        process.join()
    return rates


def summary(rates: dict[str, list[float]]) -> dict[str, Any]:
    """Medians, extremes, and the ratios round by round."""
    ratios = {
        f"{first} / {second}": [a / b for a, b in zip(rates[first], rates[second], strict=True)]
        for first, second in RATIOS
        if first in rates and second in rates
    }
    return {
        kind: {
            name: {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "rounds": values,
            }
            for name, values in table.items()
        }
        for kind, table in (("img_per_s", rates), ("ratios", ratios))
    }


def print_table(result: dict[str, Any]) -> None:
    """Medians, with the extremes behind them."""
    log.info("%d px, %d cores:", result["px"], result["cores"])
    for kind, digits in (("img_per_s", 0), ("ratios", 2)):
        for name, row in result[kind].items():
            low, median, high = (f"{row[key]:,.{digits}f}" for key in ("min", "median", "max"))
            unit = "img/s" if kind == "img_per_s" else "times"
            log.info("  %-50s %8s %s  (%s to %s)", name, median, unit, low, high)


def main() -> None:
    """Measure every pipeline at every size, and write what was found."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    unknown = set(options.pipelines) - set(PIPELINES)
    if unknown:
        raise UserError(f"no pipeline {sorted(unknown)[0]!r}: there are {', '.join(PIPELINES)}")
    for name in ("px", "images", "repeats", "seconds", "max_side"):
        values = getattr(options, name)
        if min(values if isinstance(values, tuple) else (values,), default=0) <= 0:
            raise UserError(f"{name} is {values}: it must be above 0")
    missing = {name for name, module in NEEDS.items() if not installed(module)}
    names = [name for name in PIPELINES if name in (options.pipelines or PIPELINES)]
    for name in missing & set(names):
        log.info("%s is not installed: see requirements-bench.txt", name)
    names = [name for name in names if name not in missing]
    all_cores = len(os.sched_getaffinity(0))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        places = lay_out(options, Path(folder), "FFCV, its file" in names)
        packed = [path.stat().st_size for path in places.unpacked.glob("*/*")]
        originals = [path.stat().st_size for path in places.originals.glob("*/*")]
        pictures = {
            "images": len(packed),
            "distinct": len({(path.parent, path.name[5:]) for path in places.unpacked.glob("*/*")}),
            "mean_bytes": float(np.mean(originals)),
            "packed_mean_bytes": float(np.mean(packed)),
        }
        log.info("pictures: %s", pictures)
        for px in options.px:
            for cores in dict.fromkeys(cores or all_cores for cores in options.cores):
                rates = measure(names, places, px, cores, options)
                results.append({"px": px, "cores": cores, **summary(rates)})
                print_table(results[-1])
    record = {
        "command": ["python3", "scripts/benchmark_data.py", "PHOTOS", *sys.argv[2:]],
        "pictures": pictures,
        "settings": {
            "max_side": options.max_side,
            "quality": options.quality,
            "batch_size": BATCH_SIZE,
            "seconds": options.seconds,
        },
        "results": results,
        "hardware": describe_computer(),
        "versions": versions(("ffcv", "nvidia-dali-cuda130")),
    }
    if options.output:
        write_json(options.output, record)


def installed(module: str) -> bool:
    """Whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


if __name__ == "__main__":
    run_stage(main)
