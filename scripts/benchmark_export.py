"""How long one picture takes on the CPU: eager PyTorch, TorchScript, torch.export's .pt2, ONNX.

    python3 scripts/benchmark_export.py --output export_latency.json

ResNet-50 with 1,000 outputs, exported by generate_trace_model.py's own functions, each file read
back; ONNX, which gives activation maps too, is run by ONNX Runtime. After a warm-up they
take turns in blocks of ten pictures, and each block begins with one that does not count, since the
threads of the one before may still be awake. Prints medians and percentiles of the milliseconds
from a float32 tensor to the logits; --output takes a JSON file with hardware and versions.
"""

import contextlib
import dataclasses
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import generate_trace_model
from model import ResNet50Wrapper
from utils import (
    UserError,
    describe_computer,
    parse_options,
    run_stage,
    versions,
    write_json,
)

BLOCK = 10  # pictures that count, before the next one's turn
WARM_UP = 10  # pictures before the first


@dataclasses.dataclass(frozen=True)
class BenchmarkOptions:
    """How much is measured, and on how many threads."""

    px: int = 224
    """side of the picture, in pixels"""
    pictures: int = 200
    """pictures that count, for each format and number of threads; a multiple of 10"""
    threads: tuple[int, ...] = (1, 2)
    """numbers of threads"""
    output: Path | None = None
    """JSON file to write"""


def load_all(px: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """The same model as PyTorch has it, and read back from each format."""
    torch.manual_seed(0)
    model = ResNet50Wrapper(1000).eval()
    with contextlib.redirect_stdout(io.StringIO()):  # TorchScript's graph
        exports = {
            kind: exporter(model, px, {})
            for kind, exporter in generate_trace_model.EXPORTERS.items()
        }
    found = {"eager": model, **{kind: export.run for kind, export in exports.items()}}
    found["onnx"] = exports["onnx"].content  # a session has a number of threads of its own
    return found


def onnx_runner(content: bytes, threads: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """ONNX Runtime on this many threads."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    # Its threads would otherwise stay awake and take the cores from whoever is next.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(content, settings, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images.numpy()})


def measure(
    runners: dict[str, Callable[[torch.Tensor], Any]], images: torch.Tensor, pictures: int
) -> dict[str, list[float]]:
    """Milliseconds of each picture, by format."""
    found: dict[str, list[float]] = {name: [] for name in runners}
    with torch.inference_mode():
        for run in runners.values():
            for _ in range(WARM_UP):
                run(images)
        for _ in range(pictures // BLOCK):
            for name, run in runners.items():
                run(images)
                for _ in range(BLOCK):
                    started = time.perf_counter()
                    run(images)
                    found[name].append(1e3 * (time.perf_counter() - started))
    return found


def main() -> None:
    """Export, measure, print."""
    options = parse_options(BenchmarkOptions, __doc__)
    if options.pictures < BLOCK or options.pictures % BLOCK or min(options.threads, default=0) < 1:
        raise UserError("pictures must be a multiple of 10 from 10 on, each of threads 1 or more")
    loaded = load_all(options.px)
    images = torch.rand(1, 3, options.px, options.px, generator=torch.Generator().manual_seed(0))
    results = []
    for threads in options.threads:
        torch.set_num_threads(threads)
        runners = {**loaded, "onnx": onnx_runner(loaded["onnx"], threads)}
        for name, times_ms in measure(runners, images, options.pictures).items():
            ordered = sorted(times_ms)
            # Rounded once, so that what is printed is what is written.
            row = {
                "format": name,
                "threads": threads,
                "median_ms": round(statistics.median(ordered), 3),
                **{f"p{p}_ms": round(ordered[p * len(ordered) // 100], 3) for p in (5, 95)},
            }
            results.append(row)
            print(
                f"{threads} thread{'s' * (threads > 1)}  {name:<12} {row['median_ms']:7.1f} ms "
                f"(5 % below {row['p5_ms']:.1f}, 5 % above {row['p95_ms']:.1f})",
                flush=True,
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(
            options.output,
            {
                "settings": {"px": options.px, "pictures": options.pictures},
                "results": results,
                "hardware": describe_computer(),
                "versions": versions(("onnx", "onnxscript", "onnxruntime")),
            },
        )


if __name__ == "__main__":
    run_stage(main)
