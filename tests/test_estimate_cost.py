import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY

# 2,000 img/s a core at 224 px, 4,000 at 128 px.
BENCHMARK = {
    "results": [
        {"px": px, "cores": cores, "img_per_s": {"ours, store": {"median": rate * cores}}}
        for px, rate in ((224, 2000.0), (128, 4000.0))
        for cores in (1, 2)
    ]
}


def estimate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = folder / "data.json"
    path.write_text(json.dumps(BENCHMARK))
    command = [sys.executable, "scripts/estimate_cost.py", "--data-benchmark", str(path)]
    return subprocess.run(
        [*command, *arguments],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )


def rows(output: str) -> list[list[str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


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


def test_smaller_crops_cost_less(tmp_path: Path) -> None:
    growing = ("--first-train-px", "128", "--train-px", "192", "--epochs-to-show", "24")
    answer = estimate(tmp_path, *growing)
    row = rows(answer.stdout)[0]
    assert row[0] == "128 to 192 px"
    whole = rows(estimate(tmp_path, "--train-px", "192", "--epochs-to-show", "24").stdout)[0]
    assert float(row[3]) < float(whole[3])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--data-benchmark", "missing.json"), "no missing.json: run scripts/benchmark_data.py"),
        (("--gpu-img-per-s", "0"), "gpu_img_per_s is 0.0: it must be above 0"),
        (("--epochs-to-show", "0"), "epochs is 0: it must be above 0"),
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
    readme = (REPOSITORY / "README.md").read_text()
    for crops, epochs, instance, hours, spot, *_ in rows(answer.stdout):
        if instance == "g5.xlarge":
            first = crops if epochs == "24" else ""
            assert f"| {first} | {epochs} | {hours} | {spot} |".replace("|  |", "| |") in readme
