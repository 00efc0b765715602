"""The settings of scripts/aws, each declared once, and where a user changes them.

A setting stands in `aws.env` at the top of this repository, which git ignores, as a line
NAME=value; or in the environment as RESNET50_NAME, which goes first; or on the command line, for
that command alone. No id stands anywhere: what the commands make bears the project's tag, and they
find it by that.
"""

import dataclasses
import os
import re
import shlex
import typing
from pathlib import Path
from typing import Literal

from utils import ConfigOptions, UserError, check_config, parse_options

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILE = REPOSITORY / "aws.env"
ENVIRONMENT_PREFIX = "RESNET50_"


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is rented, where, and what it shall do."""

    project: str = "resnet50-imagenet"
    """name and tag of all that is made; another one is another training beside it"""
    region: str = ""
    """AWS region; empty: the one that the AWS CLI is set to"""
    zone: str = ""
    """availability zone; empty: the cheapest one that has capacity"""
    instance_type: str = "g5.xlarge"
    """what trains: g5.xlarge, 2xlarge, 4xlarge and 8xlarge have the same GPU"""
    market: Literal["spot", "on-demand"] = "spot"
    """spot costs about four tenths, and may be taken away and come back"""
    data_set: Literal["imagenet", "imagenet-100k", "imagenette"] = "imagenet"
    """what is trained on"""
    prepare_type: str = "c7i.xlarge"
    """what downloads and packs the data, on demand"""
    archive_gb: int = 260
    """disk of that instance in GB, for the system, PyTorch, and the archive of 167 GB"""
    data_gb: int = 60
    """volume for the packed data in GB; ImageNet at 400 px has about 48"""
    data_throughput: int = 437
    """throughput of that volume in MB/s, 125 to 1,000; a g5.xlarge reads 437 in bursts"""
    data_iops: int = 3000
    """reads a second of that volume, 3,000 to 16,000"""
    initialization_rate: int = 300
    """MiB/s at which it is filled from the snapshot, 100 to 300; 0: slowly, as it is read"""
    runs_gb: int = 20
    """volume for checkpoints and results in GB; it outlives the instance"""
    ssh_key: str = ""
    """private key, made if it is not there; empty: ~/.ssh/<project>"""
    ssh_from: str = "auto"
    """the one IPv4 address that may log in; auto: this computer's, from checkip.amazonaws.com"""
    ssh_options: str = ""
    """more options for ssh, such as -o ProxyJump=HOST"""
    ssh_user: str = "ubuntu"
    """who logs in"""
    gpu_ami: str = (
        "/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id"
    )
    """SSM parameter with the newest image for training: Ubuntu 24.04 with NVIDIA's driver"""
    cpu_ami: str = (
        "/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
    )
    """SSM parameter with the newest image for preparing the data"""
    trainer_options: str = ""
    """options of trainer.py, after an = on the command line: --trainer-options="--epochs 32"
    """
    mirror: str = ""
    """s3://bucket/prefix for a copy of each checkpoint; the bucket has to be there"""
    budget_usd: float = 0.0
    """US dollars at which training stops with everything saved; 0: no budget"""
    when_done: Literal["stop", "keep"] = "stop"
    """what becomes of the instance ten minutes after training has ended"""


@dataclasses.dataclass(frozen=True)
class _Trainer:
    config: ConfigOptions


def load_settings() -> Settings:
    """Defaults, changed by aws.env, changed by the environment; raises UserError."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    found: dict[str, tuple[str, str]] = {}  # a setting's value, and where it stands
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals:
            raise UserError(f"{FILE}, line {number}: {line.strip()!r} is not NAME=value")
        value = re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip())
        found[name.strip().lower()] = value, f"{FILE}, line {number}"
    for variable, value in os.environ.items():
        if variable.startswith(ENVIRONMENT_PREFIX):
            found[variable.removeprefix(ENVIRONMENT_PREFIX).lower()] = value, variable
    values = {}
    for name, (value, where) in found.items():
        if name not in fields:
            raise UserError(f"{where}: there is no setting {name}; known are {', '.join(fields)}")
        values[name] = _typed(fields[name], value, where)
    settings = Settings(**values)
    check_settings(settings)
    return settings


def _typed(field: dataclasses.Field, value: str, where: str) -> object:
    if typing.get_origin(field.type) is Literal:
        choices = typing.get_args(field.type)
        if value not in choices:
            raise UserError(f"{where}: {field.name} is {value!r}: choose {' or '.join(choices)}")
        return value
    try:
        return field.type(value)
    except ValueError:
        raise UserError(f"{where}: {field.name} is {value!r}: it must be a number") from None


def check_settings(settings: Settings) -> None:
    """Refuse what AWS or the trainer would refuse once it costs; raises UserError."""
    ranges = {
        "archive_gb": (20, 16_384),
        "data_gb": (1, 16_384),
        "runs_gb": (5, 16_384),
        "data_throughput": (125, 1000),
        "data_iops": (3000, 16_000),
    }
    for name, (least, most) in ranges.items():
        if not least <= getattr(settings, name) <= most:
            raise UserError(
                f"{name} is {getattr(settings, name)}: it must be {least:,} to {most:,}"
            )
    if settings.data_throughput > settings.data_iops // 4:
        raise UserError(
            f"data_throughput is {settings.data_throughput}: EC2 gives a quarter of data_iops, "
            f"{settings.data_iops:,}, at most: use {settings.data_iops // 4:,} or less, or "
            f"data_iops {4 * settings.data_throughput:,}"
        )
    rate = settings.initialization_rate
    if rate and not 100 <= rate <= 300:
        raise UserError(f"initialization_rate is {rate}: it must be 0, or 100 to 300")
    if not settings.project.replace("-", "").isalnum() or len(settings.project) > 40:
        raise UserError(f"project is {settings.project!r}: use up to 40 letters, digits and dashes")
    try:
        shlex.split(settings.ssh_options)
    except ValueError as error:
        reason = str(error).lower()
        raise UserError(f"ssh_options is {settings.ssh_options}: {reason}") from None
    if set(settings.trainer_options) & set("'\"\\$`"):
        raise UserError("trainer_options must do without quotes, backslashes and dollars")
    try:  # rather here than on the machine that is paid for
        check_config(parse_options(_Trainer, arguments=settings.trainer_options.split()).config)
    except UserError as error:
        reason = str(error).partition(" (python3 ")[0]
        raise UserError(
            f"trainer_options: {reason} (python3 trainer.py --help lists them)"
        ) from None
    if not 0 <= settings.budget_usd < float("inf"):
        raise UserError(f"budget_usd is {settings.budget_usd}: it must be 0 or more")
    if settings.mirror and not re.fullmatch(r"s3:/(/[\w.=+-]+)+/?", settings.mirror):
        raise UserError(f"mirror is {settings.mirror}: here it must be s3://bucket/prefix")
