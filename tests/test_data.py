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

# ------------------------------------------------------------------------------ helpers

def filled(fill: Callable, *arguments: object, px: int) -> np.ndarray:
    """What `fill` writes, given arguments and a place in a batch."""
    batch = np.full((3, px, px, 3), 99, np.uint8)
    fill(*arguments, batch[1])
    assert (batch[::2] == 99).all()  # nothing is written into the neighbours
    return batch[1]


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


# ------------------------------------------------------------------------------ batches

def numbered_images(folder: Path, count: int) -> image_files.ImageSet:
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
