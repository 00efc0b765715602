"""The settings, the schedule, the command line and the run's folder."""

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Literal

import pytest
import torch

import utils
from utils import RECIPES, Config, UserError, learning_rate, train_px

REPOSITORY = Path(__file__).parent.parent

# The published table of the reference run: max_lr 0.175, 2,860 steps an epoch, 50 epochs.
PUBLISHED_RATES = {
    1: "0.00884",
    5: "0.04900",
    10: "0.13300",
    15: "0.17500",
    20: "0.16633",
    25: "0.14205",
    30: "0.10697",
    35: "0.06803",
    40: "0.03294",
    45: "0.00866",
    48: "0.00141",
    50: "0.0000007",
}


@pytest.mark.parametrize(("epoch", "published"), PUBLISHED_RATES.items())
def test_learning_rates_are_those_of_the_published_table(epoch: int, published: str) -> None:
    digits = len(published.partition(".")[2])
    rate = learning_rate(Config(max_lr=0.175), epoch * 2860, 2860)
    # To the printed precision: half a unit of the last digit, rounded or cut off.
    assert math.isclose(rate, float(published), rel_tol=0, abs_tol=10**-digits)


@pytest.mark.parametrize("shape", ["cos", "linear"])
@pytest.mark.parametrize(("epochs", "steps", "pct_start"), [(5, 7, 0.3), (2, 50, 0.1), (3, 1, 0.5)])
def test_the_schedule_is_torchs_one_cycle(
    epochs: int, steps: int, pct_start: float, shape: Literal["cos", "linear"]
) -> None:
    config = Config(
        epochs=epochs, pct_start=pct_start, max_lr=0.4, div_factor=10, anneal_strategy=shape
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=0.4,
        total_steps=epochs * steps,
        pct_start=pct_start,
        anneal_strategy=shape,
        div_factor=10,
        final_div_factor=config.final_div_factor,
        cycle_momentum=False,
    )
    for step in range(epochs * steps):
        expected = optimizer.param_groups[0]["lr"]
        assert math.isclose(learning_rate(config, step, steps), expected, rel_tol=1e-9)
        optimizer.step()
        if step + 1 < epochs * steps:
            scheduler.step()


def test_extra_epochs_are_a_cycle_of_their_own() -> None:
    config = Config(epochs=3, extra_epochs=2)
    plain, extra = Config(epochs=3), Config(epochs=2)
    rates = [learning_rate(config, step, 10) for step in range(50)]
    assert rates[:30] == [learning_rate(plain, step, 10) for step in range(30)]
    assert rates[30:] == [learning_rate(extra, step, 10) for step in range(20)]


def test_crops_grow_from_the_first_size_to_the_last() -> None:
    config = Config(epochs=11, first_train_px=96, train_px=224, px_ramp_start=0.2, px_ramp_end=0.8)
    sizes = [train_px(config, epoch) for epoch in range(11)]
    # From 96 px at epoch 2 to 224 px at epoch 8: 21.3 px an epoch, to the nearest 32.
    assert sizes == [96, 96, 96, 128, 128, 160, 192, 192, 224, 224, 224]
    assert [train_px(config, epoch) for epoch in (11, 12, 500)] == [224] * 3  # the extra epochs


@pytest.mark.parametrize("epochs", [1, 2, 3, 16, 50])
@pytest.mark.parametrize(("first", "last"), [(64, 64), (64, 96), (128, 176), (32, 200), (160, 224)])
@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.35, 0.85), (0.0, 0.01), (0.99, 1.0)])
def test_any_ramp_rises_in_steps_of_32_and_ends_at_train_px(
    epochs: int, first: int, last: int, start: float, end: float
) -> None:
    config = Config(
        epochs=epochs, first_train_px=first, train_px=last, px_ramp_start=start, px_ramp_end=end
    )
    utils.check_config(dataclasses.replace(config, val_resize_px=256))
    sizes = [train_px(config, epoch) for epoch in range(epochs)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == last
    assert epochs == 1 or sizes[0] == first
    assert all(px == last or px % 32 == 0 for px in sizes)


def test_a_size_halfway_between_two_is_the_larger_one() -> None:
    config = Config(epochs=3, first_train_px=128, train_px=160, px_ramp_start=0.0, px_ramp_end=1.0)
    assert [train_px(config, epoch) for epoch in range(3)] == [128, 160, 160]


def test_without_a_first_size_all_crops_have_the_same() -> None:
    assert {train_px(Config(train_px=200), epoch) for epoch in range(60)} == {200}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"first_train_px": 100}, "first_train_px is 100.*multiple of 32"),
        ({"first_train_px": 256}, "first_train_px is 256.*at most train_px, 224"),
        ({"first_train_px": -32}, "first_train_px is -32"),
        ({"px_ramp_start": -0.1}, "px_ramp_start is -0.1"),
        ({"px_ramp_end": 1.5}, "px_ramp_end 1.5"),
        ({"px_ramp_start": 0.5, "px_ramp_end": 0.5}, "the start below the end"),
        ({"px_ramp_end": math.nan}, "px_ramp_end nan"),
        ({"val_batch_size": 0}, "val_batch_size is 0"),
        ({"mixup_alpha": -0.2}, "mixup_alpha is -0.2: it must be 0 or more"),
        ({"cutmix_alpha": math.inf}, "cutmix_alpha is inf"),
        ({"erase_probability": 1.1}, "erase_probability is 1.1: it must be at most 1"),
        ({"erase_probability": math.nan}, "erase_probability is nan"),
        ({"optimizer": "sdg"}, "optimizer is 'sdg': it must be one of sgd, muon"),
        ({"precision": "fp64"}, "precision is 'fp64': it must be one of auto, fp16, bf16, fp32"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed: dict[str, float], says: str) -> None:
    utils.check_config(Config())
    with pytest.raises(UserError, match=says):
        utils.check_config(dataclasses.replace(Config(), **changed))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0: it must be below 1"),
        ({"budget_usd": 5.0, "price_per_hour": 0.0}, "budget_usd is 5.0 and price_per_hour 0"),
        ({"crop_min_scale": 0.0}, "crop_min_scale is 0.0: it must be above 0"),
        ({"pct_start": 1.0}, "pct_start is 1.0: it must lie between 0 and 1"),
        ({"pct_start": 0.0}, "pct_start is 0.0: it must lie between 0 and 1"),
        ({"seed": 2**63}, "seed is 9223372036854775808: it must be 0 or more, below"),
    ],
)
def test_settings_at_their_limits_are_refused(changed: dict[str, float], says: str) -> None:
    with pytest.raises(UserError, match=says):
        utils.check_config(dataclasses.replace(Config(), **changed))


def test_the_defaults_are_the_reference_runs() -> None:
    expected = {
        "batch_size": 448,
        "name": "resnet50_imagenet_1k_onecycleLr",
        "workers": 12,
        "max_lr": 0.175,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "epochs": 50,
        "pct_start": 0.3,
        "div_factor": 25.0,
        "final_div_factor": 1e4,
        "train_folder_name": "/mnt/data/imagenetdata/train",
        "val_folder_name": "/mnt/data/imagenetdata/val",
    }
    config = dataclasses.asdict(RECIPES["reference"].config)
    assert {name: config[name] for name in expected} == expected


# All that differs from the reference run.
FAST = {
    "recipe": "fast",
    "name": "resnet50_imagenet_1k_fast",
    "epochs": 24,
    "batch_size": 512,
    "max_lr": 0.05,
    "pct_start": 0.2,
    "anneal_strategy": "linear",
    "optimizer": "muon",
    "weight_decay": 0.01,
    "norm_and_bias_lr": 16.0,
    "train_px": 192,
    "first_train_px": 128,
    "crop_min_scale": 0.35,
    "zero_init_residual": True,
    "blurpool": True,
    "price_per_hour": 0.4,
}
ACCURATE = {
    **FAST,
    "recipe": "accurate",
    "name": "resnet50_imagenet_1k_accurate",
    "epochs": 56,
    "label_smoothing": 0.1,
    "average_steps": 100.0,
    "crop_min_scale": 0.25,
    "mixup_alpha": 0.2,
    "cutmix_alpha": 1.0,
    "erase_probability": 0.1,
    "trivial_augment": True,
}
QUICKSTART = {
    "recipe": "quickstart",
    "name": "quickstart",
    "train_folder_name": "data/digits/train",
    "val_folder_name": "data/digits/val",
    "epochs": 8,
    "batch_size": 32,
    "val_batch_size": 64,
    "max_lr": 0.03,
    "weight_decay": 5e-4,
    "train_px": 48,
    "val_px": 48,
    "val_resize_px": 48,
    "crop_min_scale": 0.8,
    "flip": False,
    "zero_init_residual": True,
    "workers": 2,
    "price_per_hour": 0.0,
}


def test_the_recipes_are_what_their_claims_stand_for() -> None:
    expected = {"reference": {}, "fast": FAST, "accurate": ACCURATE, "quickstart": QUICKSTART}
    defaults = dataclasses.asdict(Config())
    changed = {
        name: {
            key: value
            for key, value in dataclasses.asdict(recipe.config).items()
            if value != defaults[key]
        }
        for name, recipe in RECIPES.items()
    }
    assert changed == expected


def parse(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    @dataclasses.dataclass(frozen=True)
    class Options:
        config: utils.ConfigOptions

    monkeypatch.setattr(sys, "argv", ["stage.py", *arguments])
    return utils.parse_options(Options).config


def test_every_setting_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = {}
    for field in dataclasses.fields(Config):
        value = getattr(RECIPES["reference"].config, field.name)
        choices = {"recipe": "quickstart", "precision": "fp32", "device": "cpu"}
        choices |= {"optimizer": "muon", "anneal_strategy": "linear", "loss": "bce"}
        if field.name in choices:
            changed[field.name] = choices[field.name]
        elif isinstance(value, bool):
            changed[field.name] = not value
        else:
            changed[field.name] = value + type(value)(1)
    arguments: list[str] = []
    for name, value in changed.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        else:
            arguments += [f"--{option}", str(value)]
    assert dataclasses.asdict(parse(monkeypatch, *arguments)) == changed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--recipe", "quickstart"],
        ["--recipe=quickstart"],
        ["--recipe", "fast", "--recipe", "quickstart"],
    ],
)
def test_a_recipe_sets_the_defaults(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> None:
    config = parse(monkeypatch, *arguments, "--max_lr", "0.25")
    assert config == dataclasses.replace(RECIPES["quickstart"].config, max_lr=0.25)


@pytest.mark.parametrize("recipe", RECIPES)
def test_settings_as_arguments_are_read_as_the_same(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    config = RECIPES[recipe].config
    assert utils.as_arguments(config) == [f"--recipe={recipe}"]
    changed = dataclasses.replace(
        config,
        name="-x y",
        max_lr=1e-7,
        flip=not config.flip,
        train_px=config.train_px + 32,
        first_train_px=0,
        label_smoothing=0.3,
        anneal_strategy="linear",
    )
    for settings in (config, changed):
        assert parse(monkeypatch, *utils.as_arguments(settings)) == settings


def test_help_names_every_setting_and_says_what_it_is() -> None:
    answer = subprocess.run(
        [sys.executable, "trainer.py", "--help"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert answer.returncode == 0
    text = " ".join(answer.stdout.replace("│", " ").split())
    for field in dataclasses.fields(Config):
        assert re.search(f"--{field.name.replace('_', '-')}[ ,]", text)
    for phrase in ("images in a training step", "seconds between two progress lines"):
        assert phrase in text


def test_the_latest_run_is_the_one_started_last(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .* yet"):
        utils.latest_run(str(tmp_path))
    for age, name in enumerate(("newest", "older", "oldest")):
        (tmp_path / name).mkdir()
        utils.write_json(tmp_path / name / "config.json", {})
        then = time.time() - 60 * age
        os.utime(tmp_path / name / "config.json", (then, then))
    (tmp_path / "no_run").mkdir()
    assert utils.latest_run(str(tmp_path)) == "newest"


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    utils.write_atomically(path, b"old")
    order = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda *args, real=real, name=name: (order.append(name), real(*args))
        )
    utils.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert order == ["fsync", "replace", "fsync"]  # content, name, folder

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left") as error:
        utils.write_atomically(path, b"newer")
    assert error.value.filename == str(path)
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_config_json_tells_versions_commit_and_hardware(tmp_path: Path) -> None:
    utils.save_config(tmp_path, Config(), ["cat", "dog"], {"gpu": "A10G"})
    record = json.loads((tmp_path / "config.json").read_text())
    assert Config(**record["config"]) == Config()
    assert record["classes"] == ["cat", "dog"]
    assert record["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert record["hardware"] == {"gpu": "A10G"}
    assert record["commit"] == utils.commit()


def test_the_commit_is_that_of_the_checkout_and_says_what_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    assert utils.commit() == ""  # as where only the files were copied

    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "utils.py").write_text("first")
    git("init")
    git("add", "utils.py")
    git("commit", "-m", "first")
    git("tag", "-a", "v1", "-m", "a release")
    head = git("rev-parse", "HEAD")
    assert utils.commit() == head and len(head) == 40
    (tmp_path / "utils.py").write_text("second")
    assert utils.commit() == f"{head}-dirty"


@pytest.mark.parametrize(
    ("seconds", "text"), [(41.4, "41 s"), (425, "7 min 5 s"), (51600, "14 h 20 min")]
)
def test_durations_are_said_as_people_say_them(seconds: float, text: str) -> None:
    assert utils.format_duration(seconds) == text


def test_the_readme_has_every_setting_with_its_default() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for field in dataclasses.fields(Config):
        star = r" \*" if field.name in utils.FREE_SETTINGS else ""
        default = {True: "yes", False: "no"}.get(field.default, field.default)
        if isinstance(field.default, int | float) and not isinstance(field.default, bool):
            default = f"{field.default:g}"
        assert re.search(rf"\| `{field.name}`{star} \| {re.escape(str(default))} \|", readme)


def test_every_setting_is_in_one_of_the_two_lists() -> None:
    fields = {field.name for field in dataclasses.fields(utils.Config)}
    assert fields == utils.RESULT_SETTINGS | utils.FREE_SETTINGS
    assert not utils.RESULT_SETTINGS & utils.FREE_SETTINGS


@pytest.mark.parametrize(("columns", "draws"), [(80, True), (0, False)])
def test_a_bar_is_drawn_where_the_terminal_says_how_wide_it_is(columns: int, draws: bool) -> None:
    ours, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, columns))
    program = "import sys, utils; sys.exit(3 if utils.on_terminal() else 4)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=terminal, timeout=60)
    os.close(ours)
    os.close(terminal)
    assert done.returncode == (3 if draws else 4)
