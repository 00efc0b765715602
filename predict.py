"""Say what photos show: files or folders in, a line a picture out.

    python3 predict.py photo.jpg holiday/                  the most recent run's export
    python3 predict.py --name NAME --top 1 photo.jpg
    python3 predict.py --json holiday/ > answers.jsonl     one JSON object a line

Reads model.onnx and model.json of runs/<name>/export/ (python3 generate_trace_model.py), or of
--export, and prepares pictures as validation and the app do. A folder means the pictures in it and
in its folders, but for hidden files. A file that cannot be used is told on stderr, or as "error" in
JSON; the others are answered, and the exit code is 1. A path that is not there ends it at once.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import tyro
from PIL import Image

from utils import (
    EXIT_FAILED,
    UserError,
    latest_run,
    log,
    parse_options,
    run_folder,
    run_stage,
    stale_export,
)

sys.path.insert(0, str(Path(__file__).resolve().parent / "gradio_deploy"))

import classifier
import decoder

HEIC = (".heic", ".heif")


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Which pictures, and by which model."""

    pictures: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PICTURE|FOLDER")
    ]
    """picture files, or folders of them"""
    name: str = ""
    """the run whose export is used; the most recent one if empty"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    export: Path | None = None
    """folder of another export"""
    top: int = 5
    """how many of the likeliest classes are told"""
    json: bool = False
    """print one JSON object a picture in place of a table"""


def find_pictures(paths: Sequence[Path]) -> Iterator[Path]:
    """The files that are named, and those in named folders that are called like pictures.

    Raises OSError for a folder that cannot be read.
    """
    endings = Image.registered_extensions()

    def give_up(error: OSError) -> NoReturn:
        raise error

    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = []
        for folder, inside, names in os.walk(path, onerror=give_up):
            inside[:] = [name for name in inside if not name.startswith(".")]
            found += [Path(folder, name) for name in names if not name.startswith(".")]
        for file in sorted(found):
            suffix = file.suffix.lower()
            # An iPhone's photos are refused with what to do.
            is_picture = suffix in HEIC or endings.get(suffix) in decoder.PICTURE_FORMATS
            if is_picture and not file.is_fifo():
                yield file


def shown_name(file: Path) -> str:
    """A file's name for the table: quoted if it holds a line break, or bytes that are no text."""
    name = str(file)
    return name if name.isprintable() else repr(name)


def tell(
    file: Path, predictions: Sequence[classifier.Prediction], as_json: bool, width: int
) -> None:
    """Print the answer to a picture; in the table its name takes `width` characters."""
    if as_json:
        rows = [
            {"class": one.class_id, "label": one.label, "probability": one.probability}
            for one in predictions
        ]
        print(json.dumps({"file": str(file), "predictions": rows}), flush=True)
    else:
        shown = "   ".join(f"{one.label} {100 * one.probability:.1f} %" for one in predictions)
        print(f"{shown_name(file):<{width}}   {shown}", flush=True)


def tell_refusal(file: Path, reason: str, as_json: bool) -> None:
    """Print why a file was not used, among the answers only where they are JSON."""
    if as_json:
        print(json.dumps({"file": str(file), "error": reason}), flush=True)
    else:
        print(f"{shown_name(file)}: {reason}", file=sys.stderr, flush=True)


def main() -> None:
    """Find the pictures, load the model, answer one after the other."""
    options = parse_options(PredictOptions, __doc__)
    if not options.pictures:
        raise UserError("no pictures: name files or folders, such as python3 predict.py photo.jpg")
    if missing := [str(path) for path in options.pictures if not path.exists()]:
        raise UserError(f"no such file or folder: {', '.join(missing)}")
    if options.top < 1:
        raise UserError(f"top is {options.top}: it must be 1 or more")
    files = list(find_pictures(options.pictures))
    if not files:
        raise UserError(f"no pictures in {', '.join(map(str, options.pictures))}")
    folder = options.export
    if folder is None:
        name = options.name or latest_run(options.runs_folder)
        folder = run_folder(options.runs_folder, name) / "export"
        if not options.name:
            print(f"asking the most recent run: {name}", file=sys.stderr, flush=True)
    try:
        session, export = classifier.load_export(folder)
    except classifier.ExportError as error:
        raise UserError(f"{error}: make it with python3 generate_trace_model.py") from None
    if options.export is None and (complaint := stale_export(folder.parent, export)):
        log.warning("%s", complaint)
    width = max(len(shown_name(file)) for file in files)
    refused = 0
    for file in files:
        try:
            with open(file, "rb") as opened:
                content = opened.read(classifier.MAX_BYTES + 1)  # of a larger one no more
            images, _ = classifier.preprocess(classifier.open_picture(content), export)
        except (classifier.RefusedError, OSError) as error:
            tell_refusal(file, getattr(error, "strerror", None) or str(error), options.json)
            refused += 1
            continue
        (logits,) = session.run(["logits"], {"images": images})
        tell(file, classifier.likeliest(logits[0], export, options.top), options.json, width)
    if refused:
        raise UserError(f"{refused} of {len(files)} pictures could not be used", EXIT_FAILED)


if __name__ == "__main__":
    run_stage(main)
