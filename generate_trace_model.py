"""Export a trained model: TorchScript, ONNX for the app and AWS Lambda, torch.export's file.

    python3 generate_trace_model.py                       the most recent run, its best weights
    python3 generate_trace_model.py --name NAME --weights last
    python3 generate_trace_model.py --formats torchscript onnx pt2

Reads config.json and best.pt of runs/<name>/. Writes into runs/<name>/export/, in float32:

    model.pt     TorchScript, for `torch.jit.load`; deprecated in PyTorch, and not to be had from
                 Python 3.14 on
    model.onnx   ONNX of opset 18, for batches of any size; the fields of model.json are its
                 metadata_props. Its second output, activation_maps, says which places of the
                 picture speak for each class
    model.pt2    on request: torch.export's file, for `torch.export.load("model.pt2").module()` and
                 batches of any size; it carries model.json as an extra file of that name
    model.json   labels, input size, mean, deviation and resize rule, the accuracy that was
                 measured, the SHA-256 of each file
    examples/    a few validation images

and copies into the app's folder what the app reads: model.onnx, model.json, examples/. Nothing is
written unless the outputs of each file, read back, equal the model's, for one picture and for seven
or more at once: to 1e-5, in ONNX to 1e-4, times the largest logit where that is more than 1.
"""

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import data
import image_files
from model import ResNet50Wrapper, human_names, load_weights
from utils import (
    EXIT_FAILED,
    MEAN,
    STD,
    Config,
    DeploymentConfig,
    UserError,
    check_writable,
    is_number,
    latest_run,
    parse_options,
    read_json,
    read_metrics,
    read_run,
    run_folder,
    run_stage,
    write_atomically,
    write_json,
)

# Largest difference between an exported and an eager logit, where no logit is beyond 1; else it is
# relative to the largest. ONNX Runtime has convolutions of its own, and BatchNorm folded into them.
TOLERANCES = {"torchscript": 1e-5, "onnx": 1e-4, "pt2": 1e-5}
LEAST_BATCH = 7  # images in a batch that the formats are compared on, beside one alone
MAX_EXAMPLES = 100  # they are compared in one batch, which takes 10 MB of memory an image
ONNX_OPSET = 18  # the exporter's own; later ones have nothing that ResNet-50 uses
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
    file_name: str  # in examples/; the class's own may be too long, or no text
    content: bytes  # of that file


class Export(NamedTuple):
    """The model as a file of one format."""

    file: str  # its name
    content: bytes
    run: Callable[[torch.Tensor], torch.Tensor]  # what a reader of the file will get
    about: dict[str, Any]  # what model.json has beside the file's name and hash


def trace(model: ResNet50Wrapper, px: int) -> torch.jit.ScriptModule:
    """The model as TorchScript, for inputs (N, 3, px, px)."""
    return torch.jit.trace(model, torch.zeros(1, 3, px, px))


def as_torchscript(model: ResNet50Wrapper, px: int, metadata: dict[str, Any]) -> Export:
    """TorchScript, which has no place for the metadata; prints its graph."""
    # Said once, in the README, and not five times at every export.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
    print("Tracing model on device: cpu")
    traced = trace(model, px)
    print(traced.graph)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    content = buffer.getvalue()
    return Export("model.pt", content, torch.jit.load(io.BytesIO(content)), {})


def export_program(model: torch.nn.Module, px: int) -> torch.export.ExportedProgram:
    """The model as torch.export has it, for inputs (N, 3, px, px) of any N from 1 on."""
    batch = {0: torch.export.Dim("batch", min=1)}
    # A batch of two: torch.export would take one of one picture for a constant.
    program = torch.export.export(model, (torch.zeros(2, 3, px, px),), dynamic_shapes=(batch,))
    for node in program.graph.nodes:  # which lines made it, with the folders of this computer
        node.meta.pop("stack_trace", None)
    return program


def as_pt2(model: ResNet50Wrapper, px: int, metadata: dict[str, Any]) -> Export:
    """torch.export's file, the metadata in it as the extra file model.json."""
    buffer = io.BytesIO()
    extra_files = {"model.json": json.dumps(metadata)}
    torch.export.save(export_program(model, px), buffer, extra_files=extra_files)
    content = buffer.getvalue()
    loaded = torch.export.load(io.BytesIO(content)).module()
    return Export("model.pt2", content, loaded, {})


class WithActivationMaps(torch.nn.Module):
    """A ResNet that gives, beside its logits, what each place of the last features adds to them.

    The class activation maps of Zhou et al., arXiv 1512.04150: the last layer's weights over the
    features, float32 (N, classes, height, width). The mean of a map over the places, with the bias
    of its class, is the logit.
    """

    def __init__(self, model: ResNet50Wrapper) -> None:
        super().__init__()
        self.resnet = model.model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (N, classes) and maps of a batch (N, 3, H, W)."""
        resnet = self.resnet
        features = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
        for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
            features = stage(features)
        maps = resnet.fc.weight @ features.flatten(2)
        logits = resnet.fc(resnet.avgpool(features).flatten(1))
        return logits, maps.unflatten(2, features.shape[2:])


def as_onnx(model: ResNet50Wrapper, px: int, metadata: dict[str, Any]) -> Export:
    """ONNX by the exporter that builds on torch.export; each field of the metadata is a property.

    A property is text: what is no text is put there as JSON.
    """
    import onnx  # these take a second, in which a mistake is answered already
    import onnxruntime

    proto = torch.onnx.export(
        export_program(WithActivationMaps(model).eval(), px),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits", "activation_maps"],
        opset_version=ONNX_OPSET,
    ).model_proto
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    del proto.graph.value_info[:]  # shapes between the layers, in which it has another name
    properties = {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in metadata.items()
    }
    onnx.helper.set_model_props(proto, properties)
    onnx.checker.check_model(proto)
    content = proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

    return Export("model.onnx", content, run, {"opset": ONNX_OPSET})


EXPORTERS = {"torchscript": as_torchscript, "onnx": as_onnx, "pt2": as_pt2}


def largest_difference(
    model: Callable[[torch.Tensor], torch.Tensor],
    exported: Callable[[torch.Tensor], torch.Tensor],
    images: torch.Tensor,
) -> tuple[float, float]:
    """The largest difference of any logit: of the batch (N, 3, H, W), and of its first alone.

    And the largest of the model's logits, both without their signs. Of fewer than LEAST_BATCH
    images, some are in the batch several times.
    """
    batch = images[torch.arange(max(LEAST_BATCH, len(images))) % len(images)]
    with torch.inference_mode():
        eager = torch.cat([model(batch), model(images[:1])])
        logits = torch.cat([exported(batch), exported(images[:1])])
    return (eager - logits).abs().max().item(), eager.abs().max().item()


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
            return Example(path, label, f"{label:04}{suffix}", content)
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
    """Export, compare, and write the files."""
    options = parse_options(DeploymentConfig, __doc__)
    formats = tuple(dict.fromkeys(options.formats))
    links = {"card_url": options.card_url, "code_url": options.code_url}
    links = {key: url for key, url in links.items() if url}
    for key, url in links.items():
        if not re.fullmatch(r"https?://[^\s()<>]+", url):
            raise UserError(f"--{key.replace('_', '-')} {url!r} is no address: https://...")
    if not 0 <= options.examples <= MAX_EXAMPLES:
        raise UserError(f"examples is {options.examples}: it must be 0 to {MAX_EXAMPLES}")
    if not formats:
        raise UserError(f"no --formats: name one or several of {', '.join(EXPORTERS)}")
    name = options.name or latest_run(options.runs_folder)
    folder = run_folder(options.runs_folder, name)
    unfinished = ", which is not finished" * (not (folder / "result.json").exists())
    print(f"exporting {'the most recent run: ' * (not options.name)}{name}{unfinished}")
    run = read_run(folder)
    weights = folder / f"{options.weights}.pt"
    if run is None or not weights.exists():
        raise UserError(f"no {weights}: train the run first with python3 trainer.py --name {name}")
    config, classes, _ = run
    targets = {folder / "export": "--runs-folder"}
    if "onnx" in formats:
        targets[Path(options.app_folder)] = "--app-folder"
    for target, option in targets.items():
        check_writable(target, option)
        if (target / "examples").exists() and not (target / "model.json").exists():
            raise UserError(
                f"{target}/examples is there, but no model.json beside it: it may be yours, and an "
                f"export would replace it: move it away, or choose another {option}"
            )
    model, digest, accuracy = measured_weights(folder, options.weights, len(classes))
    print(options)

    labels = human_names(classes)
    examples = choose_examples(config.val_folder_name, classes, options.examples)
    images = example_images(examples, config)
    metadata = {
        "format": 1,
        "name": name,
        "classes": list(classes),
        "labels": labels,
        "input_px": config.val_px,
        "resize_px": config.val_resize_px,
        "mean": list(MEAN),
        "std": list(STD),
        "resize_rule": RESIZE_RULE,
        "weights": options.weights,
        "weights_sha256": digest,
        **accuracy,
        **links,
    }
    exports: dict[str, Export] = {}
    for kind in formats:
        exports[kind] = EXPORTERS[kind](model, config.val_px, metadata)
        compare(kind, model, exports[kind], images, bool(examples))
    show_predictions(exports[formats[0]].run, images, labels, examples)
    for target in targets:
        kinds = formats if target == folder / "export" else ("onnx",)
        write_export(target, {kind: exports[kind] for kind in kinds}, metadata, examples)


def compare(
    kind: str, model: ResNet50Wrapper, export: Export, images: torch.Tensor, are_photos: bool
) -> None:
    """Say by how much an export's outputs differ from the model's; UserError if by too much."""
    word = "traced" if kind == "torchscript" else kind
    difference, largest = largest_difference(model, export.run, images)
    allowed = TOLERANCES[kind] * max(1.0, largest)
    if not difference <= allowed:  # not a number is refused too
        raise UserError(
            f"{word} and eager outputs differ by {difference:.2g}, more than {allowed:.1e}: "
            "nothing was written",
            EXIT_FAILED,
        )
    print(
        f"{word} and eager outputs differ by at most {difference:.1e} (allowed: {allowed:.1e}) on "
        f"{len(images)} {'validation images' if are_photos else 'pictures of noise'}"
    )


def show_predictions(
    exported: Callable[[torch.Tensor], torch.Tensor],
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


def measured_weights(
    folder: Path, weights: str, num_classes: int
) -> tuple[ResNet50Wrapper, str, dict[str, Any]]:
    """A run's model for inference, its weights' SHA-256, and what measured_accuracy has of them.

    Raises UserError, also where a training that runs replaces either meanwhile.
    """
    path = folder / f"{weights}.pt"

    def stands() -> tuple[str, dict[str, Any]]:
        return hashlib.sha256(path.read_bytes()).hexdigest(), measured_accuracy(folder, weights)

    before = stands()
    try:
        model = load_weights(path, num_classes).eval()
    except ValueError as error:
        raise UserError(f"{error}: put a copy there, or take others with --weights") from None
    if stands() != before:
        raise UserError(f"{path} was replaced while it was read: give the same command again")
    return model, *before


def measured_accuracy(folder: Path, weights: str) -> dict[str, Any]:
    """Epoch of the weights and the validation accuracy that the trainer measured."""
    path = folder / "metrics.jsonl"
    fields = ("epoch", "val_top1", "val_top5", "val_images")
    rows = read_metrics(path, fields) if path.exists() else []
    if not rows:
        raise UserError(f"no epoch has finished yet: {path} is missing or empty")
    row = rows[-1] if weights == "last" else max(rows, key=lambda row: row["val_top1"])
    path = folder / "result.json"
    result = read_json(path)
    if result is not None:
        if not isinstance(result, dict) or not all(is_number(result.get(name)) for name in fields):
            raise UserError(f"{path} lacks an epoch or its accuracy: bring back a copy")
        if result["epoch"] == row["epoch"]:
            row = result  # the last evaluation: these weights, in fp32 as they are served
    return {field: row[field] for field in fields}


def write_export(
    folder: Path, exports: dict[str, Export], metadata: dict[str, Any], examples: Sequence[Example]
) -> None:
    """Write the models, model.json and examples/ into a folder, in place of an earlier export.

    Pictures that somebody has put into examples/ stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        kind: {
            "file": export.file,
            "sha256": hashlib.sha256(export.content).hexdigest(),
            **export.about,
        }
        for kind, export in exports.items()
    }
    for export in exports.values():
        write_atomically(folder / export.file, export.content)
    write_json(folder / "model.json", {**metadata, "formats": described})
    files = [export.file for export in exports.values()]
    for other in {"model.pt", "model.pt2", "model.onnx"} - set(files):
        (folder / other).unlink(missing_ok=True)
    (folder / "examples").mkdir(exist_ok=True)
    for path in (folder / "examples").iterdir():
        if re.fullmatch(r"\d{4}\.[a-z0-9]+", path.name):  # as first_example names them
            path.unlink()
    for example in examples:
        (folder / "examples" / example.file_name).write_bytes(example.content)
    print(f"wrote {folder / files[0]}, {', '.join([*files[1:], 'model.json'])} and examples/")


if __name__ == "__main__":
    run_stage(main)
