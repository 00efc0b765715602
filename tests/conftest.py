"""What the test files share: tiny images, and the stages started as a user starts them."""

import dataclasses
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import quick_start
from aws_emulator import Emulator, start_emulator
from PIL import Image
from quick_aws import quick_aws

REPOSITORY = Path(__file__).resolve().parent.parent
# What a script starts in the background does not hear Ctrl-C; the commands shall all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks; the commands inherit it
# One thread, since the tests themselves are the parallelism; no GPU, even where there is one; and
# no EC2, even on an instance.
COMMAND_ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def make_images(
    folder: Path, classes: int = 3, images: int = 8, px: int = 48, seed: int = 0
) -> None:
    """Write `images` JPEGs a class into folder/train and folder/val: noisy waves, tinted by class.

    The classes are class_0, class_1 and so on, the files train_0.jpg and so on.
    """
    noise = np.random.default_rng(seed)
    across = np.linspace(0, 2 * np.pi, px)
    for part in ("train", "val"):
        for label in range(classes):
            class_folder = folder / part / f"class_{label}"
            class_folder.mkdir(parents=True)
            tint = np.roll([80, 20, -60], label)
            waves = np.sin((label + 1) * across)[:, None, None] * tint + tint / 2
            for image in range(images):
                picture = 128 + waves + noise.normal(0, 25, (px, px, 3))
                pixels = picture.clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(class_folder / f"{part}_{image}.jpg")


def run_stage_command(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
    from_nothing: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a stage in a process of its own: run_stage_command("trainer.py", "--epochs", 1).

    `env` is what the environment has beside COMMAND_ENVIRONMENT. The process is a quick start's;
    that of a new interpreter with `from_nothing`, and for what loads no PyTorch and is as quick.
    """
    stage, *options = map(str, arguments)
    command = [sys.executable, REPOSITORY / stage, *options]
    given = {"cwd": cwd, "env": {**COMMAND_ENVIRONMENT, **(env or {})}, "timeout": timeout}
    if from_nothing or stage == "scripts/prepare_data.py":
        return subprocess.run(command, **given, capture_output=True, text=True, check=False)
    return quick_start.run(command, **given)


@pytest.fixture(scope="session")
def shared_emulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Emulator]:
    """One for all tests of a process of pytest; its start takes longer than many a test."""
    with start_emulator(tmp_path_factory.mktemp("emulator")) as emulator:
        yield emulator


@pytest.fixture(scope="session")
def quick_aws_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with an `aws` for the front of PATH."""
    with quick_aws(tmp_path_factory.mktemp("aws")) as folder:
        yield folder


@pytest.fixture
def aws_account(shared_emulator: Emulator) -> Iterator[Emulator]:
    """An empty account, and the AWS CLI for it."""
    shared_emulator.reset()
    yield dataclasses.replace(shared_emulator, environment=dict(shared_emulator.environment))
    shared_emulator.check()


@pytest.fixture
def quick_aws_account(aws_account: Emulator, quick_aws_folder: Path) -> Emulator:
    """The same with a CLI that starts quickly, and tries no call a second time."""
    environment = aws_account.environment
    environment["AWS_MAX_ATTEMPTS"] = "1"
    environment["PATH"] = f"{quick_aws_folder}{os.pathsep}{environment['PATH']}"
    return aws_account


# One of 500 s, which is a process's whole work, and others of 30 to 150 s.
LONGEST = (
    "test_the_whole_path",
    "test_from_nothing_to_training_and_back_as_the_readme_says",
    "test_killed_after_each_change_every_command_ends_in_the_same_state",
    "test_six_kills_change_nothing",
    "test_the_life_of_a_function",
    "test_a_run_goes_on_from_its_mirror_on_an_empty_machine",
    "test_ec2s_notice_saves_in_time_after_all_kinds_of_odd_answers",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest tests first, so that the processes of pytest-xdist end together.

    With worksteal each begins with an equal part of the list, and takes from others' ends later.
    """
    processes = getattr(config, "workerinput", {}).get("workercount", 1)
    longest = [item for name in LONGEST for item in items if item.name == name]
    others = [item for item in items if item not in longest]
    heads = [longest]
    if processes > 1:
        heads = [longest[:1], *(longest[1 + n :: processes - 1] for n in range(processes - 1))]
    left = len(items)
    items.clear()
    for process, head in enumerate(heads):
        count = left // (processes - process)
        left -= count
        more = max(0, count - len(head))
        items += head + others[:more]
        del others[:more]
