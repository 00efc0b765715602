"""What packing costs beside the bare work: decoding, resizing and encoding on as many threads.

    python3 scripts/benchmark_pack.py SOURCE --folder FOLDER --blocks 5

A block packs SOURCE into a store in FOLDER: lists it, reads, hashes, writes and syncs; the next one
prepares the same pictures, which lie in memory already, and throws the results away. The ratio of
the two rates, pair by pair, is what is left of the bare rate. Prints a JSON object.
"""

import contextlib
import dataclasses
import io
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

import packing

from store import open_store
from utils import UserError, describe_computer, parse_options, run_stage, versions


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to pack, where to, and how often."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """what `prepare_data.py pack` takes"""
    folder: Path = Path()
    """folder on the disk to write to"""
    blocks: int = 5
    """pairs of blocks"""
    max_side: int = 400
    """as of `prepare_data.py pack`"""
    quality: int = 90
    """as of `prepare_data.py pack`"""
    workers: int = len(os.sched_getaffinity(0))
    """threads of both"""


def main() -> None:
    """Measure the pairs and print them."""
    options = parse_options(BenchmarkOptions, __doc__)
    if options.blocks < 1 or options.workers < 1:
        raise UserError("blocks and workers must be 1 or more")
    if options.max_side < 0 or not 1 <= options.quality <= 100:
        raise UserError("max_side must be 0 or more, quality 1 to 100")
    if not options.folder.is_dir():
        raise UserError(f"no folder {options.folder}: make it, or name another with --folder")
    source = packing.open_source(options.source)
    _, members = packing.list_pictures(source, None)
    contents = [read() for read in source.contents(members)]

    def bare_s() -> float:
        started = time.monotonic()
        with ThreadPoolExecutor(options.workers) as pool:
            starts = range(0, len(contents), 16)
            list(pool.map(prepare_some, (contents[at : at + 16] for at in starts)))
        return time.monotonic() - started

    def prepare_some(some: list[bytes]) -> None:
        for content in some:
            packing.prepare(lambda content=content: content, options.max_side, options.quality)

    def packing_s() -> float:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            store = Path(folder) / "store"
            settings = (options.max_side, options.quality, options.workers, None, False)
            started = time.monotonic()
            with contextlib.redirect_stdout(io.StringIO()):  # its table
                packing.pack(options.source, store, *settings)
            taken_s = time.monotonic() - started
            sizes.append(len(open_store(store).mapping))
        return taken_s

    sizes: list[int] = []
    bare_s()  # warms up
    pairs = [(packing_s(), bare_s()) for _ in range(options.blocks)]

    def spread(values: list[float]) -> dict[str, float]:
        return {
            "median": round(statistics.median(values), 3),
            "min": round(min(values), 3),
            "max": round(max(values), 3),
        }

    pictures = len(contents)
    result = {
        "packing_over_bare_rate": spread([bare / packing for packing, bare in pairs]),
        "packing_pictures_per_s": spread([pictures / packing for packing, _ in pairs]),
        "bare_pictures_per_s": spread([pictures / bare for _, bare in pairs]),
        "pairs_s": [[round(value, 3) for value in pair] for pair in pairs],
        "pictures": pictures,
        "source_bytes": sum(map(len, contents)),
        "store_bytes": sizes[-1],
        "settings": {name: getattr(options, name) for name in ("max_side", "quality", "workers")},
        "hardware": describe_computer(),
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_stage(main)
