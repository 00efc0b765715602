"""The LR range test: the curve, the suggestion, and that it leaves no trace in a run."""

import itertools
import json
import math
import random
import re
import shlex
import shutil
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_images, run_stage_command
from PIL import Image

import lr_finder
from trainer import TrainerOptions, take_max_lr
from utils import Config, UserError, parse_options


def valley(rates: list[float]) -> list[float]:
    """A smoothed loss that falls from 2.3, is lowest at 0.14, and explodes above 1."""
    return [2.3 - 1.8 / (1 + (0.02 / rate) ** 2) + 2 * rate**2 for rate in rates]


RATES = [1e-4 * 10 ** (5 * step / 199) for step in range(200)]


def test_the_suggestion_is_where_the_loss_is_lowest() -> None:
    losses = valley(RATES)
    assert lr_finder.suggest(RATES, losses, losses) == RATES[losses.index(min(losses))]
    assert 0.12 < lr_finder.suggest(RATES, losses, losses) < 0.16


def test_the_test_ends_once_the_loss_has_risen_by_half_of_its_fall() -> None:
    losses = valley(RATES)
    ends = [lr_finder.diverged(losses[: step + 1]) for step in range(200)]
    end = ends.index(True)
    lowest = min(losses)
    assert losses[end - 1] <= lowest + (losses[0] - lowest) / 2 < losses[end]
    settled = [2.3] * 12
    assert not lr_finder.diverged([*settled, 2.2, 2.4])  # noise
    assert lr_finder.diverged([*settled, 2.6])  # never fell
    assert not lr_finder.diverged([2.3, 1.0, 2.6])  # an average of three steps says nothing


@pytest.mark.parametrize(
    ("losses", "advice"),
    [
        ([2.3] * 200, "higher --last-lr"),
        ([0.0] * 200, "higher --last-lr"),
        ([2.3 + rate for rate in RATES], "lower --first-lr"),
    ],
)
def test_a_loss_that_never_falls_gives_no_suggestion(losses: list[float], advice: str) -> None:
    with pytest.raises(UserError, match=f"does not fall anywhere in this range: try a {advice}"):
        lr_finder.suggest(RATES, losses, losses)


def smooth(losses: list[float]) -> list[float]:
    average, smoothed = 0.0, []
    for step, loss in enumerate(losses, start=1):
        average = 0.9 * average + 0.1 * loss
        smoothed.append(average / (1 - 0.9**step))
    return smoothed


@pytest.mark.parametrize("deviation", [0.05, 0.1, 0.2])
def test_noise_gives_no_suggestion(deviation: float) -> None:
    refused = 0
    for seed in range(100):
        losses = random.Random(seed)
        noise = [2.3 + losses.gauss(0, deviation) for _ in range(100)]
        try:
            lr_finder.suggest(RATES[::2], noise, smooth(noise))
        except UserError:
            refused += 1
    assert refused >= 95


def test_noise_does_not_hide_a_fall() -> None:
    draw = random.Random(0)
    losses = [loss + draw.gauss(0, 0.1) for loss in valley(RATES)]
    assert 0.05 < lr_finder.suggest(RATES, losses, smooth(losses)) < 0.5


def test_a_range_that_ends_too_early_gives_no_suggestion() -> None:
    end = next(step for step, rate in enumerate(RATES) if rate > 0.03)
    losses = valley(RATES)[:end]
    with pytest.raises(UserError, match=r"still falls at 0[.]029: try a higher --last-lr"):
        lr_finder.suggest(RATES[:end], losses, losses)


def test_a_loss_that_becomes_no_number_is_told() -> None:
    told = "beyond a rate of {:.2g} the loss is no number: try a lower --last-lr, or more --steps"
    losses = valley(RATES)
    lowest = losses.index(min(losses))
    for curve in (losses[:0], losses[:5], losses[: lowest + 1], [2.3] * 50):
        rates = RATES[: len(curve)]
        with pytest.raises(UserError, match=told.format(max(rates, default=0))):
            lr_finder.suggest(rates, curve, curve, breaks_off=True)
    # Where the loss has risen again before, it has been seen where it is lowest.
    curve = losses[: lowest + 5]
    assert lr_finder.suggest(RATES[: lowest + 5], curve, curve, breaks_off=True) == RATES[lowest]


def test_the_average_of_a_loss_that_stays_is_that_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first step on; and each step has the mixture of its epoch and batch."""
    mixed, taken = [], []

    def train_step(run: object, images: object, labels: object, rate: float, mix: object):
        taken.append(rate)
        return torch.tensor(2.5)

    monkeypatch.setattr(lr_finder.engine, "train_step", train_step)
    monkeypatch.setattr(lr_finder.augment, "draw_mix", lambda _, *of: mixed.append(of[:2]))
    run = types.SimpleNamespace(model=torch.nn.Identity())
    batches = itertools.repeat((torch.zeros(4, 32, 32, 3), torch.zeros(4)))
    options = lr_finder.FinderOptions(Config(), first_lr=1e-4, last_lr=1.0, steps=20)
    rates, losses, smoothed = lr_finder.range_test(run, batches, options, epoch_steps=3)
    assert rates == taken and (rates[0], rates[-1]) == pytest.approx((1e-4, 1.0))
    assert losses == [2.5] * 20 and smoothed == pytest.approx(losses)
    assert mixed == [divmod(step, 3) for step in range(20)]


def test_each_epoch_of_the_test_has_an_order_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(tmp_path / "images", images=4)
    seen, read = [], lr_finder.data.train_batches

    def range_test(run: object, batches: Iterator[object], *_: object):
        next(itertools.islice(batches, 6, None))  # of epochs of three
        return RATES, valley(RATES), valley(RATES)

    def train_batches(images: object, config: Config, epoch: int, pin: bool):
        seen.append(epoch)
        return read(images, config, epoch, pin=pin)

    monkeypatch.setattr(lr_finder, "range_test", range_test)
    monkeypatch.setattr(lr_finder.data, "train_batches", train_batches)
    monkeypatch.setattr(lr_finder, "start_log", lambda _: None)
    options = ("--runs-folder", "runs", "--train-px", "32", "--batch-size", "4", "--workers", "1")
    folders = ("--train-folder-name", "images/train", "--val-folder-name", "images/val")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["lr_finder.py", *options, *folders])
    lr_finder.main()
    assert seen[:3] == [0, 1, 2]


@pytest.mark.parametrize("suggestion", [0.1, None])
def test_the_picture_has_both_curves_and_the_suggestion_if_there_is_one(
    suggestion: float | None,
) -> None:
    losses, smoothed = [2 * loss for loss in valley(RATES)], valley(RATES)
    (axes,) = lr_finder.draw(Config(name="a"), RATES, losses, smoothed, suggestion).axes
    raw, average, *line = axes.lines
    assert (list(raw.get_xdata()), list(raw.get_ydata())) == (RATES, losses)
    assert (list(average.get_xdata()), list(average.get_ydata())) == (RATES, smoothed)
    assert axes.get_xscale() == "log"
    texts = [text.get_text() for text in axes.get_legend().get_texts()]
    assert texts[:2] == ["loss of the batch", "smoothed"]
    assert texts[2:] == ([] if suggestion is None else ["suggested max_lr: 0.1"])
    assert [list(one.get_xdata()) for one in line] == ([] if suggestion is None else [[0.1, 0.1]])


def test_the_command_tells_where_the_loss_becomes_no_number(tmp_path: Path) -> None:
    make_images(tmp_path / "images", images=4)
    done = run_stage_command(
        *("lr_finder.py", "--runs-folder", tmp_path / "runs", "--name", "run"),
        *("--train-folder-name", tmp_path / "images/train"),
        *("--val-folder-name", tmp_path / "images/val", "--batch-size", 6, "--workers", 1),
        *("--train-px", 32, "--precision", "fp32", "--last-lr", 1e30, "--steps", 20),
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"error: beyond a rate of \S+ the loss is no number: try a lower --last-lr, or more "
        r"--steps; the curve is \S+/runs/run/lr_finder_refused\.png\n",
        done.stderr,
    )
    (picture,) = (tmp_path / "runs/run").iterdir()
    with Image.open(picture) as curve:
        assert curve.size == (1350, 825)


def test_the_command_writes_curve_and_picture_and_nothing_else(tmp_path: Path) -> None:
    make_images(tmp_path / "images", images=16)
    settings = [
        *("--runs-folder", str(tmp_path / "runs"), "--name", "run"),
        *("--train-folder-name", str(tmp_path / "images/train")),
        *("--val-folder-name", str(tmp_path / "images/val")),
        *("--train-px", "32", "--val-px", "32", "--val-resize-px", "32", "--batch-size", "16"),
        *("--epochs", "1", "--precision", "fp32", "--workers", "2", "--flip", "--seed", "1"),
        "--zero-init-residual",  # so that the loss falls by more than its noise
    ]
    folder = tmp_path / "runs/run"
    refused = run_stage_command("lr_finder.py", *settings, "--micro-batch-size", "1")
    assert refused.returncode == 2, refused.stderr
    assert "1 at once, and BatchNorm needs 2: use a larger --micro-batch-size" in refused.stderr
    assert not folder.exists()
    # Too low a range: what may be found before stays, and the curve is drawn beside it.
    low = ("--steps", "20", "--first-lr", "1e-9", "--last-lr", "1e-8")
    refused = run_stage_command("lr_finder.py", *settings, *low)
    assert refused.returncode == 2
    assert "try more --steps, or a larger --batch-size; the curve is " in refused.stderr
    assert [path.name for path in folder.iterdir()] == ["lr_finder_refused.png"]
    found = run_stage_command("lr_finder.py", *settings, "--steps", "40", "--last-lr", "100")
    assert found.returncode == 0, found.stderr
    files = sorted(path.name for path in folder.rglob("*") if path.is_file())
    assert files == ["lr_finder.json", "lr_finder.png"]

    curve = json.loads((folder / "lr_finder.json").read_text())
    rates, losses = curve["learning_rate"], curve["loss"]
    assert len(rates) == len(losses) == len(curve["smoothed_loss"]) == curve["steps"]
    # 100 is far too much for any network: the test must have stopped before its end.
    assert curve["steps"] < 40
    growth = [later / earlier for earlier, later in itertools.pairwise(rates)]
    assert all(math.isclose(factor, (100 / 1e-4) ** (1 / 39)) for factor in growth)
    assert rates[0] < curve["suggested_max_lr"] < rates[-1]
    assert f"suggested max_lr: {curve['suggested_max_lr']:.3g}" in found.stdout
    with Image.open(folder / "lr_finder.png") as picture:
        assert picture.size == (1350, 825)
    # What it says is all that the trainer has to be told.
    (said,) = re.findall(r"train with it: python3 trainer.py (.*)\n", found.stdout)
    *words, last = shlex.split(said)
    typed = [str(one) for one in settings]
    told, meant = (parse_options(TrainerOptions, arguments=each) for each in (words, typed))
    assert told == meant
    assert last == "--max-lr-from-finder"

    # The first loss is that of the trainer's own first step: the same model, batch and crops.
    trained = run_stage_command(
        "trainer.py", *settings, "--max-lr-from-finder", "--log-interval-s", "1e-9"
    )
    assert trained.returncode == 0, trained.stderr
    suggested = curve["suggested_max_lr"]
    assert f"max_lr: {suggested:.3g}, which the LR finder gave" in trained.stdout
    first = next(line for line in trained.stdout.splitlines() if "step 1/" in line)
    assert f"loss {losses[0]:.2f}" in first
    config = json.loads((folder / "config.json").read_text())["config"]
    assert config["max_lr"] == curve["suggested_max_lr"]

    # Once begun, a run keeps its rate, whatever is found later.
    begun = {"config": {"max_lr": 0.3}}
    assert take_max_lr(Config(max_lr_from_finder=True), folder, begun).max_lr == 0.3

    # A rate that was found for other settings is not taken.
    folder.with_name("other").mkdir()
    shutil.copy(folder / "lr_finder.json", folder.with_name("other"))
    other = [*settings, "--name", "other", "--max-lr-from-finder", "--batch-size", "7"]
    refused = run_stage_command("trainer.py", *other)
    assert refused.returncode == 2
    assert "lr_finder.json is of batch_size 16 instead of 7" in refused.stderr

    weights = (folder / "last.pt").read_bytes()
    again = run_stage_command("lr_finder.py", *settings, "--steps", "40", "--last-lr", "100")
    assert again.returncode == 0, again.stderr
    assert (folder / "last.pt").read_bytes() == weights
    assert json.loads((folder / "lr_finder.json").read_text()) == curve


def test_crops_that_grow_are_tested_at_their_first_size(tmp_path: Path) -> None:
    make_images(tmp_path / "images", images=16)
    found = run_stage_command(
        *("lr_finder.py", "--runs-folder", tmp_path / "runs", "--name", "run"),
        *("--train-folder-name", tmp_path / "images/train"),
        *("--val-folder-name", tmp_path / "images/val", "--batch-size", 16, "--workers", 1),
        *("--first-train-px", 32, "--train-px", 64, "--epochs", 2, "--precision", "fp32"),
        *("--px-ramp-start", 0, "--px-ramp-end", 1, "--steps", 40, "--last-lr", 100, "--seed", 1),
        "--zero-init-residual",
    )
    assert found.returncode == 0, found.stderr
    assert "the first epoch's 32 px" in found.stdout
    curve = json.loads((tmp_path / "runs/run/lr_finder.json").read_text())
    assert curve["settings"]["train_px"] == 32
