"""What is random about a picture: a function of (seed, epoch, index) alone.

Order, crop, flip, TrivialAugment's operation and the erased rectangle of a picture follow from its
index; which batch is mixed, and how, from that of the batch. Neither the number of threads or
processes nor an interruption changes any of it, and to switch one on changes no other's draws.
"""

import functools
import math
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from utils import MEAN, Config

# ------------------------------------------------------------------------------ random words

# What words are drawn for: each has a stream of its own. The first is the order's and the crop's.
PLACE, OPERATION, ERASURE, MIXING = range(4)

_philox = threading.local()  # a generator and its state for each thread: making them is slow


def random_words(seed: int, epoch: int, index: int, purpose: int = PLACE) -> np.random.Philox:
    """This thread's generator of random uint64, where those of (seed, epoch, index) begin.

    Philox is a counter turned into noise (Salmon et al., SC 2011): there is no state to keep, and
    NumPy promises that its raw stream stays the same in later versions.
    """
    if not hasattr(_philox, "generator"):
        _philox.generator = np.random.Philox(key=0, counter=0)
        _philox.state = _philox.generator.state
    place = _philox.state["state"]
    place["key"][:] = epoch, seed
    place["counter"][1:3] = index, purpose
    _philox.generator.state = _philox.state
    return _philox.generator


def uniform(word: Callable[[], int]) -> float:
    """A number from [0, 1), of the next random word."""
    return (word() >> 11) * 2.0**-53


def symmetric_beta(alpha: float, word: Callable[[], int]) -> float:
    """A draw from Beta(alpha, alpha) for any alpha above 0, of two random words.

    Of Student's t with 2 alpha degrees of freedom, 1/2 + t / (2 sqrt(2 alpha + t^2)) has this
    distribution, and Bailey's polar method (Mathematics of Computation 62, 1994) gives t. NumPy
    promises no stable stream for its own.
    """
    power = (1 - uniform(word)) ** (1 / alpha)
    cosine = math.cos(2 * math.pi * uniform(word))
    square = (1 - power) * cosine**2  # of t, times power / (2 alpha), which may be 0
    return 0.5 + math.copysign(0.5, cosine) * math.sqrt(square / (power + square))


# ------------------------------------------------------------------------------ order and crop


def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """The order of an epoch: each of range(images) once, int64."""
    # Counted from 0 up, the indexes of images never reach this one.
    return np.argsort(random_words(seed, epoch, 2**64 - 1).random_raw(images), kind="stable")


def random_crop(
    seed: int, epoch: int, index: int, height: int, width: int, min_scale: float
) -> tuple[int, int, int, int, bool]:
    """Crop (top, left, crop_height, crop_width) and whether to mirror it.

    The distribution is that of torchvision's RandomResizedCrop(scale=(min_scale, 1),
    ratio=(3/4, 4/3)) and RandomHorizontalFlip(0.5): ten tries, then the largest central crop
    within the ratios.
    """
    word = random_words(seed, epoch, index).random_raw
    mirrored = word() < 2**63
    log_ratio = math.log(4 / 3)
    for _ in range(10):
        area_draw, ratio_draw, top_draw, left_draw = [uniform(word) for _ in range(4)]
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


# ------------------------------------------------------------------------------ the crop's pixels

MEAN_COLOUR = tuple(round(255 * value) for value in MEAN)  # 0, once it is normalised

ERASED_SHARES = (0.02, 0.33)  # of the area; as torchvision's RandomErasing has them
ERASED_RATIOS = (0.3, 3.3)  # height over width


def random_erasure(
    seed: int, epoch: int, index: int, px: int, probability: float
) -> tuple[int, int, int, int] | None:
    """The rectangle (top, left, height, width) to erase from a crop of px x px, or None.

    Random erasing (Zhong et al., arXiv 1708.04896) with the distribution of torchvision's
    RandomErasing: ten tries, then nothing is erased.
    """
    word = random_words(seed, epoch, index, ERASURE).random_raw
    if uniform(word) >= probability:
        return None
    least, most = ERASED_SHARES
    least_log, most_log = map(math.log, ERASED_RATIOS)
    for _ in range(10):
        area_draw, ratio_draw, top_draw, left_draw = [uniform(word) for _ in range(4)]
        area = px * px * (least + area_draw * (most - least))
        ratio = math.exp(least_log + ratio_draw * (most_log - least_log))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < px and width < px:
            top, left = int(top_draw * (px - height + 1)), int(left_draw * (px - width + 1))
            return top, left, height, width
    return None


@functools.cache
def _functional() -> ModuleType:
    """torchvision's operations, which take a second to load and are rarely asked for."""
    from torchvision.transforms.v2 import functional

    return functional


def _affine(image: Image.Image, **changes: Any) -> Image.Image:
    """As torchvision's; what comes in from outside is black."""
    still = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return _functional().affine(image, **{**still, "interpolation": _BILINEAR, **changes})


def _sheared(image: Image.Image, across: float, down: float) -> Image.Image:
    degrees = [math.degrees(math.atan(across)), math.degrees(math.atan(down))]
    return _affine(image, shear=degrees, center=[0, 0])


def _moved(image: Image.Image, across: float, down: float) -> Image.Image:
    # By whole pixels, for which the quickest interpolation gives the same.
    whole = [int(across), int(down)]
    return _affine(image, translate=whole, interpolation=Image.Resampling.NEAREST)


_BILINEAR = Image.Resampling.BILINEAR

MAGNITUDES = 31  # from 0 to the largest, equally far apart

# TrivialAugment's operations on a Pillow image, the largest magnitude of each, and whether it goes
# both ways: as torchvision's TrivialAugmentWide has them.
OPERATIONS: dict[str, tuple[Callable[[Image.Image, float], Image.Image], float, bool]] = {
    "Identity": (lambda image, _: image, 0.0, False),
    "ShearX": (lambda image, by: _sheared(image, by, 0.0), 0.99, True),
    "ShearY": (lambda image, by: _sheared(image, 0.0, by), 0.99, True),
    "TranslateX": (lambda image, by: _moved(image, by, 0.0), 32.0, True),
    "TranslateY": (lambda image, by: _moved(image, 0.0, by), 32.0, True),
    "Rotate": (lambda image, by: _functional().rotate(image, by, _BILINEAR), 135.0, True),
    "Brightness": (lambda image, by: _functional().adjust_brightness(image, 1 + by), 0.99, True),
    "Color": (lambda image, by: _functional().adjust_saturation(image, 1 + by), 0.99, True),
    "Contrast": (lambda image, by: _functional().adjust_contrast(image, 1 + by), 0.99, True),
    "Sharpness": (lambda image, by: _functional().adjust_sharpness(image, 1 + by), 0.99, True),
    "Posterize": (lambda image, by: _functional().posterize(image, 8 - round(by)), 6.0, False),
    "Solarize": (lambda image, by: _functional().solarize(image, 255 - by), 255.0, False),
    "AutoContrast": (lambda image, _: _functional().autocontrast(image), 0.0, False),
    "Equalize": (lambda image, _: _functional().equalize(image), 0.0, False),
}


def random_operation(seed: int, epoch: int, index: int) -> tuple[str, float]:
    """One of OPERATIONS and its magnitude: TrivialAugment, Wide (arXiv 2103.10158)."""
    word = random_words(seed, epoch, index, OPERATION).random_raw
    name = list(OPERATIONS)[int(uniform(word) * len(OPERATIONS))]
    _, largest, both_ways = OPERATIONS[name]
    magnitude = largest * int(uniform(word) * MAGNITUDES) / (MAGNITUDES - 1)
    return name, -magnitude if both_ways and word() < 2**63 else magnitude


def change_pixels(config: Config, epoch: int, index: int, crop: np.ndarray) -> None:
    """Change a flipped training crop, uint8 (px, px, 3), in place, as the settings ask.

    First TrivialAugment, then erasing, as in torchvision's reference training.
    """
    if config.trivial_augment:
        name, magnitude = random_operation(config.seed, epoch, index)
        if name != "Identity":
            # Pillow is quicker than tensors: at 224 px 0.55 against 0.90 ms in the mean over the
            # operations (one core of an EPYC, when translations still interpolated).
            crop[:] = OPERATIONS[name][0](Image.fromarray(crop), magnitude)
    if config.erase_probability:
        px, probability = len(crop), config.erase_probability
        rectangle = random_erasure(config.seed, epoch, index, px, probability)
        if rectangle is not None:
            top, left, height, width = rectangle
            crop[top : top + height, left : left + width] = MEAN_COLOUR


# ------------------------------------------------------------------------------ mixed batches


class Mix(NamedTuple):
    """How the images of a batch are mixed with their partners': one way for all of them.

    The partner of the image in place p of the whole batch is that in place p XOR 1: so pairs lie
    within one process's part, however many there are. The last of an odd batch has none.
    """

    own_share: float  # that an image's own label has in the loss; its partner's has the rest
    # Top, left, bottom and right, in pixels, of what comes from the partner; None: all is blended.
    box: tuple[int, int, int, int] | None = None


def draw_mix(config: Config, epoch: int, batch_index: int, px: int) -> Mix | None:
    """How to mix a batch of images of px x px, counted from 0 in each epoch; None: not at all.

    MixUp (Zhang et al., arXiv 1710.09412) or CutMix (Yun et al., arXiv 1905.04899), where both are
    asked for each with the same chance. Distributed as in torchvision; the share of CutMix is that
    of the pixels, exactly.
    """
    mixup, cutmix = config.mixup_alpha, config.cutmix_alpha
    if not mixup and not cutmix:
        return None
    word = random_words(config.seed, epoch, batch_index, MIXING).random_raw
    cuts = word() < 2**63 if mixup and cutmix else cutmix > 0
    own_share = symmetric_beta(cutmix if cuts else mixup, word)
    if not cuts:
        return Mix(own_share)
    half = int(px * math.sqrt(1 - own_share) / 2)  # of a side of the box, which the edges may cut
    row, column = int(uniform(word) * px), int(uniform(word) * px)
    top, bottom = max(0, row - half), min(px, row + half)
    left, right = max(0, column - half), min(px, column + half)
    return Mix(1 - (bottom - top) * (right - left) / px**2, (top, left, bottom, right))


def mix_pairs(images: torch.Tensor, labels: torch.Tensor, mix: Mix) -> torch.Tensor:
    """Mix images, normalised (N, 3, H, W), in place; returns the labels of their partners, (N,).

    The images are a process's part of a batch, which begins in an even place. Nothing waits for
    the device.
    """
    pairs = _pairs(images)
    if mix.box is None:
        pairs.lerp_(pairs.flip(1), 1 - mix.own_share)
    else:
        top, left, bottom, right = mix.box
        boxes = pairs[..., top:bottom, left:right]
        boxes.copy_(boxes.flip(1))
    partners = labels.clone()
    _pairs(partners).copy_(_pairs(labels).flip(1))
    return partners


def _pairs(tensor: torch.Tensor) -> torch.Tensor:
    """A view of (N, ...) as (N // 2, 2, ...)."""
    count = len(tensor) // 2
    return tensor[: 2 * count].unflatten(0, (count, 2))
