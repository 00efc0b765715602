"""From an empty account to a training and back: the real AWS CLI, an emulator, real machines.

The machines are those of aws_machine.py: systemd, sshd, loop devices, a metadata service.
"""

import base64
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import boto3
import pytest
from aws_emulator import Emulator
from aws_machine import Machines
from conftest import REPOSITORY, make_images
from test_trainer import as_options, outcome, train

from utils import UserError

TRAINING = {
    "recipe": "quickstart",
    "name": "run",
    "train_px": 32,
    "val_px": 32,
    "val_resize_px": 32,
    "epochs": 8,
    "batch_size": 4,
    "workers": 1,
    "precision": "fp32",
    "device": "cpu",
}
IAM_NAME = "resnet50-imagenet-us-east-1"  # of the profile for the mirror, and of its role
READING = ("Describe", "Get", "List", "Head")


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """A key that logs in."""
    path = tmp_path / "key"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True)
    return path


@pytest.fixture
def emulator(quick_aws_account: Emulator) -> Emulator:
    return quick_aws_account


@pytest.fixture
def machines(emulator: Emulator, tmp_path: Path, key: Path) -> Iterator[Machines]:
    """What runs in the account; Imagenette, of three tiny classes, is downloaded already."""
    if os.geteuid() != 0:
        pytest.skip("machines need root, for namespaces and loop devices")
    make_images(tmp_path / "data" / "imagenette", px=40)
    names = ("n01440764", "n02102040", "n02979186")  # three of its own classes
    for folder in sorted((tmp_path / "data/imagenette").glob("*/class_*")):
        folder.rename(folder.with_name(names[int(folder.name[-1])]))
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


@pytest.mark.timeout(900)
def test_from_nothing_to_training_and_back_as_the_readme_says(
    machines: Machines, tmp_path: Path
) -> None:
    emulator, quick = machines.emulator, machines.environment
    # What is done for the first time is done by processes of the CLI, one a call.
    environment = {**quick, "PATH": f"{emulator.aws.parent}{os.pathsep}{quick['PATH']}"}
    undisturbed = {**TRAINING, "runs_folder": tmp_path / "runs"}
    for part in ("train", "val"):
        undisturbed[f"{part}_folder_name"] = tmp_path / "data" / "imagenette" / part
    train(undisturbed)
    lines = {line.split("cloud.py ")[1].split()[0]: line for line in commands_of_readme()}
    assert list(lines) == ["prices", "prepare", "launch", "watch", "fetch", "stop", "tear-down"]

    def again_changes_nothing(line: str) -> str:
        emulator.clear()
        said = typed(line, quick)
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
    (call,) = emulator.calls("RunInstances")
    assert "resnet50-poweroff" in base64.b64decode(call["params"]["UserData"]).decode()
    again_changes_nothing(lines["prepare"])

    emulator.clear()
    typed(lines["launch"], environment)
    (call,) = emulator.calls("RunInstances")
    for name, value in {
        "MetadataOptions.HttpTokens": "required",
        "InstanceMarketOptions.SpotOptions.SpotInstanceType": "persistent",
        "InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior": "stop",
        "BlockDeviceMapping.2.Ebs.VolumeInitializationRate": "300",
        "BlockDeviceMapping.2.Ebs.DeleteOnTermination": "true",
    }.items():
        assert call["params"][name] == value
    assert "resnet50-poweroff" in base64.b64decode(call["params"]["UserData"]).decode()
    assert not [name for name in call["params"] if "MaxPrice" in name]
    assert account(emulator)["spot requests"] == ["active"]
    (instance_id,) = [one for one in machines.running if not machines.running[one].poll()]
    # Had nobody set it up, the machine would have stopped.
    first_start = (machines.folder_of(instance_id) / "user_data.log").read_text()
    assert re.search(r"(2h|1h 59min) left .*resnet50-poweroff.timer", first_start)
    timers = "systemctl list-timers --all --no-pager"
    assert "resnet50-poweroff" not in machines.run(instance_id, timers).stdout
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
    # From the local disk, which was empty again.
    settings = machines.run(instance_id, "cat /mnt/runs/run/config.json").stdout
    assert '"train_folder_name": "/mnt/nvme/imagenette.store"' in settings
    wait_for(lambda: "resnet50-poweroff" in machines.run(instance_id, timers).stdout)
    said = again_changes_nothing(lines["watch"])
    assert "finished in" in said
    assert re.search(r"interruptions *\| *1: ", said), said

    here = tmp_path / "fetched"
    fetch = f"{lines['fetch']} --checkpoints --to {here}"
    again_changes_nothing(fetch)
    assert "resnet50-poweroff" in machines.run(instance_id, timers).stdout  # it still stops
    assert outcome({**undisturbed, "runs_folder": here}) == outcome(undisturbed)
    # Trained on here, it is not fetched over.
    train({**undisturbed, "runs_folder": here, "extra_epochs": 1})
    trained = (here / "run" / "metrics.jsonl").read_bytes()
    assert "was trained on here since" in refused(environment, "fetch", "--to", str(here))
    assert (here / "run" / "metrics.jsonl").read_bytes() == trained
    typed(lines["stop"], environment)
    assert account(emulator)["spot requests"] == ["disabled"]
    again_changes_nothing(lines["stop"])
    again_changes_nothing(lines["watch"])
    emulator.clear()
    typed(f"{fetch}-2", environment)  # starts the instance for it, and stops it again
    assert changes(emulator) == ["StartInstances", "StopInstances"]

    assert typed(lines["tear-down"], environment).endswith("all gone\n")
    assert account(emulator) == {}
    again_changes_nothing(lines["tear-down"])


KILL = """#!/bin/bash
{aws} "$@"
status=$?
case $status-$2 in
[1-9]* | 0-describe-* | 0-get-* | 0-list-* | 0-head-* | 0-wait) ;;
*) kill -KILL $PPID ;;
esac
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


def start_launch(
    environment: dict[str, str], output: Path, times: int = 1
) -> subprocess.Popen[bytes]:
    """Give `launch`, and wait until it has said `times` that its machine looks whether it can
    train: in the middle of the bootstrap."""
    with open(output, "w") as said:
        launching = subprocess.Popen(
            [sys.executable, REPOSITORY / "scripts" / "aws" / "cloud.py", "launch", "--yes"],
            env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said,
        )  # fmt: skip
    wait_for(lambda: output.read_text().count("looking whether") == times)
    return launching


def break_off_launch(environment: dict[str, str], output: Path) -> None:
    launching = start_launch(environment, output)
    launching.kill()
    launching.wait()


@pytest.fixture
def killing(quick_aws_folder: Path, tmp_path: Path) -> Path:
    """A folder with an `aws` that kills who calls it, once the change has been made."""
    folder = tmp_path / "killing"
    folder.mkdir()
    (folder / "aws").write_text(KILL.format(aws=quick_aws_folder / "aws"))
    (folder / "aws").chmod(0o755)
    return folder


@pytest.mark.timeout(900)
def test_killed_after_each_change_every_command_ends_in_the_same_state(
    machines: Machines, killing: Path, tmp_path: Path
) -> None:
    emulator, environment = machines.emulator, machines.environment
    assert until_it_ends(environment, "prepare", killing) == 9
    assert account(emulator) == {
        "snapshots": ["completed"],
        "groups": ['[["203.0.113.7/32"]]'],
        "keys": ["resnet50-imagenet"],
    }
    for _ in range(3):  # after the instance, the volume and its attachment
        assert cloud(environment, "launch", "--yes", path=killing).returncode == -9
    # Where nobody has set it up it stops by itself, after each of its starts.
    (instance_id,) = [one for one in machines.running if not machines.running[one].poll()]
    emulator.interrupt(instance_id)
    wait_for(lambda: instance_id not in machines.running)
    emulator.resume(instance_id)
    wait_for(lambda: instance_id in machines.running)
    timers = "systemctl list-timers --all --no-pager"
    wait_for(lambda: "resnet50-poweroff" in machines.run(instance_id, timers).stdout)
    # EC2 takes the machine while it is set up, and gives it back: it trains, with nobody there.
    break_off_launch(environment, tmp_path / "launching")
    emulator.interrupt(instance_id)
    wait_for(lambda: instance_id not in machines.running)
    emulator.resume(instance_id)
    wait_for(lambda: instance_id in machines.running)
    log = "cat /mnt/runs/run/train.log"
    wait_for(lambda: "epoch 1/" in machines.run(instance_id, log).stdout)
    # From here on its trainer sees to that. A bootstrap anew leaves the training alone.
    assert "resnet50-poweroff" not in machines.run(instance_id, timers).stdout
    here = machines.folder_of(instance_id)
    bootstrap = f"cd {here}/home/resnet50 && PATH={here}/bin:$PATH "
    bootstrap += "bash scripts/aws/instance/bootstrap.sh; echo $?"
    said = machines.run(instance_id, bootstrap).stdout
    assert said.endswith("training runs here already\n0\n"), said
    assert "resnet50-poweroff" not in machines.run(instance_id, timers).stdout
    assert until_it_ends(environment, "launch", killing) == 0
    launched = account(emulator)
    assert launched["instances"] == ["running"] and launched["spot requests"] == ["active"]
    assert launched["volumes"] == ["20 GB, in-use", "60 GB, in-use", "95 GB, in-use"]
    assert until_it_ends(environment, "stop", killing) == 1
    assert account(emulator)["instances"] == ["stopped"]
    assert until_it_ends(environment, "launch", killing) == 1

    # Settings that its run cannot take on, broken off while the machine is set up, then those that
    # it can, in whose bootstrap the connection breaks. Started with the machine, the trainer had
    # the settings that it had before.
    wrong = f"{environment['RESNET50_TRAINER_OPTIONS']} --max-lr 0.5"
    break_off_launch({**environment, "RESNET50_TRAINER_OPTIONS": wrong}, tmp_path / "wrong")
    options = f"{environment['RESNET50_TRAINER_OPTIONS']} --val-batch-size 3"
    output = tmp_path / "right"
    launching = start_launch({**environment, "RESNET50_TRAINER_OPTIONS": options}, output, times=2)
    machines.run(instance_id, "pkill -KILL -f '[s]shd.*: root@notty'")
    assert launching.wait(120) == 0, output.read_text()
    said = output.read_text()
    assert "bootstrap of another start runs there: waiting for its end" in said
    assert said.count("the connection broke; it goes on there") == 1
    there = machines.folder_of(instance_id) / "home" / "resnet50"
    assert "--val-batch-size 3" in (there / "aws-instance.env").read_text()
    show = "systemctl is-active resnet50-poweroff.timer"
    # A machine that cannot start the trainer does not wait for ever.
    text = (there / "aws-instance.env").read_text()
    (there / "aws-instance.env").write_text(text.replace("TRAINER_USER=root", "TRAINER_USER=none"))
    restart = f"bash {there}/scripts/aws/instance/poweroff.sh never; {show}"
    assert machines.run(instance_id, restart).stdout == "inactive\n"
    machines.run(instance_id, "systemctl restart resnet50-trainer")
    assert machines.run(instance_id, show).stdout == "active\n"
    assert until_it_ends(environment, "tear-down", killing) == 6
    assert account(emulator) == {}


def test_a_dry_run_changes_nothing(machines: Machines) -> None:
    emulator, environment = machines.emulator, machines.environment
    commands = ("prices", "prepare", "launch", "watch", "fetch", "stop", "tear-down")

    def dry_runs() -> list[str]:
        emulator.clear()
        before = account(emulator)
        said = [cloud(environment, command, "--dry-run").stdout for command in commands]
        assert changes(emulator) == [] and account(emulator) == before
        return said

    said = dry_runs()
    shown = [line.split()[3] for line in said[1].splitlines() if line.startswith("$ aws ec2 ")]
    assert shown == [
        "create-security-group",
        "authorize-security-group-ingress",
        "import-key-pair",
        "run-instances",
        "create-volume",
        "attach-volume",
        "create-snapshot",
        "terminate-instances",
        "delete-volume",
    ]
    assert all(one.endswith("dry run: nothing was changed\n") for one in (said[0], said[1]))
    # What it shows can be typed: with the ids that it cannot know, all of it is a command.
    snapshot(emulator)
    launched = dry_runs()[2]
    assert re.findall(r"^\$ aws ec2 ([a-z-]+)", launched, re.M)[-3:] == [
        "run-instances",
        "create-volume",
        "attach-volume",
    ]
    assert '"VolumeInitializationRate": 300' in launched
    assert '"InstanceInterruptionBehavior": "stop"' in launched


# ------------------------------------------------------------------------------ what goes wrong


def ec2_of(emulator: Emulator) -> Any:
    """EC2 in the account, without these commands."""
    session = boto3.Session("test", "test", region_name="us-east-1")
    return session.client("ec2", endpoint_url=emulator.environment["AWS_ENDPOINT_URL"])


def tagged(kind: str, project: str = "resnet50-imagenet", **tags: str) -> list[dict[str, Any]]:
    """The project's tags, for what is made by hand."""
    pairs = {"project": project, **tags}
    listed = [{"Key": f"resnet50-{key}", "Value": value} for key, value in pairs.items()]
    return [{"ResourceType": kind, "Tags": listed}]


def snapshot(
    emulator: Emulator,
    data_set: str = "imagenette",
    project: str = "resnet50-imagenet",
    complete: bool = True,
) -> str:
    """What prepare leaves; its id."""
    ec2 = ec2_of(emulator)
    volume = ec2.create_volume(AvailabilityZone="us-east-1b", Size=60)["VolumeId"]
    made = ec2.create_snapshot(
        VolumeId=volume, TagSpecifications=tagged("snapshot", project, data=data_set)
    )
    if complete:
        ec2.get_waiter("snapshot_completed").wait(
            SnapshotIds=[made["SnapshotId"]], WaiterConfig={"Delay": 1}
        )
    ec2.delete_volume(VolumeId=volume)
    return made["SnapshotId"]


def rented(emulator: Emulator, environment: dict[str, str], command: str = "launch") -> str:
    """Rent an instance by a command that ends before its volume is there; the instance's id."""
    emulator.fail("CreateVolume", "VolumeLimitExceeded", match="gp3")
    assert "VolumeLimitExceeded" in refused(environment, command, "--yes")
    groups = ec2_of(emulator).describe_instances()["Reservations"]
    (instance_id,) = (
        one["InstanceId"]
        for group in groups
        for one in group["Instances"]
        if one["State"]["Name"] != "terminated"
    )
    return instance_id


def an_aws(folder: Path, script: str) -> Path:
    """A folder with an `aws` of bash's, in which $aws is the one that there is."""
    folder.mkdir()
    (folder / "aws").write_text(f"#!/bin/bash\naws=$(type -ap aws | sed -n 2p)\n{script}\n")
    (folder / "aws").chmod(0o755)
    return folder


@pytest.fixture
def environment(emulator: Emulator, key: Path) -> dict[str, str]:
    """Of commands that do not come as far as a machine."""
    return {
        **emulator.environment,
        "RESNET50_SSH_KEY": str(key),
        "RESNET50_SSH_FROM": "203.0.113.7",
        "RESNET50_DATA_SET": "imagenette",
    }


def refused(environment: dict[str, str], *arguments: str) -> str:
    """The one line with which a command ends."""
    done = cloud(environment, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_what_is_missing_is_said_with_what_to_do(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    assert "scripts/aws/cloud.py --help lists" in refused(environment, "launch", "--marketz")
    without = {k: v for k, v in environment.items() if not k.startswith("AWS_ACCESS")}
    assert "no AWS credentials" in refused(without, "prices")
    assert "aws configure" in refused(without, "prices")
    nowhere = {
        k: v for k, v in environment.items() if k not in ("AWS_REGION", "AWS_DEFAULT_REGION")
    }
    assert "set region in aws.env" in refused(nowhere, "prices")
    unreachable = {**environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}
    assert "no network" in refused(unreachable, "launch", "--yes")
    assert "run prepare first" in refused(environment, "launch", "--yes")
    assert "no training instance" in refused(environment, "fetch")
    assert cloud(environment, "watch").stdout == "no training instance: launch makes one\n"
    assert cloud(environment, "stop").stdout == "no training instance runs\n"
    assert "nobody is there to ask" in refused(environment, "prepare")
    kaggle = {**environment, "RESNET50_DATA_SET": "imagenet", "HOME": str(tmp_path)}
    assert "~/.kaggle/access_token" in refused(kaggle, "prepare", "--yes")
    assert "must be 0 or more" in refused(environment, "launch", "--yes", "--budget-usd", "-1")
    quoted = refused(environment, "launch", "--yes", "--trainer-options=--name $(id)")
    assert "without quotes" in quoted
    half = {**environment, "RESNET50_SSH_OPTIONS": '-o ProxyCommand="ssh bastion'}
    assert "no closing quotation" in refused(half, "launch")
    assert "the AWS CLI is not installed" in refused({**environment, "PATH": "/nowhere"}, "prices")
    assert changes(emulator) == []


def test_another_preparation_is_left_alone(emulator: Emulator, environment: dict[str, str]) -> None:
    emulator.fail("CreateVolume", "VolumeLimitExceeded")
    assert "VolumeLimitExceeded" in refused(environment, "prepare", "--yes")
    before = account(emulator)
    assert before["instances"] == ["running"]
    assert "prepares imagenette" in refused(environment, "prepare", "--data-set", "imagenet")
    snapshot(emulator, "imagenet")  # which is there already
    says = refused(environment, "prepare", "--data-set", "imagenet")
    assert "prepares imagenette" in says and "terminate-instances" in says
    assert account(emulator) == {**before, "snapshots": ["completed"]}
    # Once it has stopped, its start costs, and is asked for.
    (instance_id,) = re.findall(r"\bi-[0-9a-f]+", says)[:1]
    emulator.shut_down(instance_id)
    emulator.clear()
    assert "nobody is there to ask" in refused(environment, "prepare")
    assert changes(emulator) == []


def test_nothing_is_started_before_what_may_fail(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.fail("CreateVolume", "VolumeLimitExceeded")
    refused(environment, "launch", "--yes")
    assert account(emulator)["instances"] == ["running"]
    assert cloud(environment, "stop").stdout.endswith("launch goes on\n")
    emulator.fail("AuthorizeSecurityGroupIngress", "RequestLimitExceeded")
    says = refused(environment, "launch", "--yes", "--ssh-from", "203.0.113.8")
    assert "RequestLimitExceeded" in says
    assert account(emulator)["instances"] == ["stopped"]


def test_stop_tells_that_ec2_takes_the_instance_just_now(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.fail("CreateVolume", "VolumeLimitExceeded")
    (instance_id,) = set(re.findall(r"\bi-[0-9a-f]+", cloud(environment, "launch", "--yes").stdout))
    emulator.set(instance_describes=10)
    emulator.interrupt(instance_id)
    emulator.clear()
    assert "but EC2 has taken one" in cloud(environment, "stop").stdout
    assert changes(emulator) == []


def test_a_volume_too_small_for_the_data_is_told(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    emulator.fail("AttachVolume", "RequestLimitExceeded")
    refused(environment, "prepare", "--yes", "--data-gb", "10")
    says = refused(environment, "prepare", "--yes")
    assert "has 10 GB, less than data_gb, 60" in says and "delete-volume" in says


def test_what_aws_refuses_is_said_with_what_to_do(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    for action, code, advice in [
        ("CreateSecurityGroup", "VPCIdNotSpecified", "create-default-vpc"),
        ("RunInstances", "MaxSpotInstanceCountExceeded", "L-3819A6DF"),
        ("RunInstances", "InsufficientInstanceCapacity", "another instance_type"),
        ("RunInstances", "UnauthorizedOperation", "AmazonEC2FullAccess"),
        ("DescribeInstances", "ExpiredToken", "aws sso login"),
        ("DescribeInstances", "AuthFailure", "aws configure"),
        ("GetParameter", "ParameterNotFound", "gpu_ami"),
    ]:
        emulator.fail(action, code, "AWS's own words", times=0)
        said = refused(environment, "launch", "--yes")
        assert "AWS's own words" in said and code in said and advice in said
        emulator.heal()
    # Nothing is left behind that the next command would not find.
    assert set(account(emulator)) == {"snapshots", "groups", "keys"}


def test_a_zone_without_capacity_is_passed_over(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    zones = sorted(spot_zones(emulator))
    cheapest = min(zones)[1]
    emulator.fail("RunInstances", "InsufficientInstanceCapacity", times=0, zone=cheapest)
    emulator.fail("CreateVolume", "VolumeLimitExceeded", "too many")
    assert "VolumeLimitExceeded" in refused(environment, "launch", "--yes")
    asked = [call["params"] for call in emulator.calls("RunInstances")]
    assert [zones[0][1], zones[1][1]] == [
        next(zone for _, zone in zones if zone in json.dumps(params)) for params in asked
    ]


def spot_zones(emulator: Emulator) -> list[tuple[float, str]]:
    """What a g5.xlarge costs in each zone."""
    session = boto3.Session("test", "test", region_name="us-east-1")
    ec2 = session.client("ec2", endpoint_url=emulator.environment["AWS_ENDPOINT_URL"])
    history = ec2.describe_spot_price_history(
        InstanceTypes=["g5.xlarge"], ProductDescriptions=["Linux/UNIX"], StartTime=time.time()
    )["SpotPriceHistory"]
    return [(float(row["SpotPrice"]), row["AvailabilityZone"]) for row in history]


def test_the_volume_with_the_runs_decides_on_the_zone(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    session = boto3.Session("test", "test", region_name="us-east-1")
    ec2 = session.client("ec2", endpoint_url=environment["AWS_ENDPOINT_URL"])
    tags = {"resnet50-project": "resnet50-imagenet", "resnet50-role": "runs"}
    dearest = max(spot_zones(emulator))[1]
    ec2.create_volume(
        AvailabilityZone=dearest,
        Size=20,
        TagSpecifications=[
            {
                "ResourceType": "volume",
                "Tags": [{"Key": key, "Value": value} for key, value in tags.items()],
            }
        ],
    )
    assert f"AvailabilityZone={dearest}" in cloud(environment, "launch", "--dry-run").stdout
    other = min(spot_zones(emulator))[1]
    said = refused(environment, "launch", "--dry-run", "--zone", other)
    assert f"lies in {dearest}" in said and f"zone={dearest}" in said


def test_what_a_spot_request_brings_by_itself_is_the_projects(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    """Terminated while its request lives, an instance has a successor, which bears no tags."""
    snapshot(emulator)
    session = boto3.Session("test", "test", region_name="us-east-1")
    ec2 = session.client("ec2", endpoint_url=environment["AWS_ENDPOINT_URL"])

    def running() -> list[dict]:
        running = {"Name": "instance-state-name", "Values": ["running"]}
        groups = ec2.describe_instances(Filters=[running])["Reservations"]
        return [one for group in groups for one in group["Instances"]]

    emulator.fail("CreateVolume", "VolumeLimitExceeded", "too many", times=0)
    for _ in range(2):  # the second goes on with what the first has rented
        assert "VolumeLimitExceeded" in refused(environment, "launch", "--yes")
    (first,) = running()
    said = refused(environment, "launch", "--yes", "--data-set", "imagenet-100k")
    ec2.stop_instances(InstanceIds=[first["InstanceId"]])
    assert "nobody is there to ask" in refused(environment, "launch")  # what starting it will cost
    assert running() == [] and emulator.calls("StartInstances") == []
    ec2.start_instances(InstanceIds=[first["InstanceId"]])
    assert f"data_set imagenette ({first['InstanceId']}), not data_set imagenet-100k: to" in said
    ec2.terminate_instances(InstanceIds=[first["InstanceId"]])
    (successor,) = running()
    assert "Tags" not in successor
    said = cloud(environment, "launch", "--yes").stdout
    assert f"there is an instance already: {successor['InstanceId']}" in said
    # What it is cannot be changed, and is not passed over in silence.
    for option, asked, has in (
        ("--instance-type", "g5.2xlarge", "g5.xlarge"),
        ("--market", "on-demand", "spot"),
    ):
        said = refused(environment, "launch", "--yes", option, asked)
        name = option.removeprefix("--").replace("-", "_")
        assert f"an instance with {name} {has} (" in said and f"not {name} {asked}: to" in said
        assert "tear-down --keep-snapshot --keep-runs, then launch" in said
    here = successor["Placement"]["AvailabilityZone"]
    other = next(zone for _, zone in spot_zones(emulator) if zone != here)
    said = refused(environment, "launch", "--yes", "--zone", other)
    assert f"an instance with zone {here} (" in said and "fetch the runs, tear-down" in said
    assert len(emulator.calls("RunInstances")) == 1

    # While EC2 has no capacity for it, no second one is rented beside it.
    emulator.set(has_capacity=0)
    ec2.terminate_instances(InstanceIds=[successor["InstanceId"]])
    said = refused(environment, "launch", "--yes")
    assert "its spot request is not (open: capacity-not-available)" in said
    assert "tear-down --keep-snapshot --keep-runs" in said
    said = cloud(environment, "watch").stdout
    assert "its spot request will bring one" in said and "capacity-not-available" in said
    assert "its spot request will bring one" in cloud(environment, "stop").stdout
    last = emulator.resume(successor["InstanceId"])
    # What is going already is waited for, since its volumes stay in use till then.
    emulator.set(instance_describes=4)
    request = ec2.describe_spot_instance_requests()["SpotInstanceRequests"][0]
    ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=[request["SpotInstanceRequestId"]])
    ec2.terminate_instances(InstanceIds=[last])
    done = cloud(environment, "tear-down", "--yes")
    said = done.stdout
    assert done.returncode == 0, done.stderr
    assert f"instance {last}, g5.xlarge" in said and ", shutting-down" in said
    assert said.endswith("all gone\n")
    assert account(emulator) == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_is_started_to_fetch_is_stopped_if_that_is_broken_off(
    number: signal.Signals, emulator: Emulator, environment: dict[str, str]
) -> None:
    """As soon as EC2 has been asked to start it; SIGHUP comes with a terminal that is closed."""
    snapshot(emulator)
    emulator.fail("CreateVolume", "VolumeLimitExceeded", "too many", times=0)
    refused(environment, "launch", "--yes")
    session = boto3.Session("test", "test", region_name="us-east-1")
    ec2 = session.client("ec2", endpoint_url=environment["AWS_ENDPOINT_URL"])
    (reservation,) = ec2.describe_instances()["Reservations"]
    ec2.stop_instances(InstanceIds=[reservation["Instances"][0]["InstanceId"]])
    emulator.clear()
    with subprocess.Popen(
        # Whoever runs the tests by nohup ignores SIGHUP, and so would this.
        [
            *("env", "--default-signal=HUP", sys.executable),
            *(REPOSITORY / "scripts" / "aws" / "cloud.py", "fetch", "--yes"),
        ],
        env={**environment, "RESNET50_SSH_OPTIONS": "-o ProxyCommand=false"},
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    ) as fetching:  # fmt: skip
        wait_for(lambda: emulator.calls("StartInstances"))
        fetching.send_signal(number)
        assert fetching.communicate(timeout=60)[1] == "error: interrupted\n"
    assert fetching.returncode == 75
    assert changes(emulator) == ["StartInstances", "StopInstances"]
    assert account(emulator)["instances"] == ["stopped"]


def test_a_role_for_the_mirror_is_made_and_torn_down(
    emulator: Emulator, environment: dict[str, str], killing: Path
) -> None:
    snapshot(emulator)
    mirrored = {**environment, "RESNET50_MIRROR": "s3://bucket/resnet50"}
    assert "404" in refused(mirrored, "launch", "--yes")
    session = boto3.Session("test", "test", region_name="us-east-1")
    session.client("s3", endpoint_url=environment["AWS_ENDPOINT_URL"]).create_bucket(
        Bucket="bucket"
    )
    emulator.fail("RunInstances", "MaxSpotInstanceCountExceeded", times=0)
    ends = []
    while not ends or ends[-1] == -9:
        ends.append(cloud(mirrored, "launch", "--yes", path=killing).returncode)
        assert len(ends) < 20
    assert ends.count(-9) >= 7  # role, policy, profile, role into profile, group, rule, key
    assert account(emulator)["roles"] == account(emulator)["profiles"] == [IAM_NAME]
    iam = session.client("iam", endpoint_url=environment["AWS_ENDPOINT_URL"])
    policy = iam.get_role_policy(RoleName=IAM_NAME, PolicyName="mirror")
    resources = [one["Resource"] for one in policy["PolicyDocument"]["Statement"]]
    assert resources == ["arn:aws:s3:::bucket", "arn:aws:s3:::bucket/resnet50/*"]
    # IAM has no regions: what another region's machine needs stays.
    assert "nothing in eu-west-1" in cloud(mirrored, "tear-down", "--region", "eu-west-1").stdout
    assert account(emulator)["roles"] == account(emulator)["profiles"] == [IAM_NAME]
    until_it_ends(environment, "tear-down", killing)
    assert account(emulator) == {}


def test_another_address_takes_the_place_of_the_one_that_could_log_in(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.fail("RunInstances", "MaxSpotInstanceCountExceeded", times=0)
    refused(environment, "launch", "--yes")
    refused(environment, "launch", "--yes", "--ssh-from", "203.0.113.8")
    assert account(emulator)["groups"] == ['[["203.0.113.8/32"]]']
    wide = refused(environment, "launch", "--yes", "--ssh-from", "0.0.0.0/0")
    assert "one address" in wide
    assert account(emulator)["groups"] == ['[["203.0.113.8/32"]]']


def test_only_port_22_is_open_and_to_one_address(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.fail("RunInstances", "MaxSpotInstanceCountExceeded", times=0)
    ec2 = ec2_of(emulator)

    def rules() -> list[tuple[object, ...]]:
        refused(environment, "launch", "--yes")
        names = [{"Name": "group-name", "Values": ["resnet50-imagenet"]}]
        (group,) = ec2.describe_security_groups(Filters=names)["SecurityGroups"]
        group_ids.append(group["GroupId"])
        return [
            (one["IpProtocol"], one["FromPort"], one["ToPort"], one["IpRanges"], one["Ipv6Ranges"])
            for one in group["IpPermissions"]
        ]

    group_ids: list[str] = []
    only_ssh = [("tcp", 22, 22, [{"CidrIp": "203.0.113.7/32"}], [])]
    assert rules() == only_ssh
    all_v4, all_v6 = {"IpRanges": [{"CidrIp": "0.0.0.0/0"}]}, {"Ipv6Ranges": [{"CidrIpv6": "::/0"}]}
    # By hand, say for a notebook; the AWS console's "all TCP"; the same port by IPv6.
    for first, last, who in ((8888, 8888, all_v4), (0, 65535, all_v4), (22, 22, all_v6)):
        by_hand = {"IpProtocol": "tcp", "FromPort": first, "ToPort": last, **who}
        ec2.authorize_security_group_ingress(GroupId=group_ids[0], IpPermissions=[by_hand])
        assert rules() == only_ssh


def test_a_key_is_made_once_and_one_of_another_computer_is_asked_for(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    snapshot(emulator)
    emulator.fail("RunInstances", "MaxSpotInstanceCountExceeded", times=0)
    here = {**environment, "RESNET50_SSH_KEY": "", "HOME": str(tmp_path)}
    key = tmp_path / ".ssh" / "resnet50-imagenet"
    cloud(here, "launch", "--dry-run")
    assert not key.exists()
    refused(here, "launch", "--yes")
    made = key.read_bytes()
    assert key.stat().st_mode & 0o777 == 0o600 and key.parent.stat().st_mode & 0o777 == 0o700
    refused(here, "launch", "--yes")
    assert key.read_bytes() == made and len(emulator.calls("ImportKeyPair")) == 1
    emulator.clear()
    there = {**here, "HOME": str(tmp_path / "other")}
    said = refused(there, "launch", "--yes")
    assert "is not on this computer: copy it" in said and "delete-key-pair" in said
    assert changes(emulator) == [] and not (tmp_path / "other").exists()


def test_a_mirror_that_is_set_later_or_changed_may_be_used(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    rented(emulator, environment)
    session = boto3.Session("test", "test", region_name="us-east-1")
    url = environment["AWS_ENDPOINT_URL"]
    session.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
    text = f'IAM Instance Profile "arn:aws:iam::1:instance-profile/{IAM_NAME}" has no associated '
    emulator.fail("AssociateIamInstanceProfile", "InvalidParameterValue", f"{text}IAM Roles")
    emulator.fail("CreateVolume", "VolumeLimitExceeded", match="gp3", times=0)
    for mirror in ("s3://bucket/a", "s3://bucket/a", "s3://bucket/b"):
        said = refused(environment, "launch", "--yes", "--mirror", mirror)
        assert "VolumeLimitExceeded" in said
        policy = session.client("iam", endpoint_url=url).get_role_policy(
            RoleName=IAM_NAME, PolicyName="mirror"
        )
        objects = policy["PolicyDocument"]["Statement"][1]["Resource"]
        assert objects == f"arn:aws:s3:::{mirror.removeprefix('s3://')}/*"
        # Refused once, then given; the same profile is not given again.
        assert len(emulator.calls("AssociateIamInstanceProfile")) == 2
    (association,) = ec2_of(emulator).describe_iam_instance_profile_associations()[
        "IamInstanceProfileAssociations"
    ]
    assert association["IamInstanceProfile"]["Arn"].endswith(IAM_NAME)


def test_tear_down_leaves_what_is_not_the_projects(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    session = boto3.Session("test", "test", region_name="us-east-1")
    ec2 = session.client("ec2", endpoint_url=environment["AWS_ENDPOINT_URL"])
    other = ec2.create_volume(AvailabilityZone="us-east-1a", Size=7)["VolumeId"]
    said = cloud(environment, "tear-down", "--yes", "--keep-snapshot").stdout
    assert said == "nothing in us-east-1 bears the tag resnet50-project=resnet50-imagenet\n"
    said = cloud(environment, "tear-down", "--yes").stdout
    assert "snapshot snap-" in said and other not in said
    assert account(emulator) == {"volumes": ["7 GB, available"]}


def test_another_projects_things_are_left_alone(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    other = {**environment, "RESNET50_PROJECT": "other"}
    snapshot(emulator, project="other")
    rented(emulator, other)
    before = account(emulator)
    assert before["spot requests"] == ["active"] and before["snapshots"] == ["completed"]
    said = cloud(environment, "tear-down", "--yes").stdout
    assert said == "nothing in us-east-1 bears the tag resnet50-project=resnet50-imagenet\n"
    assert "run prepare first" in refused(environment, "launch", "--yes")
    snapshot(emulator)
    emulator.fail("CreateVolume", "VolumeLimitExceeded", match="gp3")
    assert "VolumeLimitExceeded" in refused(environment, "launch", "--yes")
    both = account(emulator)
    assert {kind: 2 * len(states) for kind, states in before.items()} == {
        kind: len(states) for kind, states in both.items()
    }
    assert cloud(environment, "tear-down", "--yes").stdout.endswith("all gone\n")
    assert account(emulator) == before


def test_what_is_to_be_kept_is_not_torn_down(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.fail("AttachVolume", "RequestLimitExceeded")
    refused(environment, "launch", "--yes")
    lost = "The runs' checkpoints and results go too."
    keep = ("tear-down", "--keep-runs", "--keep-snapshot")
    assert lost in cloud(environment, "tear-down", "--dry-run").stdout
    said = cloud(environment, *keep, "--dry-run").stdout
    assert lost not in said and ", runs, 20 GB" not in said
    assert cloud(environment, *keep, "--yes").stdout.endswith("all else is gone\n")
    assert account(emulator) == {"volumes": ["20 GB, available"], "snapshots": ["completed"]}
    assert cloud(environment, "tear-down", "--yes").stdout.endswith("all gone\n")
    assert account(emulator) == {}


def test_what_comes_while_it_is_torn_down_is_torn_down_too(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    """As the successor of an instance that is terminated before its request is cancelled."""
    snapshot(emulator)
    first = rented(emulator, environment)
    script = f"""if [ "$2" = cancel-spot-instance-requests ]; then
        $aws ec2 terminate-instances --instance-ids {first} >/dev/null
    fi
    exec $aws "$@\""""
    done = cloud(environment, "tear-down", "--yes", path=an_aws(tmp_path / "late", script))
    assert done.stdout.endswith("all gone\n"), done.stderr
    assert account(emulator) == {}


def test_what_is_gone_already_does_not_keep_the_rest(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    snapshot(emulator)
    emulator.fail("RunInstances", "MaxSpotInstanceCountExceeded")
    refused(environment, "launch", "--yes")
    emulator.fail("DeleteSnapshot", "InvalidSnapshot.InUse")
    assert "InvalidSnapshot.InUse" in refused(environment, "tear-down", "--yes")
    script = '[ "$2" != delete-snapshot ] || $aws "$@"\nexec $aws "$@"'  # somebody else, before
    done = cloud(environment, "tear-down", "--yes", path=an_aws(tmp_path / "twice", script))
    assert done.stdout.endswith("all gone\n"), done.stderr
    assert account(emulator) == {}


def test_who_does_not_say_yes_changes_nothing(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.clear()
    for answer in ("\n", "n\n"):
        for command in ("tear-down", "launch"):
            line = f"python3 scripts/aws/cloud.py {command} || echo ended with $?"
            said = typed(line, environment, answer)
            assert said.endswith("Go on? [y/N] ended with 2\n"), said
    assert changes(emulator) == []


def test_without_a_mirror_no_permission_for_iam_is_needed(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    for action in ("GetInstanceProfile", "GetRole", "ListInstanceProfiles", "ListRoles"):
        emulator.fail(action, "AccessDenied", times=0)
    assert cloud(environment, "tear-down", "--yes").stdout.endswith("all gone\n")
    emulator.heal()
    assert account(emulator) == {}


def test_a_role_that_only_has_the_projects_name_is_left_alone(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    session = boto3.Session("test", "test", region_name="us-east-1")
    url = environment["AWS_ENDPOINT_URL"]
    iam = session.client("iam", endpoint_url=url)
    iam.create_role(RoleName=IAM_NAME, AssumeRolePolicyDocument="{}")
    assert "nothing in us-east-1" in cloud(environment, "tear-down", "--yes").stdout
    session.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
    snapshot(emulator)
    said = refused(environment, "launch", "--yes", "--mirror", "s3://bucket/a")
    assert "EntityAlreadyExists" in said and "another project" in said
    assert account(emulator)["roles"] == [IAM_NAME]


def test_a_new_instance_profile_is_waited_for(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    session = boto3.Session("test", "test", region_name="us-east-1")
    url = environment["AWS_ENDPOINT_URL"]
    session.client("s3", endpoint_url=url).create_bucket(Bucket="bucket")
    text = f"Value ({IAM_NAME}) for parameter iamInstanceProfile.name is invalid."
    emulator.fail("RunInstances", "InvalidParameterValue", text)
    emulator.fail("CreateVolume", "VolumeLimitExceeded", "too many")
    done = cloud(environment, "launch", "--yes", "--mirror", "s3://bucket/a")
    assert "VolumeLimitExceeded" in done.stderr
    assert len(emulator.calls("RunInstances")) == 2
    assert "is rented, and costs" in done.stdout


def test_the_newest_complete_snapshot_of_the_data_set_is_trained_on(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    time.sleep(1.1)  # their times are whole seconds
    newest = snapshot(emulator)
    snapshot(emulator, "imagenet-100k")
    said = cloud(environment, "launch", "--dry-run", "--data-gb", "10").stdout
    assert f'"SnapshotId": "{newest}", "VolumeSize": 60' in said  # not less than it holds
    time.sleep(1.1)
    emulator.set(snapshot_describes=50)
    snapshot(emulator, complete=False)
    assert "run prepare first" in refused(environment, "launch", "--yes")
    assert emulator.calls("RunInstances") == []


def test_the_price_is_that_of_the_zone_where_it_is_rented(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.set(price_usd=0.123, instance_type="g5.xlarge", zone="us-east-1c")
    said = cloud(environment, "launch", "--dry-run").stdout
    assert "a g5.xlarge, spot, in us-east-1c at $0.123 an hour now" in said


def test_prices_show_the_odds_where_they_may_be_asked_for(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    emulator.set(score=10, zone="us-east-1b")
    rows = dict(line.split(maxsplit=1) for line in cloud(environment, "prices").stdout.splitlines())
    assert rows["us-east-1b"].split()[-1] == "10"
    emulator.fail("GetSpotPlacementScores", "UnauthorizedOperation")
    rows = dict(line.split(maxsplit=1) for line in cloud(environment, "prices").stdout.splitlines())
    assert rows["us-east-1b"].split()[-1] == "-"


def test_the_data_are_prepared_where_their_volume_lies(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    ec2_of(emulator).create_volume(
        AvailabilityZone="us-east-1c", Size=60, TagSpecifications=tagged("volume", role="data")
    )
    said = cloud(environment, "prepare", "--dry-run").stdout
    assert re.findall(r"AvailabilityZone=(\S+)", said) == ["us-east-1c"]


@pytest.mark.parametrize("command", ["prepare", "launch"])
def test_the_end_of_the_instance_before_is_waited_for(
    command: str, emulator: Emulator, environment: dict[str, str]
) -> None:
    """It holds its volumes until then."""
    if command == "launch":
        snapshot(emulator)
    last = rented(emulator, environment, command)
    ec2 = ec2_of(emulator)
    for request in ec2.describe_spot_instance_requests()["SpotInstanceRequests"]:
        ec2.cancel_spot_instance_requests(SpotInstanceRequestIds=[request["SpotInstanceRequestId"]])
    emulator.set(instance_describes=6)
    ec2.terminate_instances(InstanceIds=[last])
    emulator.set(instance_describes=0)
    emulator.clear()
    emulator.fail("CreateVolume", "VolumeLimitExceeded", match="gp3")
    assert "VolumeLimitExceeded" in refused(environment, command, "--yes")
    actions = [call["action"] for call in emulator.calls()]
    before = emulator.calls()[: actions.index("RunInstances")]
    assert [call for call in before if call["params"].get("InstanceId.1") == last]


def test_an_instance_that_is_only_coming_is_gone_on_with(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.set(instance_describes=50)
    emulator.fail("DescribeInstances", "RequestLimitExceeded", match="InstanceId.1")
    refused(environment, "launch", "--yes")
    said = cloud(environment, "launch", "--dry-run").stdout
    assert "there is an instance already: i-" in said and ", pending\n" in said


def test_of_two_instances_none_is_chosen(emulator: Emulator, environment: dict[str, str]) -> None:
    snapshot(emulator)
    first = rented(emulator, environment)
    ec2 = ec2_of(emulator)
    (group,) = ec2.describe_instances(InstanceIds=[first])["Reservations"]
    ec2.run_instances(
        ImageId=group["Instances"][0]["ImageId"],
        InstanceType="g5.xlarge",
        MinCount=1,
        MaxCount=1,
        TagSpecifications=tagged("instance", role="train"),
    )
    emulator.clear()
    for command in ("launch", "watch", "fetch", "stop"):
        said = refused(environment, command)
        assert "there are 2 training instances" in said and "tear-down --dry-run" in said
    assert changes(emulator) == []


def test_what_ec2_has_taken_is_not_started_to_fetch(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    emulator.interrupt(rented(emulator, environment))
    emulator.clear()
    assert "once EC2 has started" in refused(environment, "fetch", "--yes")
    assert changes(emulator) == []


def test_nohup_holds(emulator: Emulator, environment: dict[str, str]) -> None:
    snapshot(emulator)
    with subprocess.Popen(
        [
            *("env", "--ignore-signal=HUP", sys.executable),
            *(REPOSITORY / "scripts" / "aws" / "cloud.py", "launch", "--yes"),
        ],
        env={**environment, "RESNET50_SSH_OPTIONS": "-o ProxyCommand=false"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as launching:  # fmt: skip
        wait_for(lambda: emulator.calls("AttachVolume"))
        launching.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            launching.wait(2)
        launching.terminate()
        said, complaint = launching.communicate(timeout=60)
    assert complaint == "error: interrupted\n" and "is rented, and costs" in said


def test_a_snapshot_that_fails_is_made_anew_and_until_then_all_is_kept(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The emulator's do not fail.
    failing = an_aws(tmp_path / "failing", '$aws "$@" | sed s/\\"completed\\"/\\"error\\"/')
    rented(emulator, environment, "prepare")
    before = account(emulator)
    emulator.set(snapshot_describes=2)
    made = snapshot(emulator, complete=False)
    for name, value in {**environment, "PATH": f"{failing}:{environment['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import cloud as commands

    monkeypatch.setattr(commands, "SNAPSHOT_POLL_S", 0)
    settings = commands.load_settings()
    options = commands.Prepare(yes=True, settings=settings)
    with pytest.raises(UserError, match=f"{made} failed: the same command makes another"):
        commands.prepare(options, commands.Aws("", dry_run=False))
    assert account(emulator) == {**before, "snapshots": ["completed"]}
    said = cloud(environment, "prepare", "--dry-run", path=failing).stdout
    deleted, *_, created = re.findall(r"^\$ aws ec2 (\S+-snapshot) (.*)", said, re.M)
    assert deleted == ("delete-snapshot", f"--snapshot-id {made}")
    assert created[0] == "create-snapshot"


# ------------------------------------------------------------------------------ what is asked of it


def machine_that(folder: Path, answers: str = "") -> Path:
    """A folder with an `ssh` that writes down what it is asked, and answers: cases of bash's."""
    folder.mkdir(exist_ok=True)
    script = f'command=${{@: -1}}\necho "$command" >>{folder}/asked\ncase $command in'
    (folder / "ssh").write_text(f"#!/bin/bash\n{script}\n{answers}\nesac\n")
    (folder / "ssh").chmod(0o755)
    return folder


def asked(folder: Path) -> list[str]:
    """What the machine was asked since the last time, but for the first words of each login."""
    lines = (folder / "asked").read_text().splitlines()
    (folder / "asked").unlink()
    return [line for line in lines if line != "true"]


def test_a_machine_that_is_about_to_stop_stays_while_it_is_fetched_from(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    snapshot(emulator)
    answers = """*resnet50-poweroff.timer) echo active ;;
        "ls /mnt/runs") echo run lost+found ;;
        tar*) tar c --files-from=/dev/null; [ ! -e {folder}/broken ] || exit 2 ;;"""
    ssh = machine_that(tmp_path / "ssh", answers.format(folder=tmp_path))
    assert cloud(environment, "launch", "--yes", path=ssh).returncode == 0
    fetch = ("fetch", "--yes", "--to", str(tmp_path / "runs"))
    here = "cd resnet50/scripts/aws/instance && sudo"
    while_fetching = [
        f"{here} bash poweroff.sh 2h",
        "ls /mnt/runs",
        "tar c -C /mnt/runs --exclude=checkpoints -- run",
        f"{here} bash poweroff.sh 10min",
    ]
    asked(ssh)
    emulator.clear()
    assert cloud(environment, *fetch, path=ssh).returncode == 0
    assert asked(ssh)[1:] == while_fetching
    (tmp_path / "broken").touch()
    assert cloud(environment, *fetch, path=ssh).returncode == 2
    assert asked(ssh)[1:] == while_fetching
    assert changes(emulator) == []

    # Started for that alone it does not train, and stops by itself if nobody stops it.
    (tmp_path / "broken").unlink()
    assert cloud(environment, "stop", path=ssh).returncode == 0
    emulator.clear()
    assert cloud(environment, *fetch, path=ssh).returncode == 0
    first, *_, last = asked(ssh)
    assert first.startswith(f"{here} systemctl stop resnet50-trainer && sudo bash poweroff.sh 2h")
    assert last.startswith("tar ")
    assert changes(emulator) == ["StartInstances", "StopInstances"]


def test_a_training_is_stopped_for_other_settings_only_after_asking(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    snapshot(emulator)
    ssh = machine_that(tmp_path / "ssh", f"*.new*) cat >{tmp_path}/env ;;")
    assert cloud(environment, "launch", "--yes", path=ssh).returncode == 0
    asked(ssh)
    machine_that(
        ssh,
        f"""*.new*) cat >{tmp_path}/env ;;
        cat*aws-instance.env) cat {tmp_path}/env ;;
        *is-active*) echo active ;;""",
    )
    # Its price may be another by now, and not be the cheapest any more.
    first = (tmp_path / "env").read_text()
    zone = ec2_of(emulator).describe_volumes()["Volumes"][0]["AvailabilityZone"]
    emulator.set(price_usd=0.987, instance_type="g5.xlarge", zone=zone)
    poweroff = "sudo bash resnet50/scripts/aws/instance/poweroff.sh"
    assert "training runs: see it" in cloud(environment, "launch", path=ssh).stdout
    assert asked(ssh)[-1] == f"{poweroff} never"
    assert (tmp_path / "env").read_text() == first

    changed = {**environment, "RESNET50_TRAINER_OPTIONS": "--epochs 7"}
    done = cloud(changed, "launch", path=ssh)
    assert "--epochs 7" in done.stdout and "nobody is there to ask" in done.stderr
    assert asked(ssh)[-1] == "cat resnet50/aws-instance.env"
    assert cloud(changed, "launch", "--yes", path=ssh).returncode == 0
    said = asked(ssh)
    stop = f"{poweroff} 2h && sudo systemctl stop resnet50-trainer && {poweroff} 2h"
    assert said.index(stop) < next(at for at, line in enumerate(said) if "bootstrap.sh" in line)
    assert "'--price-per-hour 0.987 --epochs 7'" in (tmp_path / "env").read_text()
    assert "$0.9870 an hour now" in cloud(changed, "watch", path=ssh).stdout


def test_a_preparation_that_fails_leaves_no_snapshot(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    ssh = machine_that(tmp_path / "ssh", "*prepare.status*) exit 3 ;;")
    done = cloud(environment, "prepare", "--yes", path=ssh)
    assert done.returncode == 2 and "that failed, as told above" in done.stderr
    assert "is rented, and costs" in done.stdout
    found = account(emulator)
    assert found["instances"] == ["running"] and "snapshots" not in found
    assert "60 GB, in-use" in found["volumes"]


def test_kaggles_key_is_neither_shown_nor_open_to_others(
    emulator: Emulator, environment: dict[str, str], tmp_path: Path
) -> None:
    emulator.set(snapshot_describes=0)
    answer = f'*kaggle*) HOME={tmp_path} bash -c "umask 022; $command" ;;'
    ssh = machine_that(tmp_path / "ssh", answer)
    known = {
        **environment,
        "RESNET50_DATA_SET": "imagenet",
        "KAGGLE_USERNAME": "me",
        "KAGGLE_KEY": "c0ffee",
    }
    known.pop("KAGGLE_API_TOKEN", None)
    done = cloud(known, "prepare", "--yes", path=ssh)
    assert done.returncode == 0, done.stderr
    file = tmp_path / ".kaggle" / "kaggle.json"
    assert json.loads(file.read_text()) == {"username": "me", "key": "c0ffee"}
    assert file.stat().st_mode & 0o077 == 0
    assert "c0ffee" not in done.stdout + done.stderr + "".join(asked(ssh))
    assert "c0ffee" not in emulator.log.read_text()


def test_what_never_answers_is_not_waited_for_for_ever(
    emulator: Emulator,
    environment: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import machine
    import resources

    twice = f"[ $(wc -l <{tmp_path}/ssh/asked) -gt 2 ] || exit 255"
    ssh = machine_that(tmp_path / "ssh", f"*) {twice} ;;")
    for name, value in {**environment, "PATH": f"{ssh}:{environment['PATH']}"}.items():
        monkeypatch.setenv(name, value)
    silent = machine.Machine(machine.Settings(), "i-1", "203.0.113.1", dry_run=False)
    with pytest.raises(UserError, match="does not let this computer log in"):
        silent.wait(-1)
    assert (ssh / "asked").read_text() == "true\n"

    monkeypatch.setattr(resources, "PROFILE_S", -1)
    emulator.fail("CreateVolume", "InvalidParameterValue", "Invalid IAM Instance Profile name")
    with pytest.raises(UserError, match="Invalid IAM Instance Profile name"):
        resources.once_its_profile_is_known(
            resources.Aws("", dry_run=False),
            *("ec2", "create-volume", "--availability-zone", "us-east-1a", "--size", "1"),
        )
    assert len(emulator.calls("CreateVolume")) == 1


def test_what_the_disks_cost_is_said_before_they_are_rented(
    emulator: Emulator, environment: dict[str, str]
) -> None:
    snapshot(emulator)
    # 75 + 20 GB with the system, 20 for the runs, 60 of the data at 437 MB/s; 125 are free.
    said = cloud(environment, "launch", "--dry-run").stdout
    assert f"175 GB of disks cost ${175 * 0.08 + 312 * 0.04:.2f} a month" in said
    options = ("--data-throughput", "125", "--data-iops", "4000", "--runs-gb", "30")
    said = cloud(environment, "launch", "--dry-run", *options).stdout
    assert f"185 GB of disks cost ${185 * 0.08 + 1000 * 0.005:.2f} a month" in said


def test_a_budget_needs_a_price_that_is_known(
    emulator: Emulator, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot(emulator)
    dry = ("launch", "--dry-run", "--market", "on-demand", "--budget-usd", "9")
    assert "at $1.006 an hour now" in cloud(environment, *dry).stdout
    said = refused(environment, *dry, "--instance-type", "g5.12xlarge")
    assert "the price of a g5.12xlarge in us-east-1" in said and "--price-per-hour" in said
    own = "--trainer-options=--price-per-hour 5.7"
    known = cloud(environment, *dry, "--instance-type", "g5.12xlarge", own)
    assert known.returncode == 0, known.stderr

    # What is known are the prices of some regions.
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import cloud as commands

    assert commands.on_demand_price("g5.xlarge", "us-west-2c") == 1.006
    assert commands.on_demand_price("g5.xlarge", "eu-central-1a") is None

    # What is not known is not counted, and a user's own price has the last word.
    emulator.fail("CreateVolume", "VolumeLimitExceeded", "too many", times=0)
    rented = ("launch", "--yes", "--market", "on-demand", "--instance-type", "g5.12xlarge")
    refused(environment, *rented)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    aws = commands.Aws("us-east-1", dry_run=False)
    (reservation,) = aws.read("ec2", "describe-instances")["Reservations"]
    instance_id = reservation["Instances"][0]["InstanceId"]

    def told(trainer_options: str) -> str:
        settings = commands.Settings(market="on-demand", trainer_options=trainer_options)
        return commands.instance_env(aws, settings, instance_id, {"VolumeId": "vol-1"}).decode()

    assert "TRAINER_OPTIONS='--price-per-hour 0'\n" in told("")
    assert "TRAINER_OPTIONS='--price-per-hour 0 --price-per-hour 5.7'\n" in told(own[18:])
    # The spot price may change by itself; whoever changes his own wants that to count.
    same = commands._without_price
    assert same(told("").replace(" 0'", " 0.41'")) == same(told(""))
    assert same(told("--price-per-hour 5.7")) != same(told("--price-per-hour 5.8"))


@pytest.mark.parametrize("has_git", [True, False])
def test_a_data_set_in_the_repository_is_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_git: bool
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import machine

    monkeypatch.setattr(machine, "REPOSITORY", tmp_path)
    if has_git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        (tmp_path / ".gitignore").write_text("/data/\n")
    (tmp_path / "trainer.py").write_text("# code\n")
    for folder in ("data", "ILSVRC"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "train.tar").touch()
    os.truncate(tmp_path / "data/train.tar", 10**9)
    machine.check_repository()
    os.truncate(tmp_path / "ILSVRC/train.tar", 2 * 10**9)
    import cloud as commands

    refuse = functools.partial(commands.launch, mock.Mock(), None)  # before AWS is asked anything
    for call in (machine.check_repository, refuse):
        with pytest.raises(UserError, match=r"/ILSVRC has 2,000 MB, which would be sent to the m"):
            call()


# ------------------------------------------------------------------------------ settings


def test_settings_come_from_the_file_the_environment_and_the_command_line(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import settings

    monkeypatch.setattr(settings, "FILE", tmp_path / "aws.env")
    (tmp_path / "aws.env").write_text('# mine\nRUNS_GB=30\nBUDGET_USD=9.5\nMARKET="on-demand"\n')
    monkeypatch.setenv("RESNET50_RUNS_GB", "40")
    found = settings.load_settings()
    assert (found.runs_gb, found.budget_usd, found.market) == (40, 9.5, "on-demand")
    for line, complaint in [
        ("RUNS_SIZE=3", "line 1: there is no setting runs_size; known are project, "),
        ("just words", "line 1: 'just words' is not NAME=value"),
        ("DATA_GB=many", "line 1: data_gb is 'many': it must be a number"),
        ("MARKET=cheap", "line 1: market is 'cheap': choose spot or on-demand"),
        ("DATA_IOPS=1", "data_iops is 1: it must be 3,000 to 16,000"),
        ("MIRROR=/disk", "mirror is /disk: here it must be s3://bucket/prefix"),
        ("MIRROR=s3://a/b;c", "mirror is s3://a/b;c: here it must be s3://bucket/prefix"),
        ("MIRROR=s3://a/b c", "mirror is s3://a/b c: here it must be s3://bucket/prefix"),
        ("TRAINER_OPTIONS=--name 'a b'", "trainer_options must do without quotes"),
        ("TRAINER_OPTIONS=--epochs 5 --bogus 1", "trainer_options: Unrecognized options: --bogus"),
        ("TRAINER_OPTIONS=--epochs 0", "trainer_options: epochs is 0"),
        ("PROJECT=a b", "project is 'a b'"),
    ]:
        (tmp_path / "aws.env").write_text(line)
        with pytest.raises(UserError, match=re.escape(complaint)):
            settings.load_settings()


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("INITIALIZATION_RATE=50", "initialization_rate is 50: it must be 0, or 100 to 300"),
        ("INITIALIZATION_RATE=400", "initialization_rate is 400: it must be 0, or 100 to 300"),
        ("INITIALIZATION_RATE=0", ""),
        (f"PROJECT={'a' * 41}", "use up to 40 letters, digits and dashes"),
        (f"PROJECT={'a' * 40}", ""),
        ("BUDGET_USD=inf", "budget_usd is inf: it must be 0 or more"),
        ("BUDGET_USD=nan", "budget_usd is nan: it must be 0 or more"),
        ("ARCHIVE_GB=19", "archive_gb is 19: it must be 20 to 16,384"),
        ("DATA_GB=0", "data_gb is 0: it must be 1 to 16,384"),
        ("RUNS_GB=4", "runs_gb is 4: it must be 5 to 16,384"),
        ("DATA_THROUGHPUT=1001", "data_throughput is 1001: it must be 125 to 1,000"),
        ("DATA_THROUGHPUT=751", "data_throughput is 751: EC2 gives a quarter of data_iops, 3,000"),
        ("DATA_THROUGHPUT=750", ""),
        ("WHEN_DONE=terminate", "when_done is 'terminate': choose stop or keep"),
    ],
)
def test_what_aws_would_refuse_later_is_refused_at_once(
    line: str, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import settings

    monkeypatch.setattr(settings, "FILE", tmp_path / "aws.env")
    (tmp_path / "aws.env").write_text(f"{line}\n")
    with pytest.raises(UserError, match=re.escape(complaint)) if complaint else nullcontext():
        settings.load_settings()


def test_kaggles_credentials_are_found_where_its_own_program_finds_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import cloud as commands

    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KAGGLE_API_TOKEN", "KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".kaggle").mkdir()
    for file in ("kaggle.json", "access_token"):
        (tmp_path / ".kaggle" / file).write_text(file)
        assert commands.kaggle_credentials() == (file, file.encode())
    monkeypatch.setenv("KAGGLE_USERNAME", "me")
    monkeypatch.setenv("KAGGLE_KEY", "key")
    name, content = commands.kaggle_credentials()
    assert (name, json.loads(content)) == ("kaggle.json", {"username": "me", "key": "key"})
    monkeypatch.setenv("KAGGLE_API_TOKEN", "token")
    assert commands.kaggle_credentials() == ("access_token", b"token")


# ------------------------------------------------------------------------------ on the instance

# One partition of Linux, from sector 64 on, and the mark at the end of the first sector.
MBR = r"\0\0\0\0\203\0\0\0\100\0\0\0\0\100\0\0" + r"\0" * 48 + r"\125\252"

MOUNT = """
mount --make-rprivate /
mkdir -p /dev/disk
mount -t tmpfs tmpfs /dev/disk
mkdir -p /dev/disk/by-id
ln -s "$1" /dev/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol0123
bash scripts/aws/instance/mount.sh vol-0123 "$2" && ls "$2"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", ""),
        ("mkdir {disk}.d; touch {disk}.d/mine; mkfs.ext4 -q -d {disk}.d {disk}", ""),
        ("echo precious | dd of={disk} conv=notrunc status=none", "no file system: left as it is"),
        ("printf '{mbr}' | dd of={disk} bs=1 seek=446 conv=notrunc status=none", "of its own"),
        ("mkswap {disk} >/dev/null", "left as it is"),
    ],
    ids=["empty", "ext4", "bytes", "partitions", "swap"],
)
def test_only_an_empty_volume_gets_a_file_system(
    content: str, complaint: str, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.touch()
    os.truncate(disk, 20_000_000)
    subprocess.run(content.format(disk=disk, mbr=MBR), shell=True, check=True)
    before = disk.read_bytes()
    made = subprocess.run(
        ["losetup", "--find", "--show", disk], capture_output=True, text=True, check=True
    )
    loop = made.stdout.strip()
    try:
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", MOUNT, "mount", loop, tmp_path / "folder"],
            cwd=REPOSITORY, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    finally:
        subprocess.run(["losetup", "--detach", loop], check=True)
    if complaint:
        assert done.returncode == 2 and complaint in done.stderr
        assert disk.read_bytes() == before
    else:
        assert done.returncode == 0, done.stderr
        assert ("mine" in done.stdout) == bool(content)
        assert "lost+found" in done.stdout


def test_a_detached_command_goes_on_without_its_follower_and_is_not_started_twice(
    tmp_path: Path,
) -> None:
    script = REPOSITORY / "scripts" / "aws" / "instance" / "detached.sh"
    job = "echo began; while [ ! -e go ]; do sleep 0.1; done; echo ended; exit 7"
    command = ["bash", script, "job", "bash", "-c", job]

    def follow() -> subprocess.Popen[str]:
        return subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True)

    first = follow()
    assert first.stdout and first.stdout.readline() == "began\n"
    first.kill()
    first.wait()
    second = follow()
    assert second.stdout and second.stdout.readline() == "began\n"
    (tmp_path / "go").touch()
    assert second.communicate(timeout=30)[0] == "ended\n"
    assert (tmp_path / "job.status").read_text() == "7\n"
    assert (tmp_path / "job.log").read_text() == "began\nended\n"


@pytest.fixture
def instance(tmp_path: Path) -> Path:
    """The code as on an instance, and programs that write down in `called` what they shall do."""
    folder = tmp_path / "resnet50"
    shutil.copytree(
        REPOSITORY / "scripts" / "aws" / "instance", folder / "scripts" / "aws" / "instance"
    )
    (folder / "aws-instance.env").write_text(
        "DATA_VOLUME=vol-1\nRUNS_VOLUME=vol-2\nSTORE=imagenette.store\nTRAINER_USER=ubuntu\n"
        "TRAINER_OPTIONS='--epochs 7 --name run'\nWHEN_DONE=stop\n"
    )
    for name in (
        "bin/sudo",
        "bin/systemctl",
        "bin/python3",
        ".venv/bin/python",
        "scripts/setup.sh",
    ):
        program = folder / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f'#!/bin/bash\necho {program.name} "$*" >>{folder}/called\n')
        program.chmod(0o755)
    return folder


def run_there(instance: Path, *command: str | Path) -> tuple[int, list[str]]:
    """Run a command with those programs; its exit code, and what they should do."""
    environment = {**os.environ, "PATH": f"{instance / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=instance, env=environment, capture_output=True, text=True)
    called = (instance / "called").read_text().splitlines()
    (instance / "called").unlink()
    return done.returncode, called


def test_a_machine_that_cannot_be_set_up_stops(instance: Path) -> None:
    bootstrap = ("bash", "scripts/aws/instance/bootstrap.sh")
    never, soon = (f"sudo bash scripts/aws/instance/poweroff.sh {w}" for w in ("never", "10min"))
    unit = f"{instance}/resnet50-trainer.service"
    code, called = run_there(instance, *bootstrap)
    assert code == 0 and called[0] == never and soon not in called
    assert called[-1] == "sudo systemctl start resnet50-trainer"
    # Taken and given back while it is installed, it goes on by itself.
    assert called.index(f"sudo systemctl enable {unit}") < called.index("setup.sh requirements.txt")
    text = Path(unit).read_text()
    assert f"WorkingDirectory={instance}\n" in text and "@" not in text

    for failing in (".venv/bin/python", "scripts/setup.sh"):
        program = instance / failing
        works = program.read_text()
        program.write_text(f"{works}exit 3\n")
        code, called = run_there(instance, *bootstrap)
        assert code == 3 and called[0] == never and called[-1] == soon
        program.write_text(works)
    env = instance / "aws-instance.env"
    env.write_text(env.read_text().replace("WHEN_DONE=stop", "WHEN_DONE=keep"))
    (instance / "scripts/setup.sh").write_text("exit 3\n")
    code, called = run_there(instance, *bootstrap)
    assert code == 3 and soon not in called


def test_the_trainer_is_told_to_use_the_gpu_and_what_the_settings_say(instance: Path) -> None:
    line = "set -a; . ./aws-instance.env; bash scripts/aws/instance/train.sh --dry-run"
    code, (called,) = run_there(instance, "bash", "-c", line)
    assert code == 0
    data = "/mnt/data/imagenette.store"
    assert called == (
        f"python trainer.py --device cuda --runs-folder /mnt/runs --train-folder-name {data} "
        f"--val-folder-name {data} --epochs 7 --name run --dry-run"
    )


PREPARE = """
mount --make-rprivate /
mount --bind "$1" /mnt
exec bash scripts/aws/instance/prepare.sh vol-1 imagenet
"""
# Of scripts/prepare_data.py: `pip install` comes before it.
PACK = """
[ $1 = -m ] && exit
cd data
echo packed >imagenet.store
sha256sum imagenet.store >imagenet.store.sha256
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_machine_that_prepares_stops_by_itself_however_it_ends(
    instance: Path, tmp_path: Path
) -> None:
    volume = tmp_path / "mnt" / "data"
    volume.mkdir(parents=True)
    (instance / "data").mkdir()
    prepare = ("unshare", "--mount", "bash", "-c", PREPARE, "prepare", volume.parent)
    never, later = (f"sudo bash scripts/aws/instance/poweroff.sh {w}" for w in ("never", "1h"))
    mounted = "sudo bash scripts/aws/instance/mount.sh vol-1 /mnt/data"
    python = instance / ".venv/bin/python"
    writes_down = python.read_text()

    python.write_text(f"{writes_down}[ $1 = -m ]\n")
    code, called = run_there(instance, *prepare)
    assert code == 1 and called[:2] == [never, mounted] and called[-1] == later
    assert "sudo umount /mnt/data" not in called and list(volume.iterdir()) == []

    python.write_text(f"{writes_down}{PACK}")
    for content in (None, "cut off"):  # its copy, before
        if content:
            (volume / "imagenet.store").write_text(content)
        code, called = run_there(instance, *prepare)
        assert code == 0 and called[:2] == [never, mounted]
        assert "python scripts/prepare_data.py imagenet data" in called
        # All of it has to be in the snapshot.
        assert called[-2:] == ["sudo umount /mnt/data", later]
        assert (volume / "imagenet.store").read_text() == "packed\n"
        assert (volume / "imagenet.store.sha256").exists()

    code, called = run_there(instance, *prepare)  # what is done is not done again
    assert code == 0 and not [line for line in called if line.startswith("python ")]
    assert called[-2:] == ["sudo umount /mnt/data", later]


SSHD = """
mount --make-rprivate /
mount -t tmpfs tmpfs /run
mkdir /run/sshd
exec /usr/sbin/sshd -i -f "$0"
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root")
def test_a_machine_with_another_host_key_is_not_trusted(
    key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "scripts" / "aws")
    import machine

    (tmp_path / "sshd.sh").write_text(SSHD)
    host_key = tmp_path / "host_key"
    (tmp_path / "sshd_config").write_text(
        f"HostKey {host_key}\nAuthorizedKeysFile {key}.pub\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\n"
    )
    proxy = f"unshare --mount bash -c '. {tmp_path}/sshd.sh' {tmp_path}/sshd_config"
    settings = machine.Settings(
        ssh_key=str(key), ssh_user="root", ssh_options=shlex.join(["-o", f"ProxyCommand={proxy}"])
    )

    def log_in(address: str) -> None:
        machine.Machine(settings, "i-1", address, dry_run=False).wait(0)

    def new_host_key() -> None:
        for path in (host_key, host_key.with_suffix(".pub")):
            path.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", host_key], check=True)

    new_host_key()
    log_in("203.0.113.1")
    log_in("203.0.113.2")  # another address after a start
    new_host_key()
    with pytest.raises(UserError, match="shows another host key than before: not trusted"):
        log_in("203.0.113.2")


# ------------------------------------------------------------------------------ what is public


@pytest.mark.parametrize(
    ("end", "restarts", "stops"),
    [
        ("exited/75/exit-code", 0, False),  # interrupted
        ("exited/75/success", 0, False),  # by systemd
        ("exited/78/exit-code", 0, False),  # its mirror does not answer
        ("exited/78/exit-code", 10, True),
        ("exited/75/exit-code", 10, True),
        ("killed/KILL/signal", 9, False),
        ("killed/KILL/signal", 10, True),
        ("killed/KILL/oom-kill", 0, False),
        ("killed/TERM/success", 0, True),  # before it had begun: systemd takes that for its end
        ("//exit-code", 0, True),  # the installation has failed
        ("exited/0/success", 0, True),
        *((f"exited/{code}/exit-code", 0, True) for code in (1, 2, 76, 77)),
    ],
)
def test_a_machine_whose_training_will_not_go_on_is_stopped(
    end: str, restarts: int, stops: bool, tmp_path: Path
) -> None:
    for name, text in (("systemctl", f'[ "$1" != show ] || echo {restarts}'), ("systemd-run", "")):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$*" >> {tmp_path}/called\n{text}\n')
        (tmp_path / name).chmod(0o755)
    code, status, result = end.split("/")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        ["bash", "scripts/aws/instance/ended.sh"],
        cwd=REPOSITORY,
        env={"PATH": path, "EXIT_CODE": code, "EXIT_STATUS": status, "SERVICE_RESULT": result},
        check=True,
    )
    called = tmp_path / "called"
    assert (called.exists() and "--on-active=10min" in called.read_text()) == stops


def test_what_a_user_wants_kept_is_not_stopped(instance: Path) -> None:
    (instance / "bin/systemd-run").write_text(f"echo systemd-run >>{instance}/called\n")
    (instance / "bin/systemd-run").chmod(0o755)
    ended = "SERVICE_RESULT=success WHEN_DONE={} bash scripts/aws/instance/ended.sh; systemctl x"
    _, called = run_there(instance, "bash", "-c", ended.format("keep"))
    assert called == ["systemctl x"]
    _, called = run_there(instance, "bash", "-c", ended.format("stop"))
    assert "systemd-run" in called


def test_what_is_not_stopped_for_is_started_again_and_there_is_time_to_save() -> None:
    unit = (REPOSITORY / "scripts/aws/instance/resnet50-trainer.service").read_text()
    has = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"\w+=", line))
    ended = (REPOSITORY / "scripts/aws/instance/ended.sh").read_text()
    assert has["RestartForceExitStatus"].split() == re.findall(r"exited/(\d+)/\*", ended)
    assert has["Restart"] == "on-abnormal"  # killed
    # EC2's notice comes two minutes before, and what it stops is not to be started again before.
    assert 60 < int(has["TimeoutStopSec"]) < 120 <= int(has["RestartSec"])


def test_no_id_or_key_of_aws_is_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    secrets = re.compile(
        r"\b(?:ami|vol|snap|sg|subnet|vpc|i|eni)-[0-9a-f]{8,17}\b|\bAKIA[A-Z0-9]{16}\b"
        r"|\b(?:arn:aws:[a-z0-9-]*:[a-z0-9-]*:)\d{12}\b|BEGIN [A-Z ]*PRIVATE KEY"
    )
    names = [name for name in listed.stdout.split("\0") if name and "tests/" not in name]
    assert len(names) > 50
    for name in names:
        text = (REPOSITORY / name).read_bytes().decode(errors="replace")
        assert not secrets.search(text), name
