"""Evaluate a checkpoint or an export on any validation set, and look at where it errs.

    python3 evaluate.py                                       the most recent run's best weights
    python3 evaluate.py --flip-average --sizes 160 192 224 256 288
    python3 evaluate.py --model runs/NAME/export/model.onnx --val-folder-name other.store

Reads a weights file or a checkpoint of a run, or TorchScript, ONNX or .pt2 with the model.json
beside it. Images are prepared and counted as in training's validation: with a run's own settings,
in fp32, the counts are those of its result.json. A validation set may have only some of the model's
classes, which are then matched by name. Writes into runs/<name>/evaluation/, or --output:

    evaluation.json   everything that was found, the protocol, hardware and versions
    per_class.csv     images and right answers of each class, and what it is mostly taken for
    evaluation.png    calibration, and the accuracy of the classes
    worst.png         the images with the highest loss, as the model saw them
    sizes.png         with --sizes: accuracy against the size of the images
"""

import csv
import dataclasses
import hashlib
import io
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import tqdm

import data
import engine
import error_analysis
import evaluated_model
import image_files
import preflight
from error_analysis import Answers, Shown
from evaluated_model import Predict
from model import human_names
from utils import (
    EXIT_FAILED,
    Config,
    UserError,
    check_config,
    check_writable,
    latest_run,
    on_terminal,
    parse_options,
    read_run,
    run_folder,
    run_stage,
    start_log,
    versions,
    write_atomically,
    write_json,
    write_png,
)

MOST_WORST = 200  # images in the contact sheet, which is then 17,000 px high


@dataclasses.dataclass(frozen=True)
class EvaluationOptions:
    """Which model, on which images, and how they are shown to it."""

    name: str = ""
    """the run; if empty, the one in whose folder --model lies, or the most recent one"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    weights: Literal["best", "last"] = "best"
    """which weights of the run: those with the best validation top-1, or the last"""
    model: Path | None = None
    """a file in their place: a run's weights or checkpoint, or an export (.pt, .onnx, .pt2) with
    model.json; TorchScript and .pt2 are programs: only from whom you trust"""
    val_folder_name: str = ""
    """validation images, a folder or a store; the run's if empty"""
    val_px: int = 0
    """side of the centre crop, in pixels; 0: the run's or the export's"""
    val_resize_px: int = 0
    """shorter side before the crop, in pixels; 0: to val_px as the run or the export has it"""
    flip_average: bool = False
    """average the probabilities (softmax) for the image and its mirror image"""
    sizes: tuple[int, ...] = ()
    """more sides of the crop to evaluate at, in pixels; the shorter side grows with them"""
    val_batch_size: int = 128
    """images in a batch; the counts do not depend on it"""
    workers: int = Config.workers
    """threads that decode images; 0 decodes in the main thread"""
    skip_bad_images: bool = False
    """decode every image first and leave out those that cannot be read"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where the model runs; auto: the GPU if there is one, but for ONNX, which runs on the CPU"""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """arithmetic of the model; exports compute in fp32"""
    worst: int = 24
    """images in worst.png; 0: none"""
    output: Path | None = None
    """folder to write into; evaluation/ in the run's if not given"""


class Subject(NamedTuple):
    """What is evaluated."""

    path: Path
    kind: str  # weights, torchscript, onnx or pt2
    predict: Predict
    classes: tuple[str, ...]
    labels: list[str]  # of the classes, for people
    config: Config  # of the run or the export, with what the options change
    device: torch.device
    sha256: str  # of the file


# ------------------------------------------------------------------------------ the model


def find_run(options: EvaluationOptions) -> Path | None:
    """The run's folder; None where none is named and --model lies in no run's."""
    if options.model is not None:
        if options.weights == "last":
            raise UserError("--weights last and --model are two models: give one of them")
        if not options.model.is_file():
            raise UserError(f"no file {options.model}: --model takes a file")
        evaluated_model.kind_of(options.model)  # refuses what is no model
    if options.name:
        return run_folder(options.runs_folder, options.name)
    if options.model is not None:
        near = options.model.absolute().parents[:2]  # a run has its exports in export/
        return next((folder for folder in near if (folder / "config.json").exists()), None)
    name = latest_run(options.runs_folder)
    print(f"evaluating the most recent run: {name}")
    return run_folder(options.runs_folder, name)


def load_subject(options: EvaluationOptions, folder: Path | None) -> Subject:
    """The model with its classes, and the settings to evaluate it by; raises UserError."""
    run = read_run(folder) if folder else None
    if options.name and run is None:
        raise UserError(f"no {folder}/config.json: name a run in {options.runs_folder}/")
    path = options.model or folder / f"{options.weights}.pt"
    if not path.is_file():
        raise UserError(f"no file {path}: train first, with python3 trainer.py")
    kind, digest = evaluated_model.kind_of(path), sha256(path)
    if kind == "weights":
        if run is None:
            raise UserError(f"{path} does not say what its classes are: name its run with --name")
        config, classes, _ = run
        config = settings(options, config)
        device = engine.choose_device(config)
        engine.choose_precision(config, device)  # refuses what the device cannot do
        predict = evaluated_model.load_checkpoint(path, len(classes), device)
        labels = evaluated_model.class_names(classes, human_names(classes))
        return Subject(path, kind, predict, classes, labels, config, device, digest)
    if options.precision != "fp32":
        raise UserError(f"precision is {options.precision}, but exports compute in fp32")
    if kind == "onnx" and options.device == "cuda":
        raise UserError("device is cuda, but ONNX runs on the CPU here: leave out --device")
    if run is None and not options.val_folder_name:
        raise UserError(f"{path} belongs to no run: name the images with --val-folder-name")
    export = evaluated_model.read_description(path, kind)
    sizes = {"val_px": export["input_px"], "val_resize_px": export["resize_px"]}
    config = settings(options, dataclasses.replace(run[0] if run else Config(), **sizes))
    device = torch.device("cpu") if kind == "onnx" else engine.choose_device(config)
    predict = evaluated_model.load_export(path, kind, export, device)
    for px in dict.fromkeys((export["input_px"], config.val_px, *options.sizes)):
        evaluated_model.check_size(path, predict, export, px, device)
    labels = evaluated_model.class_names(export["classes"], export["labels"])
    classes = tuple(export["classes"])
    return Subject(path, kind, predict, classes, labels, config, device, digest)


def sha256(path: Path) -> str:
    """The digest of a file as it is now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(options: EvaluationOptions, config: Config) -> Config:
    """A run's settings with what the options change; raises UserError where they cannot be used."""
    changed = dataclasses.replace(
        at_size(config, options.val_px or config.val_px),
        val_folder_name=options.val_folder_name or config.val_folder_name,
        val_batch_size=options.val_batch_size,
        workers=options.workers,
        skip_bad_images=options.skip_bad_images,
        device=options.device,
        precision=options.precision,
    )
    if options.val_resize_px:
        changed = dataclasses.replace(changed, val_resize_px=options.val_resize_px)
    check_config(changed)
    return changed


def at_size(config: Config, px: int) -> Config:
    """The settings with another side of the crop, and the shorter side in proportion to it."""
    resize_px = round(px * config.val_resize_px / config.val_px)
    return dataclasses.replace(config, val_px=px, val_resize_px=resize_px)


# ------------------------------------------------------------------------------ the images


def open_images(subject: Subject) -> tuple[image_files.ImageSet, str]:
    """The validation images, their labels the model's outputs, and what is to be said of them."""
    config, classes = subject.config, subject.classes
    val_set = image_files.open_image_set(config.val_folder_name, "val")
    foreign = sorted(set(val_set.classes) - set(classes))
    if foreign:
        names = ", ".join(foreign[:5]) + ", …" * (len(foreign) > 5)
        raise UserError(
            f"{subject.path} does not know {len(foreign):,} of the {len(val_set.classes):,} "
            f"classes in {val_set.folder}: {names}"
        )
    if len(val_set.classes) == len(classes) and val_set.classes != classes:
        raise UserError(
            f"{val_set.folder} has the classes of {subject.path} in another order: the list of "
            "them beside the model was altered"
        )
    skipped = image_files.check_files(config, {"val": val_set})
    val_set = val_set.without([file.removeprefix("val/") for file in skipped])
    said = f"; unreadable images left out: {len(skipped):,}" * bool(skipped)
    if val_set.classes != classes:
        said += (
            f"; images of {len(val_set.classes):,} of the model's {len(classes):,} classes, "
            "matched by name, while it may answer with any"
        )
    place = {name: number for number, name in enumerate(classes)}
    outputs = np.array([place[name] for name in val_set.classes])
    return dataclasses.replace(val_set, classes=classes, labels=outputs[val_set.labels]), said


def ask(subject: Subject, config: Config, val_set: image_files.ImageSet, flip: bool) -> Answers:
    """What the model says to every image, at the sizes in `config`."""
    predict = evaluated_model.with_mirror_images(subject.predict) if flip else subject.predict
    batches = data.val_batches(val_set, config, pin=subject.device.type == "cuda")
    parts = []
    title, hidden = f"{config.val_px} px", not on_terminal()
    with tqdm.tqdm(total=len(val_set), desc=title, unit="img", disable=hidden, leave=False) as bar:
        # `bool` heeds nothing: no other process shares the work.
        for logits, labels in engine.logits_of(
            predict, batches, subject.device, config.precision, bool
        ):
            likeliest = logits.topk(min(5, logits.shape[1]), dim=1).indices
            in_top5 = (likeliest == labels[:, None]).any(dim=1)
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            confidences = logits.softmax(dim=1).amax(dim=1)
            parts.append((labels, likeliest[:, 0], in_top5, losses, confidences))
            bar.update(len(labels))
    answers = Answers(*(torch.cat(part).cpu().numpy() for part in zip(*parts, strict=True)))
    if wrong := int((~np.isfinite(answers.losses)).sum()):
        raise UserError(
            f"{subject.path} gives no number as the loss of {wrong:,} of {len(val_set):,} images: "
            "its weights are spoilt, or --precision is too low",
            EXIT_FAILED,
        )
    return answers


def look_at_worst(
    answers: Answers, subject: Subject, val_set: image_files.ImageSet, count: int
) -> list[Shown]:
    """The images with the highest loss, the highest first, as the model saw them."""
    shown = []
    for index in np.argsort(-answers.losses, kind="stable")[:count].tolist():
        pixels = np.empty((subject.config.val_px, subject.config.val_px, 3), np.uint8)
        data.fill_val(subject.config, val_set.read(index), index, pixels)
        label, said = (subject.labels[which[index]] for which in (answers.labels, answers.said))
        confidence, loss = (which.item(index) for which in (answers.confidences, answers.losses))
        path = str(val_set.path(index))
        shown.append(Shown(path, pixels, label, said, confidence, loss))
    return shown


# ------------------------------------------------------------------------------ the stage


def protocol(config: Config, flip: bool) -> str:
    """How an image is shown to the model; of one view in the words of result.json."""
    views = "mean of softmax of image and mirror image" if flip else "one view"
    sizes = f"shorter side to {config.val_resize_px} px, centre crop {config.val_px} px"
    return f"{sizes}, {views}, {config.precision}"


def write(output: Path, result: dict[str, Any], shown: list[Shown]) -> None:
    """Write the files, and remove those of an earlier evaluation that this one has not."""
    output.mkdir(parents=True, exist_ok=True)
    figures = {"evaluation.png": error_analysis.draw_overview(result)}
    if shown:
        figures["worst.png"] = error_analysis.draw_worst(shown)
    if result["sizes"]:
        figures["sizes.png"] = error_analysis.draw_sizes(result["model"], result["sizes"])
    table = io.StringIO()
    writer = csv.DictWriter(table, list(result["per_class"][0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(result["per_class"])
    for stale in {"worst.png", "sizes.png"} - set(figures):
        (output / stale).unlink(missing_ok=True)
    for name, figure in figures.items():
        write_png(figure, output / name)
    write_atomically(output / "per_class.csv", table.getvalue().encode(errors="surrogateescape"))
    write_json(output / "evaluation.json", result)
    print(f"wrote {output}/: {', '.join(['evaluation.json', 'per_class.csv', *figures])}")


def main() -> None:
    """Load the model, ask it about every image, look at its answers, tell and write them."""
    options = parse_options(EvaluationOptions, __doc__)
    if not 0 <= options.worst <= MOST_WORST:
        raise UserError(f"worst is {options.worst}: it must be 0 to {MOST_WORST}")
    if min(options.sizes, default=1) < 1:
        raise UserError(f"sizes has {min(options.sizes)}: each must be above 0")
    start_log(None)
    torch.backends.cudnn.allow_tf32 = False  # which a GPU would otherwise take for fp32
    folder = find_run(options)
    output = options.output or (folder / "evaluation" if folder else None)
    if output is None:
        raise UserError(f"{options.model} belongs to no run: name a folder with --output")
    check_writable(output, "--output")
    subject = load_subject(options, folder)
    if sha256(subject.path) != subject.sha256:
        raise UserError(f"{subject.path} was replaced while it was read: try again")
    config, (val_set, said) = subject.config, open_images(subject)
    print(f"evaluating {subject.path} on {len(val_set):,} images of {val_set.folder}")
    started = time.monotonic()
    answers = ask(subject, config, val_set, options.flip_average)
    elapsed_s = time.monotonic() - started
    summary = {"val_px": config.val_px, "val_resize_px": config.val_resize_px}
    summary |= error_analysis.summary(answers)
    sizes = [summary] if options.sizes else []
    for px in sorted({*options.sizes} - {config.val_px}):
        other = at_size(config, px)
        found = error_analysis.summary(ask(subject, other, val_set, options.flip_average))
        sizes.append({"val_px": px, "val_resize_px": other.val_resize_px, **found})
    pairs = error_analysis.confused_pairs(answers, subject.classes, subject.labels)
    shown = look_at_worst(answers, subject, val_set, options.worst)
    result = {
        "model": str(subject.path),
        "kind": subject.kind,
        "model_sha256": subject.sha256,
        "val_folder_name": config.val_folder_name,
        "protocol": protocol(config, options.flip_average) + said,
        **summary,
        "elapsed_s": elapsed_s,
        "calibration": error_analysis.calibration(answers),
        "sizes": sorted(sizes, key=lambda row: row["val_px"]),
        "confused_pairs": pairs[: error_analysis.PAIRS_KEPT],
        "per_class": error_analysis.per_class(answers, subject.classes, subject.labels, pairs),
        "worst": [error_analysis.without_pixels(one) for one in shown],
        "hardware": preflight.describe_hardware(subject.device, config.precision),
        "versions": versions(("onnxruntime",)),
    }
    error_analysis.tell(result)
    write(output, result, shown)


if __name__ == "__main__":
    run_stage(main)
