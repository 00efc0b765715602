"""The AWS emulator of the other tests, asked by the real AWS CLI: what it shows beside moto's."""

import datetime
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aws_emulator import Emulator, start_emulator

IMAGE_PARAMETER = (
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
)
PERSISTENT = json.dumps(
    {
        "MarketType": "spot",
        "SpotOptions": {
            "SpotInstanceType": "persistent",
            "InstanceInterruptionBehavior": "stop",
        },
    }
)
Aws = Callable[..., Any]


@pytest.fixture
def emulator(aws_account: Emulator) -> Emulator:
    return aws_account


@pytest.fixture
def aws(emulator: Emulator) -> Aws:
    def run(*arguments: object, refused: str = "") -> Any:
        """What the CLI prints, from JSON; with `refused` it must fail with this code of AWS's."""
        done = subprocess.run(
            [emulator.aws, *map(str, arguments)],
            env=emulator.environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if refused:
            assert f"({refused})" in done.stderr
            return done.stderr
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout or "null")

    return run


@pytest.fixture
def image(aws: Aws) -> str:
    return aws("ssm", "get-parameter", "--name", IMAGE_PARAMETER)["Parameter"]["Value"]


def tags(*kinds: str) -> list[str]:
    return [f"ResourceType={kind},Tags=[{{Key=run,Value=first}}]" for kind in kinds]


def launch(aws: Aws, image: str, *options: str) -> dict[str, Any]:
    command = ("ec2", "run-instances", "--image-id", image, "--instance-type", "g5.xlarge")
    return aws(*command, *options)["Instances"][0]


def instances(aws: Aws) -> dict[str, dict[str, Any]]:
    found = aws("ec2", "describe-instances", "--filters", "Name=instance-lifecycle,Values=spot")
    return {i["InstanceId"]: i for r in found["Reservations"] for i in r["Instances"]}


def request(aws: Aws, *states: str) -> dict[str, Any]:
    filters = ["Name=tag:run,Values=first", f"Name=state,Values={','.join(states)}"]
    (found,) = aws("ec2", "describe-spot-instance-requests", "--filters", *filters)[
        "SpotInstanceRequests"
    ]
    return found


def test_the_life_of_a_spot_instance(emulator: Emulator, aws: Aws, image: str) -> None:
    emulator.set(instance_describes=1)
    devices = [
        {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 90}},
        {
            "DeviceName": "/dev/sdf",
            "Ebs": {
                "VolumeSize": 20,
                "VolumeType": "gp3",
                "Iops": 4000,
                "Throughput": 500,
                "DeleteOnTermination": False,
            },
        },
    ]
    instance = launch(
        aws,
        image,
        *("--instance-market-options", PERSISTENT, "--placement", "AvailabilityZone=us-east-1c"),
        *("--block-device-mappings", json.dumps(devices), "--metadata-options"),
        *("HttpTokens=required", "--tag-specifications"),
        *tags("instance", "volume", "spot-instances-request", "network-interface"),
    )
    instance_id, address = instance["InstanceId"], instance["PublicIpAddress"]
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["MetadataOptions"]["HttpTokens"] == "required"
    aws("ec2", "wait", "instance-running", "--instance-ids", instance_id)
    assert len(emulator.calls("DescribeInstances")) == 2  # pending once
    fulfilled = request(aws, "active")
    assert fulfilled["SpotInstanceRequestId"] == instance["SpotInstanceRequestId"]
    assert fulfilled["InstanceId"] == instance_id
    assert fulfilled["Status"]["Code"] == "fulfilled"
    assert fulfilled["Type"] == "persistent"
    found = aws("ec2", "describe-volumes", "--filters", "Name=tag:run,Values=first")["Volumes"]
    volumes = {volume["Attachments"][0]["Device"]: volume for volume in found}
    root, data = volumes["/dev/sda1"], volumes["/dev/sdf"]
    assert (root["Size"], root["Attachments"][0]["DeleteOnTermination"]) == (90, True)
    assert (data["Iops"], data["Throughput"]) == (4000, 500)
    assert not data["Attachments"][0]["DeleteOnTermination"]

    emulator.interrupt(instance_id)
    assert instances(aws)[instance_id]["State"]["Name"] == "stopping"
    stopped = instances(aws)[instance_id]
    assert stopped["State"]["Name"] == "stopped"
    assert stopped["StateReason"]["Code"] == "Server.SpotInstanceShutdown"
    assert "PublicIpAddress" not in stopped
    assert request(aws, "disabled")["Status"]["Code"] == "instance-stopped-no-capacity"
    start = ("ec2", "start-instances", "--instance-ids", instance_id)
    aws(*start, refused="IncorrectSpotRequestState")
    emulator.set(instance_describes=0)
    assert emulator.resume(instance_id) == instance_id
    running = instances(aws)[instance_id]
    assert running["State"]["Name"] == "running"
    assert running["PublicIpAddress"] != address
    assert len(running["BlockDeviceMappings"]) == 2

    aws("ec2", "stop-instances", "--instance-ids", instance_id)
    aws("ec2", "wait", "instance-stopped", "--instance-ids", instance_id)
    assert request(aws, "disabled")["Status"]["Code"] == "instance-stopped-by-user"
    aws(*start)
    # A request that is not cancelled brings a new instance, without the tags of the first.
    aws("ec2", "terminate-instances", "--instance-ids", instance_id)
    successor_id = request(aws, "active")["InstanceId"]
    assert successor_id != instance_id
    found = instances(aws)
    assert found[instance_id]["State"]["Name"] == "terminated"
    assert found[successor_id]["State"]["Name"] == "running"
    assert "Tags" not in found[successor_id]
    (kept,) = aws("ec2", "describe-volumes", "--filters", "Name=tag:run,Values=first")["Volumes"]
    assert (kept["VolumeId"], kept["State"]) == (data["VolumeId"], "available")
    request_id = instance["SpotInstanceRequestId"]
    aws("ec2", "cancel-spot-instance-requests", "--spot-instance-request-ids", request_id)
    aws("ec2", "terminate-instances", "--instance-ids", successor_id)
    aws("ec2", "wait", "instance-terminated", "--instance-ids", successor_id)
    assert request(aws, "cancelled", "active")["State"] == "cancelled"
    assert len(instances(aws)) == 2


def test_volumes_and_snapshots(emulator: Emulator, aws: Aws, image: str) -> None:
    make = ("ec2", "create-volume", "--volume-type", "gp3")
    here = ("--availability-zone", "us-east-1b")
    volume_id = aws(*make, *here, "--size", 8)["VolumeId"]
    snapshot = aws("ec2", "create-snapshot", "--volume-id", volume_id)
    assert snapshot["State"] == "pending"
    snapshot_id = snapshot["SnapshotId"]
    aws(*make, *here, "--snapshot-id", snapshot_id, refused="IncorrectState")
    aws("ec2", "wait", "snapshot-completed", "--snapshot-ids", snapshot_id)
    assert len(emulator.calls("DescribeSnapshots")) == 2
    (mine,) = aws("ec2", "describe-snapshots", "--owner-ids", "self")["Snapshots"]
    assert mine["Progress"] == "100%"
    swift = ("--snapshot-id", snapshot_id, "--volume-initialization-rate", 300)
    elsewhere = aws(*make, "--availability-zone", "us-east-1a", *swift)["VolumeId"]
    (described,) = aws("ec2", "describe-volumes", "--volume-ids", elsewhere)["Volumes"]
    assert (described["VolumeInitializationRate"], described["Size"]) == (300, 8)

    instance_id = launch(aws, image, "--placement", "AvailabilityZone=us-east-1b")["InstanceId"]
    attach = ("ec2", "attach-volume", "--instance-id", instance_id, "--device", "/dev/sdf")
    aws(*attach, "--volume-id", elsewhere, refused="InvalidVolume.ZoneMismatch")
    aws(*attach, "--volume-id", volume_id)
    aws("ec2", "delete-volume", "--volume-id", volume_id, refused="VolumeInUse")
    aws("ec2", "delete-volume", "--volume-id", volume_id, "--dry-run", refused="DryRunOperation")
    aws("ec2", "terminate-instances", "--instance-ids", instance_id)
    left = aws("ec2", "describe-volumes", "--query", "Volumes[].[VolumeId,State]")
    assert sorted(left) == sorted([[volume_id, "available"], [elsewhere, "available"]])


def test_prices_scores_and_quotas(emulator: Emulator, aws: Aws) -> None:
    history = ("ec2", "describe-spot-price-history", "--instance-types", "g5.xlarge")
    linux = ("--product-descriptions", "Linux/UNIX")
    now = datetime.datetime.now(datetime.UTC)
    current = aws(*history, *linux, "--start-time", now.isoformat())["SpotPriceHistory"]
    prices = {price["AvailabilityZone"]: float(price["SpotPrice"]) for price in current}
    assert len(current) == len(prices) == 5  # us-east-1e has no g5
    assert len(set(prices.values())) > 1
    assert all(0.2 < price < 1.006 for price in prices.values())
    span = ("--start-time", (now - datetime.timedelta(days=2)).isoformat())
    span += ("--end-time", (now - datetime.timedelta(days=1)).isoformat())
    older = aws(*history, *linux, *span, "--availability-zone", "us-east-1a")["SpotPriceHistory"]
    times = [datetime.datetime.fromisoformat(price["Timestamp"]) for price in older]
    assert {price["AvailabilityZone"] for price in older} == {"us-east-1a"}
    assert len({price["SpotPrice"] for price in older}) > 3
    assert times == sorted(times, reverse=True)
    # The last change before the start is told too: it is the price at the start.
    assert times[-1] < now - datetime.timedelta(days=2) <= times[-2]
    assert times[0] <= now - datetime.timedelta(days=1)

    emulator.set(price_usd=0.99, instance_type="g5.xlarge", zone="us-east-1a", score=10)
    current = aws(*history, "--start-time", datetime.datetime.now(datetime.UTC).isoformat())
    assert ["us-east-1a", "0.990000"] in [
        [price["AvailabilityZone"], price["SpotPrice"]] for price in current["SpotPriceHistory"]
    ]
    scores = ("ec2", "get-spot-placement-scores", "--instance-types", "g5.xlarge")
    scores += ("--target-capacity", 1, "--single-availability-zone")
    assert aws(*scores)["SpotPlacementScores"][0]["Score"] == 10
    quota = ("service-quotas", "get-service-quota", "--service-code", "ec2", "--quota-code")
    assert aws(*quota, "L-3819A6DF")["Quota"]["Value"] == 64


def test_faults_and_the_log(
    emulator: Emulator, aws: Aws, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(emulator.environment, "AWS_MAX_ATTEMPTS", "1")
    emulator.clear()
    fault = {"action": "RunInstances", "code": "InsufficientInstanceCapacity", "times": 0}
    emulator.fail(**fault, zone="us-east-1a", message="no g5 here")
    subnets = ("ec2", "describe-subnets", "--filters", "Name=availability-zone,Values=us-east-1a")
    subnet_id = aws(*subnets)["Subnets"][0]["SubnetId"]
    type_ = ("ec2", "run-instances", "--image-id", image, "--instance-type", "g5.xlarge")
    refusal = aws(*type_, "--subnet-id", subnet_id, refused="InsufficientInstanceCapacity")
    assert "no g5 here" in refusal
    there = ("--placement", "AvailabilityZone=us-east-1b", "--client-token", "once")
    # The answer is lost, the instance is there: the same token finds it.
    emulator.fail("RunInstances", "drop", after=1)
    with pytest.raises(AssertionError, match="Connection was closed"):
        launch(aws, image, *there)
    launch(aws, image, *there)
    assert len(aws("ec2", "describe-instances")["Reservations"]) == 1
    emulator.heal()
    emulator.fail("*", "ExpiredToken", times=2)
    aws("sts", "get-caller-identity", refused="ExpiredToken")
    aws("s3", "ls", refused="ExpiredToken")
    assert [(call["service"], call["action"], call.get("code")) for call in emulator.calls()] == [
        ("ec2", "DescribeSubnets", None),
        ("ec2", "RunInstances", "InsufficientInstanceCapacity"),
        ("ec2", "RunInstances", "drop"),
        ("ec2", "RunInstances", None),
        ("ec2", "DescribeInstances", None),
        ("sts", "GetCallerIdentity", "ExpiredToken"),
        ("s3", "ListBuckets", "ExpiredToken"),
    ]
    assert emulator.calls("RunInstances")[0]["params"]["SubnetId"] == subnet_id


def test_a_group_in_use_stays(aws: Aws, image: str) -> None:
    group = ("ec2", "create-security-group", "--group-name", "train", "--description", "train")
    group_id = aws(*group)["GroupId"]
    interface = {"DeviceIndex": 0, "Groups": [group_id], "AssociatePublicIpAddress": True}
    instance = launch(aws, image, "--network-interfaces", json.dumps([interface]))
    assert instance["PublicIpAddress"]
    assert [used["GroupId"] for used in instance["SecurityGroups"]] == [group_id]
    delete = ("ec2", "delete-security-group", "--group-id", group_id)
    aws(*delete, refused="DependencyViolation")
    aws("ec2", "terminate-instances", "--instance-ids", instance["InstanceId"])
    aws(*delete)


def test_what_the_emulator_lacks_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="describe_volume_status is not yet implemented"),
        start_emulator(tmp_path) as emulator,
    ):
        command = [emulator.aws, "ec2", "describe-volume-status"]
        environment = {**emulator.environment, "AWS_MAX_ATTEMPTS": "1"}
        assert subprocess.run(command, env=environment, capture_output=True).returncode
        assert emulator.calls()[0]["code"] == "EmulatorFailed"
