"""Whether what is served answers as the model did in validation, on real photos.

    python3 scripts/check_serving.py --name NAME --count 200 --output serving.json

Takes photos, evenly spaced, from the run's validation set or --photos (a folder with a folder a
class), and compares with the run's own weights and preprocessing: every format in
runs/<name>/export/ on the same input, the app in a process of its own over HTTP, the Lambda
function's handler on the event of a request, and predict.py's functions. Prints how far the inputs
are apart, in grey levels, and for how many photos the five likeliest classes are the same, in the
same order. More than one grey level, or other classes, end with exit code 1.
"""

import dataclasses
import importlib
import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "gradio_deploy"))

import classifier
import lambda_runtime
import stress_app

import data
import image_files
from model import load_weights
from utils import (
    EXIT_FAILED,
    MEAN,
    STD,
    UserError,
    describe_computer,
    latest_run,
    parse_options,
    read_run,
    run_folder,
    run_stage,
    stale_export,
    versions,
    write_json,
)

ROOT = Path(__file__).resolve().parent.parent
TOP = 5
MAX_GREY_LEVELS = 1.0


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Which run, and which photos."""

    name: str = ""
    """the run; the most recent one if empty"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    photos: str = ""
    """folder or store of the photos; the run's own validation set if empty"""
    count: int = 200
    """how many photos"""
    output: Path | None = None
    """JSON file to write"""


def exported(
    folder: Path, export: dict[str, Any]
) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """What each file of an export gives for a batch (N, 3, H, W): logits (N, classes)."""
    formats = export["formats"]
    found: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}
    if "torchscript" in formats:
        warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated")
        found["TorchScript"] = torch.jit.load(folder / "model.pt")
    if "pt2" in formats:
        found[".pt2"] = torch.export.load(folder / "model.pt2").module()
    session, _ = classifier.load_export(folder)
    found["ONNX Runtime"] = lambda images: torch.from_numpy(
        session.run(["logits"], {"images": images.numpy()})[0]
    )
    return found


def ask_app(app: stress_app.App, content: bytes, export: dict[str, Any]) -> list[str]:
    """The five likeliest classes as the running app gives them."""
    answer = stress_app.classify(app, "photo.jpg", content)
    if answer.event != "complete":
        raise UserError(f"the app did not answer: {answer.text[:200]}", EXIT_FAILED)
    by_name = dict(zip(classifier.class_names(export), export["classes"], strict=True))
    shown = json.loads(answer.text)[0]["confidences"]
    return [by_name[entry["label"]] for entry in shown[:TOP]]


def ask_lambda(handler: Any, content: bytes) -> list[str]:
    """The five likeliest classes as the Lambda function gives them."""
    answer = json.loads(handler.handler(lambda_runtime.post(content), None)["body"])
    if "predictions" not in answer:
        raise UserError(f"the Lambda function did not answer: {answer['error']}", EXIT_FAILED)
    return [entry["class"] for entry in answer["predictions"]]


def deployed(folder: Path, source: str, export: Path) -> Path:
    """A copy of a folder's code with the export beside it."""
    shutil.copytree(
        ROOT / source, folder, ignore=shutil.ignore_patterns("model.*", "examples", "__pycache__")
    )
    for file in (
        ROOT / "gradio_deploy/classifier.py",
        ROOT / "gradio_deploy/decoder.py",
        export / "model.onnx",
        export / "model.json",
    ):
        shutil.copy(file, folder)
    return folder


def main() -> None:
    """Ask everybody about every photo, and compare."""
    options = parse_options(ServingOptions, __doc__)
    name = options.name or latest_run(options.runs_folder)
    folder = run_folder(options.runs_folder, name)
    if options.count < 1:
        raise UserError(f"count is {options.count}: it must be 1 or more")
    if options.output and not options.output.absolute().parent.is_dir():
        raise UserError(f"no folder for --output {options.output}")
    run = read_run(folder)
    if run is None:
        raise UserError(f"no {folder}/config.json: name a run with --name")
    config, classes, _ = run
    photos = image_files.open_image_set(options.photos or config.val_folder_name, "val")
    try:
        export, *_ = classifier.read_export(folder / "export")
        if complaint := stale_export(folder, export):
            raise UserError(complaint)
        model = load_weights(folder / f"{export['weights']}.pt", len(classes)).eval()
        files = exported(folder / "export", export)
    except (classifier.ExportError, ValueError, OSError, RuntimeError) as error:
        told = " ".join(str(error).split())[:300]
        raise UserError(f"{told}: export again with python3 generate_trace_model.py") from None
    std = np.array(STD).reshape(3, 1, 1)
    indices = np.unique(np.linspace(0, len(photos.labels) - 1, options.count).astype(int)).tolist()
    same = dict.fromkeys([*files, "predict.py", "app", "Lambda"], 0)
    grey_levels, differences = 0.0, dict.fromkeys(files, 0.0)
    with tempfile.TemporaryDirectory() as place:
        task = deployed(Path(place) / "task", "lambda_deploy", folder / "export")
        sys.path.insert(0, str(task))
        handler = importlib.import_module("handler")
        app_folder = deployed(Path(place) / "app", "gradio_deploy", folder / "export")
        with stress_app.start_app(app_folder) as app, torch.inference_mode():
            for index in indices:
                content = bytes(photos.read(index)[0])
                shown = np.empty((config.val_px, config.val_px, 3), np.uint8)
                try:
                    data.fill_val(config, image_files.encoded(content), 0, shown)
                    served, _ = classifier.preprocess(classifier.open_picture(content), export)
                except (classifier.RefusedError, ValueError, OSError) as error:
                    raise UserError(f"{photos.path(index)}: {error}") from None
                images = data.normalize(torch.from_numpy(shown)[None]).contiguous()
                logits = model(images)[0]
                expected = [classes[i] for i in logits.argsort(descending=True)[:TOP]]
                apart = 255 * np.abs(served[0] - images[0].numpy()) * std
                grey_levels = max(grey_levels, float(apart.max()))
                answers = {
                    "app": ask_app(app, content, export),
                    "Lambda": ask_lambda(handler, content),
                }
                for kind, run in files.items():
                    found = run(images)[0]
                    differences[kind] = max(differences[kind], (found - logits).abs().max().item())
                    answers[kind] = [classes[i] for i in found.argsort(descending=True)[:TOP]]
                (found,) = handler.SESSION.run(["logits"], {"images": served})
                likeliest = classifier.likeliest(found[0], export, TOP)
                answers["predict.py"] = [one.class_id for one in likeliest]
                for kind, answer in answers.items():
                    same[kind] += answer == expected
    print(f"inputs are at most {grey_levels:.4f} grey levels apart on {len(indices)} photos")
    for kind, count in same.items():
        logit = f", logits apart by at most {differences[kind]:.1e}" if kind in differences else ""
        print(f"  {kind:<12} the same {TOP} likeliest classes for {count} of {len(indices)}{logit}")
    if options.output:
        write_json(
            options.output,
            {
                "photos": len(indices),
                "mean_std": [list(MEAN), list(STD)],
                "grey_levels_apart": round(grey_levels, 5),
                "same_top5": same,
                "logits_apart": {kind: float(f"{x:.2e}") for kind, x in differences.items()},
                "hardware": describe_computer(),
                "versions": versions(("onnxruntime", "gradio")),
            },
        )
    if grey_levels > MAX_GREY_LEVELS or min(same.values()) < len(indices):
        raise UserError("what is served differs from what was measured", EXIT_FAILED)


if __name__ == "__main__":
    run_stage(main)
