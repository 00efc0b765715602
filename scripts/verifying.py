"""Verifying a data set: what `python3 scripts/prepare_data.py verify DIR` does.

DIR is a folder with train/<class>/ and val/<class>/ in it, or a store. Every picture is read and
decoded, as the trainer does it but for its size. What would stop a run or falsify it is a problem:
pictures that cannot be read or have changed since the folder was last verified, classes that are
empty or only in one part, and, where the classes are ImageNet's 1,000, other counts than its own.
What is merely odd, and what the trainer leaves aside, is noted.

A folder without problems keeps the checksums of its files in its index: the trainer's start checks
nothing again, and a file that changes later is refused when it is read.
"""

import collections
import dataclasses
import hashlib
import io
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from packing import Progress
from PIL import Image
from zlib_ng import zlib_ng

import image_files
from image_files import Encoded, ImageSet
from store import PARTS
from utils import UserError, check_writable, format_duration, log, write_json

TINY_PX = 32  # smaller side
HUGE_PIXELS = 25_000_000  # 75 MB, decoded, in each of the loader's threads
ENDINGS = {"JPEG": (".jpg", ".jpeg"), "TIFF": (".tif", ".tiff")}  # the others' is their name
IMAGENET = {"train": 1_281_167, "val": 50_000}  # pictures in 1,000 classes
IMAGENET_VAL = 50  # pictures in each class of val
BLOCK = 50  # pictures a task, which Ctrl-C waits for
NO_MEMORY = "takes more memory than there is"
PERHAPS_DAMAGED = "perhaps damaged: libjpeg complains of it"
CHANGED = (
    "its bytes are not those that were last verified: bring back a copy or, if it is meant to be "
    f"so, remove {image_files.INDEX_NAME} above its class folder and verify again"
)
SHOWN = 5  # examples of what is noted, and classes at either end, on the screen


@dataclasses.dataclass
class Part:
    """What was found in train/ or val/: of each picture, in the order of `images`."""

    images: ImageSet
    sizes: np.ndarray  # in bytes, int64
    crcs: np.ndarray  # CRC-32 of the file, uint32
    sides: np.ndarray  # height and width in pixels as a person sees it, int32 (N, 2); 0: unreadable
    before: ImageSet | None  # what the folder's index said before
    formats: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bad: dict[int, str] = dataclasses.field(default_factory=dict)  # reasons by position
    notes: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # paths by kind

    def path(self, index: int) -> str:
        """Where a picture lies."""
        return str(self.images.path(index))

    def counts(self) -> dict[str, int]:
        """Pictures of each class, readable or not."""
        classes = self.images.classes
        counts = np.bincount(self.images.labels, minlength=len(classes)).tolist()
        return dict(zip(classes, counts, strict=True))

    def changed(self) -> list[int]:
        """Readable pictures whose checksums are not those that the folder's index held."""
        if self.before is None or self.before.crcs is None:
            return []
        before = dict(zip(self.before.files, self.before.crcs.tolist(), strict=True))
        return [
            index
            for index, (file, crc) in enumerate(
                zip(self.images.files, self.crcs.tolist(), strict=True)
            )
            if before.get(file, crc) != crc and index not in self.bad
        ]

    def gone(self) -> list[str]:
        """Paths of pictures that the folder's index held and the folder holds no more."""
        before = () if self.before is None else self.before.files
        return [str(self.images.folder / file) for file in sorted({*before} - {*self.images.files})]


# ------------------------------------------------------------------------------ one picture


def inspect(name: str, encoded: Encoded) -> tuple[int, int, str, list[str]]:
    """Decode a picture: its height and width, its format, and what is odd about it.

    Raises ValueError or OSError if it cannot be read.
    """
    data, size = encoded
    kind, notes = "JPEG", []
    image_files.take_complaint()  # of one before, that was refused in the end
    if size is not None:
        # At an eighth of its size: all of its data is read, which is what may be wrong.
        image_files.decode_plain_jpeg(data, 1, 1)
        height, width = size
    else:
        height, width = image_files.decode_with_pillow(data).shape[:2]
        with Image.open(io.BytesIO(data)) as image:
            kind = image.format
            if kind == "JPEG" and image.mode == "CMYK":
                kind = "CMYK JPEG"
                notes.append("CMYK, shown as RGB")
            if _is_animated(image) and kind != "MPO":  # a photo and its preview
                notes.append("animated, of which the first picture is shown")
            if image_files.turn_upright(image) is not None:
                notes.append("turned upright, as EXIF data asks for")
    complaint = image_files.take_complaint()
    if complaint:
        notes.append(PERHAPS_DAMAGED)
    plain = "JPEG" if kind in ("CMYK JPEG", "MPO") else kind
    if not name.lower().endswith(ENDINGS.get(plain, (f".{plain.lower()}",))):
        notes.append(f"a {plain} by another name")
    if min(height, width) < TINY_PX:
        notes.append(f"below {TINY_PX} px")
    if height * width > HUGE_PIXELS:
        notes.append(f"above {HUGE_PIXELS // 10**6} million pixels")
    return height, width, kind, notes


def _is_animated(image: Image.Image) -> bool:
    """Whether there are more pictures in it than the first, which alone is looked at."""
    try:
        return getattr(image, "is_animated", False)
    except Exception:  # whatever Pillow meets in a later one that is broken
        return True


# ------------------------------------------------------------------------------ all of them


def open_parts(folder: Path) -> dict[str, ImageSet]:
    """train and val of a folder, listed anew, or of a store.

    Raises UserError if they are not there, or the store is not as it was packed.
    """
    if folder.is_file():
        return {part: image_files.open_image_set(str(folder), part) for part in PARTS}
    missing = [f"{part}/" for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: name a folder with train/<class>/ and "
            "val/<class>/ in it, or a store"
        )
    return {part: image_files.list_folder(folder / part) for part in PARTS}


def decode_all(images: ImageSet, workers: int, progress: Progress) -> Part:
    """Read and decode every picture of a part."""
    count = len(images)
    part = Part(
        images,
        np.zeros(count, np.int64),
        np.zeros(count, np.uint32),
        np.zeros((count, 2), np.int32),
        None if images.store else image_files.read_index(images.folder, outdated=True),
    )

    def inspect_some(start: int) -> list[tuple[int, str, list[str] | Exception]]:
        found = []
        for index in range(start, min(start + BLOCK, count)):
            try:
                encoded = images.read(index)
                part.sizes[index], part.crcs[index] = len(encoded[0]), zlib_ng.crc32(encoded[0])
                height, width, kind, notes = inspect(images.file(index), encoded)
            except (ValueError, OSError, MemoryError) as error:
                found.append((index, "unreadable", error))
            else:
                part.sides[index] = height, width
                found.append((index, kind, notes))
        return found

    pool = ThreadPoolExecutor(workers, "verify")
    try:
        for found in pool.map(inspect_some, range(0, count, BLOCK)):
            for index, kind, result in found:
                part.formats[kind] += 1
                if isinstance(result, Exception):
                    # Without the path, which is told anyway.
                    part.bad[index] = getattr(result, "strerror", None) or str(result) or NO_MEMORY
                else:
                    for note in result:
                        part.notes.setdefault(note, []).append(part.path(index))
                progress.tell(int(part.sizes[index]))
    finally:
        pool.shutdown(cancel_futures=True)  # a user who interrupts waits for no further picture
    return part


def left_aside(images: ImageSet) -> list[str]:
    """What lies in a part's folder, but is no picture of a class by its place and its name."""
    strange = [
        entry.path
        for entry in os.scandir(images.folder)
        if not entry.name.startswith(".") and entry.name not in images.classes
    ]
    for name in images.classes:
        pictures = set(image_files.image_names(images.folder / name))
        strange += [
            entry.path
            for entry in os.scandir(images.folder / name)
            if not entry.name.startswith(".") and entry.name not in pictures
        ]
    return sorted(strange)


def same_content(train: Part, val: Part) -> list[list[str]]:
    """Paths of files that are the same, byte by byte, in groups.

    Only those of the same size and checksum are read again.
    """
    keys = np.concatenate(
        [part.sizes.astype(np.uint64) << np.uint64(32) | part.crcs for part in (train, val)]
    )
    distinct, counts = np.unique(keys, return_counts=True)
    groups = collections.defaultdict(list)
    for at in np.flatnonzero(np.isin(keys, distinct[counts > 1])).tolist():
        part, index = (train, at) if at < len(train.images) else (val, at - len(train.images))
        if index not in part.bad:
            digest = hashlib.sha256(part.images.read(index)[0]).digest()
            groups[digest].append(part.path(index))
    return [paths for paths in groups.values() if len(paths) > 1]


# ------------------------------------------------------------------------------ problems


def find_problems(parts: dict[str, Part]) -> list[tuple[str, str]]:
    """What would stop a run or falsify it: where, and what."""
    problems = []
    for part in parts.values():
        images = part.images
        problems += [(part.path(index), reason) for index, reason in sorted(part.bad.items())]
        problems += [(part.path(index), CHANGED) for index in part.changed()]
        problems += [
            (str(images.folder / name), "no picture in it") for name in images.empty_classes()
        ]
    for has, lacks in (PARTS, PARTS[::-1]):
        missing = set(parts[has].images.classes) - set(parts[lacks].images.classes)
        folder = parts[lacks].images.folder
        problems += [(str(folder / name), f"missing, is in {has}/") for name in sorted(missing)]
    return problems + unlike_imagenet(parts)


def is_imagenet(parts: dict[str, Part]) -> bool:
    """Whether the classes are 1,000 that are named as ImageNet's are, such as n01440764."""
    classes = {name for part in parts.values() for name in part.images.classes}
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def unlike_imagenet(parts: dict[str, Part]) -> list[tuple[str, str]]:
    """Where the counts are not those of ImageNet-1k, if that is what it is."""
    if not is_imagenet(parts):
        return []
    problems = [
        (str(parts[part].images.folder), f"{found:,} pictures, ImageNet-1k has {count:,}")
        for part, count in IMAGENET.items()
        if (found := len(parts[part].images)) != count
    ]
    val = parts["val"]
    return problems + [
        (str(val.images.folder / name), f"{count} pictures, ImageNet-1k has {IMAGENET_VAL}")
        for name, count in val.counts().items()
        if count not in (0, IMAGENET_VAL)  # an empty one is told already
    ]


def keep_indexes(parts: dict[str, Part]) -> None:
    """Have the trainer's start check a folder without problems no more, and one with them anew."""
    for part in parts.values():
        if not (part.bad or part.changed() or part.images.empty_classes()):
            verified = dataclasses.replace(part.images, crcs=part.crcs)
            image_files.keep_index(verified, image_files.DECODED)
        elif part.before is not None:  # its checksums stay: they tell what has changed
            image_files.keep_index(part.before, image_files.NOT_CHECKED)


# ------------------------------------------------------------------------------ the report


def describe(part: Part) -> dict[str, Any]:
    """A part's numbers, for the report."""
    shown = part.sides[part.sides[:, 0] > 0]
    digest = hashlib.sha256(part.images.names)
    digest.update(part.crcs.tobytes())
    numbers: dict[str, Any] = {
        "pictures": len(part.images),
        "unreadable": len(part.bad),
        "bytes": int(part.sizes.sum()),
        "formats": dict(part.formats.most_common()),
        # The same for the same names and contents: to compare two copies by.
        "fingerprint": digest.hexdigest(),
        "classes": part.counts(),
    }
    if len(shown):
        for name, function in (("least", np.min), ("median", np.median), ("most", np.max)):
            height, width = function(shown, axis=0).tolist()
            numbers[f"{name}_height_px"], numbers[f"{name}_width_px"] = int(height), int(width)
    return numbers


def print_table(described: dict[str, dict[str, Any]]) -> None:
    """Print the parts, and their classes: all, or the smallest and the largest."""
    print(f"{'part':<8}{'pictures':>12}{'classes':>9}{'a class':>16}{'GB':>9}  formats")
    for part, numbers in described.items():
        counts = sorted(numbers["classes"].values())
        formats = ", ".join(f"{count:,} {kind}" for kind, count in numbers["formats"].items())
        print(
            f"{part:<8}{numbers['pictures']:>12,}{len(counts):>9,}"
            f"{f'{counts[0]:,} to {counts[-1]:,}':>16}{numbers['bytes'] / 1e9:>9.3f}  {formats}"
        )
    train, val = (described[part]["classes"] for part in PARTS)
    rows = sorted(train | val, key=lambda name: (train.get(name, 0), val.get(name, 0), name))
    width = max(8, *map(len, rows))
    print(f"\n{'class':<{width}}{'train':>10}{'val':>10}")
    for at, name in enumerate(rows):
        if SHOWN <= at < len(rows) - SHOWN and len(rows) > 4 * SHOWN:
            if at == SHOWN:
                print(f"… {len(rows) - 2 * SHOWN:,} between the smallest and the largest")
            continue
        print(f"{name:<{width}}{train.get(name, 0):>10,}{val.get(name, 0):>10,}")
    print(flush=True)


def tell_notes(notes: dict[str, list[Any]]) -> None:
    """Say what is odd, each kind with some examples; all of what may be damaged."""
    for kind, found in notes.items():
        shown = found if kind == PERHAPS_DAMAGED else found[:SHOWN]
        examples = [" = ".join(item) if isinstance(item, list) else item for item in shown]
        more = ", …" if len(found) > len(shown) else ""
        log.info("noted: %s: %s (%s%s)", kind, f"{len(found):,}", ", ".join(examples), more)


def verify(folder: Path, output: Path | None, workers: int) -> None:
    """Verify a data set and report; raises UserError for any problem, once all are told.

    Args:
        folder: with train/ and val/ in it, or a store
        output: where the whole report goes as JSON; None: nowhere
        workers: threads that decode
    """
    started = time.monotonic()
    if output is not None:
        if output.is_dir():
            raise UserError(f"--output {output} is a folder: name a file")
        check_writable(output.parent, "--output")
        output.parent.mkdir(parents=True, exist_ok=True)
    sets = open_parts(folder)
    progress = Progress("verifying", sum(len(images) for images in sets.values()))
    try:
        parts = {name: decode_all(images, workers, progress) for name, images in sets.items()}
    finally:
        progress.bar.close()

    notes: dict[str, list[Any]] = {}
    for part in parts.values():
        for kind, paths in part.notes.items():
            notes.setdefault(kind, []).extend(paths)
        if gone := part.gone():
            notes.setdefault("no longer there since the last verification", []).extend(gone)
        strange = left_aside(part.images) if part.images.store is None else []
        if strange:
            notes.setdefault("left aside, no picture of a class", []).extend(strange)
    for paths in same_content(parts["train"], parts["val"]):
        in_train = [path.startswith(f"{parts['train'].images.folder}/") for path in paths]
        mixed = any(in_train) and not all(in_train)
        kind = "the same picture in train and val" if mixed else "the same picture again"
        notes.setdefault(kind, []).append(paths)
    problems = find_problems(parts)
    keep_indexes(parts)

    described = {name: describe(part) for name, part in parts.items()}
    print_table(described)
    tell_notes(notes)
    for path, problem in problems:
        log.info("problem: %s: %s", path, " ".join(problem.split()))
    if is_imagenet(parts):
        verdict = "are not" if unlike_imagenet(parts) else "are"
        log.info("the 1,000 classes are named as ImageNet-1k's; the counts %s its own", verdict)
    if output is not None:
        report = {
            "verified": str(folder),
            "problems": [{"path": path, "problem": problem} for path, problem in problems],
            "notes": notes,
            "imagenet_1k": is_imagenet(parts),
            "parts": described,
        }
        write_json(output, report)
        log.info("the whole report: %s", output)
    log.info("verified in %s", format_duration(time.monotonic() - started))
    if problems:
        path, problem = problems[0]
        raise UserError(
            f"{len(problems):,} problem{'s' * (len(problems) > 1)} in {folder}, listed above, the "
            f"first {path}: {problem}"
        )
    log.info("%s: all is well", folder)
