"""scripts/benchmark_variants.py: the real command, on a plan of two variants."""

import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_images, run_stage_command

from utils import Config

sys.path.insert(0, str(REPOSITORY / "scripts"))

import benchmark_variants

SCRIPT = "scripts/benchmark_variants.py"
PLAN = """
[common]
train_folder_name = "{folder}"
epochs = 4
batch_size = 4
train_px = 64
first_train_px = 32
workers = 1
precision = "fp32"
[variants."small crops first"]
[variants."mixed, 64 px throughout"]
first_train_px = 0
mixup_alpha = 0.2
"""


def write_plan(folder: Path) -> Path:
    make_images(folder / "images", classes=2, images=6)
    plan = folder / "waves.toml"
    plan.write_text(PLAN.format(folder=folder / "images/train"))
    return plan


def test_every_variant_is_timed_at_each_of_its_sizes_and_set_against_the_first(
    tmp_path: Path,
) -> None:
    plan, output = write_plan(tmp_path), tmp_path / "made/variants.json"
    done = run_stage_command(
        SCRIPT, plan, "--rounds", 3, "--block-steps", 2, "--output", output, timeout=240
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert (record["plan"], record["rounds"], record["block_steps"]) == ("waves.toml", 3, 2)
    assert record["hardware"]["precision"] == "fp32"
    growing, mixed = record["variants"].values()
    assert [list(turn) for turn in growing["step_s"]] == [["32", "64"]] * 3
    assert [list(turn) for turn in mixed["step_s"]] == [["64"]] * 3
    # Of four epochs the first two have crops of 32 px. Times are written to a tenth of a ms.
    growing_rates = [4 * 4 / (2 * turn["32"] + 2 * turn["64"]) for turn in growing["step_s"]]
    mixed_rates = [4 / turn["64"] for turn in mixed["step_s"]]
    ratios = [one / other for one, other in zip(mixed_rates, growing_rates, strict=True)]
    for name, expected in (("img_per_s", mixed_rates), ("ratio", ratios)):
        parts = min(expected), sorted(expected)[1], max(expected)
        found = [mixed[name][part] for part in ("min", "median", "max")]
        assert found == pytest.approx(parts, rel=0.01)
    assert growing["ratio"] == {"min": 1.0, "median": 1.0, "max": 1.0}
    assert f"{mixed['img_per_s']['median']:.1f} img/s" in done.stderr + done.stdout


def test_the_named_variants_alone_are_timed_in_their_order(tmp_path: Path) -> None:
    plan, output = write_plan(tmp_path), tmp_path / "variants.json"
    options = ("--rounds", 1, "--block-steps", 1, "--output", output)
    done = run_stage_command(SCRIPT, plan, *options, "--variants", "mixed, 64 px throughout")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(output.read_text())["variants"]) == ["mixed, 64 px throughout"]


def test_an_epoch_counts_with_the_size_of_its_crops() -> None:
    config = Config(epochs=4, batch_size=10, train_px=64, first_train_px=32)
    assert benchmark_variants.epochs_at(config) == {32: [0, 1], 64: [2, 3]}
    assert benchmark_variants.img_per_s(config, {32: 1.0, 64: 3.0}) == 5.0


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (
            ("--variants", "small crops last"),
            'has no variant "small crops last": '
            'it has "small crops first", "mixed, 64 px throughout"',
        ),
        (("--block-steps", 3), "3 steps and one before them need 16 images, and "),
        (("--rounds", 0), "rounds and block_steps must be 1 or more"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    options: tuple[object, ...], complaint: str, tmp_path: Path
) -> None:
    done = run_stage_command(SCRIPT, write_plan(tmp_path), *options)
    assert done.returncode == 2
    assert complaint in done.stderr and "Traceback" not in done.stderr
