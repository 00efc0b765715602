"""moto's EC2, S3, SSM, Lambda and quotas, mended where our scripts would notice that it is not AWS.

Imported by aws_emulator.py's server alone, before moto answers its first request. Each function
below takes the place of one of moto's (see `mend`); its docstring says what AWS does. The sources
are the EC2 user guide (pages "Spot request status", "Stop/terminate a Spot Instance", "Behavior of
Spot Instance interruptions", "Spot Instance pricing history") and the EC2 API reference.
"""

import datetime
import itertools
import json
import os
import random
import time
from typing import Any

# Read by moto when it is imported. It has hundreds of images; those of `IMAGES` do.
os.environ["MOTO_EC2_LOAD_DEFAULT_AMIS"] = "false"

from moto.awslambda import models as lambda_models
from moto.awslambda import responses as lambda_responses
from moto.awslambda import urls as lambda_urls
from moto.core.responses import ActionResult
from moto.ec2 import utils as ec2_utils
from moto.ec2.exceptions import EC2ClientError
from moto.ec2.models import amis, ec2_backends, elastic_block_store, instance_types, spot_requests
from moto.ec2.models import instances as ec2_instances
from moto.ec2.models import security_groups as ec2_security_groups
from moto.ec2.responses import elastic_block_store as volume_responses
from moto.ec2.responses import instances as instance_responses
from moto.ec2.responses import spot_instances as spot_responses
from moto.s3.models import s3_backends
from moto.servicequotas import models as quota_models
from moto.ssm import models as ssm_models

ACCOUNT = "123456789012"
# Root volumes in GiB as the images' makers give them.
IMAGES = {
    "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id": {
        "ami_id": "ami-0d1e0000000002404",
        "name": "Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 24.04) 20261101",
        "owner_id": "898082745236",
        "owner_alias": "amazon",
        "root_gib": 75,
    },
    "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id": {
        "ami_id": "ami-0ca00000000002404",
        "name": "ubuntu/images/hvm-ssd-gp3/ubuntu-noble-24.04-amd64-server-20261101",
        "owner_id": "099720109477",
        "owner_alias": None,
        "root_gib": 8,
    },
}
ROOT_GIB = {image["ami_id"]: image["root_gib"] for image in IMAGES.values()}
# Linux on demand in us-east-1, as of 2025; other types are priced by their vCPUs.
ON_DEMAND_USD = {
    "g4dn.xlarge": 0.526,
    "g4dn.2xlarge": 0.752,
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g5.4xlarge": 1.624,
    "g5.8xlarge": 2.448,
    "g5.12xlarge": 5.672,
    "g5.16xlarge": 4.096,
    "g5.24xlarge": 8.144,
    "g5.48xlarge": 16.288,
    "g6.xlarge": 0.8048,
    "g6.2xlarge": 0.9776,
    "g6.4xlarge": 1.3232,
}
PRICE_PERIOD_S = 5 * 3600  # from one change of a spot price to the next
HISTORY_S = 90 * 86400  # what AWS keeps
QUOTAS = {
    "L-3819A6DF": "All G and VT Spot Instance Requests",
    "L-DB2E81BA": "Running On-Demand G and VT instances",
    "L-34B43A08": "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests",
    "L-1216C47A": "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances",
}


class Settings:
    """What tests set through /emulator/set; `reset` brings the defaults back."""

    def __init__(self) -> None:
        self.snapshot_describes = 1  # how often a new snapshot is seen pending
        # How often an instance is seen pending when it is new or started, shutting down at its end.
        self.instance_describes = 0
        self.prices_usd: dict[tuple[str, str], list[tuple[float, float]]] = {}  # (time, USD)
        self.has_capacity = 1  # for what a spot request launches once its instance is terminated
        self.scores: dict[str, int] = {}  # by zone
        self.quotas = dict.fromkeys(QUOTAS, 64.0)  # vCPUs
        self.concurrency = 1000  # Lambda's quota: instances of all functions at once
        self.launches: dict[str, Any] = {}  # reservations by client token


settings = Settings()


def refuse(code: str, message: str) -> None:
    raise EC2ClientError(code, message)


def backend(region: str = "us-east-1") -> Any:
    return ec2_backends[ACCOUNT][region]


# -------------------------------------------------------------------------------- launching


def all_block_devices(
    self: Any, image_id: str, mappings: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The image's root device, as `mappings` change it, and their other devices.

    AWS makes the root volume whatever else is asked for; moto makes it only when nothing is.
    """
    image = self.amis[image_id]
    root = {
        "SnapshotId": image.ebs_snapshot.id,
        "VolumeSize": ROOT_GIB.get(image_id, image.ebs_snapshot.volume_size),
        "VolumeType": "gp3",
        "DeleteOnTermination": True,
    }
    devices = {image.root_device_name: root}
    for mapping in mappings:
        name = mapping["DeviceName"]
        if mapping.get("NoDevice") is not None:
            devices.pop(name, None)
        elif "Ebs" in mapping:
            given = {key: value for key, value in mapping["Ebs"].items() if value is not None}
            devices[name] = {**devices.get(name, {"DeleteOnTermination": True}), **given}
    return [{"DeviceName": name, "Ebs": ebs} for name, ebs in devices.items()]


def parse_block_device_mapping(self: Any) -> list[dict[str, Any]]:
    """All that was asked for; moto forgets Throughput and VolumeInitializationRate."""
    mappings = self._get_param("BlockDeviceMappings", [])
    for mapping in mappings:
        self._validate_block_device_mapping(mapping)
    return mappings


def attach_block_devices(instance: Any, devices: list[dict[str, Any]], tags: dict) -> None:
    for device in devices:
        ebs = device["Ebs"]
        volume = instance.ec2_backend.create_volume(
            size=ebs.get("VolumeSize"),
            zone_name=instance.placement.zone,
            snapshot_id=ebs.get("SnapshotId"),
            encrypted=ebs.get("Encrypted", False),
            kms_key_id=ebs.get("KmsKeyId"),
            volume_type=ebs.get("VolumeType", "gp2"),
            iops=ebs.get("Iops"),
            throughput=ebs.get("Throughput"),
            initialization_rate=ebs.get("VolumeInitializationRate"),
        )
        volume.add_tags(tags)
        moto_attach_volume(
            instance.ec2_backend,
            volume.id,
            instance.id,
            device["DeviceName"],
            ebs["DeleteOnTermination"] is True,
        )


def zone_of(self: Any, placement: str | None, subnet_id: str | None, nics: list) -> str | None:
    subnet_id = subnet_id or next((nic["SubnetId"] for nic in nics if "SubnetId" in nic), None)
    return self.get_subnet(subnet_id).availability_zone if subnet_id else placement


def check_offered(self: Any, instance_type: str, zone: str | None) -> None:
    """A type that the zone does not have is refused by name of the zones that have it."""
    if instance_type not in instance_types.INSTANCE_TYPES:
        refuse("InvalidParameterValue", f"Invalid value '{instance_type}' for InstanceType.")
    offered = sorted(
        offering["Location"]
        for offering in instance_types.INSTANCE_TYPE_OFFERINGS["availability-zone"][
            self.region_name
        ]
        if offering["InstanceType"] == instance_type
    )
    if zone and offered and zone not in offered:
        refuse(
            "Unsupported",
            f"Your requested instance type ({instance_type}) is not supported in your requested "
            f"Availability Zone ({zone}). Please retry your request by not specifying an "
            f"Availability Zone or choosing {', '.join(offered)}.",
        )


def run_instances(
    self: Any, image_id: str, count: int, user_data: Any, security_group_names: list, **options: Any
) -> Any:
    """What a launch on AWS does beside moto's: root volumes, tags, spot requests, public addresses.

    The same client token launches nothing new. A launch that is refused leaves nothing behind.
    """
    token = options.get("client_token")
    if token and token != "ABCDE" and token in settings.launches:  # moto's default is no token
        return settings.launches[token]
    if image_id not in self.amis:
        refuse("InvalidAMIID.NotFound", f"The image id '[{image_id}]' does not exist")
    key_name = options.get("key_name")
    if key_name and key_name not in self.key_pairs:
        refuse("InvalidKeyPair.NotFound", f"The key pair '{key_name}' does not exist")
    nics = options.get("nics") or []
    zone = zone_of(self, options.get("placement"), options.get("subnet_id"), nics)
    check_offered(self, options["instance_type"], zone)
    tags = options.pop("tags", {})
    market = options.pop("market", None)
    devices = all_block_devices(self, image_id, options.get("block_device_mappings") or [])
    for device in devices:
        check_volume(self, device["Ebs"], "InvalidBlockDeviceMapping")
    reservation = moto_run_instances(
        self,
        image_id,
        count,
        user_data,
        security_group_names,
        **{**options, "block_device_mappings": [], "tags": {"instance": tags.get("instance", {})}},
    )
    relaunch = (image_id, 1, user_data, security_group_names, {**options, "market": None})
    for instance in reservation.instances:
        instance.pending_describes = settings.instance_describes
        for nic, wish in itertools.zip_longest(
            instance.nics.values(), nics[: len(instance.nics)], fillvalue={}
        ):
            if "NetworkInterfaceId" not in wish:  # moto keeps these for ever
                nic.delete_on_termination = wish.get("DeleteOnTermination", True) is not False
            nic.add_tags(tags.get("network-interface", {}))
        # moto shows an instance's groups from the request's top level alone.
        instance.security_groups = instance.security_groups or list(instance.nics[0].group_set)
        attach_block_devices(instance, devices, tags.get("volume", {}))
        if market and market.get("MarketType") == "spot":
            SpotRequest(self, instance, market.get("SpotOptions", {}), tags, relaunch)
    settings.launches[token] = reservation
    return reservation


def run_instances_response(self: Any) -> ActionResult:
    """Hands on InstanceMarketOptions whole; moto reads the MarketType alone."""
    market = self._get_param("InstanceMarketOptions")
    ec2_backend = self.ec2_backend
    launch = ec2_backend.run_instances
    # An attribute of this backend alone, for the length of this call (see the server's lock).
    ec2_backend.run_instances = lambda *args, **options: launch(*args, **options, market=market)
    try:
        return moto_run_instances_response(self)
    finally:
        del ec2_backend.run_instances


# ------------------------------------------------------------------------------------ spot


class SpotRequest(spot_requests.SpotInstanceRequest):
    """The request behind `instance`, which RunInstances has launched with a market type of spot."""

    __module__ = "moto.ec2.models.spot_requests"  # moto files its models by this name

    def __init__(
        self, ec2_backend: Any, instance: Any, wishes: dict[str, Any], tags: dict, relaunch: tuple
    ) -> None:
        self.launched = instance
        self.relaunch = relaunch
        self.created = self.updated = now_text()
        self.product = "Linux/UNIX"
        nic = instance.nics[0]
        super().__init__(
            ec2_backend,
            ec2_utils.random_spot_request_id(),
            # Without a maximum of one's own it is the price on demand.
            wishes.get("MaxPrice") or str(on_demand_usd(instance.instance_type)),
            instance.image_id,
            wishes.get("SpotInstanceType", "one-time"),
            None,
            wishes.get("ValidUntil"),
            None,
            None,
            instance.key_name,
            [group.id for group in nic.group_set],
            instance.user_data,
            instance.instance_type,
            instance.placement.zone,
            None,
            None,
            False,
            nic.subnet.id,
            tags,
            None,
            wishes.get("InstanceInterruptionBehavior"),
        )
        self.set_state("active", "fulfilled")
        ec2_backend.spot_instance_requests[self.id] = self
        self.adopt(instance)

    def launch_instance(self) -> Any:
        return self.launched

    def adopt(self, instance: Any) -> None:
        self.instance = instance
        instance.lifecycle = "spot"
        instance.spot_instance_request_id = self.id

    def set_state(self, state: str, code: str) -> None:
        self.state, self._status_code, self.updated = state, code, now_text()
        self.status_message = MESSAGES.get(code, "")

    def launch_again(self) -> None:
        """A new instance, as the first one was; the tags of the first are not on it."""
        image_id, count, user_data, groups, options = self.relaunch
        options = {**options, "client_token": None}
        instance = self.ec2_backend.run_instances(image_id, count, user_data, groups, **options)
        self.adopt(instance.instances[0])
        associate_profile(self.ec2_backend, self.instance, options)
        self.set_state("active", "fulfilled")

    @property
    def status(self) -> dict[str, str]:
        return {
            "Code": self._status_code,
            "Message": self.status_message,
            "UpdateTime": self.updated,
        }

    @property
    def status_code(self) -> str:  # the filter status-code
        return self._status_code

    @property
    def create_time(self) -> str:
        return self.created

    @property
    def launched_availability_zone(self) -> str:
        return self.instance.placement.zone


MESSAGES = {
    "fulfilled": "Your Spot request is fulfilled.",
    "instance-stopped-by-user": "Your instance was stopped by user.",
    "instance-stopped-no-capacity": "Your instance was stopped: there is no Spot capacity.",
    "instance-stopped-by-price": "Your instance was stopped: the Spot price is above your maximum.",
    "instance-terminated-by-user": "You terminated the instance.",
    "instance-terminated-no-capacity": "Your instance was terminated: there is no Spot capacity.",
    "request-canceled-and-instance-running": "Your request is cancelled; its instance runs on.",
}


def now_text() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def associate_profile(ec2_backend: Any, instance: Any, options: dict[str, Any]) -> None:
    name, arn = (options.get(f"iam_instance_profile_{key}") for key in ("name", "arn"))
    if name or arn:
        ec2_backend.associate_iam_instance_profile(instance.id, name, arn)


def spot_request(instance: Any) -> SpotRequest | None:
    request_id = getattr(instance, "spot_instance_request_id", None)
    return instance.ec2_backend.spot_instance_requests.get(request_id)


def cancel_spot_instance_requests(self: Any, request_ids: list[str]) -> list[Any]:
    """They stay listed, cancelled; a stopped instance is terminated, a running one runs on."""
    for request_id in request_ids:
        if request_id not in self.spot_instance_requests:
            refuse(
                "InvalidSpotInstanceRequestID.NotFound",
                f"The spot instance request ID '{request_id}' does not exist",
            )
    requests = [self.spot_instance_requests[request_id] for request_id in request_ids]
    for request in requests:
        state = request.instance.state
        if state in ("running", "pending"):
            request.set_state("cancelled", "request-canceled-and-instance-running")
        elif state == "stopped":
            request.set_state("cancelled", "instance-terminated-by-service")
            request.instance.terminate()
        else:
            request.set_state("cancelled", "canceled-before-fulfillment")
    return requests


def describe_spot_instance_requests(
    self: Any, filters: Any = None, spot_instance_ids: list[str] | None = None
) -> list[Any]:
    """An unknown id is an error."""
    for request_id in spot_instance_ids or []:
        if request_id not in self.spot_instance_requests:
            refuse(
                "InvalidSpotInstanceRequestID.NotFound",
                f"The spot instance request ID '{request_id}' does not exist",
            )
    return moto_describe_spot_instance_requests(self, filters, spot_instance_ids)


def terminate_instances(self: Any, instance_ids: list[str]) -> list[tuple[Any, Any]]:
    """A persistent request that is not cancelled launches a new instance, a one-time is closed.

    Terminating what is terminated is no error, and changes nothing.
    """
    asked = self.get_multi_instances_by_id(instance_ids)
    over = [instance for instance in asked if instance._state.name == "terminated"]
    living = [instance for instance in asked if instance not in over]
    result = [(instance, instance._state) for instance in over]
    if living:
        result += moto_terminate_instances(self, [instance.id for instance in living])
    for instance in living:
        instance.pending_describes = settings.instance_describes
        request = spot_request(instance)
        if request and request.state == "cancelled":
            request.set_state("cancelled", "instance-terminated-by-user")
        elif request and request.type == "persistent" and settings.has_capacity:
            request.launch_again()
        elif request and request.type == "persistent":
            request.set_state("open", "capacity-not-available")
        elif request:
            request.set_state("closed", "instance-terminated-by-user")
    return result


def stop_instances(self: Any, instance_ids: list[str]) -> list[tuple[Any, Any]]:
    """A spot instance can be stopped only where its request is persistent and not cancelled."""
    for instance in self.get_multi_instances_by_id(instance_ids):
        if instance.state in ("terminated", "pending"):
            refuse(
                "IncorrectInstanceState",
                f"This instance '{instance.id}' is not in a state from which it can be stopped.",
            )
        request = spot_request(instance)
        if request and (request.type != "persistent" or request.state == "cancelled"):
            kind = "one-time" if request.type != "persistent" else "cancelled"
            refuse(
                "UnsupportedOperation",
                f"You can't stop the Spot Instance '{instance.id}' because it is associated with "
                f"a {kind} Spot Instance request. You can only stop Spot Instances associated "
                "with persistent Spot Instance requests.",
            )
    result = moto_stop_instances(self, instance_ids)
    for instance, before in result:
        request = spot_request(instance)
        if request and before.name != "stopped":
            request.set_state("disabled", "instance-stopped-by-user")
    return result


def start_instances(self: Any, instance_ids: list[str]) -> list[tuple[Any, Any]]:
    """A spot instance that EC2 has stopped, EC2 alone can start."""
    for instance in self.get_multi_instances_by_id(instance_ids):
        if instance.state == "terminated":
            refuse(
                "IncorrectInstanceState",
                f"The instance '{instance.id}' is not in a state from which it can be started.",
            )
        request = spot_request(instance)
        startable = {"fulfilled", "instance-stopped-by-user"}
        if request and (request.state == "cancelled" or request.status_code not in startable):
            refuse(
                "IncorrectSpotRequestState",
                f"You can't start the Spot Instance '{instance.id}' because the associated Spot "
                "Instance request is not in an appropriate state to support start.",
            )
    running = {i.id: i.public_ip for i in self.get_multi_instances_by_id(instance_ids)}
    result = moto_start_instances(self, instance_ids)
    for instance, before in result:
        if before.name == "running":  # moto gives it a new address all the same
            instance.nics[0].public_ip = running[instance.id]
        else:
            instance.pending_describes = settings.instance_describes
        if spot_request(instance):
            spot_request(instance).set_state("active", "fulfilled")
    return result


def interrupt(instance_id: str, why: str = "no-capacity", region: str = "us-east-1") -> str:
    """What EC2 does to a spot instance whose capacity it wants back; its request's status code.

    `why`: no-capacity or by-price. The two minutes from the notice on are left out.
    """
    instance = backend(region).get_instance(instance_id)
    request = spot_request(instance)
    if not request or instance.state not in ("running", "pending"):
        raise ValueError(f"{instance_id} is no running spot instance")
    stops = request.instance_interruption_behaviour == "stop"
    if stops:
        instance.stop()
        instance.pending_describes = settings.instance_describes
        name, kind = "Server.SpotInstanceShutdown", "stopped"
    else:
        instance.terminate()
        name, kind = "Server.SpotInstanceTermination", "terminated"
    instance.state_reason = ec2_instances.StateReason(f"{name}: Spot instance {kind}", name)
    instance._reason = f"{name} ({now_text()})"
    code = f"instance-{kind}-{why}"
    if request.state == "cancelled":
        state = "cancelled"
    elif stops:
        state = "disabled"
    else:
        state = "open" if request.type == "persistent" else "closed"
    request.set_state(state, code)
    return code


def resume(instance_id: str, region: str = "us-east-1") -> str:
    """What EC2 does when capacity is back: the instance that runs for the request, its id.

    A stopped instance starts with the volumes that are attached to it, at a new public address;
    for a terminated one a new one is launched.
    """
    instance = backend(region).get_instance(instance_id)
    request = spot_request(instance)
    if not request or request.state not in ("disabled", "open"):
        raise ValueError(f"{instance_id} has no request that waits for capacity")
    if instance.state == "stopped":
        instance.start()
        instance.pending_describes = settings.instance_describes
        request.set_state("active", "fulfilled")
    else:
        request.launch_again()
    return request.instance.id


def shut_down(instance_id: str, region: str = "us-east-1") -> str:
    """`shutdown` in the instance itself: stops or terminates it, as it was launched to do."""
    ec2_backend = backend(region)
    instance = ec2_backend.get_instance(instance_id)
    if instance.instance_initiated_shutdown_behavior == "terminate":
        ec2_backend.terminate_instances([instance_id])
    else:
        ec2_backend.stop_instances([instance_id])
    name = "Client.InstanceInitiatedShutdown"
    instance.state_reason = ec2_instances.StateReason(f"{name}: Instance initiated shutdown", name)
    return instance.state


def instance_state(self: Any) -> Any:
    """Pending, or on its way to an end, for as many looks as the settings say, then what it is."""
    if self._state.name == "running" and self.pending_describes > 0:
        return ec2_instances.InstanceState("pending", 0)
    if self._state.name == "terminated" and self.pending_describes > 0:
        return ec2_instances.InstanceState("shutting-down", 32)
    if self._state.name == "stopped" and self.pending_describes > 0:  # by EC2
        return ec2_instances.InstanceState("stopping", 64)
    return self._state


def looked_at_instances() -> None:
    """Called after each look at the instances: brings those that are pending forward."""
    for instance in backend().all_instances():
        instance.pending_describes = max(0, instance.pending_describes - 1)


# ----------------------------------------------------------------------------- buckets


def is_another_accounts_bucket(bucket: str, expected_owner: str | None) -> bool:
    """Whether the owner that a call expects is not a bucket's: S3 refuses such a call."""
    _, owner = s3_backends.bucket_accounts.get(bucket, (None, expected_owner))
    return expected_owner is not None and owner != expected_owner


# ----------------------------------------------------------------------------- spot prices


def on_demand_usd(instance_type: str) -> float:
    """A price per hour, of Linux."""
    if instance_type in ON_DEMAND_USD:
        return ON_DEMAND_USD[instance_type]
    vcpus = instance_types.INSTANCE_TYPES[instance_type]["VCpuInfo"]["DefaultVCpus"]
    return round(0.0425 * vcpus, 4)


def spot_usd(instance_type: str, zone: str, period: int) -> float:
    """A price per hour, the same whenever it is asked for: 30 to 60 % of that on demand.

    Each zone has a level of its own, around which the price moves by a tenth.
    """
    level = random.Random(f"{instance_type} {zone}").uniform(0.33, 0.54)
    move = random.Random(f"{instance_type} {zone} {period}").uniform(0.9, 1.1)
    return round(on_demand_usd(instance_type) * level * move, 4)


def price_changes(instance_type: str, zone: str, until_s: float) -> list[tuple[float, float]]:
    """(time, price) of the changes of the last 90 days up to `until_s`, the latest first."""
    offset_s = random.Random(f"{zone} {instance_type}").randrange(PRICE_PERIOD_S)
    last = int((until_s - offset_s) // PRICE_PERIOD_S)
    drawn = [
        (period * PRICE_PERIOD_S + offset_s, spot_usd(instance_type, zone, period))
        for period in range(last - HISTORY_S // PRICE_PERIOD_S, last + 1)
    ]
    given = [
        change
        for change in settings.prices_usd.get((instance_type, zone), [])
        if change[0] <= until_s
    ]
    if given:  # from the first price that a test sets on, its prices alone
        drawn = [change for change in drawn if change[0] < given[0][0]]
    return sorted(drawn + given, reverse=True)


def describe_spot_price_history_response(self: Any) -> ActionResult:
    """The changes from StartTime to EndTime and the one in force at StartTime, latest first."""

    def moment(name: str, default: float) -> float:
        value = self._get_param(name)
        if isinstance(value, str):
            value = datetime.datetime.fromisoformat(value)
        return value.replace(tzinfo=value.tzinfo or datetime.UTC).timestamp() if value else default

    now_s = time.time()
    start_s, end_s = moment("StartTime", now_s - HISTORY_S), moment("EndTime", now_s)
    filters = self._filters_from_querystring()
    types = self._get_param("InstanceTypes", []) or filters.get("instance-type", ON_DEMAND_USD)
    zones = filters.get("availability-zone", [])
    if self._get_param("AvailabilityZone"):
        zones = [self._get_param("AvailabilityZone")]
    products = self._get_param("ProductDescriptions", []) or filters.get("product-description", [])
    products = {product.removesuffix(" (Amazon VPC)") for product in products}
    offerings = instance_types.INSTANCE_TYPE_OFFERINGS["availability-zone"][self.region]
    history = []
    for offering in offerings:
        kind, zone = offering["InstanceType"], offering["Location"]
        if kind not in types or (zones and zone not in zones):
            continue
        changes = price_changes(kind, zone, min(end_s, now_s))
        inside = [change for change in changes if change[0] >= start_s]
        for at_s, usd in changes[: len(inside) + 1]:
            for product, extra_usd in (("Linux/UNIX", 0.0), ("Windows", 0.18)):
                if not products or product in products:
                    history.append(
                        {
                            "InstanceType": kind,
                            "ProductDescription": product,
                            "SpotPrice": f"{usd + extra_usd:.6f}",
                            "AvailabilityZone": zone,
                            "Timestamp": datetime.datetime.fromtimestamp(at_s, datetime.UTC),
                        }
                    )
    history.sort(key=lambda price: price["Timestamp"], reverse=True)
    return ActionResult({"SpotPriceHistory": history})


def get_spot_placement_scores(self: Any) -> ActionResult:
    """Scores of 1 to 10, of the regions or, with SingleAvailabilityZone, of their zones."""
    self.error_on_dryrun()
    wanted = self._get_param("InstanceTypes", [])
    scores = []
    for region in self._get_param("RegionNames", []) or [self.region]:
        zones = ec2_backends[self.current_account][region].describe_availability_zones()
        offers = {
            offering["Location"]
            for offering in instance_types.INSTANCE_TYPE_OFFERINGS["availability-zone"][region]
            if offering["InstanceType"] in wanted
        }
        by_zone = {
            zone: settings.scores.get(
                zone.name, random.Random(f"score {zone.name} {sorted(wanted)}").randint(1, 9)
            )
            for zone in zones
            if zone.name in offers
        }
        if self._get_bool_param("SingleAvailabilityZone", False):
            scores += [
                {"Region": region, "AvailabilityZoneId": zone.zone_id, "Score": score}
                for zone, score in by_zone.items()
            ]
        elif by_zone:
            scores.append({"Region": region, "Score": max(by_zone.values())})
    scores.sort(key=lambda score: -score["Score"])
    return ActionResult({"SpotPlacementScores": scores[:10]})


# -------------------------------------------------------------------- volumes and snapshots


def check_volume(self: Any, ebs: dict[str, Any], code: str) -> None:
    """Refuse, with `code`, what EBS refuses of a new volume."""
    snapshot = self.get_snapshot(ebs["SnapshotId"]) if ebs.get("SnapshotId") else None
    size = ebs.get("VolumeSize")
    if snapshot and snapshot_status(snapshot) != "completed":
        refuse("IncorrectState", f"Snapshot '{snapshot.id}' is in invalid state - pending")
    if snapshot and size and int(size) < snapshot.volume_size and not snapshot.from_ami:
        refuse(
            code,
            f"Volume of size {size}GB is smaller than snapshot '{snapshot.id}', expect size >= "
            f"{snapshot.volume_size}GB",
        )
    rate = ebs.get("VolumeInitializationRate")
    if rate and not snapshot:
        refuse(
            "InvalidParameterCombination",
            "VolumeInitializationRate can be specified only for a volume created from a snapshot.",
        )
    if rate and not 100 <= int(rate) <= 300:
        refuse(
            "InvalidParameterValue",
            "The volume initialization rate must be between 100 and 300 MiB/s.",
        )
    kind = ebs.get("VolumeType") or "gp2"
    for name, kinds in (("Throughput", {"gp3"}), ("Iops", {"gp3", "io1", "io2"})):
        if ebs.get(name) and kind not in kinds:
            refuse(
                "InvalidParameterCombination",
                f"The parameter {name.lower()} is not supported for {kind} volumes.",
            )
    if kind == "gp3":
        throughput, iops = int(ebs.get("Throughput") or 125), int(ebs.get("Iops") or 3000)
        if not 125 <= throughput <= 2000:
            refuse(
                "InvalidParameterValue", f"Volume throughput of {throughput} is not 125 to 2000."
            )
        if throughput > iops / 4:
            refuse(
                "InvalidParameterCombination",
                f"Throughput (MiBps) to iops ratio of {throughput / iops:.6f} is too high; "
                "maximum is 0.250000",
            )


def create_volume(
    self: Any,
    size: int,
    zone_name: str,
    *args: Any,
    initialization_rate: int | None = None,
    **options: Any,
) -> Any:
    """Keeps the initialization rate; gp3 has 125 MiB/s where nothing is said."""
    if not self.get_zone_by_name(zone_name):
        refuse("InvalidZone.NotFound", f"The zone '{zone_name}' does not exist.")
    volume = moto_create_volume(self, size, zone_name, *args, **options)
    volume.volume_initialization_rate = initialization_rate
    if volume.volume_type == "gp3":
        volume.throughput = volume.throughput or 125
    if volume.volume_type == "gp2":  # 3 a GiB
        volume.iops = max(100, min(3 * int(volume.size), 16000))
    return volume


def create_volume_response(self: Any) -> ActionResult:
    """Hands on VolumeInitializationRate, which moto does not read."""
    names = ("SnapshotId", "VolumeType", "Throughput", "Iops", "VolumeInitializationRate")
    ebs = {name: self._get_param(name) for name in names}
    check_volume(
        self.ec2_backend, {**ebs, "VolumeSize": self._get_param("Size")}, "InvalidParameterValue"
    )
    known = set(self.ec2_backend.volumes)
    result = moto_create_volume_response(self)
    for volume_id in set(self.ec2_backend.volumes) - known:
        volume = self.ec2_backend.volumes[volume_id]
        volume.volume_initialization_rate = ebs["VolumeInitializationRate"]
    return result


def attach_volume(
    self: Any,
    volume_id: str,
    instance_id: str,
    device_path: str,
    delete_on_termination: bool = False,
) -> Any:
    """Refused in another zone, where volume or device are in use, and for a terminated instance."""
    volume, instance = self.get_volume(volume_id), self.get_instance(instance_id)
    if volume.attachment:
        refuse("VolumeInUse", f"{volume_id} is already attached to an instance")
    if volume.zone.name != instance.placement.zone:
        refuse(
            "InvalidVolume.ZoneMismatch",
            f"The volume '{volume_id}' is not in the same availability zone as instance "
            f"'{instance_id}'",
        )
    if instance.state not in ("running", "stopped"):
        refuse("IncorrectState", f"Instance '{instance_id}' is not 'running'.")
    if device_path in instance.block_device_mapping:
        refuse(
            "InvalidParameterValue",
            f"Invalid value '{device_path}' for unixDevice. Attachment point {device_path} is "
            "already in use",
        )
    return moto_attach_volume(self, volume_id, instance_id, device_path, delete_on_termination)


def detach_volume(
    self: Any, volume_id: str, instance_id: str | None = None, device_path: str | None = None
) -> Any:
    """The instance need not be named; a running instance keeps its root volume."""
    volume = self.get_volume(volume_id)
    if not volume.attachment:
        refuse("IncorrectState", f"Volume '{volume_id}' is in the 'available' state.")
    instance = volume.attachment.instance
    if instance_id and instance_id != instance.id:
        refuse(
            "InvalidAttachment.NotFound",
            f"The volume '{volume_id}' is not attached to instance '{instance_id}'.",
        )
    if volume.attachment.device == instance.root_device_name and instance.state == "running":
        refuse(
            "OperationNotPermitted",
            f"Unable to detach root volume '{volume.attachment.device}' from instance "
            f"'{instance.id}'",
        )
    return moto_detach_volume(self, volume_id, instance.id, device_path)


def teardown_defaults(self: Any) -> None:
    """At termination the volumes are let go, and those deleted whose attachment says so."""
    for device, block in list(self.block_device_mapping.items()):
        moto_detach_volume(self.ec2_backend, block.volume_id, self.id, device)
        if block.delete_on_termination:
            self.ec2_backend.delete_volume(block.volume_id)


def attachment_deletes(self: Any) -> bool:
    """DeleteOnTermination in describe-volumes, as the instance has it."""
    block = self.instance.block_device_mapping.get(self.device)
    return bool(block and block.delete_on_termination)


def snapshot_status(snapshot: Any) -> str:
    pending = getattr(snapshot, "pending_describes", 0)
    return "pending" if pending > 0 else "completed"


def create_snapshot(self: Any, *args: Any, **options: Any) -> Any:
    """Pending at first, for as many looks as the settings say."""
    snapshot = moto_create_snapshot(self, *args, **options)
    snapshot.pending_describes = 0 if snapshot.from_ami else settings.snapshot_describes
    snapshot.status = snapshot_status(snapshot)
    return snapshot


def snapshot_progress(self: Any) -> str:
    """`settings.snapshot_describes` looks long on its way."""
    if self.status == "completed":
        return "100%"
    left = self.pending_describes / (settings.snapshot_describes + 1)
    return f"{max(0, round(99 * (1 - left)))}%"


def describe_snapshots_response(self: Any) -> ActionResult:
    """OwnerIds are honoured (`self` too), and each look brings a pending snapshot forward."""
    result = moto_describe_snapshots_response(self)
    owners = {ACCOUNT if o == "self" else o for o in self._get_param("OwnerIds", [])}
    snapshots = result.result["Snapshots"]
    if owners:
        snapshots = [snapshot for snapshot in snapshots if snapshot.owner_id in owners]
    seen = []
    for snapshot in snapshots:
        snapshot.status = snapshot_status(snapshot)
        seen.append(
            {
                "SnapshotId": snapshot.id,
                "VolumeId": snapshot.volume_id,
                "VolumeSize": snapshot.volume_size,
                "State": snapshot.status,
                "Progress": snapshot_progress(snapshot),
                "StartTime": snapshot.start_time,
                "OwnerId": snapshot.owner_id,
                "Description": snapshot.description,
                "Encrypted": snapshot.encrypted,
                "StorageTier": snapshot.storage_tier,
                "Tags": snapshot.tag_set,
            }
        )
        if snapshot.status == "pending":
            snapshot.pending_describes -= 1
            snapshot.status = snapshot_status(snapshot)
    return ActionResult({"Snapshots": seen})


# ------------------------------------------------------- groups, images, parameters, quotas


def delete_security_group_in(self: Any, vpc_id: str | None, group_id: str) -> None:
    """Refused while an instance, another interface or another group's rule uses it."""
    group = self.get_security_group_from_id(group_id)
    if group.name == "default":
        refuse(
            "CannotDelete",
            f'the specified group: "{group_id}" name: "default" cannot be deleted by a user',
        )
    used = any(group in nic.group_set for nic in self.enis.values()) or any(
        group in instance.security_groups and instance.state != "terminated"
        for instance in self.all_instances()
    )
    named = any(
        (rule.source_group or {}).get("GroupId") == group_id
        for groups in self.groups.values()
        for other in groups.values()
        if other is not group
        for rule in [*other.ingress_rules, *other.egress_rules]
    )
    if used or named:
        refuse("DependencyViolation", f"resource {group_id} has a dependent object")
    moto_delete_security_group_in(self, vpc_id, group_id)


def load_images(self: Any) -> None:
    """The images that the public parameters below name, in every region."""
    for image in IMAGES.values():
        self.amis[image["ami_id"]] = amis.Ami(
            self,
            image["ami_id"],
            name=image["name"],
            description=image["name"],
            owner_id=image["owner_id"],
            owner_alias=image["owner_alias"],
            public=True,
            virtualization_type="hvm",
            architecture="x86_64",
            hypervisor="xen",
            root_device_type="ebs",
            root_device_name="/dev/sda1",
            region_name=f"{self.region_name}a",
        )


def image_block_devices(self: Any) -> list[dict[str, Any]]:
    """With the image's own size of root volume."""
    return [
        {
            "DeviceName": self.root_device_name,
            "Ebs": {
                "SnapshotId": self.ebs_snapshot.id,
                "VolumeSize": ROOT_GIB.get(self.id, 15),
                "DeleteOnTermination": True,
                "VolumeType": "gp3",
            },
        }
    ]


def check_loading_status(self: Any, key: str) -> None:
    """The public parameters of `IMAGES`, which moto lacks."""
    moto_check_loading_status(self, key)
    if key in IMAGES and not dict.__contains__(self, key):
        dict.__setitem__(
            self,
            key,
            [
                ssm_models.Parameter(
                    account_id=self.account_id,
                    name=key,
                    value=IMAGES[key]["ami_id"],
                    parameter_type="String",
                    description=None,
                    allowed_pattern=None,
                    keyid=None,
                    last_modified_date=datetime.datetime.now(datetime.UTC),
                    version=1,
                    data_type="aws:ec2:image",
                )
            ],
        )


def get_service_quota(self: Any, service_code: str, quota_code: str) -> dict[str, Any]:
    """The quotas of vCPUs by kind of instance."""
    if service_code == "ec2" and quota_code in QUOTAS:
        return {
            "ServiceCode": "ec2",
            "ServiceName": "Amazon Elastic Compute Cloud (Amazon EC2)",
            "QuotaCode": quota_code,
            "QuotaName": QUOTAS[quota_code],
            "Value": settings.quotas[quota_code],
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
        }
    return moto_get_service_quota(self, service_code, quota_code)


def unreserved(lambda_backend: Any, but: str = "") -> int:
    """What the functions, `but` one, leave of Lambda's quota."""
    others = (one for one in lambda_backend.list_functions() if one.function_name != but)
    return settings.concurrency - sum(int(one.reserved_concurrency or 0) for one in others)


def put_function_concurrency(self: Any, function_name: str, reserved_concurrency: int) -> int:
    """100 stay for functions without a reservation, or all of a quota that is smaller."""
    least = min(100, settings.concurrency)
    if unreserved(self, function_name) - int(reserved_concurrency) < least:
        raise lambda_models.InvalidParameterValueException(
            "Specified ReservedConcurrentExecutions for function decreases account's "
            f"UnreservedConcurrentExecution below its minimum value of [{least}]."
        )
    return moto_put_function_concurrency(self, function_name, reserved_concurrency)


def get_account_settings(self: Any) -> str:
    """Lambda's quota and what of it is not reserved; moto has none of it."""
    left = unreserved(self.backend)
    limit = {
        "ConcurrentExecutions": settings.concurrency,
        "UnreservedConcurrentExecutions": left,
    }
    return json.dumps({"AccountLimit": limit})


# What the functions above call on.
moto_run_instances = ec2_instances.InstanceBackend.run_instances
moto_terminate_instances = ec2_instances.InstanceBackend.terminate_instances
moto_stop_instances = ec2_instances.InstanceBackend.stop_instances
moto_start_instances = ec2_instances.InstanceBackend.start_instances
moto_run_instances_response = instance_responses.InstanceResponse.run_instances
moto_create_volume_response = volume_responses.ElasticBlockStore.create_volume
moto_describe_snapshots_response = volume_responses.ElasticBlockStore.describe_snapshots
moto_describe_spot_instance_requests = (
    spot_requests.SpotRequestBackend.describe_spot_instance_requests
)
moto_create_volume = elastic_block_store.EBSBackend.create_volume
moto_attach_volume = elastic_block_store.EBSBackend.attach_volume
moto_detach_volume = elastic_block_store.EBSBackend.detach_volume
moto_create_snapshot = elastic_block_store.EBSBackend.create_snapshot
moto_delete_security_group_in = ec2_security_groups.SecurityGroupBackend._delete_security_group
moto_check_loading_status = ssm_models.ParameterDict._check_loading_status
moto_put_function_concurrency = lambda_models.LambdaBackend.put_function_concurrency
moto_get_service_quota = quota_models.ServiceQuotasBackend.get_service_quota


def mend() -> None:
    """Put the functions above in the places of moto's."""
    instance = ec2_instances.Instance
    instance.pending_describes = 0
    instance.instance_state = property(instance_state)
    instance.state = property(lambda self: self.instance_state.name)
    instance.state_code = property(lambda self: self.instance_state.code)
    instance.teardown_defaults = teardown_defaults
    instance.mapped_volume_ids = property(
        lambda self: [block.volume_id for block in self.block_device_mapping.values()]
    )
    ec2_utils.filter_dict_attribute_mapping.update(
        {
            "instance-lifecycle": "lifecycle",
            "spot-instance-request-id": "spot_instance_request_id",
            "client-token": "client_token",
            "block-device-mapping.volume-id": "mapped_volume_ids",
        }
    )
    instance.spot_instance_request_id = None
    backend_class = ec2_instances.InstanceBackend
    backend_class.run_instances = run_instances
    backend_class.terminate_instances = terminate_instances
    backend_class.stop_instances = stop_instances
    backend_class.start_instances = start_instances
    instance_responses.InstanceResponse.run_instances = run_instances_response
    instance_responses.InstanceResponse._parse_block_device_mapping = parse_block_device_mapping

    spot_backend = spot_requests.SpotRequestBackend
    spot_backend.cancel_spot_instance_requests = cancel_spot_instance_requests
    spot_backend.describe_spot_instance_requests = describe_spot_instance_requests
    spot_response = spot_responses.SpotInstances
    spot_response.describe_spot_price_history = describe_spot_price_history_response
    spot_response.get_spot_placement_scores = get_spot_placement_scores

    ebs = elastic_block_store
    ebs.EBSBackend.create_volume = create_volume
    ebs.EBSBackend.attach_volume = attach_volume
    ebs.EBSBackend.detach_volume = detach_volume
    ebs.EBSBackend.create_snapshot = create_snapshot
    ebs.Volume.volume_initialization_rate = None
    ebs.VolumeAttachment.delete_on_termination = property(attachment_deletes)
    ebs.Snapshot.progress = property(snapshot_progress)
    volume_responses.ElasticBlockStore.create_volume = create_volume_response
    volume_responses.ElasticBlockStore.describe_snapshots = describe_snapshots_response

    ec2_security_groups.SecurityGroupBackend._delete_security_group = delete_security_group_in
    amis.AmiBackend._load_amis = load_images
    amis.Ami.block_device_mappings = property(image_block_devices)
    ssm_models.ParameterDict._check_loading_status = check_loading_status
    quota_models.ServiceQuotasBackend.get_service_quota = get_service_quota

    lambda_models.LambdaBackend.put_function_concurrency = put_function_concurrency
    lambda_response = lambda_responses.LambdaResponse
    lambda_response.get_account_settings = get_account_settings
    path = r"{0}/(?P<api_version>[^/]+)/account-settings/?$"
    lambda_urls.url_paths[path] = lambda_response.dispatch
