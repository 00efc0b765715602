"""scripts/benchmark_step.py: the real command, at the smallest size that says anything."""

import json
import sys
from pathlib import Path

import pytest
from conftest import REPOSITORY, make_images, run_stage_command

from utils import Config

sys.path.insert(0, str(REPOSITORY / "scripts"))

import benchmark_step

SCRIPT = REPOSITORY / "scripts" / "benchmark_step.py"


def test_it_measures_both_steps_with_and_without_the_loader(tmp_path: Path) -> None:
    make_images(tmp_path / "images", classes=2, images=6)
    output = tmp_path / "step.json"
    done = run_stage_command(
        *(SCRIPT, "--px", 64, 32, "--batch-size", 4, "--pairs", 2, "--block-steps", 1),
        *("--train-folder-name", tmp_path / "images/train", "--workers", 1),
        *("--precision", "fp32", "--loss-curve", 3, "--curves", 2, "--output", output),
        timeout=240,
        from_nothing=True,  # memory is measured too
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(output.read_text())
    assert set(record) == {
        *("settings", "hardware", "versions", "sizes", "loss_curve", "flop_per_image_at_224_px"),
        *("peak_flops", "peak_flops_measured_by"),
    }
    assert record["settings"]["batch_size"] == 4
    assert record["hardware"]["precision"] == "fp32"
    assert {"torch", "torchvision"} <= set(record["versions"])
    assert [size["px"] for size in record["sizes"]] == [64, 32]
    for size in record["sizes"]:
        for name in ("reference", "ours"):
            assert size[f"{name}_img_per_s"]["median"] > 0
            assert 0 < size[f"{name}_share_of_peak"] < 1
            assert size[name]["first_step_s"] > 0
            # At the least the weights, their gradients and their momentum.
            assert size[name]["peak_bytes"] > 3 * 4 * 25_557_032
        for name in ("ratio", "kept_with_loader"):
            assert 0 < size[name]["min"] <= size[name]["median"] <= size[name]["max"]
        assert f"{size['ratio']['median']:.2f} (" in done.stdout
    curves = record["loss_curve"]
    losses = curves["losses"]
    assert {name: [len(curve) for curve in each] for name, each in losses.items()} == {
        "ours": [3, 3], "reference": [3, 3],
    }  # fmt: skip
    # The same weights and the same pictures, in fp32: the first losses are the same.
    assert losses["ours"][0][0] == pytest.approx(losses["reference"][0][0], rel=1e-3)
    assert len({each[number][0] for each in losses.values() for number in (0, 1)}) >= 3
    # Over 3 steps a curve is one number, smoothed; and two of each are halved in two ways.
    own = curves["ours_from_reference"]
    first, second, third, fourth = (
        sum(curve) / 3 for curve in (*losses["ours"], *losses["reference"])
    )
    # The first and the third began alike: one is in each half.
    ways = [first + second - third - fourth, first + fourth - second - third]
    ways = [abs(way) / 2 for way in ways]
    assert own["mean"] == own["largest"] == pytest.approx(ways[0], abs=1e-3)
    assert curves["mean_of_halves"]["max"] == pytest.approx(max(ways), abs=1e-3)
    assert curves["mean_of_halves"]["median"] == pytest.approx(sum(ways) / 2, abs=1e-3)
    assert curves["halves"] == 2
    assert 1 <= curves["halves_at_least_as_far_apart"] <= 2
    assert "loss over 3 steps" in done.stdout


def test_every_loss_curve_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_images(tmp_path / "images", classes=2, images=6)
    folder = str(tmp_path / "images/train")
    config = Config(batch_size=4, train_folder_name=folder, precision="fp32", workers=1)
    options = benchmark_step.BenchmarkOptions(batch_size=4, loss_curve=3, curves=2)
    monkeypatch.setattr(benchmark_step, "move_weights", lambda *_: None)
    losses = benchmark_step.loss_curves(32, options, config)["losses"]
    assert losses["ours"][0] == losses["ours"][1]
    assert losses["reference"][0] == losses["reference"][1]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--loss-curve", "5"], "--train-folder-name"),
        (["--px", "16"], "32 px or more"),
        (["--curves", "1"], "curves must be 2 or more"),
        (["--batch-size", "1"], "batch_size is 1"),
        (["--train-folder-name", "nowhere"], "no folder or store nowhere"),
    ],
)
def test_nonsense_ends_with_one_line(options: list[str], says: str) -> None:
    done = run_stage_command(SCRIPT, *options)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert says in line
