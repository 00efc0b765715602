import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY

sys.path.insert(0, str(REPOSITORY / "scripts"))

import estimate_cost

import muon
from model import ResNet50Wrapper
from utils import RECIPES, train_px

# 2,000 img/s a core at 224 px, 4,000 at 128 px.
BENCHMARK = {
    "results": [
        {"px": px, "cores": cores, "img_per_s": {"ours, store": {"median": rate * cores}}}
        for px, rate in ((224, 2000.0), (128, 4000.0))
        for cores in (1, 2)
    ]
}
# A quarter of that with TrivialAugment, on a slower machine.
AUGMENTED = {
    "results": [
        {
            "px": px,
            "cores": 1,
            "ratios": {"ours as accurate, store / ours, store": {"median": 0.25}},
        }
        for px in (224, 128)
    ]
}


def estimate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    files = {"--data-benchmark": BENCHMARK, "--augmented-data-benchmark": AUGMENTED}
    command = [sys.executable, "scripts/estimate_cost.py"]
    for option, record in files.items():
        path = folder / f"{option.removeprefix('--')}.json"
        path.write_text(json.dumps(record))
        command += [option, str(path)]
    return subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def rows(output: str) -> list[list[str]]:
    """The rows of the first table."""
    lines = output.partition("|---")[2].partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_the_instances_are_as_awss_list_has_them() -> None:
    """vCPUs and dollars an hour on demand, in us-east-1; the reference run had the largest."""
    assert estimate_cost.INSTANCES == {
        "g5.xlarge": (4, 1.006),
        "g5.2xlarge": (8, 1.212),
        "g5.8xlarge": (32, 2.448),
    }
    options = estimate_cost.EstimateOptions(config=RECIPES["reference"].config)
    assert round(2.448 * options.spot_share, 2) == options.config.price_per_hour


def test_the_gpu_sets_the_hours(tmp_path: Path) -> None:
    answer = estimate(tmp_path, "--gpu-img-per-s", "1000", "--epochs-to-show", "10", "20")
    assert answer.returncode == 0, answer.stderr
    assert "ESTIMATE, not a measurement" in answer.stdout
    # Ten epochs of 1,281,167 images and of 50,000 that cost a third each.
    hours = 10 * (1_281_167 + 50_000 / 3) / 1000 / 3600
    first = rows(answer.stdout)[0]
    spot, on_demand = f"${hours * 1.006 * 0.396:.2f}", f"${hours * 1.006:.2f}"
    expected = ["224 px throughout", "10", "g5.xlarge", f"{hours:.1f}", spot, on_demand, "GPU"]
    assert first == expected
    assert [row[2] for row in rows(answer.stdout)[:3]] == ["g5.xlarge", "g5.2xlarge", "g5.8xlarge"]
    assert len(rows(answer.stdout)) == 12  # two schedules, two lengths, three instances


def test_too_few_cores_set_the_hours(tmp_path: Path) -> None:
    options = ("--gpu-img-per-s", "16000", "--core-per-vcpu", "0.5", "--epochs-to-show", "10")
    answer = estimate(tmp_path, *options, "--spot-share", "1")
    # Four vCPUs, two cores, prepare 4,000 images a second; 32 prepare more than it takes.
    hours = 10 * (1_281_167 / 4000 + 50_000 / 3 / 16000) / 3600
    smallest, _, largest = rows(answer.stdout)[:3]
    assert smallest[3:5] == [f"{hours:.1f}", f"${hours * 1.006:.2f}"]
    assert smallest[-1] == "CPU in 100 % of the time" and largest[-1] == "GPU"
    # Of 160 px the next larger size, of 256 px the largest that was measured.
    rates = {224: 2000.0, 128: 4000.0}
    found = [estimate_cost.core_rate(rates, px) for px in (96, 128, 160, 224, 256)]
    assert found == [4000, 4000, 2000, 2000, 2000]


def test_trivial_augment_has_a_rate_of_its_own(tmp_path: Path) -> None:
    options = ("--gpu-img-per-s", "16000", "--epochs-to-show", "10", "--train-px", "128")
    plain, augmented = (
        rows(estimate(tmp_path, *options, *more).stdout)[0] for more in ((), ("--trivial-augment",))
    )
    val_h = 10 * 50_000 / 3 / 16000 / 3600
    assert plain[3] == f"{10 * 1_281_167 / 8000 / 3600 + val_h:.1f}"  # two cores of 4,000
    assert augmented[3] == f"{10 * 1_281_167 / 2000 / 3600 + val_h:.1f}"  # a quarter of that
    assert augmented[-1] == "CPU in 100 % of the time"


def test_smaller_crops_cost_less(tmp_path: Path) -> None:
    growing = ("--first-train-px", "128", "--train-px", "192", "--epochs-to-show", "24")
    answer = estimate(tmp_path, *growing)
    row = rows(answer.stdout)[0]
    assert row[0] == "128 to 192 px"
    whole = rows(estimate(tmp_path, "--train-px", "192", "--epochs-to-show", "24").stdout)[0]
    assert float(row[3]) < float(whole[3])


def accuracy_rows(output: str) -> list[list[str]]:
    return rows(output.partition("with the crops and validation of each recipe:")[2])


def test_an_accuracy_costs_the_epochs_between_two_published_ones(tmp_path: Path) -> None:
    answer = estimate(tmp_path, "--gpu-img-per-s", "1000", "--top1", "75.32", "76.1", "99")
    by_recipe = {(row[0], row[1]): row for row in accuracy_rows(answer.stdout)}
    # The reference has 224 px and 50 epochs.
    hours = 50 * (1_281_167 + 50_000 / 3) / 1000 / 3600
    assert by_recipe["reference", "75.32 %"][2:4] == ["50", f"{hours:.1f}"]
    assert "not known to get there" in by_recipe["reference", "76.1 %"][2]
    assert "not known to get there" in by_recipe["fast", "99 %"][2]
    # 75.6 after 24 epochs, 76.6 after 32; of those 28, growing from 128 px to 192, with Muon.
    row = by_recipe["fast", "76.1 %"]
    assert row[2] == "28"
    sizes = [train_px(dataclasses.replace(RECIPES["fast"].config, epochs=28), e) for e in range(28)]
    assert set(sizes) == {128, 160, 192}
    muon_s = 28 * 1_281_167 / 512 * muon_flop() / (24.7e9 * 1000)  # as if it were so many images
    pixels = sum((px / 224) ** 2 for px in sizes)
    train_s = 1_281_167 / 1000 * pixels * (1 + blur_share()) + muon_s
    hours = (train_s + 28 * 50_000 / 3 / 1000) / 3600
    assert row[3:5] == [f"{hours:.1f}", f"${hours * 1.006 * 0.396:.2f}"]


def muon_flop() -> float:
    """What muon.orthogonalize multiplies and adds for ResNet-50."""
    flop = 0.0
    for weight in ResNet50Wrapper().parameters():
        if weight.ndim > 1:
            m, n = sorted((weight.shape[0], weight[0].numel()))
            flop += muon.ROUNDS * (4 * m * m * n + 2 * m**3)
    assert math.isclose(flop, estimate_cost.FLOP_PER_MUON_STEP, rel_tol=0.01)
    return flop


def blur_share() -> float:
    """What BlurPool's means move in fp16, at 300 GB/s, over an image's time at 810 img/s."""
    network = ResNet50Wrapper(blurpool=True).eval()
    moved: list[int] = []

    def count(convolution: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        places = inputs[0].numel()  # as they are after the blur
        pointwise = convolution.kernel_size == (1, 1)
        whole = 4 * places if pointwise else places
        moved.append(3 * whole + places)  # read, written, and read again; and what is left

    for name, module in network.named_modules():
        if name.endswith(("0.conv2", "0.downsample.0")) and "layer1" not in name:
            module.register_forward_pre_hook(count)
    with torch.inference_mode():
        network(torch.zeros(1, 3, 224, 224))
    assert len(moved) == 6
    share = 2 * 2 * sum(moved) / 300e9 * 810  # 2 bytes; as much again for the gradients
    assert math.isclose(share, estimate_cost.BLUR_SHARE, rel_tol=0.05)
    return estimate_cost.BLUR_SHARE


def test_a_gpus_measured_rates_take_the_place_of_the_published_one(tmp_path: Path) -> None:
    record = {
        "hardware": {"gpu": "NVIDIA A10G"},
        "sizes": [{"px": px, "ours_img_per_s": {"median": 256_000 / px}} for px in (128, 256)],
    }
    path = tmp_path / "step.json"
    path.write_text(json.dumps(record))
    options = ("--step-benchmark", str(path), "--epochs-to-show", "10", "--train-px", "128")
    answer = estimate(tmp_path, *options, "--val-px", "128", "--val-resize-px", "128")
    hours = 10 * (1_281_167 + 50_000 / 3) / 2000 / 3600
    assert rows(answer.stdout)[0][3] == f"{hours:.1f}"

    # Of 160 px the nearest is 128, of 224 px 256: scaled by the pixels.
    found = [estimate_cost.gpu_rate({128: 2000.0, 256: 1000.0}, px) for px in (160, 224)]
    assert found == [2000 * (128 / 160) ** 2, 1000 * (256 / 224) ** 2]

    path.write_text(json.dumps({**record, "sizes": []}))
    refused = estimate(tmp_path, "--step-benchmark", str(path))
    assert refused.returncode == 2 and "has no size: its measurement was broken" in refused.stderr
    path.write_text(json.dumps({**record, "hardware": {"gpu": None}}))
    refused = estimate(tmp_path, "--step-benchmark", str(path))
    assert refused.returncode == 2 and "was measured without a GPU" in refused.stderr
    for rate in ("fast", None, 0, [2000]):
        sizes = [{"px": 128, "ours_img_per_s": {"median": rate}}]
        path.write_text(json.dumps({**record, "sizes": sizes}))
        refused = estimate(tmp_path, "--step-benchmark", str(path))
        assert refused.returncode == 2 and "is not what scripts/benchmark_step" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--data-benchmark", "missing.json"), "no missing.json: run scripts/benchmark_data.py"),
        (
            ("--augmented-data-benchmark", "benchmarks/data.json"),
            "benchmarks/data.json has not 'ours as accurate, store / ours, store' on one core",
        ),
        (("--step-benchmark", "none.json"), "none.json is not what scripts/benchmark_step.py"),
        (("--gpu-img-per-s", "0"), "gpu_img_per_s is 0.0: it must be above 0"),
        (("--epochs-to-show", "0"), "epochs is 0: it must be above 0"),
        (("--epochs", "90"), "epochs are those of --epochs-to-show here"),
        (("--extra-epochs", "2"), "epochs are those of --epochs-to-show here"),
        (("--data-benchmark", "benchmarks/save.json"), "is not what scripts/benchmark_data.py"),
    ],
)
def test_mistakes_end_in_one_line(
    tmp_path: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    answer = estimate(tmp_path, *arguments)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and complaint in answer.stderr
    assert len(answer.stderr.splitlines()) == 1


def test_the_committed_measurement_gives_the_readme_table() -> None:
    answer = subprocess.run(
        [sys.executable, "scripts/estimate_cost.py"],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    readme = (REPOSITORY / "README.md").read_text()
    assert len(rows(answer.stdout)) == 18 and len(accuracy_rows(answer.stdout)) == 6
    for crops, epochs, instance, hours, spot, *_ in rows(answer.stdout):
        if instance == "g5.xlarge":
            first = crops if epochs == "24" else ""
            assert f"| {first} | {epochs} | {hours} | {spot} |".replace("|  |", "| |") in readme
    for recipe, top1, epochs, *cells in accuracy_rows(answer.stdout):
        if cells[0] and (recipe, top1) != ("accurate", "75.3 %"):  # which is what fast is for
            row = [recipe, top1, epochs, *cells[:3]]
            assert f"| {' | '.join(row)} |" in readme
