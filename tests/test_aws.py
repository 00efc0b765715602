"""From an empty account to a training and back: the real AWS CLI, an emulator, real machines.

The machines are those of aws_machine.py: systemd, sshd, loop devices, a metadata service.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from aws_emulator import Emulator, start_emulator
from aws_machine import Machines
from conftest import REPOSITORY, make_images
from test_trainer import as_options, outcome, train

TRAINING = {
    "recipe": "quickstart",
    "name": "run",
    "train_px": 32,
    "val_px": 32,
    "val_resize_px": 32,
    "epochs": 10,
    "batch_size": 4,
    "workers": 1,
    "precision": "fp32",
    "device": "cpu",
    "checkpoint_minutes": 0.02,
}
READING = ("Describe", "Get", "List", "Head")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key that logs in."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@pytest.fixture
def emulator(tmp_path: Path) -> Iterator[Emulator]:
    """An empty account."""
    with start_emulator(tmp_path) as one:
        one.environment["AWS_MAX_ATTEMPTS"] = "1"  # the CLI would try again after some errors
        yield one


@pytest.fixture
def machines(emulator: Emulator, tmp_path: Path, key: Path) -> Iterator[Machines]:
    """What runs in the account; Imagenette, of three tiny classes, is downloaded already."""
    if os.geteuid() != 0:
        pytest.skip("machines need root, for namespaces and loop devices")
    make_images(tmp_path / "data" / "imagenette", px=40)
    with Machines(emulator, tmp_path / "machines", key, tmp_path / "data") as one:
        one.environment["RESNET50_DATA_SET"] = "imagenette"
        one.environment["RESNET50_TRAINER_OPTIONS"] = shlex.join(as_options(TRAINING))
        yield one


def cloud(
    environment: dict[str, str], *arguments: str, path: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run cloud.py; programs in `path` come before all others."""
    if path:
        environment = {**environment, "PATH": f"{path}{os.pathsep}{environment['PATH']}"}
    return subprocess.run(
        [sys.executable, REPOSITORY / "scripts" / "aws" / "cloud.py", *arguments],
        env=environment, capture_output=True, text=True, timeout=240, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def changes(emulator: Emulator) -> list[str]:
    """The actions so far that change something."""
    return [call["action"] for call in emulator.calls() if not call["action"].startswith(READING)]


def account(emulator: Emulator) -> dict[str, list[str]]:
    """What the account has beside what an empty one has, each thing with its state."""
    session = boto3.Session("test", "test", region_name="us-east-1")
    url = emulator.environment["AWS_ENDPOINT_URL"]
    ec2, iam = (session.client(name, endpoint_url=url) for name in ("ec2", "iam"))
    groups = ec2.describe_instances()["Reservations"]
    instances = [one for group in groups for one in group["Instances"]]
    requests = ec2.describe_spot_instance_requests()["SpotInstanceRequests"]
    found = {
        "instances": [one["State"]["Name"] for one in instances],
        "spot requests": [one["State"] for one in requests],
        "volumes": [
            f"{one['Size']} GB, {one['State']}" for one in ec2.describe_volumes()["Volumes"]
        ],
        "snapshots": [
            one["State"] for one in ec2.describe_snapshots(OwnerIds=["self"])["Snapshots"]
        ],
        "groups": [
            json.dumps([[block["CidrIp"] for block in rule["IpRanges"]] for rule in rules])
            for one in ec2.describe_security_groups()["SecurityGroups"]
            if one["GroupName"] != "default" and (rules := one["IpPermissions"]) is not None
        ],
        "keys": [one["KeyName"] for one in ec2.describe_key_pairs()["KeyPairs"]],
        "profiles": [
            one["InstanceProfileName"] for one in iam.list_instance_profiles()["InstanceProfiles"]
        ],
        "roles": [one["RoleName"] for one in iam.list_roles()["Roles"]],
    }
    gone = {"terminated", "cancelled", "closed"}
    kept = {
        kind: sorted(one for one in states if one not in gone) for kind, states in found.items()
    }
    return {kind: states for kind, states in kept.items() if states}


def commands_of_readme() -> list[str]:
    """The lines of README's AWS section that a user types."""
    section = (REPOSITORY / "README.md").read_text().split("\n## On AWS\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```", section, re.M | re.S)
    lines = [line.partition("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if "cloud.py" in line]


def typed(line: str, environment: dict[str, str], answer: str = "y\n") -> str:
    """Type a command in a terminal, answer what it asks, and return what it said."""
    terminal, other_end = os.openpty()
    os.write(terminal, answer.encode())
    done = subprocess.run(
        ["bash", "-c", line], cwd=REPOSITORY, env=environment, stdin=other_end,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    os.close(terminal)
    os.close(other_end)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# ------------------------------------------------------------------------------ the whole story


def test_from_nothing_to_training_and_back_as_the_readme_says(
    machines: Machines, tmp_path: Path
) -> None:
    emulator, environment = machines.emulator, machines.environment
    undisturbed = {**TRAINING, "runs_folder": tmp_path / "runs"}
    for part in ("train", "val"):
        undisturbed[f"{part}_folder_name"] = tmp_path / "data" / "imagenette" / part
    train(undisturbed)
    lines = {line.split("cloud.py ")[1].split()[0]: line for line in commands_of_readme()}
    assert list(lines) == ["prices", "prepare", "launch", "watch", "fetch", "stop", "tear-down"]

    def again_changes_nothing(line: str) -> str:
        emulator.clear()
        said = typed(line, environment)
        assert changes(emulator) == []
        return said

    assert "us-east-1a" in typed(lines["prices"], environment)
    said = typed(lines["prepare"], environment)
    assert "48 pictures in 3 classes" in said and "Go on? [y/N]" in said
    assert account(emulator) == {
        "snapshots": ["completed"],
        "groups": ['[["203.0.113.7/32"]]'],
        "keys": ["resnet50-imagenet"],
    }
    again_changes_nothing(lines["prepare"])

    emulator.clear()
    typed(lines["launch"], environment)
    (call,) = emulator.calls("RunInstances")
    assert '"HttpTokens": "required"' in json.dumps(call["params"]) or "required" in str(call)
    assert account(emulator)["spot requests"] == ["active"]
    (instance_id,) = [one for one in machines.running if not machines.running[one].poll()]
    assert "training runs" in again_changes_nothing(lines["launch"])
    log = "cat /mnt/runs/run/train.log"
    wait_for(lambda: "epoch 1/" in machines.run(instance_id, log).stdout)

    # EC2 gives notice, and takes the instance.
    machines.notice(instance_id, seconds=120)
    wait_for(lambda: "with 1" in machines.run(instance_id, f"{log} | grep spare").stdout)
    wait_for(
        lambda: (
            "ExecMainStatus=75"
            in machines.run(instance_id, "systemctl show resnet50-trainer -p ExecMainStatus").stdout
        )
    )
    emulator.interrupt(instance_id)
    wait_for(lambda: instance_id not in machines.running)
    assert "EC2 has taken it" in again_changes_nothing(lines["launch"])
    assert "instance-stopped" in again_changes_nothing(lines["watch"])

    # It comes back by itself, and training goes on to the same end.
    emulator.resume(instance_id)
    wait_for(lambda: "finished in" in machines.run(instance_id, log).stdout, 120)
    assert "resumed after" in machines.run(instance_id, log).stdout
    timers = "systemctl list-timers --all --no-pager"
    wait_for(lambda: "resnet50-poweroff" in machines.run(instance_id, timers).stdout)
    said = again_changes_nothing(lines["watch"])
    assert "finished in" in said and "1 interruption" in said

    here = tmp_path / "fetched"
    fetch = f"{lines['fetch']} --to {here} --checkpoints"
    again_changes_nothing(fetch)
    assert outcome({**undisturbed, "runs_folder": here}) == outcome(undisturbed)
    typed(lines["stop"], environment)
    assert account(emulator)["spot requests"] == ["disabled"]
    again_changes_nothing(lines["stop"])
    again_changes_nothing(lines["watch"])
    emulator.clear()
    typed(fetch, environment)  # starts the instance for it, and stops it again
    assert changes(emulator) == ["StartInstances", "StopInstances"]

    assert typed(lines["tear-down"], environment).endswith("all gone\n")
    assert account(emulator) == {}
    again_changes_nothing(lines["tear-down"])


KILL = """#!/bin/bash
{aws} "$@"
status=$?
case $2 in describe-* | get-* | list-* | head-* | wait) ;; *) kill -KILL $PPID ;; esac
exit $status
"""


def until_it_ends(environment: dict[str, str], command: str, killing: Path, *options: str) -> int:
    """Run a command, killed after each call that changes something, until it ends; the kills."""
    for kills in range(40):
        done = cloud(environment, command, "--yes", *options, path=killing)
        if done.returncode != -9:
            assert done.returncode == 0, done.stdout + done.stderr
            return kills
    raise AssertionError(f"{command} does not end: {done.stdout}")


@pytest.fixture
def killing(emulator: Emulator, tmp_path: Path) -> Path:
    """A folder with an `aws` that kills who calls it, once the change has been made."""
    folder = tmp_path / "killing"
    folder.mkdir()
    (folder / "aws").write_text(KILL.format(aws=emulator.aws))
    (folder / "aws").chmod(0o755)
    return folder


def test_killed_after_each_change_every_command_ends_in_the_same_state(
    machines: Machines, killing: Path
) -> None:
    emulator, environment = machines.emulator, machines.environment
    assert until_it_ends(environment, "prepare", killing) == 9
    assert account(emulator) == {
        "snapshots": ["completed"],
        "groups": ['[["203.0.113.7/32"]]'],
        "keys": ["resnet50-imagenet"],
    }
    assert until_it_ends(environment, "launch", killing) == 3
    launched = account(emulator)
    assert launched["instances"] == ["running"] and launched["spot requests"] == ["active"]
    assert launched["volumes"] == ["20 GB, in-use", "60 GB, in-use", "95 GB, in-use"]
    assert until_it_ends(environment, "stop", killing) == 1
    assert account(emulator)["instances"] == ["stopped"]
    assert until_it_ends(environment, "launch", killing) == 1
    assert until_it_ends(environment, "tear-down", killing) == 6
    assert account(emulator) == {}
