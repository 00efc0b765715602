"""What a trained classifier sees in a picture file, by ONNX Runtime: no PyTorch, no network.

Shared by the web page (app.py), the AWS Lambda function (lambda_deploy/handler.py) and the command
line (predict.py). It reads two of the files that `generate_trace_model.py` writes into a folder:
`model.onnx`, and `model.json` with its SHA-256, labels, sizes, mean and standard deviation. A
picture is decoded by decoder.py and prepared as in validation, to one grey level.
"""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime
from decoder import Decoder, RefusedError
from PIL import Image


def is_text(value: Any) -> bool:
    """Whether a value of model.json is a text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Whether it is a number, 0 or more; JSON as Python has it knows NaN and Infinity too."""
    return type(value) in (int, float) and 0 <= value < math.inf


def is_list_of(is_one: Callable[[Any], bool], value: Any) -> bool:
    """Whether it is a list of such values, at least one."""
    return isinstance(value, list) and bool(value) and all(map(is_one, value))


MODEL_FORMAT = 1  # of model.json; the exporter counts it up when a key changes its meaning
KEYS: dict[str, Callable[[Any], bool]] = {  # and what is read of them
    "name": is_text,
    "classes": lambda value: is_list_of(is_text, value),
    "labels": lambda value: is_list_of(is_text, value),
    "input_px": lambda value: type(value) is int and value > 0,
    "resize_px": lambda value: type(value) is int and value > 0,
    "mean": lambda value: is_list_of(is_number, value) and len(value) == 3,
    "std": lambda value: is_list_of(is_number, value) and len(value) == 3 and min(value) > 0,
    "weights": is_text,
    "epoch": is_number,
    "val_top1": is_number,
    "val_top5": is_number,
    "val_images": is_number,
    "formats": lambda value: isinstance(value, dict),
}

HEIC = re.compile(rb".{4}ftyp(hei|hev|mif1|msf1)", re.DOTALL)  # AVIF may begin like the last two
MAX_BYTES = 20 << 20
DECODER = Decoder()


class ExportError(Exception):
    """The export's files are missing or do not belong together: a clause that says which."""


# ------------------------------------------------------------------------------ the model


def read_model_json(folder: Path, sha256: str = "") -> dict[str, Any]:
    """What model.json says of the files beside it; raises ExportError, also for another sha256."""
    description = folder / "model.json"
    content = read_file(description)
    if sha256 and hashlib.sha256(content).hexdigest() != sha256.lower():
        raise ExportError(f"{description} is not the one whose SHA-256 was given")
    try:
        export = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{description} is not JSON ({error})") from None
    if not isinstance(export, dict) or export.get("format") != MODEL_FORMAT:
        raise ExportError(f"{description} is not of format {MODEL_FORMAT}, which is read here")
    if missing := [key for key in KEYS if key not in export]:
        raise ExportError(f"{description} has no {', '.join(missing)}")
    if wrong := [key for key, is_right in KEYS.items() if not is_right(export[key])]:
        raise ExportError(f"{description} has what cannot be used as {', '.join(wrong)}")
    if export["resize_px"] < export["input_px"]:
        raise ExportError(f"{description} has a resize_px below its input_px")
    return export


def read_export(folder: Path, model_json_sha256: str = "") -> tuple[dict[str, Any], Path, bytes]:
    """model.json, and path and content of the ONNX file that it describes; raises ExportError.

    A model_json_sha256 pins both files.
    """
    export = read_model_json(folder, model_json_sha256)
    described = export["formats"].get("onnx")
    file = described.get("file") if isinstance(described, dict) else None
    if not (isinstance(file, str) and re.fullmatch(r"\w[\w.-]{0,99}", file, re.ASCII)):
        raise ExportError(f"{folder / 'model.json'} names no ONNX file in its own folder")
    path = folder / file
    content = read_file(path)
    if hashlib.sha256(content).hexdigest() != described.get("sha256"):
        raise ExportError(f"{path} is not the file that model.json describes (its sha256 differs)")
    return export, path, content


def load_export(
    folder: Path, threads: int = 0, model_json_sha256: str = ""
) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """The model and its model.json, after a check that the files in `folder` belong together.

    The model takes `images`, float32 (N, 3, input_px, input_px), and gives `logits`, float32
    (N, classes). 0 threads: one for each CPU. Raises ExportError.
    """
    export, path, content = read_export(folder, model_json_sha256)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or cpus()
    # Its threads would otherwise burn the CPU for a while after each picture.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        shape = (1, 3, export["input_px"], export["input_px"])
        (logits,) = session.run(["logits"], {"images": np.zeros(shape, np.float32)})
    except Exception as error:  # ONNX Runtime has a class for each of its codes, and no base
        raise ExportError(f"{path} does not run ({str(error).strip().splitlines()[-1]})") from None
    if not logits.shape[1] == len(export["labels"]) == len(export["classes"]):
        raise ExportError(
            f"{path} has {logits.shape[1]} outputs, model.json has "
            f"{len(export['labels'])} labels and {len(export['classes'])} classes"
        )
    return session, export


def read_file(path: Path) -> bytes:
    """The bytes of one of the export's files; raises ExportError."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ExportError(f"{path} is missing") from None
    except OSError as error:
        raise ExportError(f"{path} cannot be read ({error.strerror})") from None


def cpus() -> int:
    """How many CPUs this process may use: of a container's share, not of its host's."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:  # version 2 of Linux's control groups, admin-guide/cgroup-v2.rst, cpu.max
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(count, round(int(quota) / int(period))))
    except (OSError, ValueError):  # another system, or no limit: "max"
        return count or 1


# ------------------------------------------------------------------------------ the picture


def open_picture(content: bytes) -> Image.Image:
    """The first frame of a picture file as a person sees it: 8-bit RGB, upright, on white.

    Raises RefusedError for what is no picture, damaged, too large, or of a rare format.
    """
    if not content:
        raise RefusedError(400, "The picture is empty.")
    if len(content) > MAX_BYTES:
        raise RefusedError(413, f"The picture has more than {MAX_BYTES >> 20} MB.")
    if HEIC.match(content) and b"avif" not in content[:64]:
        raise RefusedError(
            415,
            "This is a HEIC photo, which is not read here: send it as a JPEG "
            "(on an iPhone: Settings, Camera, Formats, Most Compatible).",
        )
    return DECODER.decode(content)


Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels


def preprocess(picture: Image.Image, export: dict[str, Any]) -> tuple[np.ndarray, Box]:
    """RGB picture → the model's input, as in validation, and the box of the picture that it shows.

    The shorter side becomes resize_px (bilinear, antialiased), the centre input_px are kept; only
    what the crop shows is resized. The input is float32 (1, 3, input_px, input_px).
    """
    px, (width, height) = export["input_px"], picture.size
    resized = [int(export["resize_px"] * side / min(width, height)) for side in picture.size]
    left, top = (round((side - px) / 2) for side in resized)
    across, down = width / resized[0], height / resized[1]
    box = (left * across, top * down, (left + px) * across, (top + px) * down)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))  # rounding of the last digit
    pixels = np.asarray(picture.resize((px, px), Image.Resampling.BILINEAR, box=box), np.float32)
    mean, std = (np.array(export[key], np.float32) for key in ("mean", "std"))
    return np.ascontiguousarray(((pixels / 255 - mean) / std).transpose(2, 0, 1)[None]), box


# ------------------------------------------------------------------------------ the answer


class Prediction(NamedTuple):
    """One of the likeliest classes."""

    class_id: str
    label: str
    probability: float


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis, float32; no size of logits overflows."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def likeliest(logits: np.ndarray, export: dict[str, Any], count: int = 5) -> list[Prediction]:
    """The `count` classes with the largest of the logits (classes,), the likeliest first."""
    probabilities = softmax(logits)
    return [
        Prediction(export["classes"][index], export["labels"][index], float(probabilities[index]))
        for index in np.argsort(-logits, kind="stable")[:count].tolist()
    ]


def class_names(export: dict[str, Any]) -> list[str]:
    """A name for each output; labels that several classes share (crane) carry their class too."""
    times = Counter(export["labels"])
    return [
        label if times[label] == 1 else f"{label} ({class_id})"
        for label, class_id in zip(export["labels"], export["classes"], strict=True)
    ]


def as_text(name: str) -> str:
    """Markdown that shows a name as it is, whatever stands in it."""
    return re.sub(r"[&<>*_`\[\]\\~$#|:@]", lambda sign: f"&#{ord(sign[0])};", name.strip())
