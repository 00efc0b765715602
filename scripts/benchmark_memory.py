"""What memory training takes: after each epoch, and with more threads that decode.

    python3 scripts/benchmark_memory.py imagenet.store --output memory.json

Runs trainer.py on a store, or on a folder of train/ and val/, once for each of --workers, and reads
its anonymous memory, which is its own and not the page cache's, from /proc when an epoch is over.
The first checkpoints raise it, for freed memory is kept. Prints what it finds; --output takes a
JSON file with hardware and versions.
"""

import dataclasses
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import (
    Config,
    UserError,
    as_arguments,
    describe_computer,
    log,
    parse_options,
    read_metrics,
    run_stage,
    start_log,
    versions,
    write_json,
)

TRAINER = Path(__file__).parent.parent / "trainer.py"


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """What to train on, and how."""

    pictures: tyro.conf.Positional[Path]
    """a store, or a folder with train/ and val/ in it"""
    workers: tuple[int, ...] = (1, 2, 8)
    """threads that decode, one run for each"""
    epochs: int = 5
    """epochs of a run"""
    px: int = 32
    """side of the pictures, in pixels: small ones leave the loader most to do"""
    batch_size: int = 64
    """images in a step"""
    output: Path | None = None
    """JSON file to write"""


def anonymous_bytes(pid: int) -> int:
    """The memory of a process that no file stands behind; 0 once it is about to end."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def train(config: Config) -> list[int]:
    """Train a run; its anonymous memory in bytes after each epoch."""
    metrics = Path(config.runs_folder) / config.name / "metrics.jsonl"
    command = [sys.executable, str(TRAINER), *as_arguments(config)]
    seen: list[int] = []
    with tempfile.TemporaryFile("w+") as errors:
        trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while trainer.poll() is None:
                epochs = len(read_metrics(metrics)) if metrics.exists() else 0
                if epochs > len(seen) and (held := anonymous_bytes(trainer.pid)):
                    seen.append(held)
                    what = config.workers, epochs, held / 1e6
                    log.info("workers %d, after epoch %d: %.1f MB", *what)
                time.sleep(0.02)
        finally:
            trainer.terminate()
            trainer.wait()
        if trainer.returncode:
            errors.seek(0)
            raise UserError(f"trainer.py ended with {trainer.returncode}: {errors.read().strip()}")
    if len(seen) != config.epochs:
        raise UserError(
            f"the end of {config.epochs - len(seen)} of {config.epochs} epochs was missed: they "
            "are too short, give more pictures or larger ones (--px)"
        )
    return seen


def main() -> None:
    """One run after another."""
    options = parse_options(BenchmarkOptions, __doc__)
    start_log(None)
    if min(options.workers, default=0) < 1 or options.epochs < 1:
        raise UserError("workers and epochs must be 1 or more")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a trainer ends with this, too
    parts = [str(options.pictures)] * 2
    if options.pictures.is_dir():
        parts = [str(options.pictures / part) for part in ("train", "val")]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            train_folder_name=parts[0],
            val_folder_name=parts[1],
            runs_folder=folder,
            epochs=options.epochs,
            batch_size=options.batch_size,
            train_px=options.px,
            val_px=options.px,
            val_resize_px=options.px,
            val_batch_size=options.batch_size,
        )
        bytes_after_epochs = {
            workers: train(dataclasses.replace(config, workers=workers, name=f"workers_{workers}"))
            for workers in options.workers
        }
    if options.output:
        record = {
            "settings": {name: getattr(options, name) for name in ("epochs", "px", "batch_size")},
            "anonymous_bytes_after_epochs": bytes_after_epochs,
            "hardware": describe_computer(),
            "versions": versions(),
        }
        write_json(options.output, record)


if __name__ == "__main__":
    run_stage(main)
