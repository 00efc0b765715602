"""scripts/sky.yaml: read by SkyPilot itself, and its command run on this machine.

SkyPilot is in an environment of its own, .venv-sky, which scripts/test.sh makes. Which clouds have
which GPUs it looks up in a catalogue that it downloads, with an account: that is not tried here.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command

TASK = REPOSITORY / "scripts" / "sky.yaml"
SKY_PYTHON = REPOSITORY / ".venv-sky" / "bin" / "python"

# Reads each [task, environment] as SkyPilot's server does, where no key is let through for plugins
# that may be there, and prints what it has understood, or what it objects to.
READ_TASKS = """
import json, sys, yaml
import sky
from sky.server import plugins

plugins.load_plugins(plugins.ExtensionContext())
answers = []
for path, envs in json.loads(sys.argv[1]):
    try:
        with open(path) as file:
            config = yaml.safe_load(file)
        task = sky.Task.from_yaml_config(config, env_overrides=list(envs.items()))
        task.validate_name()
        task.validate_run()
        task.expand_and_validate_workdir()
        task.expand_and_validate_file_mounts()
        answers.append(task.to_yaml_config())
    except Exception as error:
        answers.append(f"{type(error).__name__}: {error}")
json.dump(answers, sys.stdout)
"""
ENVS = {"STORE": "s3://bucket/imagenet.store", "MIRROR": "s3://bucket/runs"}

# One change each: what is replaced by what, and what SkyPilot says then.
MISTAKES = {
    "a wrong key": ("disk_size:", "disk_sise:", "disk_sise"),
    "a wrong key at the top": ("file_mounts:\n", "file_mount:\n", "file_mount"),
    "a wrong key of recovery": ("recover_on_exit_codes:", "recover_on_exit_code:", "exit_code"),
    "a wrong type": ("use_spot: true", "use_spot: sometimes", "sometimes"),
    "a wrong type at the top": ("workdir: .", "workdir: [.]", "workdir"),
    "an exit code that is none": ("[75, 143]", "[75, 1430]", "1430"),
    "a size that is none": ("cpus: 4+", "cpus: four", "four"),
    "a source that is nowhere": ("${STORE}", "${STORE_FILE}", "STORE_FILE"),
    "a target in a bucket": ("~/imagenet.store: $", "s3://bucket/imagenet.store: $", "destination"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What SkyPilot makes of the file, and what it objects to in copies with mistakes."""
    assert SKY_PYTHON.exists(), "no .venv-sky: bash scripts/test.sh makes it"
    folder = tmp_path_factory.mktemp("sky")
    text = TASK.read_text()
    tasks = {"as it stands": (TASK, ENVS), "without a mirror": (TASK, {"STORE": ENVS["STORE"]})}
    for name, (old, new, _) in MISTAKES.items():
        assert text.count(old) == 1, name
        path = folder / f"{name}.yaml"
        path.write_text(text.replace(old, new))
        tasks[name] = (path, ENVS)
    answer = subprocess.run(
        [SKY_PYTHON, "-c", READ_TASKS, json.dumps(list(tasks.values()), default=str)],
        cwd=REPOSITORY,
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "IS_SKYPILOT_SERVER": "1",
            "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        },
        timeout=120,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    return dict(zip(tasks, json.loads(answer.stdout), strict=True))


# In place of the environment that the machine has: each start of the trainer takes the next of some
# exit codes, and a pause only counts.
STAND_IN = """
python3() { read -r code < codes; sed -i 1d codes; echo started "$code"; return "$code"; }
sleep() { echo "paused $1 s"; SECONDS=$((SECONDS + $1)); }
"""


def run_command(task: dict[str, Any], home: Path, **envs: str) -> subprocess.CompletedProcess[str]:
    """Run the task's command here, as SkyPilot runs it on a machine."""
    return subprocess.run(
        ["bash", "-c", task["run"]],
        cwd=REPOSITORY,
        env={**COMMAND_ENVIRONMENT, **task["envs"], "HOME": str(home), **envs},
        timeout=120,
        capture_output=True,
        text=True,
    )


def test_skypilot_understands_the_file(answers: dict[str, Any]) -> None:
    task = answers["as it stands"]
    assert isinstance(task, dict), task
    assert Path(task["workdir"]) == REPOSITORY
    assert task["file_mounts"] == {"~/imagenet.store": ENVS["STORE"]}
    assert task["envs"] == {**ENVS, "RUN_NAME": "resnet50", "SETTINGS": ""}
    machines = task["resources"]["ordered"]
    assert [machine["accelerators"] for machine in machines] == [{"A10G": 1}, {"A10": 1}, {"L4": 1}]
    for machine in machines:
        assert machine["use_spot"] is True
        assert machine["disk_size"] == 128
        assert machine["job_recovery"]["recover_on_exit_codes"] == [75, 143]


@pytest.mark.parametrize("name", MISTAKES)
def test_skypilot_refuses_a_mistake(answers: dict[str, Any], name: str) -> None:
    assert isinstance(answers[name], str), answers[name]
    assert MISTAKES[name][2] in answers[name]


def test_store_and_mirror_have_to_be_named(answers: dict[str, Any]) -> None:
    assert "'MIRROR' is None" in answers["without a mirror"]


def test_its_command_is_the_trainers_own(answers: dict[str, Any], tmp_path: Path) -> None:
    make_images(tmp_path / "photos", classes=2, images=4)
    packed = run_stage_command(
        "scripts/prepare_data.py", "pack", tmp_path / "photos", tmp_path / "imagenet.store"
    )
    assert packed.returncode == 0, packed.stderr
    mirror = f"file://{tmp_path / 'mirror'}"
    (tmp_path / "mirror").mkdir()
    answer = run_command(
        answers["as it stands"],
        tmp_path,
        MIRROR=mirror,
        SETTINGS=f"--dry-run --runs-folder {tmp_path} --device cpu --batch-size 8 "
        "--train-px 32 --val-px 32 --val-resize-px 32",
    )
    assert answer.returncode == 0, answer.stderr
    assert "run resnet50: 8 training and 8 validation images in 2 classes" in answer.stdout
    assert f"mirror               {mirror}\n" in answer.stdout


def test_its_command_ends_as_the_trainer_does(answers: dict[str, Any], tmp_path: Path) -> None:
    """SkyPilot has to see the trainer's exit code; and no CPU takes the place of a GPU."""
    answer = run_command(answers["as it stands"], tmp_path)
    assert answer.returncode == 2
    assert "device is cuda, but PyTorch sees no GPU" in answer.stderr


@pytest.mark.parametrize(
    ("codes", "end", "starts"),
    [
        *(([0], 0, 1), ([75], 75, 1), ([77, 77, 0], 0, 3), ([77, 75], 75, 2)),
        *(([77] * 300, 77, 181), ([78, 0], 0, 2), ([78] * 300, 78, 31)),
    ],
)
def test_a_mirror_is_completed_and_asked_for_before_the_machine_goes(
    codes: list[int], end: int, starts: int, answers: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").write_text(STAND_IN)
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    answer = subprocess.run(
        ["bash", "-c", answers["as it stands"]["run"]],
        cwd=tmp_path,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (end, "")
    assert answer.stdout.count("started") == starts
    assert answer.stdout.count("paused 120 s") == starts - 1
