"""What these commands have in AWS, found by its tags, and made where it is not there."""

import datetime
import json
import time
import urllib.request
from collections.abc import Iterable, Mapping
from typing import Any

from cli import Aws, AwsError
from machine import key_of, public_key_of
from settings import Settings

from utils import UserError

PROJECT_TAG, ROLE_TAG, DATA_TAG = "resnet50-project", "resnet50-role", "resnet50-data"
ALIVE = "pending,running,stopping,stopped"  # instances that are not gone, nor going
# No capacity, or the type is not offered there: try the next zone.
OTHER_ZONE = ("InsufficientInstanceCapacity", "Unsupported", "SpotMaxPriceTooLow")
PROFILE_S, PROFILE_POLL_S = 90.0, 3.0  # EC2 hears of a new instance profile some seconds late
# What cloud-init does at every start of a machine. Where nobody comes to set it up it would cost
# for ever; bootstrap.sh and prepare.sh take it back. It does not wait for the timer, which may
# begin only once cloud-init has ended.
AT_EVERY_START = """#cloud-boothook
#!/bin/bash
systemctl is-enabled --quiet resnet50-trainer ||
    systemd-run --no-block --on-active=2h --unit=resnet50-poweroff systemctl poweroff
"""


# ------------------------------------------------------------------------------ what there is


def project_filter(settings: Settings, role: str = "") -> list[str]:
    """The CLI's --filters for what these commands made; of one role, or of all."""
    filters = [f"Name=tag:{PROJECT_TAG},Values={settings.project}"]
    return ["--filters", *filters, *([f"Name=tag:{ROLE_TAG},Values={role}"] if role else [])]


def tags(
    settings: Settings, role: str, resource_types: str, more: Mapping[str, str] | None = None
) -> list[str]:
    """The CLI's --tag-specifications of what is made."""
    pairs = {
        "Name": f"{settings.project}-{role}",
        PROJECT_TAG: settings.project,
        ROLE_TAG: role,
        **(more or {}),
    }
    listed = ",".join(f"{{Key={key},Value={value}}}" for key, value in pairs.items())
    return [
        "--tag-specifications",
        *(f"ResourceType={one},Tags=[{listed}]" for one in resource_types.split()),
    ]


def tag_of(resource: dict[str, Any], key: str) -> str:
    """A tag's value; empty if it has none of that name."""
    return next((tag["Value"] for tag in resource.get("Tags", []) if tag["Key"] == key), "")


def find_instances(
    aws: Aws, settings: Settings, role: str = "", states: str = ALIVE
) -> list[dict[str, Any]]:
    """The project's instances in these states, the newest first.

    Where one for training was terminated and its spot request was not cancelled, EC2 launches
    another, which bears no tags: such are found by the request.
    """
    wanted = [project_filter(settings, role)]
    if role in ("", "train"):
        requests = find_spot_requests(aws, settings, "open,active,disabled,closed,cancelled")
        if ids := [one["InstanceId"] for one in requests if "InstanceId" in one]:
            wanted.append(["--filters", f"Name=instance-id,Values={','.join(ids)}"])
    found = {}
    for filters in wanted:
        answer = aws.read(
            "ec2", "describe-instances", *filters, f"Name=instance-state-name,Values={states}"
        )  # fmt: skip
        for group in answer["Reservations"]:
            found.update({one["InstanceId"]: one for one in group["Instances"]})
    return sorted(found.values(), key=lambda one: one["LaunchTime"], reverse=True)


def wait_for_those_going(aws: Aws, settings: Settings, role: str) -> None:
    """Until the instances that are being terminated are gone: they hold their volumes till then."""
    going = find_instances(aws, settings, role, "shutting-down")
    if going:
        ids = [one["InstanceId"] for one in going]
        wait_until(aws, "instance-terminated", "--instance-ids", *ids)


def find_volumes(aws: Aws, settings: Settings, role: str = "") -> list[dict[str, Any]]:
    """The project's volumes that are not being deleted."""
    alive = "Name=status,Values=creating,available,in-use"
    return aws.read("ec2", "describe-volumes", *project_filter(settings, role), alive)["Volumes"]


def find_snapshots(aws: Aws, settings: Settings, data_set: str = "") -> list[dict[str, Any]]:
    """The project's snapshots, of one data set or of all, the newest first."""
    answer = aws.read(
        "ec2", "describe-snapshots", "--owner-ids", "self", *project_filter(settings)
    )  # fmt: skip
    found = [s for s in answer["Snapshots"] if data_set in ("", tag_of(s, DATA_TAG))]
    return sorted(found, key=lambda one: one["StartTime"], reverse=True)


def find_spot_requests(
    aws: Aws, settings: Settings, states: str = "open,active,disabled"
) -> list[dict[str, Any]]:
    """The project's spot requests; those that can still bring an instance, or in other states."""
    return aws.read(
        "ec2", "describe-spot-instance-requests", *project_filter(settings),
        f"Name=state,Values={states}",
    )["SpotInstanceRequests"]  # fmt: skip


def only(found: list[dict[str, Any]], what: str) -> dict[str, Any] | None:
    """The one that was found, or None; raises UserError if there are several."""
    if len(found) > 1:
        raise UserError(
            f"there are {len(found)} {what} with the project's tag: two commands ran at once; see "
            "them with tear-down --dry-run, and delete the one too many (a spot request before its "
            "instance: it would bring another)"
        )
    return found[0] if found else None


def instance_state(aws: Aws, instance_id: str) -> dict[str, Any]:
    """An instance as it is now."""
    answer = aws.read("ec2", "describe-instances", "--instance-ids", instance_id)
    return answer["Reservations"][0]["Instances"][0]


# ------------------------------------------------------------------------------ what is made


def wait_until(aws: Aws, *arguments: str) -> None:
    """Wait with the CLI's own `aws ec2 wait`, which asks again and again."""
    if not aws.dry_run:
        aws.read("ec2", "wait", *arguments)


def own_address() -> str:
    """This computer's IPv4 address as the internet sees it."""
    try:
        with urllib.request.urlopen("https://checkip.amazonaws.com", timeout=10) as answer:
            return answer.read(64).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"checkip.amazonaws.com does not say this computer's address ({error}): set ssh_from "
            "in aws.env"
        ) from None


def ensure_key(aws: Aws, settings: Settings) -> None:
    """A key pair in EC2 for this computer's key, both made where they are not there.

    Raises UserError where the key is on another computer: what is rented could not be used here.
    """
    found = aws.read(
        "ec2", "describe-key-pairs", "--filters", f"Name=key-name,Values={settings.project}"
    )["KeyPairs"]
    if found and not aws.dry_run and not key_of(settings).exists():
        remove = aws.as_typed("ec2", "delete-key-pair", "--key-name", settings.project)
        raise UserError(
            f"{key_of(settings)} is not on this computer: copy it from the one where it was made, "
            f"or make another: {remove}"
        )
    public = public_key_of(settings, make=not found and not aws.dry_run)
    if not found:
        aws.change(
            "ec2", "import-key-pair", "--key-name", settings.project,
            "--public-key-material", f"fileb://{public}",
            *tags(settings, "key", "key-pair"),
        )  # fmt: skip


def ensure_security_group(aws: Aws, settings: Settings) -> str:
    """Id of a security group that lets one address log in, and nobody else in."""
    found = aws.read(
        "ec2", "describe-security-groups", *project_filter(settings, "ssh")
    )["SecurityGroups"]  # fmt: skip
    group = found[0] if found else None
    if group is None:
        group = aws.change(
            "ec2", "create-security-group", "--group-name", settings.project,
            "--description", "SSH from one address",
            *tags(settings, "ssh", "security-group"),
            dry={"GroupId": "<security-group>"},
        )  # fmt: skip
    address = own_address() if settings.ssh_from == "auto" else settings.ssh_from
    wanted = address if "/" in address else f"{address}/32"
    if not wanted.endswith("/32"):
        raise UserError(f"ssh_from is {wanted}: it must be one address, without a network's length")
    ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": wanted}]}
    # Without its empty lists, which a revocation may not have.
    rules = [
        {key: value for key, value in rule.items() if value != []}
        for rule in group.get("IpPermissions", [])
    ]
    if rules == [ssh]:
        return group["GroupId"]
    for rule in rules:
        aws.change(
            "ec2", "revoke-security-group-ingress", "--group-id", group["GroupId"],
            "--ip-permissions", json.dumps([rule]),
        )  # fmt: skip
    aws.change(
        "ec2", "authorize-security-group-ingress", "--group-id", group["GroupId"],
        "--protocol", "tcp", "--port", "22", "--cidr", wanted,
    )  # fmt: skip
    return group["GroupId"]


def ensure_profile(aws: Aws, settings: Settings) -> list[str]:
    """Options of run-instances for a profile that may use the mirror; none without a mirror."""
    if not settings.mirror:
        return []
    name = profile_name(aws, settings)
    bucket, _, prefix = settings.mirror.removeprefix("s3://").partition("/")
    aws.read("s3api", "head-bucket", "--bucket", bucket)
    trust = {
        "Effect": "Allow",
        "Principal": {"Service": "ec2.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    objects = f"arn:aws:s3:::{bucket}/{prefix.rstrip('/') + '/' if prefix else ''}*"
    may = [
        {"Effect": "Allow", "Action": "s3:ListBucket", "Resource": f"arn:aws:s3:::{bucket}"},
        {
            "Effect": "Allow",
            "Action": ["s3:GetObject", "s3:PutObject", "s3:DeleteObject"],
            "Resource": objects,
        },
    ]
    policy = {"Version": "2012-10-17", "Statement": may}
    profiles, roles = find_profiles(aws, settings)
    if name not in roles:
        aws.change(
            "iam", "create-role", "--role-name", name, "--assume-role-policy-document",
            json.dumps({"Version": "2012-10-17", "Statement": [trust]}),
            "--tags", f"Key={PROJECT_TAG},Value={settings.project}",
        )  # fmt: skip
    if name not in roles or role_policy(aws, name) != policy:
        aws.change(
            "iam", "put-role-policy", "--role-name", name, "--policy-name", "mirror",
            "--policy-document", json.dumps(policy),
        )  # fmt: skip
    if name not in profiles:
        aws.change(
            "iam", "create-instance-profile", "--instance-profile-name", name,
            "--tags", f"Key={PROJECT_TAG},Value={settings.project}",
        )  # fmt: skip
    if not profiles.get(name):
        aws.change(
            "iam", "add-role-to-instance-profile", "--instance-profile-name", name,
            "--role-name", name,
        )  # fmt: skip
    return ["--iam-instance-profile", f"Name={name}"]


def profile_name(aws: Aws, settings: Settings) -> str:
    """Name of the instance profile and of its role; IAM has no regions, what is rented has one."""
    return f"{settings.project}-{aws.region_name}"


def find_profiles(aws: Aws, settings: Settings) -> tuple[dict[str, list[str]], list[str]]:
    """The project's instance profiles, each with its roles' names, and its roles."""
    name = profile_name(aws, settings)
    profile = _tagged(aws, settings, "instance-profile", "InstanceProfile")
    role = _tagged(aws, settings, "role", "Role")
    roles_in_it = [one["RoleName"] for one in profile["Roles"]] if profile else []
    return {name: roles_in_it} if profile else {}, [name] if role else []


def _tagged(aws: Aws, settings: Settings, kind: str, key: str) -> dict[str, Any] | None:
    """IAM's role or profile of that name, if it bears the project's tag; else None."""
    try:
        found = aws.read("iam", f"get-{kind}", f"--{kind}-name", profile_name(aws, settings))[key]
    except AwsError as error:
        # Who needs no mirror needs no permission for IAM, and has nothing there.
        allowed = ("NoSuchEntity",) if settings.mirror else ("NoSuchEntity", "AccessDenied")
        if error.code not in allowed:
            raise
        return None
    return found if tag_of(found, PROJECT_TAG) == settings.project else None


def role_policy(aws: Aws, role: str) -> dict[str, Any] | None:
    """What a role may do with the mirror; None where that was not said yet."""
    try:
        answer = aws.read(
            "iam", "get-role-policy", "--role-name", role, "--policy-name", "mirror"
        )  # fmt: skip
    except AwsError as error:
        if error.code != "NoSuchEntity":
            raise
        return None
    return answer["PolicyDocument"]


def newest_image(aws: Aws, parameter: str) -> tuple[str, str, int]:
    """Id, root device and root size in GB of the newest machine image of a kind."""
    image_id = aws.read("ssm", "get-parameter", "--name", parameter)["Parameter"]["Value"]
    image = aws.read("ec2", "describe-images", "--image-ids", image_id)["Images"][0]
    root = image["RootDeviceName"]
    sizes = [
        disk["Ebs"].get("VolumeSize", 0)
        for disk in image["BlockDeviceMappings"]
        if disk["DeviceName"] == root and "Ebs" in disk
    ]
    return image_id, root, max(sizes, default=0)


def zones_with(aws: Aws, settings: Settings, instance_type: str) -> list[str]:
    """The zones that offer a type, or the one that is set; raises UserError where none does."""
    offers = aws.read(
        "ec2", "describe-instance-type-offerings", "--location-type", "availability-zone",
        "--filters", f"Name=instance-type,Values={instance_type}",
    )["InstanceTypeOfferings"]  # fmt: skip
    zones = sorted(offer["Location"] for offer in offers)
    if not zones:
        raise UserError(f"this region offers no {instance_type}: set another region or type")
    if settings.zone and settings.zone not in zones:
        raise UserError(
            f"zone {settings.zone} offers no {instance_type}: choose {', '.join(zones)}"
        )
    return [settings.zone] if settings.zone else zones


def spot_prices(aws: Aws, instance_types: Iterable[str]) -> dict[tuple[str, str], float]:
    """US dollars an hour now, of each type in each zone."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    history = aws.read(
        "ec2", "describe-spot-price-history", "--instance-types", *instance_types,
        "--product-descriptions", "Linux/UNIX", "--start-time", now,
    )["SpotPriceHistory"]  # fmt: skip
    newest = sorted(history, key=lambda row: row["Timestamp"])
    return {
        (row["InstanceType"], row["AvailabilityZone"]): float(row["SpotPrice"]) for row in newest
    }


def placement_scores(aws: Aws, instance_type: str) -> dict[str, int]:
    """How likely a spot request succeeds in each zone, 1 to 10; empty if EC2 does not say."""
    described = aws.read("ec2", "describe-availability-zones")["AvailabilityZones"]
    names = {zone["ZoneId"]: zone["ZoneName"] for zone in described}
    try:
        scores = aws.read(
            "ec2", "get-spot-placement-scores", "--instance-types", instance_type,
            "--target-capacity", "1", "--single-availability-zone",
            "--region-names", aws.region_name,
        )["SpotPlacementScores"]  # fmt: skip
    except AwsError:  # a permission of its own, and a limit on how often it may be asked
        return {}
    return {names[row["AvailabilityZoneId"]]: row["Score"] for row in scores}


def run_instance(
    aws: Aws, settings: Settings, role: str, instance_type: str, zones: list[str],
    parameter: str, extra_root_gb: int, more: list[str], more_disks: list[dict[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """Rent an instance in the first of the zones that has one; raises AwsError."""
    image_id, root_device, root_gb = newest_image(aws, parameter)
    root = {"VolumeSize": root_gb + extra_root_gb, "VolumeType": "gp3", "DeleteOnTermination": True}
    disks = [{"DeviceName": root_device, "Ebs": root}, *more_disks]
    group = ensure_security_group(aws, settings)
    ensure_key(aws, settings)
    spot = "--instance-market-options" in more
    kinds = "instance volume" + " spot-instances-request" * spot
    for zone in zones:
        try:
            return once_its_profile_is_known(
                aws, "ec2", "run-instances", "--image-id", image_id,
                "--instance-type", instance_type,
                "--placement", f"AvailabilityZone={zone}", "--key-name", settings.project,
                "--security-group-ids", group,
                "--metadata-options", "HttpTokens=required,HttpPutResponseHopLimit=2",
                "--block-device-mappings", json.dumps(disks),
                "--user-data", AT_EVERY_START, *more,
                *tags(settings, role, kinds, {DATA_TAG: settings.data_set}),
                dry={
                    "Instances": [
                        {
                            "InstanceId": "<instance>",
                            "Placement": {"AvailabilityZone": zone},
                            "State": {"Name": "pending"},
                        }
                    ]
                },
            )["Instances"][0]  # fmt: skip
        except AwsError as error:
            if error.code not in OTHER_ZONE or zone == zones[-1]:
                raise
            print(f"{zone}: {error}: trying the next zone", flush=True)
    raise AssertionError("zones_with gives at least one")


def once_its_profile_is_known(aws: Aws, *arguments: object, dry: Any = None) -> Any:
    """aws.change(), again for a while if EC2 does not know a new instance profile yet."""
    deadline = time.monotonic() + PROFILE_S
    while True:
        try:
            return aws.change(*arguments, dry=dry)
        except AwsError as error:
            # "Invalid IAM Instance Profile name", "... has no associated IAM Roles".
            about_it = "instanceprofile" in str(error).lower().replace(" ", "")
            if not about_it or time.monotonic() > deadline:
                raise
        print("EC2 does not know the instance profile yet", flush=True)
        time.sleep(PROFILE_POLL_S)


def ensure_volume(
    aws: Aws, settings: Settings, role: str, zone: str, size_gb: int, more: list[str]
) -> dict[str, Any]:
    """The project's volume of a role, made where it is not there; raises UserError."""
    volume = only(find_volumes(aws, settings, role), f"{role} volumes")
    if volume is None:
        volume = aws.change(
            "ec2", "create-volume", "--availability-zone", zone, "--size", size_gb,
            "--volume-type", "gp3", *more, *tags(settings, role, "volume"),
            dry={"VolumeId": f"<{role}-volume>", "AvailabilityZone": zone, "Attachments": []},
        )  # fmt: skip
    elif role == "data" and volume["Size"] < size_gb:
        delete = aws.as_typed("ec2", "delete-volume", "--volume-id", volume["VolumeId"])
        raise UserError(
            f"volume {volume['VolumeId']} has {volume['Size']} GB, less than data_gb, "
            f"{size_gb}: {delete}, once it is detached"
        )
    if not volume.get("Attachments"):
        wait_until(aws, "volume-available", "--volume-ids", volume["VolumeId"])
    return volume


def attach(aws: Aws, volume: dict[str, Any], instance_id: str, device: str) -> None:
    """Attach a volume, unless it is."""
    attached = [place["InstanceId"] for place in volume.get("Attachments", [])]
    if attached == [instance_id]:
        return
    if attached:
        detach = aws.as_typed("ec2", "detach-volume", "--volume-id", volume["VolumeId"])
        raise UserError(
            f"volume {volume['VolumeId']} is attached to another instance, {attached[0]}: "
            f"{detach}, or stop that instance"
        )
    aws.change(
        "ec2", "attach-volume", "--volume-id", volume["VolumeId"], "--instance-id", instance_id,
        "--device", device,
    )  # fmt: skip
