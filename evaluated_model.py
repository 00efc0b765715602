"""A checkpoint or an export, of any format, as a function from images to logits, for evaluate.py.

Exports are what generate_trace_model.py writes; the model.json beside them says what their outputs
and inputs are, and is compared with them by SHA-256 before a file is loaded. Weights are read as
tensors only. TorchScript is a program, and so is a .pt2: torch.export.load unpickles, and evaluates
the sizes in its graph as Python.
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model import load_weights, names_in
from utils import MEAN, STD, UserError, is_out_of_memory

sys.path.insert(0, str(Path(__file__).resolve().parent / "gradio_deploy"))

import classifier

Predict = Callable[[torch.Tensor], torch.Tensor]  # normalised (N, 3, H, W) → logits (N, classes)

KINDS = {".onnx": "onnx", ".pt2": "pt2", ".pt": "weights", ".pth": "weights"}


def kind_of(path: Path) -> str:
    """What a file holds: weights, torchscript, onnx or pt2; the first two may both be called .pt.

    Raises UserError for other endings, and for a .pt that is no zip file.
    """
    kind = KINDS.get(path.suffix)
    if kind is None:
        raise UserError(f"--model {path} is none of .pt, .onnx and .pt2, which are read here")
    if kind == "weights":
        try:
            names = names_in(path)
        except ValueError:
            raise UserError(f"{path} is damaged, or not PyTorch's: bring back a copy") from None
        if any("/code/" in name for name in names):
            return "torchscript"
    return kind


def class_names(classes: Sequence[str], labels: Sequence[str]) -> list[str]:
    """The labels, each different from all others; bytes that are no text are written out."""
    names = classifier.class_names({"classes": classes, "labels": labels})
    return [name.encode(errors="backslashreplace").decode() for name in names]


def load_checkpoint(path: Path, classes: int, device: torch.device) -> Predict:
    """The model with the weights of a file; raises UserError if they are damaged or of another."""
    try:
        model = load_weights(path, classes)
    except ValueError as error:
        raise UserError(f"{error}: bring back a copy, or name another file") from None
    return model.eval().to(device, memory_format=torch.channels_last)


def read_description(path: Path, kind: str) -> dict[str, Any]:
    """The model.json beside an export, after a check that it describes this very file."""
    description = path.parent / "model.json"
    try:
        export = classifier.read_model_json(path.parent)
    except classifier.ExportError as error:
        raise UserError(again(error)) from None
    described = export["formats"].get(kind)
    if not isinstance(described, dict) or described.get("file") != path.name:
        raise UserError(again(f"{description} does not describe {path.name}"))
    if hashlib.sha256(path.read_bytes()).hexdigest() != described.get("sha256"):
        raise UserError(
            again(f"{path} is not the file that model.json describes (its sha256 differs)")
        )
    if len(export["labels"]) != len(export["classes"]):
        raise UserError(again(f"{description} has not a label for each class"))
    return export


def again(reason: object) -> str:
    """A complaint of an export, in one line, with what to do."""
    told = " ".join(str(reason).split())[:300]
    return f"{told}: export again with python3 generate_trace_model.py"


def load_export(path: Path, kind: str, export: dict[str, Any], device: torch.device) -> Predict:
    """The model of an export that `read_description` found to be whole; raises UserError.

    It takes images as `data.normalize` makes them, whatever its own mean and deviation.
    """
    warnings.filterwarnings("ignore", r"`torch\.jit\.load` is deprecated")
    try:
        if kind == "onnx":
            predict = onnx_model(path.parent)
        elif kind == "torchscript":
            predict = torch.jit.load(path, map_location=device).eval()
        else:
            predict = torch.export.load(path).module().to(device)
    except (classifier.ExportError, RuntimeError, ValueError) as error:
        raise UserError(again(error)) from None
    mean, std = export["mean"], export["std"]
    if (tuple(mean), tuple(std)) == (MEAN, STD):
        return predict
    scale, shift = (
        torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
        for values in (np.divide(STD, std), np.subtract(MEAN, mean) / std)
    )
    return lambda images: predict(images * scale + shift)


def onnx_model(folder: Path) -> Predict:
    """The ONNX file of an export, by ONNX Runtime on the CPU."""
    session, _ = classifier.load_export(folder)
    return lambda images: torch.from_numpy(
        session.run(["logits"], {"images": np.ascontiguousarray(images.numpy())})[0]
    )


def with_mirror_images(predict: Predict) -> Predict:
    """The logarithm of the mean of the probabilities for an image and for its mirror image.

    Its softmax is that mean, and its cross-entropy the mean's.
    """

    def both(images: torch.Tensor) -> torch.Tensor:
        seen, mirrored = (
            predict(view).float().log_softmax(dim=1) for view in (images, images.flip(3))
        )
        return torch.logaddexp(seen, mirrored) - math.log(2)

    return both


def check_size(
    path: Path, predict: Predict, export: dict[str, Any], px: int, device: torch.device
) -> None:
    """Try an export on a black picture of a size; raises UserError if it does not take it.

    TorchScript takes any; ONNX and .pt2, as they are exported, only the one in model.json.
    """
    try:
        with torch.inference_mode():
            shape = tuple(predict(torch.zeros(1, 3, px, px, device=device)).shape)
    except Exception as error:  # ONNX Runtime and torch.export have classes of their own
        if is_out_of_memory(error):
            raise
        if px == export["input_px"]:
            raise UserError(again(f"{path} does not run ({error})")) from None
        raise UserError(
            f"{path} takes pictures of {export['input_px']} px, for which it was exported, not of "
            f"{px}: evaluate the weights at that size, or TorchScript"
        ) from None
    if shape != (1, len(export["classes"])):
        raise UserError(
            again(f"{path} has {shape[-1]} outputs, model.json {len(export['classes'])} classes")
        )
