"""data.py: what the model gets to see, against torchvision and Pillow, on pictures made here."""

import dataclasses
import io
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional

import data
from utils import MEAN, STD, Config, UserError

CONFIG = Config(batch_size=5, val_batch_size=5, train_px=32, val_px=32, val_resize_px=36, workers=2)
PILLOW_MAY_WARN = pytest.mark.filterwarnings("ignore:::PIL")  # of what it finds in broken files
WAIT_S = 20  # for what takes milliseconds on an idle machine

# How far pixels may be off, in grey levels: (greatest difference, mean difference).
EXACT = (0, 0)
ROUNDING = (0.6, 0.4)
JPEG = (18, 2.5)  # what quality 95 loses of a picture as small and as detailed: up to (13, 1.9)


# ------------------------------------------------------------------------------ helpers


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


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


def assert_close(ours: np.ndarray, expected: np.ndarray, tolerance: tuple[float, float]) -> None:
    assert ours.dtype == np.uint8
    assert ours.shape == expected.shape
    difference = np.abs(ours.astype(int) - expected)
    assert difference.max() <= tolerance[0]
    assert difference.mean() <= tolerance[1]


def filled(fill: Callable, *arguments: object, px: int) -> np.ndarray:
    """What `fill` writes, given arguments and a place in a batch."""
    batch = np.full((3, px, px, 3), 99, np.uint8)
    fill(*arguments, batch[1])
    assert (batch[::2] == 99).all()  # nothing is written into the neighbours
    return batch[1]


def write_set(folder: Path, files: dict[str, bytes]) -> data.ImageSet:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return data.open_image_set(str(folder))


def decoding_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


# ------------------------------------------------------------------------------ crop and order


def random_crops(
    height: int, width: int, min_scale: float, count: int, seed: int = 0, epoch: int = 0
) -> np.ndarray:
    """(count, 5): top, left, height, width and mirrored of the first indexes."""
    crops = [
        data.random_crop(seed, epoch, index, height, width, min_scale) for index in range(count)
    ]
    return np.array(crops, dtype=float)


def features(crops: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, 4): area share, log of the aspect, and where between its limits the crop lies."""
    top, left, crop_height, crop_width = crops.T[:4]
    return np.stack(
        [
            crop_height * crop_width / (height * width),
            np.log(crop_width / crop_height),
            top / np.maximum(1, height - crop_height),
            left / np.maximum(1, width - crop_width),
        ],
        axis=1,
    )


@pytest.mark.parametrize(
    ("height", "width", "min_scale"),
    [
        (375, 500, 0.08),
        (500, 375, 0.35),
        (100, 1000, 0.08),  # ten tries often fail: the central crop takes over
        (90, 30, 0.3),  # as above, upright
        (12, 16, 0.25),  # so small that a place too few or too many shows
    ],
)
def test_crops_are_distributed_as_torchvisions(height: int, width: int, min_scale: float) -> None:
    count = 20_000
    torch.manual_seed(0)
    empty = torch.empty(1).expand(3, height, width)
    crop = transforms.RandomResizedCrop(1, scale=(min_scale, 1), ratio=(3 / 4, 4 / 3))
    expected = np.array([crop.get_params(empty, crop.scale, crop.ratio) for _ in range(count)])
    ours = random_crops(height, width, min_scale, count)
    top, left, crop_height, crop_width, mirrored = ours.T
    assert (top >= 0).all() and (left >= 0).all()
    assert (crop_height > 0).all() and (top + crop_height <= height).all()
    assert (crop_width > 0).all() and (left + crop_width <= width).all()

    ours, expected = features(ours, height, width), features(expected, height, width)
    for column in range(4):
        # Of two samples from one distribution, one pair in a thousand is further apart (D 0.0195).
        test = stats.ks_2samp(ours[:, column], expected[:, column], method="asymp")
        assert test.pvalue > 0.001
    # Nor do the four hang together in another way; 0.04 is four deviations of a difference.
    between = np.corrcoef(ours.T) - np.corrcoef(expected.T)
    assert np.abs(between).max() < 0.04
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / count**0.5
    for column in ours.T:
        assert abs(np.corrcoef(mirrored, column)[0, 1]) < 4 / count**0.5  # deviations


@pytest.mark.parametrize(
    "neighbour", [{"index": 1}, {"epoch": 1}, {"seed": 1}, {"seed": 1, "epoch": -1}]
)
def test_crops_of_neighbours_have_nothing_in_common(neighbour: dict[str, int]) -> None:
    count, shift = 4000, neighbour.get("index", 0)
    first = random_crops(375, 500, 0.08, count, seed=3, epoch=8)
    seed, epoch = 3 + neighbour.get("seed", 0), 8 + neighbour.get("epoch", 0)
    second = random_crops(375, 500, 0.08, count + shift, seed, epoch)[shift:]
    for one, other in zip(first.T, second.T, strict=True):
        assert abs(np.corrcoef(one, other)[0, 1]) < 4.5 / count**0.5  # deviations


def test_crops_and_order_are_the_same_when_asked_again() -> None:
    crops = random_crops(375, 500, 0.08, 50, seed=2**63 - 1, epoch=9)
    assert (crops == random_crops(375, 500, 0.08, 50, seed=2**63 - 1, epoch=9)).all()
    backwards = [data.random_crop(2**63 - 1, 9, i, 375, 500, 0.08) for i in reversed(range(50))]
    assert (crops[::-1] == np.array(backwards)).all()
    assert (data.epoch_order(5, 6, 1000) == data.epoch_order(5, 6, 1000)).all()


def test_every_epoch_and_seed_has_its_own_order() -> None:
    images = 10_000
    orders = [np.arange(images)]
    orders += [data.epoch_order(s, e, images) for s, e in ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0))]
    for place, order in enumerate(orders):
        assert (np.sort(order) == np.arange(images)).all()
        for other in orders[:place]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 4.5 / images**0.5  # deviations
            assert (order == other).sum() < 10  # 1 is to be expected
    assert data.epoch_order(0, 0, 1).tolist() == [0]


# ------------------------------------------------------------------------------ pixels


def check_val_pixels(encoded: bytes, resize_px: int, crop_px: int) -> None:
    config = dataclasses.replace(CONFIG, val_resize_px=resize_px, val_px=crop_px)
    ours = filled(data.fill_val, config, encoded, 0, px=crop_px)
    image = Image.open(io.BytesIO(encoded)).convert("RGB")
    expected = transforms.CenterCrop(crop_px)(transforms.Resize(resize_px)(image))
    # Pillow resizes both; where the crop begins is rounded to 32 bits, and in rare pixels a grey
    # level falls on the other side of a half (at most 1.5 % of them).
    assert_close(ours, pixels(expected), (1, 0.02))


VAL_SHAPES = [(375, 500), (500, 375), (400, 400), (90, 121), (333, 257), (257, 1001), (20, 3)]


@pytest.mark.parametrize(("height", "width"), VAL_SHAPES)
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:0"])
def test_val_pixels_are_torchvisions(height: int, width: int, subsampling: str) -> None:
    check_val_pixels(jpeg(scene(height, width), subsampling=subsampling), 256, 224)


@pytest.mark.parametrize(("resize_px", "crop_px"), [(36, 32), (32, 32), (33, 32), (224, 224)])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (31, 47)])
def test_val_pixels_are_torchvisions_at_other_sizes(
    height: int, width: int, resize_px: int, crop_px: int
) -> None:
    check_val_pixels(encode(scene(height, width), "PNG"), resize_px, crop_px)


def test_val_pixels_of_a_grey_jpeg_are_torchvisions() -> None:
    check_val_pixels(encode(scene(375, 500).convert("L"), "JPEG"), 256, 224)


@pytest.mark.parametrize(
    ("kind", "height", "width", "px", "mean_difference"),
    [
        # OpenCV averages areas where torchvision weighs them by a triangle, and libjpeg shrinks by
        # dropping frequencies: the more a crop shrinks, the sharper ours is. The bounds are 1.3
        # times the mean that was measured over the crops, in grey levels: 0.37, 0.85, 0.89, 0.55,
        # 0.21 and 0.55.
        ("JPEG", 375, 500, 224, 0.5),
        ("JPEG", 375, 500, 64, 1.1),
        ("JPEG", 500, 375, 64, 1.2),
        ("JPEG", 768, 1024, 96, 0.75),
        ("JPEG", 120, 160, 224, 0.3),  # only ever enlarged
        ("PNG", 768, 1024, 32, 0.75),  # decoded at full size, and shrunk by OpenCV alone
    ],
)
def test_train_pixels_are_the_same_crop_of_torchvision(
    kind: str, height: int, width: int, px: int, mean_difference: float
) -> None:
    encoded = encode(scene(height, width), kind, **({"quality": 95} if kind == "JPEG" else {}))
    image = Image.open(io.BytesIO(encoded))
    differences, shifts, both = [], [], set()
    for index in range(40):
        *box, mirrored = data.random_crop(CONFIG.seed, 4, index, height, width, 0.08)
        both.add(mirrored)
        ours = filled(data.fill_train, CONFIG, 4, encoded, index, px=px).astype(int)
        expected = pixels(functional.resized_crop(image, *box, [px, px], antialias=True))
        if mirrored:
            expected = expected[:, ::-1]
        difference = np.abs(ours - expected).mean()
        differences.append(difference)
        shifted = [np.roll(expected, by, axis)[2:-2, 2:-2] for by in (-2, 2) for axis in (0, 1)]
        nearest = min(np.abs(ours[2:-2, 2:-2] - other).mean() for other in shifted)
        assert nearest > 2 * difference
        # By how many pixels ours must move to be most like the expected one (Lucas and Kanade).
        slopes = np.stack([slope.ravel() for slope in np.gradient(expected.mean(axis=2))], axis=1)
        shifts.append(np.linalg.lstsq(slopes, (ours - expected).mean(axis=2).ravel())[0])
    assert both == {False, True}
    assert np.mean(differences) < mean_difference
    assert np.max(differences) < 2 * mean_difference
    # A crop begins and ends at whole pixels of the picture as it was decoded: each edge is up to
    # half a pixel off, but as often to either side.
    assert np.abs(shifts).max() < 0.6
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.1


def test_train_pixels_are_never_mirrored_without_flips() -> None:
    encoded = encode(scene(60, 80), "PNG")
    straight = dataclasses.replace(CONFIG, flip=False)
    mirrored = 0
    for index in range(20):
        ours = filled(data.fill_train, straight, 0, encoded, index, px=32)
        flipped = filled(data.fill_train, CONFIG, 0, encoded, index, px=32)
        if data.random_crop(CONFIG.seed, 0, index, 60, 80, 0.08)[4]:
            flipped = flipped[:, ::-1]
            mirrored += 1
        assert (ours == flipped).all()
    assert 0 < mirrored < 20


def test_train_pixels_follow_seed_epoch_and_smallest_crop() -> None:
    encoded = encode(scene(60, 80), "PNG")
    usual = filled(data.fill_train, CONFIG, 0, encoded, 0, px=32)
    assert (usual == filled(data.fill_train, CONFIG, 0, encoded, 0, px=32)).all()
    for changed, epoch, index in (
        (CONFIG, 1, 0),
        (CONFIG, 0, 1),
        (dataclasses.replace(CONFIG, seed=1), 0, 0),
        (dataclasses.replace(CONFIG, crop_min_scale=0.9), 0, 0),
    ):
        assert (usual != filled(data.fill_train, changed, epoch, encoded, index, px=32)).any()


@pytest.mark.parametrize(("height", "width"), [(600, 800), (801, 603)])
def test_a_jpeg_is_decoded_no_larger_than_its_crop_needs(
    height: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode_jpeg = data.simplejpeg.decode_jpeg

    def spy(*arguments: object, **options: object) -> np.ndarray:
        picture = decode_jpeg(*arguments, **options)
        decoded.append(picture.shape[:2])
        return picture

    monkeypatch.setattr(data.simplejpeg, "decode_jpeg", spy)
    encoded, px, scales = jpeg(scene(height, width)), 96, set()
    for index in range(30):
        _, _, crop_height, crop_width, _ = data.random_crop(0, 0, index, height, width, 0.08)
        filled(data.fill_train, CONFIG, 0, encoded, index, px=px)
        eighths = round(8 * decoded[-1][0] / height)  # libjpeg's scales
        assert decoded[-1] == (-(-height * eighths // 8), -(-width * eighths // 8))
        short = min(crop_height, crop_width)
        # Large enough, but for less than a pixel by which the decoded picture is rounded up …
        assert eighths == 8 or short * eighths / 8 > px - 1
        assert short * (eighths - 1) / 8 < px  # … and the next smaller scale is too small
        scales.add(eighths)
    assert len(decoded) == 30
    assert len(scales) >= 3

    decoded.clear()
    filled(data.fill_val, CONFIG, encoded, 0, px=32)
    assert decoded == [(height, width)]


# ------------------------------------------------------------------------------ formats

SCENE = scene(60, 84)
GREY = SCENE.convert("L")
ALPHA = Image.fromarray(np.tile(np.linspace(0, 255, 84).astype(np.uint8), (60, 1)))
PALETTE = SCENE.quantize(64)
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 256 + 77)  # 16 bits a grey value


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def on_white(image: Image.Image, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return share * pixels(image) + (1 - share) * 255


def palette_on_white(*see_through: int) -> np.ndarray:
    return on_white(PALETTE, np.where(np.isin(np.asarray(PALETTE), see_through), 0, 255))


FORMATS = {
    "baseline JPEG": (jpeg(SCENE), pixels(SCENE), JPEG),
    "progressive JPEG": (jpeg(SCENE, progressive=True), pixels(SCENE), JPEG),
    "grey JPEG": (jpeg(GREY), pixels(GREY), JPEG),
    "CMYK JPEG": (jpeg(SCENE.convert("CMYK")), pixels(SCENE), JPEG),
    "PNG": (encode(SCENE, "PNG"), pixels(SCENE), EXACT),
    "palette PNG": (encode(PALETTE, "PNG"), pixels(PALETTE), EXACT),
    "palette PNG, one colour transparent": (
        encode(PALETTE, "PNG", transparency=5),
        palette_on_white(5),
        EXACT,
    ),
    "palette PNG, some colours transparent": (
        encode(PALETTE, "PNG", transparency=bytes([0, 0, 255, 0])),
        palette_on_white(0, 1, 3),
        EXACT,
    ),
    "16-bit grey PNG": (encode(DEEP, "PNG"), pixels(GREY), EXACT),
    "black and white PNG": (encode(GREY.convert("1"), "PNG"), pixels(GREY.convert("1")), EXACT),
    "RGBA PNG": (
        encode(with_alpha(SCENE), "PNG"),
        on_white(SCENE, np.asarray(ALPHA)),
        ROUNDING,
    ),
    "LA PNG": (encode(with_alpha(GREY), "PNG"), on_white(GREY, np.asarray(ALPHA)), ROUNDING),
    # WebP always halves the colours' resolution.
    "lossy WebP": (encode(SCENE, "WEBP", quality=95), pixels(SCENE), (24, 4)),
    "lossless WebP": (encode(SCENE, "WEBP", lossless=True), pixels(SCENE), EXACT),
    "lossless WebP with alpha": (
        encode(with_alpha(SCENE), "WEBP", lossless=True, exact=True),
        on_white(SCENE, np.asarray(ALPHA)),
        ROUNDING,
    ),
    "GIF, one colour transparent": (
        encode(PALETTE, "GIF", transparency=5),
        palette_on_white(5),
        EXACT,
    ),
    "BMP": (encode(SCENE, "BMP"), pixels(SCENE), EXACT),
    "TIFF": (encode(SCENE, "TIFF", compression="tiff_lzw"), pixels(SCENE), EXACT),
    "16-bit grey TIFF": (encode(DEEP, "TIFF"), pixels(GREY), EXACT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_decodes_to_what_a_person_sees(name: str) -> None:
    encoded, expected, tolerance = FORMATS[name]
    assert_close(data.decode(encoded), expected, tolerance)
    # At least a size: what is no plain JPEG keeps its own.
    small = data.decode(encoded, 20, 20)
    assert small.shape[0] >= 20 and small.shape[1] >= 20


def test_a_file_named_as_another_format_is_what_its_bytes_say(tmp_path: Path) -> None:
    images = write_set(tmp_path, {"a/picture.JPEG": encode(SCENE, "PNG")})
    assert data.find_bad_images(images, 1, decode_all=True) == {}
    assert_close(data.decode(images.path(0).read_bytes()), pixels(SCENE), EXACT)


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


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_turns_the_picture_upright(orientation: int, kind: str) -> None:
    stored, exif = turned(SCENE, orientation)
    quality = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}, "PNG": {}}
    encoded = encode(stored, kind, exif=exif, **quality[kind])
    assert_close(data.decode(encoded), pixels(SCENE), JPEG if kind == "JPEG" else EXACT)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_exif_turns_crops_too(orientation: int) -> None:
    upright = scene(480, 640)
    stored, exif = turned(upright, orientation)
    encoded, plain = jpeg(stored, exif=exif), encode(upright, "PNG")
    # Orientation 1 takes the DCT-scaled path, in which crops differ as above.
    tolerance = (16, 2.5) if orientation == 1 else (2, 0.3)
    for index in range(6):
        ours = filled(data.fill_train, CONFIG, 0, encoded, index, px=32)
        expected = filled(data.fill_train, CONFIG, 0, plain, index, px=32)
        assert_close(ours, expected.astype(int), tolerance)
    ours = filled(data.fill_val, CONFIG, encoded, 0, px=32)
    assert_close(ours, filled(data.fill_val, CONFIG, plain, 0, px=32).astype(int), (2, 0.3))


def jpeg_with_exif(content: bytes) -> bytes:
    # Without a resolution of its own, Pillow reads the data once more and keeps errors to itself.
    plain, segment = jpeg(SCENE, dpi=(72, 72)), b"Exif\0\0" + content
    return plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[2:]


@PILLOW_MAY_WARN
def test_exif_data_that_cannot_be_read_turns_nothing() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    content = exif.tobytes()[6:]
    as_text = content.replace(b"\x01\x12\x00\x03", b"\x01\x12\x00\x02")
    assert as_text != content
    for broken in (b"", b"MM", content[:5], content[:12], b"XX" + content[2:], as_text):
        assert_close(data.decode(jpeg_with_exif(broken)), pixels(SCENE), JPEG)


def test_exif_turns_although_other_parts_of_it_are_broken() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    content = exif.tobytes()[6:]
    broken = content.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07")  # a number, typed as bytes
    assert broken != content
    expected = np.rot90(pixels(SCENE), -1)
    assert_close(data.decode(jpeg_with_exif(content)), expected, JPEG)
    assert_close(data.decode(jpeg_with_exif(broken)), expected, JPEG)


# ------------------------------------------------------------------------------ bad files

WHOLE = {  # small files of every format, as they should be
    "a.jpg": jpeg(SCENE),
    "progressive.jpg": jpeg(SCENE, progressive=True),
    "turned.jpg": jpeg(*turned(SCENE, 6)[:1], exif=turned(SCENE, 6)[1]),
    "cmyk.jpg": jpeg(SCENE.convert("CMYK")),
    "a.png": encode(SCENE, "PNG"),
    "palette.png": encode(PALETTE, "PNG", transparency=5),
    "deep.png": encode(DEEP, "PNG"),
    "a.webp": encode(SCENE, "WEBP"),
    "alpha.webp": encode(with_alpha(SCENE), "WEBP", lossless=True),
    "a.gif": encode(PALETTE, "GIF"),
    "a.bmp": encode(SCENE, "BMP"),
    "a.tif": encode(SCENE, "TIFF"),
    "lzw.tiff": encode(SCENE, "TIFF", compression="tiff_lzw"),
}


def find_bad(folder: Path, files: dict[str, bytes], decode_all: bool) -> dict[str, str]:
    """Reasons by name of the files that are reported."""
    images = write_set(folder, {f"class/{name}": content for name, content in files.items()})
    bad = data.find_bad_images(images, 2, decode_all)
    return {name.removeprefix("class/"): reason for name, reason in bad.items()}


@pytest.mark.parametrize("decode_all", [False, True])
def test_good_files_are_not_reported(decode_all: bool, tmp_path: Path) -> None:
    trailing = {
        f"{extra}_{name}": WHOLE[name] + content * extra
        for name in ("a.jpg", "progressive.jpg", "a.png", "a.webp")
        for extra in (1, 30, 300, 5000)
        for content in (b"\0", b"\xab")
    }
    assert find_bad(tmp_path, WHOLE | trailing, decode_all) == {}


@PILLOW_MAY_WARN
@pytest.mark.parametrize("decode_all", [False, True])
def test_files_cut_short_are_reported(decode_all: bool, tmp_path: Path) -> None:
    cut = {}
    for name, content in WHOLE.items():
        # A PNG's last 22 bytes and a GIF's last 2 are but the end mark: the picture is whole.
        size = len(content) - (24 if name.endswith("png") else 3 if name.endswith("gif") else 1)
        for kept in (*range(0, 24, 3), *range(24, size, size // 25), size - 7, size):
            cut[f"{kept}_{name}"] = content[:kept]
    bad = find_bad(tmp_path, cut, decode_all)
    assert cut.keys() - bad.keys() == set()
    assert all(bad.values())  # each with a reason
    assert bad["0_a.jpg"] == "the file is empty"


def test_files_of_something_else_are_reported(tmp_path: Path) -> None:
    strange = {
        "text.jpg": b"404 not found\n" * 50,
        "zeros.png": bytes(3000),
        "half_zeros.jpg": WHOLE["a.jpg"][:2000] + bytes(len(WHOLE["a.jpg"]) - 2000),
        "header.jpg": WHOLE["a.jpg"][:200],
        "header.png": b"\x89PNG\r\n\x1a\n",
    }
    bad = find_bad(tmp_path, strange | WHOLE, decode_all=False)
    assert bad.keys() == strange.keys()
    assert bad["text.jpg"] == "not an image that can be read"


def damage(content: bytes, at: int) -> bytes:
    return content[:at] + random.Random(0).randbytes(300) + content[at + 300 :]


def test_damage_that_a_format_can_notice_is_found_by_decoding(tmp_path: Path) -> None:
    places = {"a.jpg": 100, "cmyk.jpg": 100, "a.png": 2000, "deep.png": 2000, "alpha.webp": 20}
    damaged = {name: damage(WHOLE[name], at) for name, at in places.items()}
    assert find_bad(tmp_path, WHOLE | damaged, decode_all=True).keys() == damaged.keys()
    # Both ends of these files are as they should be.
    assert find_bad(tmp_path, WHOLE | damaged, decode_all=False) == {}


def test_a_jpeg_damaged_inside_is_what_other_programs_show() -> None:
    damaged = damage(WHOLE["a.jpg"], len(WHOLE["a.jpg"]) // 2)
    with Image.open(io.BytesIO(damaged)) as image:  # nothing in a JPEG tells right bytes from wrong
        assert_close(data.decode(damaged), pixels(image), EXACT)


def test_a_folder_named_as_an_image_is_reported(tmp_path: Path) -> None:
    (tmp_path / "class" / "folder.jpg").mkdir(parents=True)
    assert find_bad(tmp_path, WHOLE, decode_all=False).keys() == {"folder.jpg"}


@PILLOW_MAY_WARN
def test_broken_files_raise_nothing_but_what_is_documented() -> None:
    dice, refused = random.Random(0), 0
    for content in WHOLE.values():
        for _ in range(60):
            broken = bytearray(content[: dice.choice([None, dice.randrange(len(content))])])
            zone = dice.choice([200, len(broken)])  # headers are a small part of a file
            for _ in range(dice.choice([1, 3, 20]) if broken else 0):
                broken[dice.randrange(min(zone, len(broken)))] = dice.choice(
                    [0, 255, dice.randrange(256)]
                )
            try:
                picture = data.decode(bytes(broken))
            except (ValueError, OSError) as error:
                assert str(error)
                refused += 1
            else:
                assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert refused > 300  # of 780


def with_jpeg_header(offset: int, content: bytes) -> bytes:
    """A JPEG whose frame header is changed from some byte after its marker on."""
    start = WHOLE["a.jpg"].index(b"\xff\xc0") + offset
    return WHOLE["a.jpg"][:start] + content + WHOLE["a.jpg"][start + len(content) :]


def test_a_header_of_absurd_size_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(data.simplejpeg, "decode_jpeg")  # it would take 12 GB
    with pytest.raises(ValueError, match="exceeds limit"):
        data.decode(with_jpeg_header(5, b"\xff\xdc\xff\xdc"))  # 65,500 x 65,500


def test_a_jpeg_with_unusual_subsampling_is_decoded_by_pillow() -> None:
    encoded = with_jpeg_header(11, b"\x31")  # three luma samples beside one another
    with Image.open(io.BytesIO(encoded)) as image:
        assert_close(data.decode(encoded), pixels(image), EXACT)


# ------------------------------------------------------------------------------ batches


def numbered_images(folder: Path, count: int) -> data.ImageSet:
    """Pictures of one colour: red is the class, green the place in the whole set."""
    files = {}
    for index in range(count):
        label = index * 4 // count
        colour = (label * 50, index, 200)
        files[f"class_{label}/{index:03d}.png"] = encode(Image.new("RGB", (9, 7), colour), "PNG")
    return write_set(folder, files)


def read_all(batches: Iterator[data.Batch]) -> list[tuple[np.ndarray, list[int]]]:
    return [(images.numpy().copy(), labels.tolist()) for images, labels in batches]


@pytest.mark.parametrize("count", [1, 4, 20, 23])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_hold_every_image_once_with_its_label(
    count: int, workers: int, tmp_path: Path
) -> None:
    images = numbered_images(tmp_path, count)
    config = dataclasses.replace(CONFIG, workers=workers)
    for batches, order in (
        (data.train_batches(images, config, epoch=3), data.epoch_order(0, 3, count)),
        (data.val_batches(images, config), np.arange(count)),
    ):
        read = read_all(batches)
        assert [len(labels) for _, labels in read] == [5] * (count // 5) + [count % 5] * (
            count % 5 > 0
        )
        pictures = np.concatenate([pictures for pictures, _ in read])
        labels = np.concatenate([labels for _, labels in read])
        assert pictures.shape == (count, 32, 32, 3) and pictures.dtype == np.uint8
        assert (pictures == pictures[:, :1, :1]).all()
        assert (pictures[:, 0, 0, 1] == order).all()
        assert (pictures[:, 0, 0, 0] == labels * 50).all()
        assert (labels == order * 4 // count).all()


def test_neither_workers_nor_an_interruption_change_a_byte(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i}.jpg": jpeg(scene(50 + i, 90 - i)) for i in range(23)}
    images = write_set(tmp_path, files)

    def read(workers: int, first_batch: int = 0) -> list[tuple[bytes, list[int]]]:
        config = dataclasses.replace(CONFIG, workers=workers)
        batches = data.train_batches(images, config, 1, first_batch)
        return [(pictures.tobytes(), labels) for pictures, labels in read_all(batches)]

    whole = read(0)
    assert len({picture for picture, _ in whole}) == 5
    assert all(read(workers) == whole for workers in (1, 2, 4))
    for first_batch in range(6):
        assert read(2, first_batch) == whole[first_batch:]
    assert read(0, 3) == whole[3:]


class Fills:
    """A `fill` that notes which images it was asked for, and lets the test wait for them.

    For images from `slow_from` on it takes its time.
    """

    def __init__(self, slow_from: int = 1000) -> None:
        self.slow_from = slow_from
        self.indexes: set[int] = set()
        self.changed = threading.Condition()

    def __call__(self, encoded: bytes, index: int, out: np.ndarray) -> None:
        time.sleep(0.1 if index >= self.slow_from else 0)
        out[:] = index
        with self.changed:
            self.indexes.add(index)
            self.changed.notify_all()

    def reach(self, indexes: set[int]) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.indexes >= indexes, WAIT_S)


def test_two_more_batches_are_prepared_while_one_is_used(tmp_path: Path) -> None:
    images, fills = numbered_images(tmp_path, 20), Fills()
    batches = data.batches(images, fills, np.arange(20), batch_size=4, px=1, workers=2)
    for ready in (12, 16):
        next(batches)
        assert fills.reach(set(range(ready)))
        time.sleep(0.05)
        assert fills.indexes == set(range(ready))  # and no more: memory is bounded
    batches.close()


def test_leaving_early_ends_the_threads(tmp_path: Path) -> None:
    images, fills = numbered_images(tmp_path, 40), Fills(slow_from=8)
    batches = data.batches(images, fills, np.arange(40), batch_size=8, px=1, workers=2)
    next(batches)
    assert len(decoding_threads()) == 2
    batches.close()
    assert decoding_threads() == []
    assert len(fills.indexes) < 24  # of the two batches that were queued, some is dropped


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named(workers: int, tmp_path: Path) -> None:
    images = numbered_images(tmp_path, 20)
    config = dataclasses.replace(CONFIG, workers=workers)
    for path, content in ((images.path(7), WHOLE["a.png"][:500]), (images.path(12), None)):
        before = path.read_bytes()
        path.write_bytes(content) if content else path.unlink()
        for batches in (data.train_batches(images, config, 0), data.val_batches(images, config)):
            with pytest.raises(UserError, match=str(path)):
                read_all(batches)
        path.write_bytes(before)
    assert decoding_threads() == []


def test_batches_come_through_to_the_cpu_as_they_are(tmp_path: Path) -> None:
    images = numbered_images(tmp_path, 12)
    expected = read_all(data.val_batches(images, CONFIG))
    arrived = read_all(data.to_device(data.val_batches(images, CONFIG), torch.device("cpu")))
    assert len(arrived) == len(expected) == 3
    for (ours, labels), (theirs, their_labels) in zip(arrived, expected, strict=True):
        assert (ours == theirs).all() and labels == their_labels


def test_normalize_is_torchvisions() -> None:
    picture = np.asarray(scene(20, 30))
    images = torch.from_numpy(np.stack([picture, picture[::-1]]))
    ours = data.normalize(images)
    expected = transforms.Normalize(MEAN, STD)(images.permute(0, 3, 1, 2).double() / 255)
    assert ours.shape == (2, 3, 20, 30)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert (ours - expected).abs().max() < 1e-6  # four steps of float32 at 2.6, the largest value


# ------------------------------------------------------------------------------ sets of images


def test_images_are_listed_by_class_then_name(tmp_path: Path) -> None:
    names = ("b/2.JPEG", "b/10.jpeg", "b/c.PNG", "a/z.webp", "a/a.Tiff", "a/m.bmp", "c/only.gif")
    others = ("b/.hidden.jpg", "b/notes.txt", "b/jpg", "b/deeper/in.jpg", ".cache/x.jpg", "x.jpg")
    images = write_set(tmp_path, dict.fromkeys(names + others, b""))
    assert images.classes == ("a", "b", "c")
    assert images.files == (
        *("a/a.Tiff", "a/m.bmp", "a/z.webp"),
        *("b/10.jpeg", "b/2.JPEG", "b/c.PNG"),
        "c/only.gif",
    )
    assert images.labels.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert images.labels.dtype == np.int64
    assert images.path(4) == tmp_path / "b" / "2.JPEG"


def test_folders_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prepare_data\.py digits .*--train-folder-name"):
        data.open_image_set(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=f"{tmp_path} has no class folders"):
        write_set(tmp_path, {"picture.jpg": b"", ".hidden/picture.jpg": b""})
    with pytest.raises(UserError, match=f"class folder {tmp_path / 'b'} holds no image"):
        write_set(tmp_path, {"a/1.jpg": b"", "b/deeper/1.jpg": b"", "b/notes.txt": b""})


def test_classes_that_differ_are_named(tmp_path: Path) -> None:
    def set_of(part: str, *classes: str) -> data.ImageSet:
        return write_set(tmp_path / part, {f"{name}/1.jpg": b"" for name in classes})

    train = set_of("train", "a", "b", "c")
    data.check_same_classes(train, set_of("same", "a", "b", "c"))
    less, more, other = set_of("less", "a", "c"), set_of("more", *"abcd"), set_of("other", *"abx")
    for val, complaints in (
        (less, ["b is missing under .*less", "2 images in 2 classes", "3 classes"]),
        (more, ["d is missing under .*train"]),
        (other, ["c is missing under .*other", "x is missing under .*train"]),
    ):
        for complaint in complaints:
            with pytest.raises(UserError, match=complaint):
                data.check_same_classes(train, val)
    many = set_of("many", *(f"n{number:02d}" for number in range(9)))
    with pytest.raises(UserError, match=r"n00, n01, n02, n03, n04, … are missing under .*train"):
        data.check_same_classes(train, many)


def test_a_set_without_some_files(tmp_path: Path) -> None:
    images = write_set(tmp_path, dict.fromkeys(("a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg"), b""))
    fewer = images.without(["a/1.jpg", "b/2.jpg", "unknown"])
    assert fewer.files == ("a/2.jpg", "b/1.jpg")
    assert fewer.labels.tolist() == [0, 1]
    assert (fewer.folder, fewer.classes) == (images.folder, images.classes)
    assert images.without([]).fingerprint() == images.fingerprint() != fewer.fingerprint()
    assert len(images.files) == 4
    with pytest.raises(UserError, match=f"no image in {tmp_path / 'b'} can be read"):
        images.without(["b/1.jpg", "b/2.jpg"])


def test_the_fingerprint_is_of_the_names(tmp_path: Path) -> None:
    images = write_set(tmp_path / "here", {"a/1.jpg": b"", "b/1.jpg": b""})
    moved = write_set(tmp_path / "there", {"a/1.jpg": b"", "b/1.jpg": b""})
    renamed = write_set(tmp_path / "renamed", {"a/1.jpg": b"", "b/2.jpg": b""})
    other_class = write_set(tmp_path / "class", {"a/1.jpg": b"", "a/2.jpg": b"", "b/1.jpg": b""})
    assert images.fingerprint() == moved.fingerprint()
    assert len({each.fingerprint() for each in (images, renamed, other_class)}) == 3


# ------------------------------------------------------------------------------ a run's images


def run_config(folder: Path, **changed: object) -> Config:
    """The configuration of a run on folder/train (11 images) and folder/val (5)."""
    good = WHOLE["a.jpg"]
    write_set(folder / "train", {f"{i % 2}/{i}.jpg": good for i in range(11)})
    write_set(folder / "val", {f"{i % 2}/{i}.jpg": good for i in range(5)})
    folders = {"train_folder_name": str(folder / "train"), "val_folder_name": str(folder / "val")}
    return dataclasses.replace(CONFIG, **folders, **{"batch_size": 4, **changed})


def test_a_run_gets_both_sets(tmp_path: Path) -> None:
    train, val, skipped = data.open_images(run_config(tmp_path))
    assert (len(train.files), len(val.files), skipped) == (11, 5, [])


def test_a_run_on_bad_images_is_refused_unless_they_are_skipped(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    bad = tmp_path / "train" / "1" / "3.jpg"
    bad.write_bytes(b"")
    (tmp_path / "val" / "0" / "4.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=rf"2 of 16 images .*{bad} \(the file is empty\)"):
        data.open_images(config)

    config = dataclasses.replace(config, skip_bad_images=True)
    train, val, skipped = data.open_images(config)
    assert skipped == ["train/1/3.jpg", "val/0/4.jpg"]
    # The good files of the same names in the other set stay.
    assert len(train.files) == 10 and "1/3.jpg" not in train.files and "0/4.jpg" in train.files
    assert len(val.files) == 4 and "0/4.jpg" not in val.files and "1/3.jpg" in val.files

    bad.write_bytes(WHOLE["a.jpg"])  # a resumed run has the images that it began with
    again = data.open_images(config, skipped)
    assert [again[0].files, again[1].files, again[2]] == [train.files, val.files, skipped]


def test_damage_inside_a_file_is_skipped_too(tmp_path: Path) -> None:
    config = run_config(tmp_path, skip_bad_images=True)
    (tmp_path / "train" / "0" / "2.jpg").write_bytes(damage(WHOLE["a.jpg"], 100))
    assert data.open_images(config)[2] == ["train/0/2.jpg"]


@pytest.mark.parametrize(("batch_size", "advice"), [(12, "--batch-size 11"), (5, "--batch-size 4")])
def test_a_batch_size_that_does_not_suit_the_images_is_refused(
    batch_size: int, advice: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=advice):
        data.open_images(run_config(tmp_path, batch_size=batch_size))
