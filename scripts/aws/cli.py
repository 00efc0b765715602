"""Calls of the AWS CLI, version 1 or 2: shown before they change anything, their errors explained.

Every call is a process of `aws`, so that it can be typed again as it was shown.
"""

import functools
import json
import os
import re
import shlex
import shutil
import subprocess
from typing import Any

from utils import UserError

# What AWS's errors mean here, and the next thing to do. The codes are those of the EC2 API
# Reference, "Error codes for the Amazon EC2 API".
ADVICE = {
    "MaxSpotInstanceCountExceeded": (
        "this account may not run so many spot vCPUs of that kind: ask for 4 or more (a g5.xlarge "
        "has 4) with: aws service-quotas request-service-quota-increase --service-code ec2 "
        "--quota-code L-3819A6DF --desired-value 8"
    ),
    "VcpuLimitExceeded": (
        "this account may not run so many vCPUs of that kind: ask for more with: aws "
        "service-quotas request-service-quota-increase --service-code ec2 --quota-code L-DB2E81BA "
        "(G and VT; L-1216C47A for the others) --desired-value 8"
    ),
    "InsufficientInstanceCapacity": "no capacity there now: try later, or another instance_type",
    "UnauthorizedOperation": "these credentials lack a permission: attach AmazonEC2FullAccess",
    "AccessDenied": "these credentials lack a permission for it",
    "AccessDeniedException": (
        "these credentials lack a permission for it: attach AmazonSSMReadOnlyAccess, or for a "
        "function AWSLambda_FullAccess and CloudWatchLogsFullAccess"
    ),
    "AuthFailure": "AWS does not know these credentials, or not in that region: aws configure",
    "InvalidClientTokenId": "AWS does not know these credentials: aws configure",
    "SignatureDoesNotMatch": "the secret key is wrong, or this computer's clock: aws configure",
    "RequestExpired": "this computer's clock is wrong, or the credentials are too old",
    "ExpiredToken": "the credentials have expired: log in again (aws sso login)",
    "ExpiredTokenException": "the credentials have expired: log in again (aws sso login)",
    "OptInRequired": "the region is not switched on for this account, or the account not ready yet",
    "EntityAlreadyExists": "something else has that name: set another project in aws.env",
    "404": "there is no such bucket: aws s3 mb s3://BUCKET",
    "403": "the bucket is not yours, or these credentials may not list it",
    "VPCIdNotSpecified": "the region has no default network: aws ec2 create-default-vpc",
    "ParameterNotFound": "the region has no such image: set gpu_ami and cpu_ami, or another region",
    "InvalidSpotInstanceRequest.PersistentRequestLimit": "cancel old spot requests first",
    "VolumeLimitExceeded": "the account's volumes are at their limit: delete some, or ask for more",
    "RequestLimitExceeded": "AWS is asked too often: the same command again in a minute",
}
CREDENTIALS_MISSING = ("Unable to locate credentials", "NoCredentials", "could not be found")
NO_REGION = ("You must specify a region", "Could not connect to the endpoint URL")


class AwsError(UserError):
    """AWS refused a call; `code` is the API's own name for the reason."""

    def __init__(self, text: str, code: str) -> None:
        super().__init__(text)
        self.code = code


class Aws:
    """The AWS CLI for one region; in a dry run it shows what it would change, and does not."""

    def __init__(self, region: str, dry_run: bool) -> None:
        if shutil.which("aws") is None:
            raise UserError(
                "the AWS CLI is not installed: https://docs.aws.amazon.com/cli/latest/userguide/"
                "getting-started-install.html (pip install awscli works too)"
            )
        self.region, self.dry_run = region, dry_run

    @functools.cached_property
    def region_name(self) -> str:
        """The region of the calls, also where only the AWS CLI's own settings name it."""
        if self.region:
            return self.region
        return self.read("ec2", "describe-availability-zones")["AvailabilityZones"][0]["RegionName"]

    def read(self, *arguments: object) -> Any:
        """The JSON answer of a call that changes nothing; raises AwsError, UserError."""
        return self._call([str(argument) for argument in arguments])

    def change(self, *arguments: object, dry: Any = None) -> Any:
        """Show a call that changes something, and make it; in a dry run, answer `dry` instead."""
        words = [str(argument) for argument in arguments]
        print(f"$ {self.as_typed(*words)}", flush=True)
        return dry if self.dry_run else self._call(words)

    def as_typed(self, *words: str) -> str:
        """A command of the AWS CLI for the region, as one types it."""
        return shlex.join(["aws", *words, *self._region()])

    def _region(self) -> list[str]:
        return ["--region", self.region] if self.region else []

    def _call(self, words: list[str]) -> Any:
        done = subprocess.run(
            ["aws", *words, *self._region(), "--output", "json"],
            env={**os.environ, "AWS_PAGER": ""},  # which version 2 would otherwise start
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            return json.loads(done.stdout) if done.stdout.strip() else {}
        raise _explained(" ".join(words[:2]), done.stderr)


def _explained(call: str, complaint: str) -> UserError:
    """AWS's complaint as one line with the next thing to do."""
    complaint = " ".join(complaint.split())
    if any(text in complaint for text in CREDENTIALS_MISSING):
        return UserError(f"no AWS credentials ({complaint}): aws configure, or aws sso login")
    if any(text in complaint for text in NO_REGION):
        return UserError(f"no such region, or no network ({complaint}): set region in aws.env")
    if "Unknown parameter in" in complaint or "Invalid choice" in complaint:
        return UserError(
            f"aws {call} failed: {complaint}: this AWS CLI is too old, install a newer"
        )
    found = re.search(r"An error occurred \(([\w.]+)\) when calling [^:]*: (.*)", complaint)
    if not found:
        return UserError(f"aws {call} failed: {complaint or 'without a word'}")
    code, text = found.groups()
    advice = ADVICE.get(code, "")
    if code.endswith(".NotFound"):
        advice = "it is gone since it was listed: the same command again"
    # An authorization message is a page of base64 for AWS's own decoder.
    text = text.split("Encoded authorization failure message")[0].rstrip(" .")
    return AwsError(f"aws {call}: {text} ({code})" + f": {advice}" * bool(advice), code)
