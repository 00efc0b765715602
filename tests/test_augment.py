"""augment.py: what is random about a picture, against torchvision, NumPy and SciPy."""

import dataclasses
import itertools
import math
import shutil
import signal
import threading
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from pictures import as_read, encode, jpeg, scene, write_set
from PIL import Image
from scipy import stats
from test_trainer import outcome, plain_settings, run_folder, stop_again_and_again, train
from torchvision import transforms
from torchvision.transforms import v2

import augment
import data
import engine
import image_files
import lr_finder
import trainer
from utils import Config, learning_rate, steps_per_epoch

EVERYTHING = {
    "trivial_augment": True,
    "erase_probability": 0.6,
    "mixup_alpha": 0.4,
    "cutmix_alpha": 1.0,
    "label_smoothing": 0.1,
}


def raw(seed: int) -> object:
    """A source of random uint64 that has nothing to do with ours."""
    return np.random.PCG64(seed).random_raw


def assert_same_distribution(ours: np.ndarray, expected: np.ndarray) -> None:
    """Of two samples from one distribution, one pair in a thousand is further apart."""
    assert stats.ks_2samp(ours, expected, method="asymp").pvalue > 0.001


# ------------------------------------------------------------------------------ crop and order


def random_crops(
    height: int, width: int, min_scale: float, count: int, seed: int = 0, epoch: int = 0
) -> np.ndarray:
    """(count, 5): top, left, height, width and mirrored of the first indexes."""
    crops = [
        augment.random_crop(seed, epoch, index, height, width, min_scale) for index in range(count)
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
        assert_same_distribution(ours[:, column], expected[:, column])
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


def test_a_picture_of_a_pixel_has_a_crop_of_it() -> None:
    """Most shares of it are rounded to nothing."""
    crops = random_crops(1, 1, 0.08, 50)
    assert (crops[:, :4] == [0, 0, 1, 1]).all()


def test_no_thread_draws_from_anothers_stream() -> None:
    """Others draw between any two words of a picture's."""
    expected = augment.random_words(3, 5, 7).random_raw(4).tolist()
    word, found = augment.random_words(3, 5, 7).random_raw, []
    for index in range(4):
        other = threading.Thread(target=lambda i=index: augment.random_crop(0, 0, i, 9, 9, 0.1))
        other.start()
        other.join()
        found.append(word())
    assert found == expected


def test_crops_and_order_are_the_same_when_asked_again() -> None:
    crops = random_crops(375, 500, 0.08, 50, seed=2**63 - 1, epoch=9)
    assert (crops == random_crops(375, 500, 0.08, 50, seed=2**63 - 1, epoch=9)).all()
    backwards = [augment.random_crop(2**63 - 1, 9, i, 375, 500, 0.08) for i in reversed(range(50))]
    assert (crops[::-1] == np.array(backwards)).all()
    assert (augment.epoch_order(5, 6, 1000) == augment.epoch_order(5, 6, 1000)).all()


def test_every_epoch_and_seed_has_its_own_order() -> None:
    images = 10_000
    orders = [np.arange(images)]
    orders += [
        augment.epoch_order(s, e, images) for s, e in ((0, 0), (0, 1), (1, 0), (0, 2), (2, 0))
    ]
    for place, order in enumerate(orders):
        assert (np.sort(order) == np.arange(images)).all()
        for other in orders[:place]:
            assert abs(np.corrcoef(order, other)[0, 1]) < 4.5 / images**0.5  # deviations
            assert (order == other).sum() < 10  # 1 is to be expected
    assert augment.epoch_order(0, 0, 1).tolist() == [0]


# ------------------------------------------------------------------------------ streams


def test_crops_and_orders_are_those_of_earlier_runs() -> None:
    """As they were before there was anything else to draw, which is drawn in between here."""
    crops = {
        (0, 0, 0): (62, 144, 266, 213, True),
        (0, 0, 1): (87, 200, 212, 246, True),
        (3, 7, 12345): (119, 222, 135, 173, True),
        (2**63 - 1, 49, 1281166): (38, 95, 302, 402, False),
    }
    orders = {
        (0, 0): [8, 7, 0, 5, 6, 2, 9, 11, 4, 1, 3, 10],
        (5, 9): [10, 0, 2, 11, 7, 6, 1, 5, 4, 9, 3, 8],
    }
    for place, crop in crops.items():
        augment.random_operation(*place)
        augment.random_erasure(*place, 224, 1.0)
        assert augment.random_crop(*place, 375, 500, 0.08) == crop
    for (seed, epoch), order in orders.items():
        augment.draw_mix(Config(**EVERYTHING, seed=seed), epoch, 0, 224)
        assert augment.epoch_order(seed, epoch, 12).tolist() == order


def test_the_draws_of_one_place_have_nothing_in_common() -> None:
    """Crop, operation, erasure and mix of the same seed, epoch and index, or of a neighbour."""
    config, count = Config(mixup_alpha=1.0), 4000
    kinds = np.repeat(range(4), (5, 4, 2, 2))  # of the columns
    for seed, epoch, shift in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        crops = random_crops(375, 500, 0.08, count)
        others = []
        for index in range(shift, count + shift):
            erased = augment.random_erasure(seed, epoch, index, 224, 1.0) or (0, 0, 0, 0)
            name, magnitude = augment.random_operation(seed, epoch, index)
            operation = [list(augment.OPERATIONS).index(name), abs(magnitude)]
            operation[1] /= augment.OPERATIONS[name][1] or 1.0
            mix = augment.draw_mix(dataclasses.replace(config, seed=seed), epoch, index, 224)
            spread = abs(mix.own_share - 0.5)  # as the first word has it
            others.append([*erased, *operation, mix.own_share, spread])
        between = np.corrcoef(crops.T, np.array(others, dtype=float).T)
        between[kinds[:, None] == kinds] = 0.0
        assert np.abs(between).max() < 4.5 / count**0.5  # deviations


# ------------------------------------------------------------------------------ erasing


@pytest.mark.parametrize("px", [224, 32])
def test_rectangles_are_distributed_as_torchvisions(px: int) -> None:
    count = 6000
    torch.manual_seed(0)
    erasing, picture = v2.RandomErasing(p=1.0), [torch.empty(1).expand(3, px, px)]
    drawn = [erasing.make_params(picture) for _ in range(count)]
    expected = [[each[key] for key in "ijhw"] for each in drawn if each["v"] is not None]
    ours = [augment.random_erasure(0, 0, index, px, 1.0) for index in range(count)]
    ours = [rectangle for rectangle in ours if rectangle is not None]
    assert abs(len(ours) - len(expected)) < 10  # ten tries fail in vain one time in thousands
    samples = []
    for rectangles in (ours, expected):
        top, left, height, width = np.array(rectangles, dtype=float).T
        assert (top >= 0).all() and (left >= 0).all()
        assert (top + height <= px).all() and (left + width <= px).all()
        area, log_ratio = height * width / px**2, np.log(height / width)
        samples.append([area, log_ratio, top, left, top / (px - height), left / (px - width)])
    for mine, theirs in zip(*samples, strict=True):
        assert_same_distribution(mine, theirs)
    assert np.abs(np.corrcoef(samples[0]) - np.corrcoef(samples[1])).max() < 0.08


def test_as_many_crops_are_erased_as_was_asked_for() -> None:
    count = 10_000
    for probability in (0.1, 0.5, 1.0):
        drawn = [augment.random_erasure(3, 5, i, 224, probability) for i in range(count)]
        erased = sum(rectangle is not None for rectangle in drawn) / count
        assert (
            abs(erased - probability) < 0.001 + 4 * (probability * (1 - probability) / count) ** 0.5
        )


def crop_of(config: Config, index: int, epoch: int = 3) -> np.ndarray:
    """What fill_train makes of the scene, a PNG."""
    crop = np.full((64, 64, 3), 99, np.uint8)
    data.fill_train(config, epoch, as_read(SCENE), index, crop)
    return crop


SCENE = encode(scene(60, 80), "PNG")


def test_exactly_the_rectangle_takes_the_mean_colour() -> None:
    erased = 0
    for index in range(40):
        plain = crop_of(Config(seed=4), index)
        ours = crop_of(Config(seed=4, erase_probability=0.7), index)
        rectangle = augment.random_erasure(4, 3, index, 64, 0.7)
        if rectangle is not None:
            top, left, height, width = rectangle
            for row, column in itertools.product(range(height), range(width)):
                plain[top + row, left + column] = [124, 116, 104]
            erased += 1
        assert (ours == plain).all()
    assert 20 < erased < 36
    grey = torch.tensor([[[[124, 116, 104]]]], dtype=torch.uint8)
    assert data.normalize(grey).abs().max() < 0.01  # half a grey level is 0.009


# ------------------------------------------------------------------------------ TrivialAugment

TORCHVISIONS = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)


def theirs(image: Image.Image, name: str, magnitude: float) -> np.ndarray:
    """What torchvision's class makes of a picture, as its reference training calls it."""
    changed = TORCHVISIONS._apply_image_or_video_transform(
        image, name, magnitude, TORCHVISIONS.interpolation, TORCHVISIONS._fill
    )
    return np.asarray(changed)


def test_operations_change_the_same_pixels_as_torchvisions() -> None:
    """Every operation at all its magnitudes, both ways."""
    image, seen = scene(64, 64), 0
    assert augment.OPERATIONS.keys() == TORCHVISIONS._AUGMENTATION_SPACE.keys()
    for name, (change, largest, both_ways) in augment.OPERATIONS.items():
        magnitudes_of, signed = TORCHVISIONS._AUGMENTATION_SPACE[name]
        magnitudes = magnitudes_of(augment.MAGNITUDES, 64, 64)
        assert (both_ways, largest > 0) == (signed, magnitudes is not None)
        for place, sign in itertools.product(range(augment.MAGNITUDES), (1, -1)[: 1 + signed]):
            magnitude = 0.0 if magnitudes is None else sign * float(magnitudes[place])
            expected = theirs(image, name, magnitude)
            ours = sign * largest * place / (augment.MAGNITUDES - 1)
            if name not in ("Posterize", "Solarize"):  # which count from the other end
                assert math.isclose(ours, magnitude, rel_tol=1e-6)
                ours = magnitude  # theirs is in float32
            same = np.asarray(change(image, ours)) == expected
            if name == "Solarize":  # where float32 puts the threshold itself on either side
                same |= np.asarray(image) == round(255 * magnitude)
            assert same.all(), (name, place, sign)
            seen += (expected != np.asarray(image)).any()
    assert seen > 500  # of 622: these change something


def test_every_operation_magnitude_and_sign_is_as_likely() -> None:
    count = 60_000
    counts: dict[tuple[str, int], int] = {}
    for index in range(count):
        name, magnitude = augment.random_operation(1, 2, index)
        largest = augment.OPERATIONS[name][1]
        key = name, round(30 * magnitude / largest) if largest else 0
        counts[key] = counts.get(key, 0) + 1
    expected = {}
    for name, (_, largest, both_ways) in augment.OPERATIONS.items():
        for place in range(31) if largest else (0,):
            share = count / len(augment.OPERATIONS) / (31 if largest else 1)
            if both_ways and place:
                expected[name, place] = expected[name, -place] = share / 2
            else:
                expected[name, place] = share
    assert counts.keys() == expected.keys()
    cells = [counts[key] for key in expected]
    assert stats.chisquare(cells, list(expected.values())).pvalue > 0.001
    names = [name for name, _ in expected]
    by_name = [
        sum(c for c, n in zip(cells, names, strict=True) if n == name) for name in set(names)
    ]
    assert stats.chisquare(by_name).pvalue > 0.001


def test_the_flipped_crop_is_changed_before_it_is_erased() -> None:
    both = Config(seed=4, trivial_augment=True, erase_probability=0.7)
    names = set()
    for index in range(60):
        plain = crop_of(Config(seed=4), index)
        name, magnitude = augment.random_operation(4, 3, index)
        names.add(name)
        if name == "Solarize":
            magnitude = (255.0 - magnitude) / 255.0
        if name == "Posterize":
            magnitude = 8.0 - round(magnitude)
        expected = theirs(Image.fromarray(plain), name, magnitude).copy()
        rectangle = augment.random_erasure(4, 3, index, 64, 0.7)
        if rectangle is not None:
            top, left, height, width = rectangle
            expected[top : top + height, left : left + width] = [124, 116, 104]
        assert (crop_of(both, index) == expected).all(), (index, name)
    assert len(names) >= 12


def test_neither_workers_nor_an_interruption_change_a_byte(tmp_path: Path) -> None:
    files = {f"{i % 3}/{i}.jpg": jpeg(scene(50 + i, 90 - i)) for i in range(23)}
    images = write_set(tmp_path, files)

    def read(workers: int, first_batch: int = 0, **changes: object) -> list[bytes]:
        sizes = {"train_px": 64, "batch_size": 5, "workers": workers}
        config = Config(**{**EVERYTHING, **sizes, **changes})
        batches = data.train_batches(images, config, 1, first_batch)
        return [pictures.numpy().tobytes() for pictures, _ in batches]

    whole = read(0)
    assert all(read(workers) == whole for workers in (1, 2, 8))
    for first_batch in range(5):
        assert read(2, first_batch) == whole[first_batch:]
    for changes in ({"seed": 1}, {"trivial_augment": False}, {"erase_probability": 0.0}):
        assert read(2, **changes) != whole


# ------------------------------------------------------------------------------ mixed batches


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 3.0, 40.0])
def test_shares_are_distributed_as_numpys_beta(alpha: float) -> None:
    word, count = raw(7), 20_000
    ours = np.array([augment.symmetric_beta(alpha, word) for _ in range(count)])
    assert (ours >= 0).all() and (ours <= 1).all()
    assert_same_distribution(ours, np.random.default_rng(8).beta(alpha, alpha, count))
    assert stats.kstest(ours, stats.beta(alpha, alpha).cdf).pvalue > 0.001
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(ours.mean() - 0.5) < 4 * (variance / count) ** 0.5
    assert abs(ours.var() / variance - 1) < 0.05


@pytest.mark.parametrize("alpha", [1e-300, 1e-3, 1e6])
def test_any_alpha_gives_a_share(alpha: float) -> None:
    word = raw(7)
    ours = [augment.symmetric_beta(alpha, word) for _ in range(1000)]
    assert abs(np.mean(ours) - 0.5) < 4 * 0.5 / 1000**0.5
    spread = np.abs(np.array(ours) - 0.5)
    assert spread.max() < 0.01 if alpha > 1 else np.mean(spread > 0.499) > 0.9
    for number in (0, 2**64 - 1):
        assert 0 <= augment.symmetric_beta(alpha, lambda number=number: number) <= 1


@pytest.mark.parametrize("px", [224, 32])
def test_boxes_are_distributed_as_torchvisions(px: int) -> None:
    config, count = Config(cutmix_alpha=1.0), 6000
    torch.manual_seed(1)
    cutmix, images = v2.CutMix(alpha=1.0, num_classes=2), [torch.empty(1).expand(2, 3, px, px)]
    drawn = [cutmix.make_params(images) for _ in range(count)]
    expected = np.array([[*each["box"], each["lam_adjusted"]] for each in drawn])
    ours = []
    for batch in range(count):
        mix = augment.draw_mix(config, 2, batch, px)
        top, left, bottom, right = mix.box
        assert 0 <= top <= bottom <= px and 0 <= left <= right <= px
        assert round(mix.own_share * px**2) == px**2 - (bottom - top) * (right - left)
        ours.append([left, top, right, bottom, mix.own_share])
    for mine, other in zip(np.array(ours).T, expected.T, strict=True):
        assert_same_distribution(mine, other)
    assert np.abs(np.corrcoef(np.array(ours).T) - np.corrcoef(expected.T)).max() < 0.08


def test_each_batch_is_mixed_as_was_asked_for() -> None:
    def draws(mixup: float, cutmix: float, epoch: int = 0) -> list[augment.Mix | None]:
        config = Config(mixup_alpha=mixup, cutmix_alpha=cutmix)
        return [augment.draw_mix(config, epoch, batch, 64) for batch in range(4000)]

    assert set(draws(0, 0)) == {None}
    assert all(mix.box is None for mix in draws(0.2, 0))
    assert all(mix.box is not None for mix in draws(0, 0.2))
    both = draws(0.4, 3.0)
    boxes = sum(mix.box is not None for mix in both)
    assert abs(boxes - 2000) < 4 * 1000**0.5
    blended = [mix.own_share for mix in both if mix.box is None]
    assert stats.kstest(blended, stats.beta(0.4, 0.4).cdf).pvalue > 0.001
    assert draws(0.4, 3.0) == both
    assert draws(0.4, 3.0, epoch=1)[0] != both[0]


def one_hot(labels: torch.Tensor, mix: augment.Mix, classes: int) -> torch.Tensor:
    """The targets (N, classes) of mixed images, label by label."""
    targets = torch.zeros(len(labels), classes)
    for place in range(len(labels)):
        partner = place ^ 1 if place ^ 1 < len(labels) else place
        targets[place, labels[place]] += mix.own_share
        targets[place, labels[partner]] += 1 - mix.own_share
    return targets


def mixed_by_torchvision(
    images: torch.Tensor, labels: torch.Tensor, mix: augment.Mix
) -> torch.Tensor:
    """Its MixUp or CutMix on each pair by itself, of which it rolls one onto the other."""
    mixed = images.clone()
    for first in range(0, len(images) - 1, 2):
        pair = images[first : first + 2]
        params = {"labels": labels[first : first + 2], "batch_size": 2, "lam": mix.own_share}
        if mix.box is None:
            mixed[first : first + 2] = v2.MixUp(num_classes=9).transform(pair, params)
        else:
            top, left, bottom, right = mix.box
            params |= {"box": (left, top, right, bottom), "lam_adjusted": mix.own_share}
            mixed[first : first + 2] = v2.CutMix(num_classes=9).transform(pair, params)
    return mixed


MIXES = [
    augment.Mix(0.7),
    augment.Mix(0.2),
    augment.Mix(1 - 12 * 9 / 32**2, (3, 20, 15, 29)),
    augment.Mix(1 - 30 * 25 / 32**2, (0, 7, 30, 32)),
    augment.Mix(1.0, (5, 5, 5, 5)),
]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_pairs_are_mixed_as_torchvision_does(count: int, mix: augment.Mix) -> None:
    torch.manual_seed(2)
    bytes_ = torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8)
    labels = torch.randint(0, 9, (count,))
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        images = data.normalize(bytes_, dtype)
        before = images.clone()
        partners = augment.mix_pairs(images, labels, mix)
        expected = mixed_by_torchvision(before, labels, mix)
        if mix.box is None:
            assert torch.allclose(images, expected, rtol=0, atol=tolerance)
        else:
            assert torch.equal(images, expected)
        assert torch.equal(images[count // 2 * 2 :], before[count // 2 * 2 :])
        assert images.stride() == before.stride()  # channels last as before
        ours = mix.own_share * torch.nn.functional.one_hot(labels, 9)
        ours = ours + (1 - mix.own_share) * torch.nn.functional.one_hot(partners, 9)
        assert torch.allclose(ours, one_hot(labels, mix, 9))


def test_a_mixed_step_is_that_of_soft_targets() -> None:
    """Loss, gradient and counts; in parts too, whose limits fall between partners."""
    smoothing = 0.1
    config = Config(precision="fp32", device="cpu", label_smoothing=smoothing)
    run = engine.new_run(dataclasses.replace(config, zero_init_residual=True), 9)
    run.model.eval()  # each image by itself
    torch.manual_seed(3)
    weight = torch.nn.init.normal_(run.model.model.fc.weight)
    by_partner = 0
    # Each of another colour, so that it is taken for something else.
    images = torch.randint(0, 256, (7, 1, 1, 3)) + torch.randint(-20, 20, (7, 32, 32, 3))
    images = images.clamp(0, 255).byte()
    with torch.no_grad():
        run.model.model.fc.bias -= run.model(data.normalize(images)).mean(0)
        labels = run.model(data.normalize(images)).argmax(1)
    for mix in MIXES[:4]:
        logits = run.model(mixed_by_torchvision(data.normalize(images), labels, mix))
        targets = one_hot(labels, mix, 9)
        expected = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing)
        gradient = torch.autograd.grad(expected, weight)[0]
        guesses = logits.argmax(1)
        right = (guesses == targets.argmax(1)).sum().item()
        by_partner += right > (guesses == labels).sum().item()
        for run.micro_batch_size in (0, 3):
            run.totals = engine.new_totals(run.device)
            loss = engine.train_step(run, images, labels, 0.0, mix=mix)
            assert math.isclose(loss.item(), expected.item(), rel_tol=1e-5)
            assert math.isclose(run.totals["loss"].item(), 7 * expected.item(), rel_tol=1e-5)
            assert torch.allclose(weight.grad, gradient, rtol=1e-3, atol=1e-6)
            assert run.totals["counts"][::2].tolist() == [right, 7]
    assert by_partner  # some are right about the larger share, which is not their own label's


# ------------------------------------------------------------------------------ whole runs


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict[str, object]]:
    """Two epochs of batches of 8, 8 and 5, with all that is random and averaged weights."""
    make_images(tmp_path / "images", classes=3, images=7)
    plain = plain_settings(tmp_path / "images", tmp_path / "runs")
    yield {**plain, **EVERYTHING, "average_steps": 2.0}
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)  # which pytest would keep


def test_stops_inside_an_epoch_change_nothing(settings: dict[str, object]) -> None:
    """The real command, stopped a step or so after each start, each with other workers."""
    whole = {**settings, "name": "whole"}
    train(whole)
    stopped = {**settings, "name": "stopped", "log_interval_s": 1e-9}
    starts = ({**stopped, "workers": workers} for workers in itertools.cycle((2, 0, 8, 1)))
    ends = stop_again_and_again(stopped, [signal.SIGTERM] * 8, starts)
    assert any(step % 3 for step in ends)
    assert outcome(stopped) == outcome(whole)
    for path in run_folder(stopped).rglob("*.pt"):
        path.unlink()


def test_every_step_of_a_run_and_of_the_finder_is_mixed(
    settings: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each with the images of its place, at its epoch's size, and in a run at its rate."""
    config = Config(**{**settings, "first_train_px": 32, "train_px": 64})
    train_set, _, _ = image_files.open_images(config)
    steps = steps_per_epoch(config, train_set)
    seen: list[tuple] = []

    def note(
        run: engine.Run,
        images: torch.Tensor,
        labels: torch.Tensor,
        rate: float,
        batch_size: int | None = None,
        mix: augment.Mix | None = None,
    ) -> object:
        seen.append((images.clone(), labels.clone(), rate, batch_size, mix))
        run.step += 1
        run.totals["counts"] += 1
        return torch.tensor(1.0)

    monkeypatch.setattr(engine, "train_step", note)
    run = types.SimpleNamespace(
        step=0, history=[], device=torch.device("cpu"), model=torch.nn.Linear(1, 1), epoch_s=0.0,
        elapsed_s=0.0, totals=engine.new_totals(torch.device("cpu")), spent_usd=0.0,
    )  # fmt: skip
    for _ in range(2):
        trainer.train_epoch(run, config, train_set, bool)
        run.history.append({"val_s": 0.0})
    mixes = [
        augment.draw_mix(config, epoch, batch, (32, 64)[epoch])
        for epoch, batch in itertools.product((0, 1), range(steps))
    ]
    assert len(set(mixes)) == 6
    assert {mix.box is None for mix in mixes} == {False, True}
    epochs = [list(data.train_batches(train_set, config, epoch)) for epoch in range(2)]
    batches = list(itertools.chain.from_iterable(epochs))

    def check(rates: list[float], sizes: list[int | None]) -> None:
        assert [step[2:] for step in seen] == list(zip(rates, sizes, mixes, strict=True))
        for (images, labels, *_), (expected, their_labels) in zip(seen, batches, strict=True):
            assert torch.equal(images, expected)
            assert torch.equal(labels, their_labels)

    check([learning_rate(config, step, steps) for step in range(6)], [8, 8, 5] * 2)

    seen.clear()
    options = lr_finder.FinderOptions(config, steps=6)
    rates, _, _ = lr_finder.range_test(run, iter(batches), options, steps)
    check(rates, [None] * 6)
