"""From an empty AWS account to a running training, and back to an empty account.

    python3 scripts/aws/cloud.py prices      what the instance types cost now, zone by zone
    python3 scripts/aws/cloud.py prepare     download and pack the data; leaves a snapshot
    python3 scripts/aws/cloud.py launch      rent the GPU and start the trainer
    python3 scripts/aws/cloud.py watch       state, progress, price so far; --follow, --nvitop
    python3 scripts/aws/cloud.py fetch       the run's folder to this computer
    python3 scripts/aws/cloud.py stop        save and stop; launch goes on
    python3 scripts/aws/cloud.py tear-down   delete all that these commands made

Needs the AWS CLI, version 2 or 1, with credentials (`aws configure`), and ssh. Settings stand in
aws.env; see settings.py. Each command may be given again: what is done is not done again, what was
broken off is gone on with. `--dry-run` prints each call that would change something, and changes
nothing; `--yes` asks nothing. All that is made bears the tag resnet50-project, and is found by it;
what EC2 launches by itself, after a termination, is found by its spot request.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from cli import Aws, AwsError
from machine import FOLDER, Machine, check_repository
from resources import (
    ALIVE,
    DATA_TAG,
    PROJECT_TAG,
    ROLE_TAG,
    attach,
    ensure_profile,
    ensure_security_group,
    ensure_volume,
    find_instances,
    find_profiles,
    find_snapshots,
    find_spot_requests,
    find_volumes,
    instance_state,
    newest_image,
    once_its_profile_is_known,
    only,
    placement_scores,
    project_filter,
    run_instance,
    spot_prices,
    tag_of,
    tags,
    wait_for_those_going,
    wait_until,
    zones_with,
)
from settings import REPOSITORY, Settings, check_settings, load_settings

from utils import UserError, parse_options, run_stage

RUNS_DEVICE, DATA_DEVICE = "/dev/sdg", "/dev/sdf"  # names that EC2 wants; Linux has others
LOGIN_S = 900.0  # how long a machine may take until it lets us log in
SNAPSHOT_POLL_S = 15.0
PREPARE_MB_S = 250  # of the volume that the data is packed onto
EXTRA_ROOT_GB = 20  # beside the image's own size
# US dollars in us-east-1 in November 2026, to say what is about to be spent.
PREPARE_USD_H = 0.18  # a c7i.xlarge on demand
GP3_GB_MONTH_USD, SNAPSHOT_GB_MONTH_USD, FILLING_GB_USD = 0.08, 0.05, 0.0036
GP3_MB_S_MONTH_USD, GP3_FREE_MB_S = 0.04, 125  # throughput
GP3_IOPS_MONTH_USD, GP3_FREE_IOPS = 0.005, 3000
MONTH_H = 730
PRICE = "--price-per-hour"  # of trainer.py
SUCCESSOR = "but its spot request will bring one: tear-down ends that"
ON_DEMAND_REGIONS = ("us-east-1", "us-east-2", "us-west-2")  # with these prices; others are dearer
ON_DEMAND_USD_H = {
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g5.4xlarge": 1.624,
    "g5.8xlarge": 2.448,
}
GPU_TYPES = tuple(ON_DEMAND_USD_H)


@dataclasses.dataclass(frozen=True)
class Options:
    """What all commands have."""

    dry_run: bool = False
    """print each call that would change something, and change nothing"""
    yes: bool = False
    """do not ask"""
    settings: tyro.conf.OmitArgPrefixes[Settings] = dataclasses.field(default_factory=load_settings)


@dataclasses.dataclass(frozen=True)
class Prices(Options):
    """what the instance types cost now, zone by zone"""


@dataclasses.dataclass(frozen=True)
class Prepare(Options):
    """download and pack the data on a small instance; leaves a snapshot, and nothing else"""


@dataclasses.dataclass(frozen=True)
class Launch(Options):
    """rent the GPU and start the trainer, which from then on starts with the machine"""


@dataclasses.dataclass(frozen=True)
class Watch(Options):
    """state, progress and price so far"""

    follow: bool = False
    """stay, and show the log as it grows"""
    nvitop: bool = False
    """show what the GPU does"""


@dataclasses.dataclass(frozen=True)
class Fetch(Options):
    """copy the runs' folders to this computer"""

    to: Path = REPOSITORY / "runs"
    """folder for the runs"""
    checkpoints: bool = False
    """fetch the checkpoints too, to go on here"""


@dataclasses.dataclass(frozen=True)
class Stop(Options):
    """save and stop the training instance; its disks are kept, and launch goes on"""


@dataclasses.dataclass(frozen=True)
class TearDown(Options):
    """delete all that bears the project's tag, after showing the list"""

    keep_snapshot: bool = False
    """keep the snapshot with the data, for the next training"""
    keep_runs: bool = False
    """keep the volume with checkpoints and results"""


Command = Prices | Prepare | Launch | Watch | Fetch | Stop | TearDown


@dataclasses.dataclass(frozen=True)
class CloudOptions:
    """Which command."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Prices, tyro.conf.subcommand("prices")]
            | Annotated[Prepare, tyro.conf.subcommand("prepare")]
            | Annotated[Launch, tyro.conf.subcommand("launch")]
            | Annotated[Watch, tyro.conf.subcommand("watch")]
            | Annotated[Fetch, tyro.conf.subcommand("fetch")]
            | Annotated[Stop, tyro.conf.subcommand("stop")]
            | Annotated[TearDown, tyro.conf.subcommand("tear-down")]
        ]
    ]


# ------------------------------------------------------------------------------ helpers


def confirm(options: Options, text: str) -> None:
    """Say what is about to be spent or deleted, and ask; raises UserError for no."""
    print(text, flush=True)
    if options.yes or options.dry_run:
        return
    if not sys.stdin.isatty():
        raise UserError("nobody is there to ask: give --yes")
    try:
        answer = input("Go on? [y/N] ")
    except EOFError:  # Ctrl-D
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError("nothing was done")


@contextlib.contextmanager
def rented(aws: Aws, instance: dict[str, Any]) -> Iterator[None]:
    """Where a command is broken off in here, say that its instance goes on, and costs."""
    try:
        yield
    except BaseException:
        if not aws.dry_run:
            print(
                f"note: {describe(instance)} is rented, and costs: the same command goes on with "
                "it, tear-down deletes it",
                flush=True,
            )
        raise


def log_in(aws: Aws, settings: Settings, instance_id: str) -> Machine:
    """The instance once it runs and lets us log in."""
    wait_until(aws, "instance-running", "--instance-ids", instance_id)
    address = (
        "<address>" if aws.dry_run else instance_state(aws, instance_id).get("PublicIpAddress", "")
    )
    machine = Machine(settings, instance_id, address, aws.dry_run)
    machine.wait(LOGIN_S)
    return machine


def kaggle_credentials() -> tuple[str, bytes]:
    """Name and content of a file for ~/.kaggle; raises UserError where there is none."""
    if token := os.environ.get("KAGGLE_API_TOKEN"):
        return "access_token", token.encode()
    name, key = os.environ.get("KAGGLE_USERNAME"), os.environ.get("KAGGLE_KEY")
    if name and key:
        return "kaggle.json", json.dumps({"username": name, "key": key}).encode()
    for file in ("access_token", "kaggle.json"):
        path = Path.home() / ".kaggle" / file
        if path.exists():
            return file, path.read_bytes()
    raise UserError(
        "no Kaggle credentials: make a token on https://www.kaggle.com/settings, and put it into "
        "~/.kaggle/access_token; accept the rules on https://www.kaggle.com/competitions/"
        "imagenet-object-localization-challenge/rules"
    )


def cancel(aws: Aws, requests: list[dict[str, Any]]) -> None:
    """Cancel spot requests, which leaves their instances running."""
    if requests:
        ids = [one["SpotInstanceRequestId"] for one in requests]
        aws.change("ec2", "cancel-spot-instance-requests", "--spot-instance-request-ids", *ids)


def terminate(aws: Aws, instances: list[dict[str, Any]]) -> None:
    """Terminate instances and wait until they are gone."""
    ids = [instance["InstanceId"] for instance in instances]
    if ids:
        aws.change("ec2", "terminate-instances", "--instance-ids", *ids)
        wait_until(aws, "instance-terminated", "--instance-ids", *ids)


@contextlib.contextmanager
def already_gone() -> Iterator[None]:
    """Pass over what AWS has deleted since it was listed, as it does with an instance's disks."""
    try:
        yield
    except AwsError as error:
        if not error.code.endswith(".NotFound"):
            raise


def in_words(request: dict[str, Any]) -> str:
    """How a spot request stands."""
    status = request["Status"]
    return f"{request['State']}: {status['Code']}: {status.get('Message', '')}".rstrip(": ")


def describe(instance: dict[str, Any]) -> str:
    """An instance in a few words."""
    zone = instance["Placement"]["AvailabilityZone"]
    market = instance.get("InstanceLifecycle", "on demand")
    return f"{instance['InstanceId']}, {instance['InstanceType']}, {market}, {zone}"


def on_demand_price(instance_type: str, zone: str) -> float | None:
    """US dollars an hour on demand, where it is known here."""
    known = zone[:-1] in ON_DEMAND_REGIONS
    return ON_DEMAND_USD_H.get(instance_type) if known else None


def check_budget(settings: Settings, price: float | None, zone: str) -> None:
    """Refuse a budget where nobody knows the price that is to be added up; raises UserError."""
    own = PRICE in settings.trainer_options.replace("_", "-")
    if settings.budget_usd and price is None and not own:
        raise UserError(
            f"budget_usd is {settings.budget_usd}, and the price of a {settings.instance_type} in "
            f"{zone} is not known here: give {PRICE} in trainer_options"
        )


def gp3_month_usd(size_gb: int, mb_s: int = GP3_FREE_MB_S, iops: int = GP3_FREE_IOPS) -> float:
    """US dollars a month of a gp3 volume, whose first throughput and reads a second are free."""
    return (
        size_gb * GP3_GB_MONTH_USD
        + (mb_s - GP3_FREE_MB_S) * GP3_MB_S_MONTH_USD
        + (iops - GP3_FREE_IOPS) * GP3_IOPS_MONTH_USD
    )


# ------------------------------------------------------------------------------ the commands


def prices(options: Prices, aws: Aws) -> None:
    """Print the spot price of each GPU instance type in each zone, and the odds to get it."""
    settings = options.settings
    types = sorted(
        {*GPU_TYPES, settings.instance_type}, key=[*GPU_TYPES, settings.instance_type].index
    )
    found = spot_prices(aws, types)
    zones = sorted({zone for _, zone in found})
    if not zones:
        raise UserError("this region has no such instances: set another region in aws.env")
    scores = placement_scores(aws, settings.instance_type)
    print("spot prices in US dollars an hour; score: how likely EC2 holds it, 1 to 10, that a spot")
    print(f"request for a {settings.instance_type} succeeds there")
    print("zone".ljust(16) + "".join(kind.rjust(14) for kind in types) + "  score")
    for zone in zones:
        row = [f"{found[kind, zone]:.4f}" if (kind, zone) in found else "-" for kind in types]
        print(
            zone.ljust(16) + "".join(cell.rjust(14) for cell in row) + f"{scores.get(zone, '-'):>7}"
        )


def prepare(options: Prepare, aws: Aws) -> None:
    """Leave a snapshot of a volume with the packed data, whatever is there of it already."""
    settings = options.settings
    instance = only(find_instances(aws, settings, "prepare"), "preparing instances")
    other = tag_of(instance, DATA_TAG) if instance else ""
    if other and other != settings.data_set:
        words = ("ec2", "terminate-instances", "--instance-ids", instance["InstanceId"])
        raise UserError(
            f"{describe(instance)} prepares {other}: let that end first, with prepare --data-set "
            f"{other}, or give it up: {aws.as_typed(*words)}"
        )
    wait_for_those_going(aws, settings, "prepare")
    volume = only(find_volumes(aws, settings, "data"), "data volumes")
    snapshot = next(iter(find_snapshots(aws, settings, settings.data_set)), None)
    if snapshot is not None and snapshot["State"] == "error":
        aws.change("ec2", "delete-snapshot", "--snapshot-id", snapshot["SnapshotId"])
        snapshot = None
    if snapshot is None:
        check_repository()
        credentials = kaggle_credentials() if settings.data_set != "imagenette" else None
        if instance is None:
            disks_usd = gp3_month_usd(settings.archive_gb) / MONTH_H
            disks_usd += gp3_month_usd(settings.data_gb, PREPARE_MB_S) / MONTH_H
            kept_usd = settings.data_gb * SNAPSHOT_GB_MONTH_USD
            confirm(
                options,
                f"downloads {settings.data_set} and packs it, which takes some hours for ImageNet, "
                f"on a {settings.prepare_type}: a c7i.xlarge is about ${PREPARE_USD_H} an hour on "
                f"demand, its disks ${disks_usd:.2f}. What stays is a snapshot, at most "
                f"${kept_usd:.2f} a month",
            )
            zones = zones_with(aws, settings, settings.prepare_type)
            if volume is not None:
                zones = [volume["AvailabilityZone"]]
            instance = run_instance(
                aws, settings, "prepare", settings.prepare_type, zones,
                settings.cpu_ami, settings.archive_gb, [], [],
            )  # fmt: skip
        else:
            ensure_security_group(aws, settings)
            if is_stopped(instance):
                confirm(
                    options,
                    f"starts {describe(instance)} again, which prepares {settings.data_set}: a "
                    f"c7i.xlarge is about ${PREPARE_USD_H} an hour on demand",
                )
        with rented(aws, instance):
            volume = prepared_volume(aws, settings, instance, credentials)
            snapshot = aws.change(
                "ec2", "create-snapshot", "--volume-id", volume["VolumeId"],
                "--description", f"{settings.data_set}, packed",
                *tags(settings, "data", "snapshot", {DATA_TAG: settings.data_set}),
                dry={"SnapshotId": "<snapshot>", "State": "completed"},
            )  # fmt: skip
    with rented(aws, instance) if instance else contextlib.nullcontext():
        wait_for_snapshot(aws, snapshot)
    terminate(aws, [instance] if instance else [])
    if volume is not None:
        aws.change("ec2", "delete-volume", "--volume-id", volume["VolumeId"])
    if not aws.dry_run:
        print(f"{settings.data_set} is prepared: snapshot {snapshot['SnapshotId']}")


def prepared_volume(
    aws: Aws, settings: Settings, instance: dict[str, Any], credentials: tuple[str, bytes] | None
) -> dict[str, Any]:
    """The volume onto which the instance has downloaded and packed the data."""
    instance_id = instance["InstanceId"]
    if is_stopped(instance):
        wait_until(aws, "instance-stopped", "--instance-ids", instance_id)
        aws.change("ec2", "start-instances", "--instance-ids", instance_id)
    wait_until(aws, "instance-running", "--instance-ids", instance_id)
    volume = ensure_volume(
        aws, settings, "data", instance["Placement"]["AvailabilityZone"], settings.data_gb,
        ["--throughput", str(PREPARE_MB_S)],
    )  # fmt: skip
    attach(aws, volume, instance_id, DATA_DEVICE)
    machine = log_in(aws, settings, instance_id)
    machine.push_code()
    if credentials is not None:
        name, content = credentials
        machine.run(f"umask 077; mkdir -p ~/.kaggle; cat > ~/.kaggle/{name}", content)
    machine.run_detached(
        "prepare",
        f"bash scripts/aws/instance/prepare.sh {volume['VolumeId']} {settings.data_set}",
    )
    return volume


def wait_for_snapshot(aws: Aws, snapshot: dict[str, Any]) -> None:
    """Until it is complete, which can take longer than the CLI's own wait; raises UserError."""
    while snapshot["State"] == "pending":
        print(f"snapshot {snapshot['SnapshotId']}: {snapshot.get('Progress') or '0%'}", flush=True)
        time.sleep(SNAPSHOT_POLL_S)
        snapshot = aws.read("ec2", "describe-snapshots", "--snapshot-ids", snapshot["SnapshotId"])[
            "Snapshots"
        ][0]
    if snapshot["State"] == "error":
        raise UserError(f"snapshot {snapshot['SnapshotId']} failed: the same command makes another")


def launch(options: Launch, aws: Aws) -> None:
    """Rent the GPU, unless that was done, and see to it that the trainer runs and will run."""
    settings = options.settings
    check_repository()
    instance = only(find_instances(aws, settings, "train"), "training instances")
    if instance is None:
        if requests := find_spot_requests(aws, settings):
            raise UserError(
                f"the instance is gone, and its spot request is not ({in_words(requests[0])}): EC2 "
                "launches another, with which the same command goes on; to rent anew, end that: "
                "tear-down --keep-snapshot --keep-runs"
            )
        wait_for_those_going(aws, settings, "train")
        instance = rent(options, aws)
    else:
        refuse_another(settings, instance)
        if not may_go_on(options, aws, instance):
            return
        ensure_security_group(aws, settings)
        profile = ensure_profile(aws, settings)
        if profile and "IamInstanceProfile" not in instance:  # the mirror was set later
            once_its_profile_is_known(
                aws, "ec2", "associate-iam-instance-profile",
                "--instance-id", instance["InstanceId"], *profile,
            )  # fmt: skip
    with rented(aws, instance):
        if is_stopped(instance):
            aws.change("ec2", "start-instances", "--instance-ids", instance["InstanceId"])
        start_training(options, aws, instance)


def start_training(options: Launch, aws: Aws, instance: dict[str, Any]) -> None:
    """See to it that the trainer runs there with these settings, and will run."""
    settings, instance_id = options.settings, instance["InstanceId"]
    wait_until(aws, "instance-running", "--instance-ids", instance_id)
    zone = instance["Placement"]["AvailabilityZone"]
    runs = ensure_volume(aws, settings, "runs", zone, settings.runs_gb, [])
    attach(aws, runs, instance_id, RUNS_DEVICE)
    machine = log_in(aws, settings, instance_id)
    wanted = instance_env(aws, settings, instance_id, runs)
    machine.wait_for_detached("bootstrap")  # of a launch broken off, which may have had others
    # It starts with the machine, with the settings that it had.
    unit = "resnet50-trainer.service"
    state = machine.ask(f"systemctl is-active {unit} || systemctl list-jobs {unit}")
    if state.startswith(("active", "activating")) or " start " in state:  # or soon will be
        has = machine.ask(f"cat {FOLDER}/aws-instance.env")
        if _without_price(has) == _without_price(wanted.decode()):
            # Which a bootstrap whose end nobody saw may have asked for.
            machine.run(f"sudo bash {FOLDER}/scripts/aws/instance/poweroff.sh never")
            print("training runs: see it with watch")
            return
        confirm(
            options,
            f"training runs with other settings:\n{has}\nIt will be stopped, saved, and started "
            f"with these:\n{wanted.decode().strip()}",
        )
        # bootstrap.sh takes that back. Twice: the trainer's end may ask for ten minutes instead.
        poweroff = f"sudo bash {FOLDER}/scripts/aws/instance/poweroff.sh 2h"
        machine.run(f"{poweroff} && sudo systemctl stop resnet50-trainer && {poweroff}")
    machine.push_code()
    env = f"{FOLDER}/aws-instance.env"
    machine.run(f"cat > {env}.new && mv {env}.new {env}", wanted)
    machine.run_detached("bootstrap", "bash scripts/aws/instance/bootstrap.sh")
    if not aws.dry_run:
        print("training runs, and goes on by itself after an interruption: see it with watch")


def _without_price(env: str) -> list[str]:
    """The settings in an instance's file but for the spot price, which changes by itself.

    It comes first; one that follows is a user's own.
    """
    ours = rf"^TRAINER_OPTIONS={PRICE} \S+ ?"
    return [re.sub(ours, "TRAINER_OPTIONS=", setting).strip() for setting in shlex.split(env)]


def taken_by_ec2(aws: Aws, instance: dict[str, Any]) -> str:
    """Why EC2 has stopped an instance, and will start it again by itself; empty if it has not."""
    request = instance.get("SpotInstanceRequestId")
    if not request:
        return ""
    (found,) = aws.read(
        "ec2", "describe-spot-instance-requests", "--spot-instance-request-ids", request
    )["SpotInstanceRequests"]  # fmt: skip
    code = found["Status"]["Code"]
    return "" if code == "instance-stopped-by-user" else code


def refuse_another(settings: Settings, instance: dict[str, Any]) -> None:
    """Refuse settings that an instance which is there cannot take on; raises UserError."""
    there = {
        "instance_type": instance["InstanceType"],
        "market": "spot" if "InstanceLifecycle" in instance else "on-demand",
        # What EC2 launches anew by itself bears no tags.
        "data_set": tag_of(instance, DATA_TAG) or settings.data_set,
        "zone": instance["Placement"]["AvailabilityZone"] if settings.zone else "",
    }
    other = {key: value for key, value in there.items() if value != getattr(settings, key)}
    if other:
        asked = ", ".join(f"{key} {getattr(settings, key)}" for key in other)
        has = ", ".join(f"{key} {value}" for key, value in other.items())
        way = "tear-down --keep-snapshot --keep-runs, then launch"
        if "zone" in other:  # which the volume with the runs cannot leave
            way = (
                "fetch the runs, tear-down --keep-snapshot, then launch: a mirror has the run there"
            )
        raise UserError(
            f"there is an instance with {has} ({instance['InstanceId']}), not {asked}: to change "
            f"machines, {way}; else set it as it is"
        )


def is_stopped(instance: dict[str, Any]) -> bool:
    """Whether an instance does not run any more."""
    return instance["State"]["Name"] in ("stopping", "stopped")


def may_go_on(options: Options, aws: Aws, instance: dict[str, Any]) -> bool:
    """Whether an instance that was there runs, or may be started, for which it asks."""
    print(f"there is an instance already: {describe(instance)}, {instance['State']['Name']}")
    if not is_stopped(instance):
        return True
    wait_until(aws, "instance-stopped", "--instance-ids", instance["InstanceId"])
    if code := taken_by_ec2(aws, instance):
        print(
            f"EC2 has taken it ({code}), and alone may start it again: it does so, and training "
            "goes on, once there is capacity in this zone. To go on in another zone, where there "
            "is a mirror: tear-down --keep-snapshot, then launch; without one that loses the run"
        )
        return False
    kind, zone = instance["InstanceType"], instance["Placement"]["AvailabilityZone"]
    price = on_demand_price(kind, zone)
    if "InstanceLifecycle" in instance:
        price = spot_prices(aws, [kind]).get((kind, zone))
    confirm(options, f"starts it again, at {f'${price:.4f} an hour' if price else 'its price'}")
    return True


def rent(options: Launch, aws: Aws) -> dict[str, Any]:
    """Rent the training instance where it is cheapest; raises UserError, AwsError."""
    settings = options.settings
    snapshot = next(iter(find_snapshots(aws, settings, settings.data_set)), None)
    if snapshot is None or snapshot["State"] != "completed":
        raise UserError(f"there is no snapshot with {settings.data_set}: run prepare first")
    size_gb = max(settings.data_gb, snapshot["VolumeSize"])
    zones = zones_with(aws, settings, settings.instance_type)
    found = spot_prices(aws, [settings.instance_type])
    zones.sort(key=lambda zone: found.get((settings.instance_type, zone), 1e9))
    runs = only(find_volumes(aws, settings, "runs"), "volumes with runs")
    if runs is not None:
        home = runs["AvailabilityZone"]
        if home not in zones:
            raise UserError(
                f"the volume with the runs lies in {home}, another zone: launch there, with "
                f"zone={home}, and fetch the runs, or delete it with tear-down --keep-snapshot"
            )
        zones = [home]
    spot = settings.market == "spot"
    on_demand = on_demand_price(settings.instance_type, zones[0])
    price = found.get((settings.instance_type, zones[0])) if spot else on_demand
    check_budget(settings, price, zones[0])
    _, _, root_gb = newest_image(aws, settings.gpu_ami)
    disks_gb = root_gb + EXTRA_ROOT_GB + size_gb + settings.runs_gb
    disks_usd = gp3_month_usd(root_gb + EXTRA_ROOT_GB) + gp3_month_usd(settings.runs_gb)
    disks_usd += gp3_month_usd(size_gb, settings.data_throughput, settings.data_iops)
    filling_usd = size_gb * FILLING_GB_USD * bool(settings.initialization_rate)
    rate = f"${price:.3f} an hour now" if price else "its price on demand"
    confirm(
        options,
        f"rents a {settings.instance_type}, {settings.market}, in {zones[0]} at {rate}; "
        f"{disks_gb} GB of disks cost ${disks_usd:.2f} a month in the cheapest regions, running or "
        f"stopped, until tear-down, and filling one of them ${filling_usd:.2f} once",
    )
    data = {
        "SnapshotId": snapshot["SnapshotId"],
        "VolumeSize": size_gb,
        "VolumeType": "gp3",
        "Throughput": settings.data_throughput,
        "Iops": settings.data_iops,
        "DeleteOnTermination": True,
    }
    if settings.initialization_rate:
        data["VolumeInitializationRate"] = settings.initialization_rate
    more = ensure_profile(aws, settings)
    if spot:
        # No maximum price: it only brings more interruptions. Persistent and stop: EC2 itself
        # starts it again, in the same zone, with the same disks.
        market = {"SpotInstanceType": "persistent", "InstanceInterruptionBehavior": "stop"}
        more += [
            "--instance-market-options",
            json.dumps({"MarketType": "spot", "SpotOptions": market}),
        ]
    return run_instance(
        aws, settings, "train", settings.instance_type, zones, settings.gpu_ami, EXTRA_ROOT_GB,
        more, [{"DeviceName": DATA_DEVICE, "Ebs": data}],
    )  # fmt: skip


def instance_env(aws: Aws, settings: Settings, instance_id: str, runs: dict[str, Any]) -> bytes:
    """What the trainer's service is told, as lines NAME=value for systemd and for the shell."""
    if aws.dry_run:
        return b""
    instance = instance_state(aws, instance_id)
    disks = {disk["DeviceName"]: disk["Ebs"] for disk in instance["BlockDeviceMappings"]}
    kind, zone = instance["InstanceType"], instance["Placement"]["AvailabilityZone"]
    if "InstanceLifecycle" in instance:
        price = spot_prices(aws, [kind]).get((kind, zone))
    else:
        price = on_demand_price(kind, zone)
    check_budget(settings, price, zone)
    # First, so that one in trainer_options has the last word.
    # Unknown, it is 0, and not the recipe's, which is another machine's.
    arguments = [f"{PRICE} {price or 0}", settings.trainer_options]
    arguments += [f"--mirror {settings.mirror}"] if settings.mirror else []
    arguments += [f"--budget-usd {settings.budget_usd}"] if settings.budget_usd else []
    values = {
        "DATA_VOLUME": disks[DATA_DEVICE]["VolumeId"],
        "RUNS_VOLUME": runs["VolumeId"],
        "STORE": f"{settings.data_set}.store",
        "TRAINER_USER": settings.ssh_user,
        "TRAINER_OPTIONS": " ".join(arguments).strip(),
        "WHEN_DONE": settings.when_done,
        "AWS_DEFAULT_REGION": zone[:-1],
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in values.items()).encode()


def watch(options: Watch, aws: Aws) -> None:
    """Say how the instance and the run are; --follow and --nvitop stay."""
    settings = options.settings
    instance = only(find_instances(aws, settings, "train"), "training instances")
    requests = find_spot_requests(aws, settings)
    state = instance["State"]["Name"] if instance else "none"
    if instance:
        print(f"{describe(instance)}: {state}")
    elif requests:
        print(f"no training instance, {SUCCESSOR}")
    else:
        print("no training instance: launch makes one")
    for request in requests:
        print(f"spot request {in_words(request)}")
    if instance is None or state != "running":
        return
    kind, zone = instance["InstanceType"], instance["Placement"]["AvailabilityZone"]
    if "InstanceLifecycle" in instance:
        print(f"${spot_prices(aws, [kind]).get((kind, zone), 0):.4f} an hour now")
    ensure_security_group(aws, settings)
    machine = log_in(aws, settings, instance["InstanceId"])
    machine.run(f"bash {FOLDER}/scripts/aws/instance/status.sh", check=False)
    if options.nvitop:
        machine.show(f"{FOLDER}/.venv/bin/nvitop")
    elif options.follow:
        machine.show(
            "log=$(ls -t /mnt/runs/*/train.log 2>/dev/null | head -n 1); if [ $log ]; then "
            "tail -n 20 -F $log; else journalctl -u resnet50-trainer -n 20 -f; fi"
        )


def fetch(options: Fetch, aws: Aws) -> None:
    """Copy the runs to this computer; a stopped instance is started for that, and stopped again."""
    settings = options.settings
    instance = only(find_instances(aws, settings, "train"), "training instances")
    if instance is None:
        raise UserError("no training instance, so no runs to fetch from it: launch makes one")
    started = is_stopped(instance)
    ensure_security_group(aws, settings)
    if started and not may_go_on(options, aws, instance):
        raise UserError("the runs can be fetched once EC2 has started the instance again")
    try:
        if started:
            aws.change("ec2", "start-instances", "--instance-ids", instance["InstanceId"])
        machine = log_in(aws, settings, instance["InstanceId"])
        here = f"cd {FOLDER}/scripts/aws/instance"
        if started:  # for this alone: it shall not train, and not stay if nobody stops it below
            machine.run(
                f"{here} && sudo systemctl stop resnet50-trainer && sudo bash poweroff.sh 2h && "
                f". ~/{FOLDER}/aws-instance.env && sudo bash mount.sh $RUNS_VOLUME /mnt/runs"
            )
        # Training has ended, and the machine would stop while files are copied.
        ends = machine.ask("systemctl is-active resnet50-poweroff.timer") == "active"
        if ends and not started:
            machine.run(f"{here} && sudo bash poweroff.sh 2h")
        try:
            machine.pull("/mnt/runs", options.to, [] if options.checkpoints else ["checkpoints"])
        finally:
            if ends and not started:
                machine.run(f"{here} && sudo bash poweroff.sh 10min", check=False)
    finally:
        if started:
            aws.change("ec2", "stop-instances", "--instance-ids", instance["InstanceId"])


def stop(options: Stop, aws: Aws) -> None:
    """Stop the training instance, which saves first; a persistent spot request then rests."""
    instance = only(find_instances(aws, options.settings, "train"), "training instances")
    if instance is None or is_stopped(instance):
        print("no training instance runs")
        if instance is None and find_spot_requests(aws, options.settings):
            print(SUCCESSOR)
        if instance is not None:
            wait_until(aws, "instance-stopped", "--instance-ids", instance["InstanceId"])
        if instance is not None and (code := taken_by_ec2(aws, instance)):
            print(
                f"but EC2 has taken one ({code}), and starts it again by itself: tear-down "
                "--keep-snapshot --keep-runs ends that"
            )
        return
    aws.change("ec2", "stop-instances", "--instance-ids", instance["InstanceId"])
    wait_until(aws, "instance-stopped", "--instance-ids", instance["InstanceId"])
    if not aws.dry_run:
        print("stopped, with everything saved; its disks stay, and cost, and launch goes on")


def tear_down(options: TearDown, aws: Aws) -> None:
    """Delete what bears the project's tag: requests first, or they would bring a new instance."""
    settings = options.settings
    there = f"{ALIVE},shutting-down"  # those that go already are waited for
    instances = find_instances(aws, settings, states=there)
    requests = find_spot_requests(aws, settings)
    volumes = [
        volume
        for volume in find_volumes(aws, settings)
        if not (options.keep_runs and tag_of(volume, ROLE_TAG) == "runs")
    ]
    snapshots = [] if options.keep_snapshot else find_snapshots(aws, settings)
    groups = aws.read("ec2", "describe-security-groups", *project_filter(settings))[
        "SecurityGroups"
    ]
    keys = aws.read("ec2", "describe-key-pairs", *project_filter(settings))["KeyPairs"]
    profiles, roles = find_profiles(aws, settings)
    lines = [
        *(f"instance {describe(one)}, {one['State']['Name']}" for one in instances),
        *(f"spot request {one['SpotInstanceRequestId']}, {one['State']}" for one in requests),
        *(
            f"volume {one['VolumeId']}, {tag_of(one, ROLE_TAG)}, {one['Size']} GB"
            for one in volumes
        ),
        *(
            f"snapshot {one['SnapshotId']}, {tag_of(one, DATA_TAG)}, {one['VolumeSize']} GB"
            for one in snapshots
        ),
        *(f"security group {one['GroupId']}" for one in groups),
        *(f"key pair {one['KeyName']}" for one in keys),
        *(f"instance profile {name}" for name in profiles),
        *(f"role {name}" for name in roles),
    ]
    if not lines:
        print(f"nothing in {aws.region_name} bears the tag {PROJECT_TAG}={settings.project}")
        return
    warning = " The runs' checkpoints and results go too." * any(
        tag_of(one, ROLE_TAG) == "runs" for one in volumes
    )
    confirm(options, "deletes:\n  " + "\n  ".join(lines) + f"\n{len(lines)} in all.{warning}")
    cancel(aws, requests)
    # One may have come since the list was made.
    terminate(aws, instances if aws.dry_run else find_instances(aws, settings, states=there))
    # Those that were made for an instance are gone with it.
    left = {v["VolumeId"] for v in (volumes if aws.dry_run else find_volumes(aws, settings))}
    for volume in volumes:
        if volume["VolumeId"] in left:
            with already_gone():
                aws.change("ec2", "delete-volume", "--volume-id", volume["VolumeId"])
    for snapshot in snapshots:
        with already_gone():
            aws.change("ec2", "delete-snapshot", "--snapshot-id", snapshot["SnapshotId"])
    for group in groups:
        aws.change("ec2", "delete-security-group", "--group-id", group["GroupId"])
    for key in keys:
        aws.change("ec2", "delete-key-pair", "--key-name", key["KeyName"])
    for name, its_roles in profiles.items():
        for role in its_roles:
            aws.change(
                "iam",
                "remove-role-from-instance-profile",
                "--instance-profile-name",
                name,
                "--role-name",
                role,
            )
        aws.change("iam", "delete-instance-profile", "--instance-profile-name", name)
    for name in roles:
        policies = aws.read("iam", "list-role-policies", "--role-name", name)["PolicyNames"]
        for policy in policies:
            aws.change("iam", "delete-role-policy", "--role-name", name, "--policy-name", policy)
        aws.change("iam", "delete-role", "--role-name", name)
    if not aws.dry_run:
        print("all else is gone" if options.keep_runs or options.keep_snapshot else "all gone")


COMMANDS = {
    Prices: prices, Prepare: prepare, Launch: launch, Watch: watch,
    Fetch: fetch, Stop: stop, TearDown: tear_down,
}  # fmt: skip


def main() -> None:
    """Run one command."""
    options = parse_options(CloudOptions, __doc__).command
    # So that what was begun for a command alone ends with it, also where the terminal is closed.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup
            signal.signal(number, signal.default_int_handler)
    check_settings(options.settings)
    COMMANDS[type(options)](options, Aws(options.settings.region, options.dry_run))
    if options.dry_run:
        print("dry run: nothing was changed")


if __name__ == "__main__":
    run_stage(main)
