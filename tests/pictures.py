"""Pictures that the tests make, in every format, and how far what becomes of them may be off."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

import image_files

# How far pixels may be off, in grey levels: (greatest difference, mean difference).
EXACT = (0, 0)
ROUNDING = (0.6, 0.4)
JPEG = (18, 2.5)  # what quality 95 loses of a picture as small and as detailed: up to (13, 1.9)


def scene(height: int, width: int) -> Image.Image:
    """Waves in many directions, from the picture's size down to a thirtieth of it, as in photos.

    No colour, corner or half is like another one, so that any mix-up shows.
    """
    draws = np.random.default_rng(7)
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    picture = np.zeros((height, width, 3))
    for waves in (0.5, 1, 2, 4, 8, 16, 32):
        for channel in range(3):
            angle, phase = draws.uniform(0, 2 * np.pi, 2)
            along = columns * np.cos(angle) + rows * np.sin(angle)
            picture[..., channel] += np.cos(2 * np.pi * waves * along + phase) / waves**0.7
    picture -= picture.min()
    return Image.fromarray((picture * (255 / picture.max())).round().astype(np.uint8))


def encode(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def jpeg(image: Image.Image, **options: object) -> bytes:
    return encode(image, "JPEG", **{"quality": 95, "subsampling": "4:4:4", **options})


def as_read(encoded: bytes) -> image_files.Encoded:
    """What ImageSet.read gives for a file of these bytes."""
    return encoded, image_files.plain_jpeg_size(encoded)


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def assert_close(ours: np.ndarray, expected: np.ndarray, tolerance: tuple[float, float]) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == expected.shape
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= tolerance[0]
    assert difference.mean() <= tolerance[1]


def write_set(folder: Path, files: dict[str, bytes]) -> image_files.ImageSet:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return image_files.open_image_set(str(folder), "train")


# Exif 2.32, tag 0x0112: which side of the picture the first row and the first column show.
ORIENTATIONS = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def turned(upright: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """What a camera stores that holds the scene this way, and the data that says so."""
    first_row, first_column = ORIENTATIONS[orientation]
    stored = np.asarray(upright)
    if first_row in ("left", "right"):
        stored = stored.swapaxes(0, 1)
    if first_row in ("bottom", "right"):
        stored = stored[::-1]
    if first_column in ("bottom", "right"):
        stored = stored[:, ::-1]
    exif = Image.Exif()
    exif[0x0112] = orientation
    return Image.fromarray(np.ascontiguousarray(stored)), exif


SCENE = scene(60, 84)


def with_scans(count: int, before: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan comes `count` times, the first time after `before`."""
    content = jpeg(scene(60, 80), progressive=True)
    start = content.rindex(b"\xff\xda")
    return content[:start] + before + content[start:-2] * count + content[-2:]
