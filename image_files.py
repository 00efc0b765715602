"""Image files on the disk: which there are, and the picture that each one shows.

A data set is a folder of class folders, as ImageNet is usually laid out
(`train/n01440764/a.JPEG`), or a store: all pictures in one file, made by
`scripts/prepare_data.py pack`. Both are an `ImageSet`: names in a fixed order, labels, and the
encoded bytes of image number i.

A folder's listing is kept in it as `.image_index.npz` once its files were checked, so that the next
start reads one file instead of opening 1.3 million; it is made anew when a class folder changes.
`scripts/prepare_data.py verify` keeps a checksum of each file there too, as a store has: from then
on, a file whose bytes have changed is refused when it is read. An index with checksums is replaced
by `verify` alone; a copy of the folder with all its times and the index in it keeps them.
"""

import contextlib
import dataclasses
import errno
import functools
import hashlib
import io
import itertools
import lzma
import os
import struct
import threading
import time
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image
from zlib_ng import zlib_ng

from store import PARTS, Store, open_store
from utils import EXIT_FAILED, Config, UserError, format_duration, log, write_atomically

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")

# What an EXIF orientation asks for; 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# What libjpeg says where coded data ran out or makes no sense: it shows grey or noise instead.
DAMAGED_INSIDE = ("remature end", "bad Huffman code", "bad arithmetic code", "instead of RST")
PERHAPS_DAMAGED = ("Corrupt JPEG data", "Inconsistent progression")

# Of Exif data and sizes, without a path; `scripts/prepare_data.py verify` tells what matters.
warnings.filterwarnings("ignore", module="PIL")

# ------------------------------------------------------------------------------ the set of images


INDEX_NAME = ".image_index.npz"
INDEX_VERSION = 3
# What reading one raises that is missing or damaged: a bit may turn it into a zip that is encrypted
# or compressed in a way unheard of (RuntimeError), or into a single array (TypeError).
DAMAGED_INDEX = (
    *(OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)
# How thoroughly a folder's files have been looked at.
NOT_CHECKED, LOOKED_WHOLE, DECODED = 0, 1, 2
# Errors of a disk, of a network's file system, of a limit, of memory.
SYSTEM_ERRORS = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM),
}
TELL_S = 10.0  # seconds between two lines about a check
FINGERPRINT_IMAGES = 32  # whose checksums are a part of the fingerprint

Encoded = tuple[bytes | memoryview, tuple[int, int] | None]  # a file, and its plain_jpeg_size


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The training or the validation images, in a fixed order: by class, then by name."""

    folder: Path  # of class folders; in a store, its part: imagenet.zip/train
    classes: tuple[str, ...]  # names of the class folders, sorted; a label is a position in here
    names: bytes | memoryview  # "class/name" of each image, joined by newlines: 40 MB for ImageNet
    labels: np.ndarray  # int64, (number of images,)
    store: Store | None = None  # where the images lie if not in files of their own
    positions: np.ndarray | None = None  # of the images in the store, int64
    checked: int = NOT_CHECKED
    crcs: np.ndarray | None = None  # CRC-32 of each file when the folder was verified, uint32
    # When the class folders had last changed when listed: mtime, which `cp -a` and `tar x` set
    # back, and ctime, which nothing does.
    class_times_ns: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def files(self) -> tuple[str, ...]:
        """ "class/name" of every image; made when asked for, since ImageNet's take 150 MB."""
        return tuple(os.fsdecode(bytes(self.names)).split("\n")) if self.names else ()

    @functools.cached_property
    def _ends(self) -> np.ndarray:
        newlines = np.flatnonzero(np.frombuffer(self.names, dtype=np.uint8) == ord("\n"))
        return np.append(newlines, len(self.names))

    def file(self, index: int) -> str:
        """ "class/name" of image `index`."""
        start = self._ends[index - 1] + 1 if index else 0
        return os.fsdecode(bytes(self.names[start : self._ends[index]]))

    def path(self, index: int) -> Path:
        """Path of image `index`; in a store, what it would be if the store were a folder."""
        return self.folder / self.file(index)

    def read(self, index: int) -> Encoded:
        """The bytes of image `index`, and (height, width) where the fast decoder may have them.

        Raises ValueError or OSError if they cannot be read, or are not those that were packed or
        verified.
        """
        if self.store is None:
            start = self._ends[index - 1] + 1 if index else 0
            name = self.names[start : self._ends[index]]
            with open(os.path.join(self._folder_name, name), "rb", buffering=0) as file:
                data = file.read()
            if self.crcs is not None and zlib_ng.crc32(data) != self.crcs.item(index):
                raise ValueError(
                    "its bytes are not those that were verified; `python3 scripts/prepare_data.py "
                    "verify` finds all such files"
                )
            return encoded(data)
        position = int(self.positions[index])
        data = self.store.read(position)
        *_, height, width, _ = self.store.records.item(position)
        return (data, (height, width)) if height else (bytes(data), None)

    def unreadable(self, index: int, error: Exception) -> UserError:
        """What a user is told where image `index` cannot be read, and why."""
        advice = (
            "put a good copy there and give the same command again, or begin another run with "
            "--skip-bad-images"
        )
        if fault := system_fault(self.path(index), error):
            return UserError(fault)
        if self.store is not None:  # whose errors say what mends it
            advice = "then give the same command again"
        return UserError(f"cannot read {self.path(index)} ({error}): {advice}")

    @functools.cached_property
    def _folder_name(self) -> bytes:
        return os.fsencode(self.folder)

    def read_ahead(self, indexes: np.ndarray) -> None:
        """Have the kernel fetch images of a store that will soon be read, without waiting."""
        if self.store is not None:
            self.store.read_ahead(self.positions[indexes])

    def forget(self, indexes: np.ndarray) -> None:
        """Have the kernel drop images from memory, so that reading them reads the disk."""
        if self.store is not None:
            self.store.forget(self.positions[indexes])
            return
        for index in indexes.tolist():
            # One that cannot be opened is told where it is read.
            with (
                contextlib.suppress(OSError),
                open(self.path(index), "rb", buffering=0) as file,
            ):
                os.fsync(file.fileno())  # what is not yet written stays in memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def empty_classes(self) -> list[str]:
        """Classes that have no image."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [self.classes[label] for label in np.flatnonzero(counts == 0).tolist()]

    def fingerprint(self) -> str:
        """SHA-256 of the names and of some images' checksums: tells a resumed run whether its
        images are still the same.

        Of a store whose pictures packing has changed, all checksums are a part of it: packed with
        other settings it holds other images. Raises UserError for an image that cannot be read or
        decoded: a damaged one would be replaced one day, and the run would not go on with that.
        """
        digest = hashlib.sha256(self.names)
        # Of another size or version of a data set, each file differs from this one's.
        some = np.linspace(0, len(self) - 1, FINGERPRINT_IMAGES).astype(int)
        if self.store is not None:
            chosen = self.positions if self.store.info["reencoded"] else self.positions[some]
            digest.update(self.store.records["crc32"][chosen].tobytes())
            return digest.hexdigest()
        for index in some.tolist():
            try:
                content = self.read(index)[0]
                decode(content)
                take_complaint()  # told where the picture is used, and not of another
                digest.update(np.uint32(zlib_ng.crc32(content)).tobytes())
            except (ValueError, OSError) as error:
                raise self.unreadable(index, error) from None
        return digest.hexdigest()

    def without(self, bad_files: Iterable[str]) -> "ImageSet":
        """The same set less some of its files; raises UserError if that empties a class."""
        bad = set(bad_files)
        if not bad:
            return self
        kept = [index for index, file in enumerate(self.files) if file not in bad]
        labels = self.labels[kept]
        names = os.fsencode("\n".join(self.files[index] for index in kept))
        positions = None if self.positions is None else self.positions[kept]
        crcs = None if self.crcs is None else self.crcs[kept]
        fewer = dataclasses.replace(
            self, names=names, labels=labels, positions=positions, crcs=crcs
        )
        emptied = fewer.empty_classes()
        if emptied:
            raise UserError(
                f"no image in {self.folder / emptied[0]} can be read: mend some, or remove the "
                "class from the training and the validation folder"
            )
        return fewer


def open_image_set(folder_name: str, part: str) -> ImageSet:
    """The images of a folder, or of a store's part, "train" or "val".

    Raises UserError if there is none, a class is empty, or the store is not as it was packed.
    """
    folder = Path(folder_name)
    if folder.is_file():
        return _open_part(open_store(folder), part)
    if not folder.is_dir():
        raise UserError(
            f"no folder or store {folder}: make one with `python3 scripts/prepare_data.py imagenet "
            "DIR`, `imagenette data/imagenette` or `digits data/digits` (small, no network; for "
            "--recipe quickstart), and name it with --train-folder-name and --val-folder-name: a "
            "store with both"
        )
    image_set = read_index(folder)
    if image_set is None:
        before, image_set = read_index(folder, outdated=True), list_folder(folder)
        if before is not None and before.crcs is not None:
            if _is_copy(before, image_set):
                image_set = dataclasses.replace(image_set, checked=before.checked, crcs=before.crcs)
                keep_index(image_set, image_set.checked)
            else:
                log.info(
                    "files in %s were added, removed or replaced since it was verified: its "
                    "checksums are not compared, and each start checks its files, until `python3 "
                    "scripts/prepare_data.py verify`",
                    folder,
                )
    empty = image_set.empty_classes()
    for name in PARTS:
        if name in empty and _class_folders(folder / name)[0]:
            raise UserError(f"{folder} has no class folders of its own: name {folder / part}")
    if empty:
        raise UserError(
            f"class folder {folder / empty[0]} holds no image (such as a .jpg or .png): fill it or "
            f"remove it; the images lie in {folder}/<class>/"
        )
    return image_set


def list_folder(folder: Path) -> ImageSet:
    """The images of the class folders as they lie there now, of which some may be empty.

    Raises UserError if there are no class folders, or a name has a line break in it.
    """
    classes, times_ns = _class_folders(folder)
    if not classes:
        raise UserError(
            f"{folder} has no class folders: the images are looked for in {folder}/<class>/"
        )
    names: list[bytes] = []
    counts = []
    for name in classes:
        images = image_names(folder / name)
        if any("\n" in file for file in (name, *images)):
            raise UserError(f"a name in {folder / name} has a line break in it: rename it")
        if images:
            names.append(os.fsencode("\n".join(f"{name}/{image}" for image in images)))
        counts.append(len(images))
    labels = np.repeat(np.arange(len(classes)), counts)
    return ImageSet(folder, classes, b"\n".join(names), labels, class_times_ns=times_ns)


def _open_part(store: Store, part: str) -> ImageSet:
    """The training or the validation images of a store."""
    first, end = store.parts[part]
    if first == end:
        raise UserError(f"{store.path} has no pictures under {part}/: pack a source that has some")
    newlines = np.flatnonzero(np.frombuffer(store.names, dtype=np.uint8) == ord("\n"))
    start = newlines[first - 1] + 1 if first else 0
    return ImageSet(
        store.path / part,
        store.classes,
        store.names[start : newlines[end - 1]],
        store.records["label"][first:end].astype(np.int64),
        store,
        np.arange(first, end),
        checked=DECODED,  # when it was packed; and each picture has a checksum
    )


def _is_copy(before: ImageSet, now: ImageSet) -> bool:
    """Whether a folder's names and mtimes are still those of its index."""
    # In whole seconds, which is what tar keeps.
    mtimes_s = [[mtime // 10**9 for mtime, _ in each.class_times_ns] for each in (before, now)]
    same_names = (before.classes, before.names) == (now.classes, now.names)
    return same_names and mtimes_s[0] == mtimes_s[1]


def read_index(folder: Path, outdated: bool = False) -> ImageSet | None:
    """What `list_folder` would find, as it was kept; None if nothing was, or a folder changed.

    `outdated` asks for what was kept then, whatever has changed.
    """
    classes, times_ns = _class_folders(folder)
    try:
        with zipfile.ZipFile(folder / INDEX_NAME) as archive:

            def load(name: str) -> np.ndarray:
                # As a whole: np.load by itself may end before zipfile compares its checksum.
                return np.load(io.BytesIO(archive.read(f"{name}.npy")), allow_pickle=False)

            if int(load("version")) != INDEX_VERSION:
                return None
            kept_classes = tuple(os.fsdecode(load("classes").tobytes()).split("\n"))
            kept_times_ns = tuple(map(tuple, load("class_times_ns").tolist()))
            if (kept_classes, kept_times_ns) != (classes, times_ns) and not outdated:
                return None
            names, crcs = load("names").tobytes(), load("crc32")
            labels = np.repeat(np.arange(len(kept_classes)), load("counts"))
            files = names.count(b"\n") + 1 if names else 0
            if len(labels) != files or len(crcs) not in (0, files):
                return None
            return ImageSet(
                folder,
                kept_classes,
                names,
                labels,
                checked=int(load("checked")),
                crcs=crcs if len(crcs) else None,
                class_times_ns=kept_times_ns,
            )
    except DAMAGED_INDEX:
        return None  # there is none, or it is damaged: listing the folder makes another


def keep_index(image_set: ImageSet, checked: int) -> None:
    """Keep a folder's listing in it, for the next start; a folder that may not be written in,
    or is being changed, goes without. One with checksums stays where there are none to replace it.
    """
    # A change within a tick of the clock leaves no trace; what sets mtimes back takes far longer.
    just_now_ns = time.time_ns() - 2 * 10**9
    mtimes_ns = [mtime_ns for mtime_ns, _ in image_set.class_times_ns]
    if not mtimes_ns or max(mtimes_ns) > just_now_ns:
        return
    if image_set.crcs is None:
        before = read_index(image_set.folder, outdated=True)
        if before is not None and before.crcs is not None:
            return  # `verify` compares the files with them
    content = io.BytesIO()
    np.savez(
        content,
        version=INDEX_VERSION,
        classes=np.frombuffer(os.fsencode("\n".join(image_set.classes)), dtype=np.uint8),
        class_times_ns=np.array(image_set.class_times_ns),
        names=np.frombuffer(image_set.names, dtype=np.uint8),
        counts=np.bincount(image_set.labels),
        checked=checked,
        crc32=np.empty(0, np.uint32) if image_set.crcs is None else image_set.crcs,
    )
    try:
        write_atomically(image_set.folder / INDEX_NAME, content.getvalue())
    except OSError as error:
        log.info("no index is kept in %s: %s", image_set.folder, error.strerror)


def _class_folders(folder: Path) -> tuple[tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Names of the class folders, sorted, and mtime and ctime of each, in ns."""
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if _is_class_folder(entry)))
    stats = [os.stat(folder / name) for name in classes]
    return classes, tuple((stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; by their endings, whatever they hold."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_ENDINGS) and not entry.name.startswith(".")
    )


def _is_class_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir() and not entry.name.startswith(".")
    except OSError as error:
        if error.errno != errno.ELOOP:  # a link to itself is none, as one to nothing is
            raise
        return False


def check_apart(train: ImageSet, val: ImageSet) -> None:
    """Refuse to validate by the folder that is trained on; a store's parts are apart."""
    if train.store is None and train.folder.resolve() == val.folder.resolve():
        raise UserError(
            f"{train.folder} is named for training and for validation: its accuracy would be that "
            "of images that were learnt; name the folder of the others"
        )


def check_same_classes(train: ImageSet, val: ImageSet) -> None:
    """Refuse folders whose classes differ: labels are positions, so all later ones would shift."""
    if train.classes == val.classes:
        return
    complaints = []
    for has, lacks in ((train, val), (val, train)):
        missing = sorted(set(has.classes) - set(lacks.classes))
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            verb = "is" if len(missing) == 1 else "are"
            complaints.append(f"{names} {verb} missing under {lacks.folder}")
    raise UserError(
        f"{val.folder} has {len(val):,} images in {len(val.classes):,} classes, "
        f"{train.folder} has {len(train.classes):,} classes: {'; '.join(complaints)}"
    )


def find_bad_images(image_set: ImageSet, workers: int, decode_all: bool) -> dict[str, str]:
    """Files that cannot be read, with the reason.

    Every file's first and last bytes are looked at, which finds what is empty, cut short or no
    image at all; a file that looks odd is decoded, and with `decode_all` every file is.
    """

    def check(start: int) -> dict[str, str]:
        bad = {}
        for index in range(start, min(start + block, len(image_set))):
            path = image_set.path(index)
            try:
                if decode_all or not _looks_whole(path):
                    decode(bytes(image_set.read(index)[0]))
            except (ValueError, OSError, MemoryError) as error:
                if fault := system_fault(path, error):
                    raise UserError(fault, EXIT_FAILED) from None
                bad[image_set.file(index)] = str(error)
        return bad

    block = 100  # files a task: a task for each would take a gigabyte for ImageNet
    pool = ThreadPoolExecutor(max(1, workers), "check")
    try:
        found: dict[str, str] = {}
        told_at = time.monotonic()
        for number, bad in enumerate(pool.map(check, range(0, len(image_set), block))):
            found.update(bad)
            if time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                done = min((number + 1) * block, len(image_set))
                log.info("checked %s of %s", f"{done:,}", f"{len(image_set):,}")
        return found
    finally:
        pool.shutdown(cancel_futures=True)  # a user who interrupts waits for no further file


def system_fault(place: object, error: object) -> str:
    """What to say where a picture was not read for a reason that is not its own; else nothing."""
    if isinstance(error, MemoryError):
        return f"{place} takes more memory than there is: use fewer --workers, or a larger machine"
    if isinstance(error, OSError) and error.errno in SYSTEM_ERRORS:
        return (
            f"{place} was not read ({error.strerror}), which is the disk's or the system's fault: "
            "mend that, and give the same command again"
        )
    return ""


def _looks_whole(path: Path) -> bool:
    """Whether a JPEG, PNG or WebP file has its beginning and its end; other formats never do."""
    with open(path, "rb") as file:
        head = file.read(16)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 64))
        tail = file.read()
    if head.startswith(b"\xff\xd8\xff"):
        return b"\xff\xd9" in tail  # inside the picture's data, 0xff is never followed by 0xd9
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" in tail
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return size >= int.from_bytes(head[4:8], "little") + 8
    return False


def open_images(
    config: Config, skipped: list[str] | None = None
) -> tuple[ImageSet, ImageSet, list[str]]:
    """Training set, validation set, and the files left out as unreadable: "train/class/name".

    A resumed run passes the files that it left out at its beginning, and checks no file again.
    Raises UserError for folders, classes or images that no run should be started on.
    """
    train_set = open_image_set(config.train_folder_name, "train")
    val_set = open_image_set(config.val_folder_name, "val")
    check_apart(train_set, val_set)
    check_same_classes(train_set, val_set)
    parts = {"train": train_set, "val": val_set}
    if skipped is None:
        skipped = check_files(config, parts)
    # The two may have files of the same name, of which one is good.
    train_set, val_set = (
        image_set.without(
            [file.removeprefix(f"{part}/") for file in skipped if file.startswith(f"{part}/")]
        )
        for part, image_set in parts.items()
    )
    images, size = len(train_set), config.batch_size
    if len(train_set.classes) < 2:
        raise UserError(
            f"{train_set.folder} has {images:,} image{'s' * (images > 1)} in one class, "
            f"{train_set.classes[0]}: training needs two classes or more, and at least two images, "
            "since BatchNorm has no statistics of a single one"
        )
    if images < size:
        raise UserError(
            f"batch_size is {size}, but {train_set.folder} has {images:,} images: use --batch-size "
            f"{images} or less"
        )
    if images % size == 1:
        sizes = itertools.chain(range(size - 1, 1, -1), range(size + 1, images + 1))
        better = next(other for other in sizes if images % other != 1)
        raise UserError(
            f"with batch_size {size} the last batch of {images:,} training images would hold a "
            f"single one, of which BatchNorm has no statistics: use --batch-size {better}"
        )
    return train_set, val_set, skipped


def check_files(config: Config, parts: dict[str, ImageSet]) -> list[str]:
    """Files that cannot be read, as "part/class/name", each told on the screen with the reason.

    Raises UserError if there are any, unless the settings say to leave them out.
    """
    wanted = DECODED if config.skip_bad_images else LOOKED_WHOLE
    skipped: list[str] = []
    first = ""
    for part, image_set in parts.items():
        # Files may have changed since they were checked: to skip those, all are read again.
        in_files = config.skip_bad_images and image_set.store is None
        if image_set.checked >= wanted and not in_files:
            continue
        started = time.monotonic()
        log.info("checking %s files in %s", f"{len(image_set):,}", image_set.folder)
        bad = find_bad_images(image_set, config.workers, decode_all=config.skip_bad_images)
        log.info("checked in %s", format_duration(time.monotonic() - started))
        if not bad:
            keep_index(image_set, wanted)
        for file, reason in bad.items():
            log.info("cannot be read: %s (%s)", image_set.folder / file, reason)
            first = first or f"{image_set.folder / file} ({reason})"
            skipped.append(f"{part}/{file}")
    if skipped and not config.skip_bad_images:
        images = sum(len(image_set) for image_set in parts.values())
        raise UserError(
            f"{len(skipped)} of {images:,} images cannot be read, listed above, the first {first}: "
            "mend or remove them, or leave them out with --skip-bad-images"
        )
    return skipped


# ------------------------------------------------------------------------------ one image


def encoded(data: bytes) -> Encoded:
    """A file's content as `ImageSet.read` gives it."""
    return data, plain_jpeg_size(data)


def decode(data: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """The RGB picture that a person sees: uint8, (height, width, 3).

    Plain JPEGs are decoded by simplejpeg, at the smallest DCT scale that is at least min_height x
    min_width; 0 means full size. Everything else (PNG, WebP, CMYK, a JPEG that its EXIF data turns
    or that the fast decoder refuses) goes through Pillow at full size. Raises ValueError or OSError
    for what cannot be read.
    """
    if plain_jpeg_size(data) is None:
        return decode_with_pillow(data)
    return decode_plain_jpeg(data, min_height, min_width)


def decode_plain_jpeg(
    data: bytes | memoryview, min_height: int = 0, min_width: int = 0, fast: bool = False
) -> np.ndarray:
    """`decode` for a file that has a plain_jpeg_size.

    `fast` repeats colours, which JPEGs hold at half the resolution, instead of blending them: some
    grey levels at edges of colour, for a twentieth of the time.
    """
    try:
        return simplejpeg.decode_jpeg(
            data, fastupsample=fast, min_height=min_height, min_width=min_width
        )
    except ValueError as error:
        _judge(error)
        # Pillow knows which other slips of encoders are harmless, and refuses the rest.
        return decode_with_pillow(bytes(data))


_complaints = threading.local()


def take_complaint() -> str:
    """What libjpeg said against the last JPEG that this thread has decoded, if not enough to refuse
    it: mostly nothing. Data left over behind a picture comes from some encoders, and from damage.
    """
    return _complaints.__dict__.pop("text", "")


def _judge(error: Exception) -> None:
    """Raise ValueError where libjpeg's complaint means that a part of the picture is made up.

    Pillow listens to no complaints, and would show it.
    """
    if any(sign in str(error) for sign in DAMAGED_INSIDE):
        raise ValueError(f"damaged inside or cut short ({error})") from None
    if str(error).startswith(PERHAPS_DAMAGED):
        _complaints.text = str(error)


def _check_jpeg(data: bytes) -> None:
    """Have libjpeg decode a JPEG at an eighth of its size, for what it has to say of it."""
    try:
        *_, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        colorspace = "CMYK" if colorspace in ("CMYK", "YCCK") else "RGB"
        simplejpeg.decode_jpeg(data, colorspace, min_height=1, min_width=1)
    except (ValueError, KeyError) as error:  # KeyError: as in plain_jpeg_size
        _judge(error)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that simplejpeg shows as a person sees it; None for other files."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a chroma subsampling that it has no name for
        return None
    # A size beyond reason is most likely a broken header: Pillow refuses it before it takes memory.
    too_large = Image.MAX_IMAGE_PIXELS and height * width > Image.MAX_IMAGE_PIXELS
    if too_large or colorspace in ("CMYK", "YCCK") or _is_turned(data):
        return None
    return height, width


def _is_turned(data: bytes) -> bool:
    """Whether EXIF data turns or mirrors the picture."""
    if b"Exif\0\0" not in data:  # most files end here, some microseconds later
        return False
    try:
        return turn_upright(Image.open(io.BytesIO(data))) is not None
    except (OSError, Image.DecompressionBombError):
        return False  # decoding it will tell


def turn_upright(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture into the position that its EXIF data asks for.

    Pillow's own exif_transpose rewrites that data, and fails where other parts of it are broken.
    Without that data Pillow takes what XMP says, which no browser does.
    """
    bare = Image.new("L", (1, 1))
    names = ("exif", "Raw profile type exif")  # the other is ImageMagick's, in PNG files
    bare.info = {name: image.info[name] for name in names if name in image.info}
    try:
        return TURNS.get(bare.getexif().get(0x0112))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return None  # Exif data that cannot be read turns nothing


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Like `decode`, for any format that Pillow reads: transparency on white, first frame only."""
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if data.startswith(b"\xff\xd8"):
                _check_jpeg(data)
            elif image.format == "PNG":
                _check_png(data)
            elif image.format == "TIFF" and image.mode in ("I", "F"):
                raise ValueError("32 bits a grey value, of which none is known to be white")
            image.info.pop("xmp", None)  # by which Pillow turns a TIFF that has no tag for it
            image.load()
            turn = turn_upright(image)
            return np.asarray(_to_rgb(image if turn is None else image.transpose(turn)))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image that can be read") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Pillow answers broken files with SyntaxError, TypeError and more
        raise ValueError(str(error)) from None


def _check_png(data: bytes) -> None:
    """Compare a PNG's parts with their checksums; Pillow does not for those of the picture."""
    view, start = memoryview(data), 8
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if zlib_ng.crc32(view[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ValueError("damaged inside or cut short (a checksum of the PNG is wrong)")
        if data[start + 4 : start + 8] == b"IEND":
            return  # what some programs write behind it is no part of the picture
        start = end


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        # 16 bits a grey value; Pillow's own conversion would clip instead of scale.
        grey = (np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
