"""How long a data set as large as ImageNet takes to open, and in how much memory.

    python3 scripts/benchmark_open.py --output open.json

Writes a picture of 32 px for each class and fills a folder with hard links to them, named as
ImageNet's; `prepare_data.py pack` makes a store of it. Then opens each as a stage does, --repeats
times, in a fresh process every time: the folder at first without its index, then, after its files
were checked once, with it. The memory is by how much the process's peak grew; most of a store's
index is a mapped file, which all processes share. All of it is in the page cache. Prints what it
finds; --output takes a JSON file with hardware and versions.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import image_files
from utils import (
    UserError,
    describe_computer,
    log,
    parse_options,
    run_stage,
    start_log,
    versions,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """How many pictures to open, and how often."""

    images: int = 1_281_167
    """training pictures"""
    classes: int = 1000
    """classes, each with as many of them"""
    repeats: int = 3
    """openings of each"""
    workers: int = len(os.sched_getaffinity(0))
    """threads that check the folder's files"""
    folder: Path = Path()
    """folder on the disk to write to; what is written there is removed in the end"""
    output: Path | None = None
    """JSON file to write"""


def fill(folder: Path, images: int, classes: int) -> None:
    """Class folders under train and val, with `images` in all and one a class."""
    random = np.random.default_rng(0)
    for number in range(classes):
        name = f"n{number:08d}"
        first = folder / "val" / name / "ILSVRC2012_val_00000001.JPEG"
        first.parent.mkdir(parents=True)
        _, encoded = cv2.imencode(".jpg", random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        first.write_bytes(encoded.tobytes())
        train = folder / "train" / name
        train.mkdir(parents=True)
        for image in range(number, images, classes):
            os.link(first, train / f"{name}_{image}.JPEG")


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024


def opening(path: str, check_with: int) -> dict[str, float]:
    """Open the training images in this fresh process; also check and index them, if by threads."""
    before_bytes, started = peak_bytes(), time.monotonic()
    image_set = image_files.open_image_set(path, "train")
    result = {"s": time.monotonic() - started, "bytes": peak_bytes() - before_bytes}
    result["images"] = len(image_set)
    if check_with:
        started = time.monotonic()
        bad = image_files.find_bad_images(image_set, check_with, decode_all=False)
        result["check_s"] = time.monotonic() - started
        if bad:
            raise RuntimeError(f"pictures of its own making are bad: {bad}")
        image_files.keep_index(image_set, image_files.LOOKED_WHOLE)
    return {name: round(value, 4) for name, value in result.items()}


def main() -> None:
    """Write, open, print, remove."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if options.repeats < 1 or not 1 <= options.classes <= options.images:
        raise UserError("repeats and classes must be 1 or more, and images as many as classes")
    if not options.folder.is_dir():
        raise UserError(f"no folder {options.folder}: make it, or name another with --folder")
    spawn = multiprocessing.get_context("spawn")
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as folder,
        concurrent.futures.ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool,
    ):
        pictures, store = Path(folder) / "pictures", Path(folder) / "store"
        fill(pictures, options.images, options.classes)
        log.info("%s pictures are written", f"{options.images:,}")

        def open_often(path: Path, check_with: int = 0) -> list[dict[str, float]]:
            # The first must be over before the next, for which it may leave an index.
            checks = [check_with] + [0] * (options.repeats - 1)
            openings = [pool.submit(opening, str(path), check).result() for check in checks]
            for one in openings:
                log.info(
                    "%s: %s pictures after %.3f s, in %.0f MB",
                    path.relative_to(folder), f"{one['images']:,}", one["s"], one["bytes"] / 1e6,
                )  # fmt: skip
            return openings

        time.sleep(2)  # a folder that has just changed is not indexed
        from_folder = open_often(pictures / "train", options.workers)
        log.info("its files were checked in %.1f s", from_folder[0]["check_s"])
        prepare = [sys.executable, str(Path(__file__).parent / "prepare_data.py"), "pack"]
        started = time.monotonic()
        subprocess.run(
            [*prepare, str(pictures), str(store), "--max-side", "0"],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        packing_s = time.monotonic() - started
        log.info("packed in %.0f s", packing_s)
        record: dict[str, Any] = {
            "settings": {"images": options.images, "classes": options.classes},
            "folder": from_folder,
            "store": open_often(store),
            "packing_s": round(packing_s, 1),
            "hardware": describe_computer(),
            "versions": versions(),
        }
    if options.output:
        write_json(options.output, record)


if __name__ == "__main__":
    run_stage(main)
