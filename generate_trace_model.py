"""Export a trained model as TorchScript, for the app and for anything that runs PyTorch.

    python3 generate_trace_model.py                       the most recent run, its best weights
    python3 generate_trace_model.py --name NAME --weights last

Reads config.json and best.pt of runs/<name>/. Writes into runs/<name>/export/, and copies into the
app's folder: model.pt (TorchScript, float32), model.json (labels, input size, mean, deviation and
resize rule, the accuracy that was measured, the SHA-256 of model.pt) and examples/ (a few
validation images). Nothing is written unless the traced outputs equal the model's to 1e-5.

TorchScript is deprecated in PyTorch and does not work from Python 3.14 on; README.md says what
will take its place.
"""

import contextlib
import hashlib
import io
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import image_files
from model import ResNet50Wrapper, load_weights
from utils import (
    EXIT_FAILED,
    MEAN,
    STD,
    Config,
    DeploymentConfig,
    UserError,
    check_writable,
    latest_run,
    parse_options,
    read_json,
    read_metrics,
    run_folder,
    run_stage,
    write_atomically,
    write_json,
)

TOLERANCE = 1e-5  # largest difference between a traced and an eager logit
RESIZE_RULE = (
    "turn as EXIF says, put transparency on white, RGB; shorter side to resize_px, bilinear with "
    "antialiasing as Pillow has it; centre crop of input_px; divide by 255, less mean, over std"
)

BROWSER_SUFFIXES = {  # of the formats, as Pillow calls them, that every browser shows
    **{"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)},
    **{"GIF": (".gif",), "BMP": (".bmp",)},
}


class Example(NamedTuple):
    """A validation image that is shown beside the app."""

    path: Path  # in a store, what it would be if the store were a folder
    label: int
    file_name: str  # in examples/
    content: bytes  # of that file


def trace(model: ResNet50Wrapper, px: int) -> torch.jit.ScriptModule:
    """The model as TorchScript, for inputs (N, 3, px, px)."""
    return torch.jit.trace(model, torch.zeros(1, 3, px, px))


def largest_difference(
    model: ResNet50Wrapper, traced: torch.jit.ScriptModule, images: torch.Tensor
) -> float:
    """The largest difference of any logit: of the batch (N, 3, H, W), and of its first alone."""
    with torch.inference_mode():
        pairs = [(model(batch), traced(batch)) for batch in (images, images[:1])]
    return max((eager - exported).abs().max().item() for eager, exported in pairs)


def human_names(classes: tuple[str, ...]) -> list[str]:
    """Names that a person reads: ImageNet's for its folders, else the folders' own."""
    import torchvision  # as in model.py

    imagenet = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    if len(classes) == len(imagenet) and all(_is_wordnet_id(name) for name in classes):
        return list(imagenet)  # both are sorted by WordNet id
    imagenette = torchvision.datasets.Imagenette._WNID_TO_CLASS
    return [imagenette[name][0] if name in imagenette else name for name in classes]


def _is_wordnet_id(name: str) -> bool:
    return len(name) == 9 and name[0] == "n" and name[1:].isdigit()


def choose_examples(val_name: str, classes: tuple[str, ...], count: int) -> list[Example]:
    """The first validation image of up to `count` classes, evenly spaced, that can be read."""
    try:
        images = image_files.open_image_set(val_name, "val")
    except UserError as error:
        print(f"the export has no example pictures: {error}")
        return []
    spaced = np.unique(np.linspace(0, len(classes) - 1, count).round().astype(int)).tolist()
    examples = (first_example(images, classes[label], label) for label in spaced)
    return [example for example in examples if example]


def first_example(images: image_files.ImageSet, name: str, label: int) -> Example | None:
    """The first image of a class that can be read, of which it may have none."""
    place = images.classes.index(name) if name in images.classes else -1
    for index in np.flatnonzero(images.labels == place).tolist():
        with contextlib.suppress(ValueError, OSError):
            path, content = images.path(index), bytes(images.read(index)[0])
            suffix, content = for_browsers(path.suffix.lower(), content)
            return Example(path, label, f"{name}{suffix}", content)
    return None


def for_browsers(suffix: str, content: bytes) -> tuple[str, bytes]:
    """An image file as it is, by a name that tells its format; a PNG of what no browser shows.

    A store holds JPEGs by the names of the files that they were made from. Raises ValueError or
    OSError for what cannot be read.
    """
    picture = image_files.decode(content)
    with Image.open(io.BytesIO(content)) as image:
        suffixes = BROWSER_SUFFIXES.get(image.format)
    if suffixes:
        return suffix if suffix in suffixes else suffixes[0], content
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return ".png", file.getvalue()


def example_images(examples: Sequence[Example], config: Config) -> torch.Tensor:
    """Pictures as validation shows them to the model, normalised float32 (N, 3, px, px).

    Where there are no examples, two pictures of noise, which serve to compare outputs.
    """
    shape = (len(examples) or 2, config.val_px, config.val_px, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for out, example in zip(pixels, examples, strict=False):
        data.fill_val(config, image_files.encoded(example.content), 0, out)
    return data.normalize(torch.from_numpy(pixels))


def main() -> None:
    """Trace, compare, and write the files that the app reads."""
    options = parse_options(DeploymentConfig, __doc__)
    # Said once, in the README, and not five times at every export.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    name = options.name or latest_run(options.runs_folder)
    folder = run_folder(options.runs_folder, name)
    if not options.name:
        print(f"exporting the most recent run: {name}")
    record = read_json(folder / "config.json")
    weights = folder / f"{options.weights}.pt"
    if record is None or not weights.exists():
        raise UserError(f"no {weights}: train the run first with python3 trainer.py --name {name}")
    config = Config(**record["config"])
    classes = tuple(record["classes"])
    targets = {folder / "export": "--runs-folder", Path(options.app_folder): "--app-folder"}
    for target, option in targets.items():
        check_writable(target, option)
    accuracy = measured_accuracy(folder, options.weights)
    try:
        model = load_weights(weights, len(classes)).eval()
    except ValueError as error:
        raise UserError(f"{error}: put a copy there, or export another with --weights") from None
    print(options)

    print("Tracing model on device: cpu")
    traced = trace(model, config.val_px)
    print(traced.graph)

    labels = human_names(classes)
    examples = choose_examples(config.val_folder_name, classes, options.examples)
    images = example_images(examples, config)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    content = buffer.getvalue()
    exported = torch.jit.load(io.BytesIO(content))  # what a reader of the file will get
    difference = largest_difference(model, exported, images)
    if not difference <= TOLERANCE:
        raise UserError(
            f"traced and eager outputs differ by {difference:.2g}, more than {TOLERANCE:.0e}: "
            "nothing was written",
            EXIT_FAILED,
        )
    print(
        f"traced and eager outputs differ by at most {difference:.1e} (allowed: {TOLERANCE:.0e}) "
        f"on {len(images)} {'validation images' if examples else 'pictures of noise'}"
    )
    show_predictions(exported, images, labels, examples)
    metadata = {
        "format": 1,
        "name": name,
        "file": "model.pt",
        "sha256": hashlib.sha256(content).hexdigest(),
        "classes": list(classes),
        "labels": labels,
        "input_px": config.val_px,
        "resize_px": config.val_resize_px,
        "mean": list(MEAN),
        "std": list(STD),
        "resize_rule": RESIZE_RULE,
        "weights": options.weights,
        **accuracy,
    }
    for target in targets:
        write_export(target, content, metadata, examples)
        print(f"wrote {target / 'model.pt'}, model.json and examples/")


def show_predictions(
    exported: torch.jit.ScriptModule,
    images: torch.Tensor,
    labels: list[str],
    examples: Sequence[Example],
) -> None:
    """Print what the exported model makes of each example, and what it is."""
    with torch.inference_mode():
        probabilities = exported(images).softmax(dim=1)
    for row, example in zip(probabilities, examples, strict=False):
        guess = int(row.argmax())
        verdict = "right" if guess == example.label else f"wrong: it is {labels[example.label]}"
        print(f"  {example.path}: {labels[guess]}, {100 * row[guess]:.1f} % ({verdict})")


def measured_accuracy(folder: Path, weights: str) -> dict[str, Any]:
    """Epoch of the weights and the validation accuracy that the trainer measured."""
    path = folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    if not rows:
        raise UserError(f"no epoch has finished yet: {path} is missing or empty")
    row = rows[-1] if weights == "last" else max(rows, key=lambda row: row["val_top1"])
    result = read_json(folder / "result.json")
    if weights == "best" and result is not None and result["epoch"] == row["epoch"]:
        row = result  # the last evaluation: these weights, in fp32 as they are served
    return {key: row[key] for key in ("epoch", "val_top1", "val_top5", "val_images")}


def write_export(
    folder: Path, content: bytes, metadata: dict[str, Any], examples: Sequence[Example]
) -> None:
    """Write model.pt, model.json and examples/ into a folder, in place of an earlier export."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / metadata["file"], content)
    write_json(folder / "model.json", metadata)
    shutil.rmtree(folder / "examples", ignore_errors=True)
    (folder / "examples").mkdir()
    for example in examples:
        (folder / "examples" / example.file_name).write_bytes(example.content)


if __name__ == "__main__":
    run_stage(main)
