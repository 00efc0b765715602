"""How large the Lambda function's package is, how soon it answers first, and how fast then.

    python3 scripts/benchmark_lambda.py --name NAME --photo photo.jpg --output lambda.json

Builds the package that scripts/aws/function.py would bring to AWS, from the run's export, unpacks
it, and runs it under Lambda's Python and AWS's own runtime client, awslambdaric, on one CPU: what a
function of 1,769 MB has. A first answer counts from the start of the process; on AWS the package's
download comes before it. The files are in the page cache from the second start on.
"""

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "aws"))

import lambda_runtime
from function import RUNTIME, WHEELS, build_package, find_export

from utils import (
    EXIT_FAILED,
    UserError,
    describe_computer,
    parse_options,
    run_stage,
    versions,
    write_json,
)


@dataclasses.dataclass(frozen=True)
class LambdaOptions:
    """Which model answers what, and how often."""

    photo: Path
    """the picture that it is asked about"""
    name: str = ""
    """the run; the most recent one if empty"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    python: str = RUNTIME
    """the interpreter, of the version that Lambda has"""
    starts: int = 5
    """how often the function is started"""
    pictures: int = 200
    """how many more answers the last start gives"""
    output: Path | None = None
    """JSON file to write"""


def install_client(folder: Path) -> None:
    """AWS's runtime client, which on AWS is there already."""
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    what = ("--only-binary", ":all:", *WHEELS, "--target", str(folder), "awslambdaric")
    done = subprocess.run([*pip, *what], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"pip cannot fetch awslambdaric: {done.stderr.strip()[-300:]}", EXIT_FAILED)


def version_of(python: str) -> str:
    """Version of an interpreter."""
    command = [python, "-c", "import platform; print(platform.python_version())"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    """Build, start, ask, print."""
    options = parse_options(LambdaOptions, __doc__)
    if options.starts < 1:
        raise UserError("starts must be 1 or more")
    if options.pictures < 2:
        raise UserError("pictures must be 2 or more")
    python = shutil.which(options.python)
    if python is None:
        raise UserError(f"no {options.python}: name a Python 3.13 with --python")
    if not options.photo.is_file():
        raise UserError(f"no file {options.photo}")
    event = lambda_runtime.post(options.photo.read_bytes())
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    with tempfile.TemporaryDirectory(prefix="resnet50-lambda-") as place:
        folder = Path(place)
        package = build_package(find_export(options), folder)
        task = folder / "task"
        with zipfile.ZipFile(package) as archive:
            archive.extractall(task)
        unpacked_bytes = sum(p.stat().st_size for p in task.rglob("*") if p.is_file())
        install_client(folder / "client")
        starts_s, warm_ms = [], []
        for start in range(options.starts):
            begun = time.perf_counter()
            path = {"PYTHONPATH": str(folder / "client")}
            with lambda_runtime.started(task, [python], path) as runtime:
                status, answer = runtime.ask(event)
                starts_s.append(time.perf_counter() - begun)
                if status != 200:
                    raise UserError(f"{options.photo}: {answer['error']}")
                for _ in range(options.pictures if start == options.starts - 1 else 0):
                    begun = time.perf_counter()
                    runtime.ask(event)
                    warm_ms.append(1e3 * (time.perf_counter() - begun))
        result = {
            "package_mb": round(package.stat().st_size / 1e6, 1),
            "unpacked_mb": round(unpacked_bytes / 1e6, 1),
            "first_answers_s": [round(seconds, 2) for seconds in starts_s],
            "first_answer_median_s": round(statistics.median(starts_s), 2),
            "warm_median_ms": round(statistics.median(warm_ms), 1),
            "warm_p95_ms": round(statistics.quantiles(warm_ms, n=20)[18], 1),
        }
    for key, value in result.items():
        print(f"  {key.replace('_', ' ')}: {value}")
    if options.output:
        settings = {"starts": options.starts, "pictures": options.pictures, "cpus": 1}
        write_json(
            options.output,
            {
                "settings": settings,
                **result,
                "hardware": describe_computer(),
                "versions": {**versions(("onnxruntime",)), "python": version_of(python)},
            },
        )


if __name__ == "__main__":
    run_stage(main)
