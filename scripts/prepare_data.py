"""Bring a data set into the layout that the trainer reads: DIR/train/<class>/, DIR/val/<class>/.

    python3 scripts/prepare_data.py digits data/digits
        scikit-learn's 1,797 handwritten digits as JPEGs; no network, two seconds, 3 MB
    python3 scripts/prepare_data.py imagenette data/imagenette
        ten ImageNet classes, 13,394 photos, downloaded by torchvision (fastai/imagenette)
    python3 scripts/prepare_data.py pack SOURCE STORE
        one file of all pictures of a folder, a zip or a tar, such as Kaggle's ImageNet; see
        scripts/packing.py and store.py
    python3 scripts/prepare_data.py imagenet DIR
        ImageNet-1k from Kaggle, downloaded, checked and packed into DIR/imagenet.store; see
        scripts/kaggle_imagenet.py
    python3 scripts/prepare_data.py imagenet-100k DIR
        the same with 100 training pictures a class, into DIR/imagenet-100k.store
    python3 scripts/prepare_data.py verify DIR
        every picture of a folder or a store is decoded, and what is wrong or odd is told; see
        scripts/verifying.py

Where DIR is complete already, nothing is done. A half-finished one is never left behind: the files
are gathered in DIR.partial, which takes DIR's name at the end; a folder of that name with somebody
else's files is left alone. Packing goes on from STORE.partial where it was stopped, a download from
Kaggle where it broke off.
"""

import contextlib
import dataclasses
import fcntl
import http.client
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import UserError, log, parse_options, run_stage, start_log

DIGIT_PX = 64
DIGITS = {"train": 1442, "val": 355}
IMAGENETTE = {"train": 9469, "val": 3925}  # of every size
MARKER = ".begun_by_prepare_data"  # in DIR.partial: what is in it may be removed
SIZE_NAME = ".imagenette_size"  # in DIR: which archive it is


@dataclasses.dataclass(frozen=True)
class DigitsOptions:
    """scikit-learn's 1,797 handwritten digits as JPEGs, without a network"""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """the folder to make"""


@dataclasses.dataclass(frozen=True)
class ImagenetteOptions:
    """ten ImageNet classes, 13,394 photos, downloaded"""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """the folder to make"""
    size: Literal["full", "320px", "160px"] = "320px"
    """shorter side of the photos; full: as they were"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackingSettings:
    """What becomes of the pictures of a store."""

    max_side: int = 400
    """larger pictures are made smaller: their larger side in pixels; 0 keeps all as they are"""
    quality: int = 90
    """JPEG quality of the pictures that are made smaller, 1 to 100"""
    workers: int = len(os.sched_getaffinity(0))
    """threads that decode and encode; as many as there are cores"""
    skip_bad_images: bool = False
    """leave out pictures that cannot be read"""


@dataclasses.dataclass(frozen=True)
class PackOptions(PackingSettings):
    """one file of all pictures of a folder, a zip or a tar"""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """folder, zip or tar with train/<class>/<name> and val/<class>/<name>, or Kaggle's ImageNet"""
    store: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="STORE")]
    """the file to make"""
    val_labels: Annotated[Path | None, tyro.conf.arg(metavar="CSV")] = None
    """classes of the pictures under val/ where it has no class folders; looked for as
    LOC_val_solution.csv in SOURCE and beside it"""


@dataclasses.dataclass(frozen=True)
class KaggleOptions(PackingSettings):
    """What is downloaded from Kaggle and packed."""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """the folder for the archive and the store"""
    step: Literal["all", "download", "check", "pack"] = "all"
    """one step alone: download the archive, count what is in it, or pack that, counted, too"""
    remove_archive: bool = False
    """remove the archive once the store is finished and equal to its SHA-256"""


@dataclasses.dataclass(frozen=True)
class ImagenetOptions(KaggleOptions):
    """ImageNet-1k from Kaggle, downloaded (167 GB) and packed into DIR/imagenet.store"""


@dataclasses.dataclass(frozen=True)
class Imagenet100kOptions(KaggleOptions):
    """the same with 100 training pictures a class (18 GB), into DIR/imagenet-100k.store"""


@dataclasses.dataclass(frozen=True)
class VerifyOptions:
    """decode every picture of a folder or a store, and tell what is wrong or odd"""

    dir: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """folder with train/<class>/<name> and val/<class>/<name>, or a store"""
    output: Annotated[Path | None, tyro.conf.arg(metavar="JSON")] = None
    """file for the whole report, with the counts of every class"""
    workers: int = len(os.sched_getaffinity(0))
    """threads that decode; as many as there are cores"""


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Which data set, and where to."""

    data_set: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[DigitsOptions, tyro.conf.subcommand("digits")]
            | Annotated[ImagenetteOptions, tyro.conf.subcommand("imagenette")]
            | Annotated[ImagenetOptions, tyro.conf.subcommand("imagenet")]
            | Annotated[Imagenet100kOptions, tyro.conf.subcommand("imagenet-100k")]
            | Annotated[PackOptions, tyro.conf.subcommand("pack")]
            | Annotated[VerifyOptions, tyro.conf.subcommand("verify")]
        ]
    ]
    """which data set"""


def digits(folder: Path) -> None:
    """Write the digits: every fifth image of a class is for validation, the others for training.

    Args:
        folder: where to; must not exist yet
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    seen = [0] * 10
    for pixels, label in zip(bunch.images, bunch.target.tolist(), strict=True):
        seen[label] += 1
        part = "val" if seen[label] % 5 == 0 else "train"
        # 8x8 values from 0 to 16, drawn as dark ink on white paper.
        ink = Image.fromarray((255 - pixels * (255 / 16)).round().astype(np.uint8))
        path = folder / part / str(label) / f"{label}_{seen[label]:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        ink.resize((DIGIT_PX, DIGIT_PX), Image.Resampling.BICUBIC).save(path, quality=95)


def imagenette(folder: Path, size: str) -> None:
    """Download and unpack Imagenette; raises UserError where the network does not let it.

    Args:
        folder: where to; must not exist yet
        size: the archive, named by the photos' shorter side: full, 320px or 160px
    """
    from torchvision.datasets import Imagenette

    try:
        Imagenette(str(folder), split="train", size=size, download=True)
    # No network; no HTTP from the other end; an archive whose checksum is wrong.
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise UserError(f"Imagenette could not be downloaded: {error}") from None
    for archive in folder.glob("*.tgz"):
        archive.unlink()
    (unpacked,) = folder.glob("*/")  # imagenette2 or imagenette2-320
    for part in ("train", "val"):
        (unpacked / part).rename(folder / part)
    shutil.rmtree(unpacked)
    (folder / SIZE_NAME).write_text(f"{size}\n")


def _check_folder(folder: Path, options: "DigitsOptions | ImagenetteOptions") -> None:
    """Refuse a folder that holds another data set than the one that is asked for, or less."""
    if isinstance(options, DigitsOptions):
        title, pictures, classes = "the digits", DIGITS, {str(digit) for digit in range(10)}
    else:
        from torchvision.datasets import Imagenette

        title, pictures, classes = "Imagenette", {}, set(Imagenette._WNID_TO_CLASS)
        record = folder / SIZE_NAME
        if record.is_file():  # else it is of others' making, and perhaps a part of it
            pictures, size = IMAGENETTE, record.read_text().strip()
            if size != options.size:
                raise UserError(
                    f"{folder} holds Imagenette of --size {size}: name a folder that does not "
                    "exist yet"
                )
    others = {path.name for path in (folder / "train").glob("*/")} - classes
    if others:
        raise UserError(
            f"{folder} holds other classes than {title}, such as {min(others)}: name a folder that "
            "does not exist yet"
        )
    counts = count_images(folder)
    for part, whole in pictures.items():
        if counts[part] < whole:
            raise UserError(
                f"{folder / part} holds {counts[part]:,} of the {whole:,} pictures of {title}: "
                f"remove {folder}, and the same command makes it anew"
            )


def count_images(folder: Path) -> dict[str, int]:
    """Files per part of a data set."""
    return {part: len(list((folder / part).glob("*/*"))) for part in ("train", "val")}


def pack(options: PackOptions) -> None:
    """Pack SOURCE into STORE; raises UserError for settings that are out of range."""
    _check_settings(options)
    import packing  # with torch, which takes seconds to import

    packing.pack(
        options.source,
        options.store,
        options.max_side,
        options.quality,
        options.workers,
        options.val_labels,
        options.skip_bad_images,
    )


def from_kaggle(options: KaggleOptions) -> None:
    """Download and pack; raises UserError for settings that are out of range."""
    _check_settings(options)
    import kaggle_imagenet

    is_100k = isinstance(options, Imagenet100kOptions)
    kaggle_imagenet.prepare(
        kaggle_imagenet.IMAGENET_100K if is_100k else kaggle_imagenet.IMAGENET_1K,
        options.dir,
        options.step,
        options.max_side,
        options.quality,
        options.workers,
        options.skip_bad_images,
        options.remove_archive,
    )


def verify(options: VerifyOptions) -> None:
    """Verify DIR; raises UserError if anything is wrong with it."""
    _check_range(options, "workers", 1, 1024)
    import verifying  # with torch too

    verifying.verify(options.dir, options.output, options.workers)


def _check_settings(settings: PackingSettings) -> None:
    _check_range(settings, "max_side", 0, 65_535)
    _check_range(settings, "quality", 1, 100)
    _check_range(settings, "workers", 1, 1024)


def _check_range(options: object, field: str, least: int, most: int) -> None:
    value = getattr(options, field)
    if not least <= value <= most:
        raise UserError(f"{field} is {value}: it must be {least} to {most:,}")


@contextlib.contextmanager
def filling(folder: Path) -> Iterator[Path]:
    """An empty DIR.partial, which becomes DIR in the end; raises UserError where another process
    fills it, or somebody else's files are in it."""
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process fills {folder}: wait for its end, and give the same command again"
            ) from None
        if folder.exists():
            with contextlib.suppress(OSError):  # it is DIR by now, or not empty
                partial.rmdir()
            raise UserError(
                f"another process has just filled {folder}: give the same command again, which "
                "looks at what is there"
            )
        left = [entry for entry in os.scandir(partial) if entry.name != MARKER]
        if left and not (partial / MARKER).is_file():
            raise UserError(
                f"{partial} holds what this script has not put there, such as {left[0].name}: move "
                "it away, or name another folder"
            )
        (partial / MARKER).touch()
        for entry in left:  # of a start that was broken off
            is_folder = entry.is_dir(follow_symlinks=False)
            shutil.rmtree(entry) if is_folder else os.unlink(entry)
        yield partial
        partial.rename(folder)
        (folder / MARKER).unlink()
    finally:
        os.close(handle)


def main() -> None:
    """Bring a data set into DIR/train/<class>/ and DIR/val/<class>/ or one file, or verify one."""
    options = parse_options(PrepareOptions, __doc__).data_set
    start_log(None)
    if isinstance(options, PackOptions):
        pack(options)
        return
    if isinstance(options, KaggleOptions):
        from_kaggle(options)
        return
    if isinstance(options, VerifyOptions):
        verify(options)
        return
    folder = options.dir
    if all(count_images(folder).values()):
        _check_folder(folder, options)
        log.info("%s is there already", folder)
    else:
        if folder.exists():
            raise UserError(
                f"{folder} is there, but train/ or val/ in it holds no images: name a folder that "
                "does not exist yet"
            )
        with filling(folder) as partial:
            if isinstance(options, DigitsOptions):
                digits(partial)
            else:
                imagenette(partial, options.size)
    counts = count_images(folder)
    log.info("%s: %d training and %d validation images", folder, counts["train"], counts["val"])


if __name__ == "__main__":
    run_stage(main)
