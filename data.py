"""Images on disk → augmented uint8 batches → the device.

A data set is a folder of class folders, as ImageNet is usually laid out: `train/n01440764/a.JPEG`.
Threads decode and crop the images, each writing straight into its place in one uint8 batch of
shape (N, H, W, 3); decoding, resizing and reading release Python's interpreter lock. The bytes
stay bytes until they are on the device, where `normalize` makes floats of them.

Order, crop and flip of an image are a function of (seed, epoch, index) alone, so that neither the
number of threads nor an interruption changes what the model sees.
"""

import dataclasses
import functools
import hashlib
import io
import itertools
import math
import os
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image

from utils import MEAN, STD, Config, UserError, format_duration, log, train_px

cv2.setNumThreads(0)  # the threads here are the parallelism; OpenCV's own would fight them

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

# ------------------------------------------------------------------------------ the set of images


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """The images under a folder of class folders, in a fixed order."""

    folder: Path
    classes: tuple[str, ...]  # names of the class folders, sorted; a label is a position in here
    files: tuple[str, ...]  # "class/name", sorted by class, then by name
    labels: np.ndarray  # int64, (len(files),)

    def path(self, index: int) -> Path:
        """Path of image `index`."""
        return self.folder / self.files[index]

    def fingerprint(self) -> str:
        """SHA-256 of the names: tells a resumed run whether its images are still the same."""
        return hashlib.sha256(os.fsencode("\n".join(self.files))).hexdigest()

    def without(self, bad_files: Sequence[str]) -> "ImageSet":
        """The same set less some of its files; raises UserError if that empties a class."""
        bad = set(bad_files)
        kept = [index for index, file in enumerate(self.files) if file not in bad]
        files, labels = tuple(self.files[index] for index in kept), self.labels[kept]
        emptied = np.flatnonzero(np.bincount(labels, minlength=len(self.classes)) == 0)
        if len(emptied):
            raise UserError(
                f"no image in {self.folder / self.classes[emptied[0]]} can be read: mend some, or "
                "remove the class from the training and the validation folder"
            )
        return dataclasses.replace(self, files=files, labels=labels)


def open_image_set(folder_name: str) -> ImageSet:
    """List the images under a folder; raises UserError if it is missing or a class is empty."""
    folder = Path(folder_name)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: make one with `python3 scripts/prepare_data.py digits "
            "data/digits` (small, no network; for --recipe quickstart) or `python3 "
            "scripts/prepare_data.py imagenette data/imagenette`, and name it with "
            "--train-folder-name and --val-folder-name"
        )
    classes = sorted(entry.name for entry in os.scandir(folder) if _is_class_folder(entry))
    if not classes:
        raise UserError(
            f"{folder} has no class folders: the images are looked for in {folder}/<class>/"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        images = image_names(folder / name)
        if not images:
            raise UserError(
                f"class folder {folder / name} holds no image (such as a .jpg or .png): fill it or "
                f"remove it; the images lie in {folder}/<class>/"
            )
        files += [f"{name}/{image}" for image in images]
        labels += [label] * len(images)
    return ImageSet(folder, tuple(classes), tuple(files), np.array(labels, dtype=np.int64))


def image_names(folder: Path) -> list[str]:
    """Names of the image files in a folder, sorted; by their endings, whatever they hold."""
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.name.lower().endswith(IMAGE_ENDINGS) and not entry.name.startswith(".")
    )


def _is_class_folder(entry: os.DirEntry) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


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
        f"{val.folder} has {len(val.files):,} images in {len(val.classes):,} classes, "
        f"{train.folder} has {len(train.classes):,} classes: {'; '.join(complaints)}"
    )


def find_bad_images(image_set: ImageSet, workers: int, decode_all: bool) -> dict[str, str]:
    """Files that cannot be read, with the reason.

    Every file's first and last bytes are looked at, which finds what is empty, cut short or no
    image at all; a file that looks odd is decoded, and with `decode_all` every file is.
    """

    def check(start: int) -> dict[str, str]:
        bad = {}
        for index in range(start, min(start + block, len(image_set.files))):
            path = image_set.path(index)
            try:
                if decode_all or not _looks_whole(path):
                    decode(path.read_bytes())
            except (ValueError, OSError) as error:
                bad[image_set.files[index]] = str(error)
        return bad

    block = 100  # files a task: a task for each would take a gigabyte for ImageNet
    pool = ThreadPoolExecutor(max(1, workers), "check")
    try:
        blocks = pool.map(check, range(0, len(image_set.files), block))
        return {file: reason for bad in blocks for file, reason in bad.items()}
    finally:
        pool.shutdown(cancel_futures=True)  # a user who interrupts waits for no further file


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
    train_set = open_image_set(config.train_folder_name)
    val_set = open_image_set(config.val_folder_name)
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
    images, size = len(train_set.files), config.batch_size
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
    skipped: list[str] = []
    first = ""
    for part, image_set in parts.items():
        started = time.monotonic()
        log.info("checking %s files in %s", f"{len(image_set.files):,}", image_set.folder)
        bad = find_bad_images(image_set, config.workers, decode_all=config.skip_bad_images)
        log.info("checked in %s", format_duration(time.monotonic() - started))
        for file, reason in bad.items():
            log.info("cannot be read: %s (%s)", image_set.folder / file, reason)
            first = first or f"{image_set.folder / file} ({reason})"
            skipped.append(f"{part}/{file}")
    if skipped and not config.skip_bad_images:
        images = sum(len(image_set.files) for image_set in parts.values())
        raise UserError(
            f"{len(skipped)} of {images:,} images cannot be read, listed above, the first {first}: "
            "mend or remove them, or leave them out with --skip-bad-images"
        )
    return skipped


# ------------------------------------------------------------------------------ one image


def decode(data: bytes, min_height: int = 0, min_width: int = 0) -> np.ndarray:
    """The RGB picture that a person sees: uint8, (height, width, 3).

    A plain JPEG is decoded at the smallest DCT scale that is at least min_height x min_width;
    0 means full size. Everything else (PNG, WebP, CMYK, a JPEG that its EXIF data turns or that
    the fast decoder refuses) goes through Pillow at full size. Raises ValueError or OSError for
    what cannot be read.
    """
    if plain_jpeg_size(data) is None:
        return decode_with_pillow(data)
    return _decode_plain_jpeg(data, min_height, min_width)


def _decode_plain_jpeg(data: bytes, min_height: int, min_width: int) -> np.ndarray:
    """`decode` for a file that has a plain_jpeg_size."""
    try:
        return simplejpeg.decode_jpeg(data, min_height=min_height, min_width=min_width)
    except ValueError as error:
        if "Premature end" in str(error):
            raise  # cut short, or zeros to its end: Pillow may take what is missing for grey
        # Pillow knows which other slips of encoders are harmless, and refuses the rest.
        return decode_with_pillow(data)


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
        return _turn_upright(Image.open(io.BytesIO(data))) is not None
    except (OSError, Image.DecompressionBombError):
        return False  # decoding it will tell


def _turn_upright(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture into the position that its EXIF data asks for.

    Pillow's own exif_transpose rewrites that data, and fails where other parts of it are broken.
    """
    try:
        return TURNS.get(image.getexif().get(0x0112))
    except (OSError, ValueError, TypeError, LookupError, SyntaxError, struct.error):
        return None  # Exif data that cannot be read turns nothing


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Like `decode`, for any format that Pillow reads: transparency on white, first frame only."""
    if not data:
        raise ValueError("the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            turn = _turn_upright(image)
            return np.asarray(_to_rgb(image if turn is None else image.transpose(turn)))
    except Image.UnidentifiedImageError:
        raise ValueError("not an image that can be read") from None
    except (OSError, MemoryError):
        raise
    except Exception as error:  # Pillow answers broken files with SyntaxError, TypeError and more
        raise ValueError(str(error)) from None


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


# ------------------------------------------------------------------------------ augmentation


def random_words(seed: int, epoch: int, index: int, count: int) -> np.ndarray:
    """`count` random uint64 that depend on (seed, epoch, index) alone.

    Philox is a counter turned into noise (Salmon et al., SC 2011): there is no state to keep, and
    NumPy promises that its raw stream stays the same in later versions.
    """
    return np.random.Philox(key=seed << 64 | epoch, counter=index << 64).random_raw(count)


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of an epoch: each of range(images) once, int64."""
    # Counted from 0 up, the indexes of images never reach this one.
    return np.argsort(random_words(seed, epoch, 2**64 - 1, images), kind="stable")


def random_crop(
    seed: int, epoch: int, index: int, height: int, width: int, min_scale: float
) -> tuple[int, int, int, int, bool]:
    """Crop (top, left, crop_height, crop_width) and whether to mirror it.

    The distribution is that of torchvision's RandomResizedCrop(scale=(min_scale, 1),
    ratio=(3/4, 4/3)) and RandomHorizontalFlip(0.5): ten tries, then the largest central crop
    within the ratios.
    """
    draws = (random_words(seed, epoch, index, 41) >> np.uint64(11)) * 2.0**-53  # [0, 1)
    mirrored = bool(draws[0] < 0.5)
    log_ratio = math.log(4 / 3)
    for try_ in range(10):
        area_draw, ratio_draw, top_draw, left_draw = draws[1 + 4 * try_ : 5 + 4 * try_].tolist()
        area = height * width * (min_scale + area_draw * (1 - min_scale))
        ratio = math.exp(log_ratio * (2 * ratio_draw - 1))  # width over height
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(top_draw * (height - crop_height + 1))
            left = int(left_draw * (width - crop_width + 1))
            return top, left, crop_height, crop_width, mirrored
    crop_width = min(width, round(height * 4 / 3))
    crop_height = min(height, round(width * 4 / 3))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width, mirrored


def fill_train(config: Config, epoch: int, data: bytes, index: int, out: np.ndarray) -> None:
    """Write the training crop of an encoded image into `out`, uint8 (px, px, 3)."""
    px = out.shape[0]
    size = plain_jpeg_size(data)
    picture = decode_with_pillow(data) if size is None else None
    height, width = size or picture.shape[:2]
    top, left, crop_height, crop_width, mirrored = random_crop(
        config.seed, epoch, index, height, width, config.crop_min_scale
    )
    if picture is None:
        # At this scale the crop is still at least px x px, or the picture is at full size.
        least = math.ceil(height * px / crop_height), math.ceil(width * px / crop_width)
        picture = _decode_plain_jpeg(data, *least)
    # The crop on the picture as it was decoded: at so many eighths, its size rounded up.
    scale = round(8 * max(picture.shape[:2]) / max(height, width)) / 8
    top, bottom = round(top * scale), round((top + crop_height) * scale)
    left, right = round(left * scale), round((left + crop_width) * scale)
    crop = picture[top : max(bottom, top + 1), left : max(right, left + 1)]
    shrinks = crop.shape[0] > px or crop.shape[1] > px
    cv2.resize(
        crop, (px, px), dst=out, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    )
    if mirrored and config.flip:
        cv2.flip(out, 1, dst=out)


def fill_val(config: Config, data: bytes, index: int, out: np.ndarray) -> None:
    """Write the centre crop of an encoded image into `out`, uint8 (px, px, 3).

    The same pixels, to one grey level, as torchvision's Resize(val_resize_px) and
    CenterCrop(val_px) on a Pillow image: decoded at full size and resized by Pillow, since this is
    what the app does to a photo. Only what the crop shows is resized.
    """
    picture = Image.fromarray(decode(data))
    px, width, height = out.shape[0], *picture.size
    short = min(width, height)
    resized_width = int(config.val_resize_px * width / short)
    resized_height = int(config.val_resize_px * height / short)
    left, top = round((resized_width - px) / 2), round((resized_height - px) / 2)
    across, down = width / resized_width, height / resized_height
    box = (left * across, top * down, (left + px) * across, (top + px) * down)
    box = (box[0], box[1], min(box[2], width), min(box[3], height))  # rounding of the last digit
    out[:] = np.asarray(picture.resize((px, px), Image.Resampling.BILINEAR, box=box))


# ------------------------------------------------------------------------------ batches

Batch = tuple[torch.Tensor, torch.Tensor]  # images uint8 (N, px, px, 3); labels int64 (N,)


def batches(
    image_set: ImageSet,
    fill: Callable[[bytes, int, np.ndarray], None],
    order: np.ndarray,
    batch_size: int,
    px: int,
    workers: int,
    first_batch: int = 0,
    pin: bool = False,
) -> Iterator[Batch]:
    """Yield the images of `order` in batches, decoded by `workers` threads two batches ahead.

    The last batch may be smaller. `pin` puts the batches into page-locked memory, from which a GPU
    copies while it computes. An image that cannot be read raises UserError with its path.
    """

    def fill_some(images: np.ndarray, indexes: np.ndarray) -> None:
        for out, index in zip(images, indexes.tolist(), strict=True):
            try:
                fill(image_set.path(index).read_bytes(), index, out)
            except (ValueError, OSError, cv2.error) as error:
                raise UserError(
                    f"cannot read {image_set.path(index)} ({error}): put a good copy there and "
                    "give the same command again, or begin another run with --skip-bad-images"
                ) from error

    starts = range(first_batch * batch_size, len(order), batch_size)
    pool = ThreadPoolExecutor(workers, "decode") if workers else None

    def start(position: int) -> tuple[Batch, list]:
        indexes = order[position : position + batch_size]
        images = torch.empty((len(indexes), px, px, 3), dtype=torch.uint8, pin_memory=pin)
        labels = torch.from_numpy(image_set.labels[indexes])
        labels = labels.pin_memory() if pin else labels
        array = images.numpy()
        if pool is None:
            fill_some(array, indexes)
            return (images, labels), []
        # Some images a task: enough to be worth a thread's while, few enough to share evenly.
        step = max(1, min(16, len(indexes) // workers))
        tasks = [
            pool.submit(fill_some, array[at : at + step], indexes[at : at + step])
            for at in range(0, len(indexes), step)
        ]
        return (images, labels), tasks

    ahead = 2 if pool is not None else 0
    started: list[tuple[Batch, list]] = []
    try:
        for number, position in enumerate(starts):
            started.append(start(position))
            if number >= ahead:
                batch, tasks = started.pop(0)
                for task in tasks:
                    task.result()
                yield batch
        for batch, tasks in started:
            for task in tasks:
                task.result()
            yield batch
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def train_batches(
    image_set: ImageSet, config: Config, epoch: int, first_batch: int = 0, pin: bool = False
) -> Iterator[Batch]:
    """The training batches of an epoch, from batch `first_batch` on, at that epoch's size."""
    return batches(
        image_set,
        functools.partial(fill_train, config, epoch),
        epoch_order(config.seed, epoch, len(image_set.files)),
        config.batch_size,
        train_px(config, epoch),
        config.workers,
        first_batch,
        pin,
    )


def val_batches(image_set: ImageSet, config: Config, pin: bool = False) -> Iterator[Batch]:
    """All validation images, in order."""
    return batches(
        image_set,
        functools.partial(fill_val, config),
        np.arange(len(image_set.files)),
        config.val_batch_size,
        config.val_px,
        config.workers,
        pin=pin,
    )


def to_device(host_batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on the device; on a GPU the next one is copied while this one is used."""
    if device.type != "cuda":
        yield from host_batches
        return
    copies = torch.cuda.Stream(device)

    def start_copy(batch: Batch) -> tuple[list[torch.Tensor], torch.cuda.Event]:
        with torch.cuda.stream(copies):
            copied = [tensor.to(device, non_blocking=True) for tensor in batch]
            return copied, copies.record_event()

    def hand_over(copied: list[torch.Tensor], done: torch.cuda.Event) -> Batch:
        stream = torch.cuda.current_stream(device)
        stream.wait_event(done)
        for tensor in copied:
            tensor.record_stream(stream)  # else its memory could be reused too early
        return copied[0], copied[1]

    underway = None
    for batch in host_batches:
        coming = start_copy(batch)
        if underway is not None:
            yield hand_over(*underway)
        underway = coming
    if underway is not None:
        yield hand_over(*underway)


@functools.cache
def _scale_and_shift(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """What normalises a channel of uint8 as scale * x + shift, float32 (3, 1, 1), made once."""
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalize(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 (N, H, W, 3) → `dtype` (N, 3, H, W), channels_last, mean 0 and deviation 1.

    Computed in float32 and rounded once. On a GPU it is a single kernel, which reads the bytes and
    writes the result: nothing in float32 goes through its memory.
    """
    scale, shift = _scale_and_shift(images.device)
    images = images.permute(0, 3, 1, 2)
    out = torch.empty(
        images.shape, dtype=dtype, device=images.device, memory_format=torch.channels_last
    )
    return torch.addcmul(shift, images, scale, out=out)
