"""The trained classifier as an AWS Lambda function with an address of its own, and its removal.

    python3 scripts/aws/function.py deploy     make the function, or bring it up to date
    python3 scripts/aws/function.py remove     delete it and all that was made for it

Reads `runs/NAME/export/model.onnx` and `model.json` (generate_trace_model.py), lambda_deploy/,
classifier.py and decoder.py of gradio_deploy/. pip fetches the packages for Lambda's Python 3.13,
whatever computer this is; they and the model go into a zip, by way of a bucket that is made for it,
since Lambda takes no more than 50 MB from a computer. Settings, --dry-run and --yes are those of
cloud.py, whose tear-down leaves the function alone. Needs permissions for Lambda, IAM, S3,
CloudWatch Logs and to list EC2's zones.

Without --public only who has the account's credentials may call it (`aws lambda invoke`, or
`curl --aws-sigv4`); with it everybody may, at the account's expense.
"""

import base64
import dataclasses
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Annotated, Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent / "gradio_deploy"))

import classifier
from cli import Aws, AwsError
from cloud import Options, confirm
from resources import PROJECT_TAG, tag_of
from settings import REPOSITORY, Settings, check_settings

from utils import (
    UserError,
    latest_run,
    parse_options,
    run_folder,
    run_stage,
    stale_export,
)

SOURCE = REPOSITORY / "lambda_deploy"
RUNTIME, ARCHITECTURE = "python3.13", "x86_64"
# Amazon Linux 2023, on which that runtime builds, has glibc 2.34. Not every pip knows that a
# platform takes what was built for an older one.
WHEELS = (
    *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_27_x86_64"),
    *("--platform", "manylinux2014_x86_64", "--python-version", "3.13"),
)
# What answering needs nothing of; licences stay.
NOT_NEEDED = (
    *("bin", "onnxruntime/tools", "onnxruntime/quantization", "onnxruntime/transformers"),
    *("**/tests", "**/*.pyi", "**/__pycache__"),
)
BUCKET = r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]"  # what S3 takes for a name
UNPACKED_BYTES = 250 * 2**20  # Lambda's limit for a zip package, unpacked
TIMEOUT_S = 30
LOG_DAYS = 30
UNRESERVED = 100  # instances at once that no function may reserve
ROLE_S, ROLE_POLL_S = 90.0, 3.0  # Lambda hears of a new role some seconds late
# US dollars in us-east-1 in November 2026.
GB_SECOND_USD, REQUEST_USD = 0.0000166667, 0.0000002


@dataclasses.dataclass(frozen=True)
class Deploy(Options):
    """make the function, or bring it up to date"""

    name: str = ""
    """the run; empty: the most recent one"""
    runs_folder: str = "runs"
    """folder that holds the runs"""
    public: bool = False
    """let everybody call it, without credentials, at this account's expense"""
    max_concurrency: int | None = None
    """how many requests at once it may answer, which limits its price; 0: as many as the account;
    not given: as before"""
    image_bucket: str = ""
    """bucket of whose pictures it may be asked by their keys; empty: none"""
    memory_mb: int = 1769
    """memory in MB, 1,536 to 10,240; 1,769 come with one whole vCPU"""


@dataclasses.dataclass(frozen=True)
class Remove(Options):
    """delete the function and all that was made for it"""


@dataclasses.dataclass(frozen=True)
class FunctionOptions:
    """Which command."""

    command: tyro.conf.OmitSubcommandPrefixes[
        tyro.conf.OmitArgPrefixes[
            Annotated[Deploy, tyro.conf.subcommand("deploy")]
            | Annotated[Remove, tyro.conf.subcommand("remove")]
        ]
    ]


# ------------------------------------------------------------------------------ the package


def find_export(options: Deploy) -> Path:
    """A run's ONNX file that the function can serve, model.json beside it; raises UserError.

    Also where the run has other weights by now.
    """
    name = options.name or latest_run(options.runs_folder)
    folder = run_folder(options.runs_folder, name) / "export"
    if not options.name:
        print(f"taking the most recent run: {name}")
    try:
        described, model, _ = classifier.read_export(folder)
    except classifier.ExportError as error:
        raise UserError(f"{error}: python3 generate_trace_model.py --name {name}") from None
    if complaint := stale_export(folder.parent, described):
        raise UserError(complaint)
    return model


def build_package(model: Path, folder: Path) -> Path:
    """A zip of our code, model and packages, in `folder`; the same inputs give the same bytes.

    Raises UserError where pip fails, or Lambda would refuse the package for its size.
    """
    content = folder / "content"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--no-compile", "--only-binary", ":all:", *WHEELS, "--target", content),
            *("-r", SOURCE / "requirements.txt"),
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "without a word").splitlines()[-1]
        raise UserError(f"pip cannot fetch the packages for {RUNTIME}: {reason}")
    for pattern in NOT_NEEDED:
        for path in list(content.glob(pattern)):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    app = REPOSITORY / "gradio_deploy"
    ours = (SOURCE / "handler.py", app / "classifier.py", app / "decoder.py")
    for file in (*ours, model, model.parent / "model.json"):
        shutil.copy(file, content)
    files = sorted(path for path in content.rglob("*") if path.is_file())
    unpacked_bytes = sum(path.stat().st_size for path in files)
    if unpacked_bytes > UNPACKED_BYTES:
        raise UserError(
            f"the package would have {unpacked_bytes / 1e6:.1f} MB, and Lambda takes "
            f"{UNPACKED_BYTES / 1e6:.1f}: deploy a container image, see lambda_deploy/Dockerfile"
        )
    package = folder / "function.zip"
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in files:
            entry = zipfile.ZipInfo(str(path.relative_to(content)))  # of 1980, so always the same
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, path.read_bytes())
    print(
        f"package: {unpacked_bytes / 1e6:.1f} MB of {UNPACKED_BYTES / 1e6:.1f} that Lambda takes, "
        f"{package.stat().st_size / 1e6:.1f} MB as a zip",
        flush=True,
    )
    return package


# ------------------------------------------------------------------------------ what there is


def found(aws: Aws, *arguments: object) -> dict[str, Any] | None:
    """The answer of a call about one thing; None where there is no such thing."""
    try:
        return aws.read(*arguments)
    except AwsError as error:
        if error.code not in ("ResourceNotFoundException", "NoSuchEntity", "NoSuchBucket", "404"):
            raise
        return None


def find_function(aws: Aws, settings: Settings) -> dict[str, Any] | None:
    """The function as get-function has it, or None; raises UserError for somebody else's."""
    function = found(aws, "lambda", "get-function", "--function-name", settings.project)
    if function is not None and function.get("Tags", {}).get(PROJECT_TAG) != settings.project:
        raise UserError(
            f"there is a function {settings.project} without the tag {PROJECT_TAG}: set another "
            "project in aws.env"
        )
    return function


def find_role(aws: Aws, settings: Settings) -> dict[str, Any] | None:
    """The function's role, or None; raises UserError for somebody else's."""
    name = role_name(aws, settings)
    role = found(aws, "iam", "get-role", "--role-name", name)
    if role is not None and tag_of(role["Role"], PROJECT_TAG) != settings.project:
        raise UserError(
            f"there is a role {name} without the tag {PROJECT_TAG}: set another project in aws.env"
        )
    return role and role["Role"]


def role_name(aws: Aws, settings: Settings) -> str:
    """The name of the function's role, which is not that of the instances; roles have no region."""
    return f"{settings.project}-lambda-{aws.region_name}"


def log_group(settings: Settings) -> str:
    """Where Lambda writes what the function says."""
    return f"/aws/lambda/{settings.project}"


def find_log_group(aws: Aws, settings: Settings) -> dict[str, Any] | None:
    """The function's log, or None; AWS lists all whose names begin so."""
    groups = aws.read(
        "logs", "describe-log-groups", "--log-group-name-prefix", log_group(settings)
    )["logGroups"]  # fmt: skip
    return next((one for one in groups if one["logGroupName"] == log_group(settings)), None)


def where(aws: Aws, settings: Settings) -> tuple[str, str, str]:
    """Region, account, and the bucket for packages: its name is unique in the world."""
    region = aws.region_name
    account = aws.read("sts", "get-caller-identity")["Account"]
    rest = f"-{account}-{region}"
    project = settings.project.lower()[: 63 - len(rest)].rstrip("-")  # S3 takes 63 letters
    return region, account, project + rest


# ------------------------------------------------------------------------------ deploying


def deploy(options: Deploy, aws: Aws) -> None:
    """Make what is missing, change what differs, and print the function's address."""
    settings = options.settings
    if not 1536 <= options.memory_mb <= 10_240:
        raise UserError(f"memory_mb is {options.memory_mb}: it must be 1,536 to 10,240")
    if (options.max_concurrency or 0) < 0:
        raise UserError(f"max_concurrency is {options.max_concurrency}: it must be 0 or more")
    if options.image_bucket and not re.fullmatch(BUCKET, options.image_bucket):
        raise UserError(
            f"image_bucket is {options.image_bucket!r}: it must be a bucket's name alone, such as "
            "my-bucket"
        )
    model = find_export(options)
    function = find_function(aws, settings)
    concurrency = concurrency_to_set(aws, options)
    region, account, bucket = where(aws, settings)
    with tempfile.TemporaryDirectory(prefix="resnet50-lambda-") as folder:
        print(f"fetching the packages for {RUNTIME} ...", flush=True)
        package = build_package(model, Path(folder))
        second_usd = GB_SECOND_USD * options.memory_mb / 1024
        confirm(
            options,
            f"{'updates' if function else 'makes'} the function {settings.project} in {region}: "
            f"idle it costs nothing, 1,000 requests of 0.2 s about "
            f"${1000 * (REQUEST_USD + 0.2 * second_usd):.4f}."
            + " Everybody who knows its address may call it."
            * options.public,
        )
        role_arn = ensure_role(aws, options, region, account)
        ensure_log_group(aws, settings)
        code_sha256 = base64.b64encode(hashlib.sha256(package.read_bytes()).digest()).decode()
        if function is None or function["Configuration"]["CodeSha256"] != code_sha256:
            put_code(aws, options, function, role_arn, package, (account, bucket, region))
    if function is not None:
        configure(aws, options, function["Configuration"])
    if concurrency is not None:
        set_concurrency(aws, settings, concurrency)
    url = ensure_url(aws, options)
    if not aws.dry_run:
        print(f"the function answers at {url}")
        print(
            f"  curl --data-binary @photo.jpg {url}"
            if options.public
            else f"  curl --aws-sigv4 aws:amz:{region}:lambda --user KEY_ID:SECRET_KEY "
            f"--data-binary @photo.jpg {url}"
        )


def ensure_role(aws: Aws, options: Deploy, region: str, account: str) -> str:
    """ARN of the role that lets the function write its log and read the bucket, and no more."""
    settings, name = options.settings, role_name(aws, options.settings)
    lines = f"arn:aws:logs:{region}:{account}:log-group:{log_group(settings)}:*"
    may = [
        {
            "Effect": "Allow",
            "Action": ["logs:CreateLogStream", "logs:PutLogEvents"],
            "Resource": lines,
        }
    ]
    if options.image_bucket:
        objects = f"arn:aws:s3:::{options.image_bucket}/*"
        may.append({"Effect": "Allow", "Action": "s3:GetObject", "Resource": objects})
    policy = {"Version": "2012-10-17", "Statement": may}
    trust = {
        "Effect": "Allow",
        "Principal": {"Service": "lambda.amazonaws.com"},
        "Action": "sts:AssumeRole",
    }
    role = find_role(aws, settings)
    if role is None:
        role = aws.change(
            "iam", "create-role", "--role-name", name, "--assume-role-policy-document",
            json.dumps({"Version": "2012-10-17", "Statement": [trust]}),
            "--tags", f"Key={PROJECT_TAG},Value={settings.project}",
            dry={"Role": {"Arn": "<role>"}},
        )["Role"]  # fmt: skip
    has = None
    if role["Arn"] != "<role>":
        has = found(
            aws, "iam", "get-role-policy", "--role-name", name, "--policy-name", "function"
        )  # fmt: skip
    if has is None or has["PolicyDocument"] != policy:
        aws.change(
            "iam", "put-role-policy", "--role-name", name, "--policy-name", "function",
            "--policy-document", json.dumps(policy),
        )  # fmt: skip
    return role["Arn"]


def ensure_log_group(aws: Aws, settings: Settings) -> None:
    """A log that forgets; Lambda would make one that keeps everything."""
    group = find_log_group(aws, settings)
    if group is None:
        aws.change(
            "logs", "create-log-group", "--log-group-name", log_group(settings),
            "--tags", f"{PROJECT_TAG}={settings.project}",
        )  # fmt: skip
    if group is None or group.get("retentionInDays") != LOG_DAYS:
        aws.change(
            "logs", "put-retention-policy", "--log-group-name", log_group(settings),
            "--retention-in-days", LOG_DAYS,
        )  # fmt: skip


def put_code(
    aws: Aws,
    options: Deploy,
    function: dict[str, Any] | None,
    role_arn: str,
    package: Path,
    place: tuple[str, str, str],
) -> None:
    """Make the function with the package, or give it another one, by way of a bucket."""
    settings, (account, bucket, region) = options.settings, place
    owner = ("--expected-bucket-owner", account)  # should somebody else have taken the name
    if found(aws, "s3api", "head-bucket", "--bucket", bucket, *owner) is None:
        elsewhere = ("--create-bucket-configuration", f"LocationConstraint={region}")
        aws.change(
            "s3api", "create-bucket", "--bucket", bucket,
            *(elsewhere if region != "us-east-1" else ()),
        )  # fmt: skip
    stored = ("--bucket", bucket, "--key", package.name, *owner)
    aws.change("s3api", "put-object", *stored, "--body", package)
    if function is None:
        once_its_role_is_known(
            aws, "lambda", "create-function", "--function-name", settings.project,
            "--runtime", RUNTIME, "--architectures", ARCHITECTURE, "--handler", "handler.handler",
            "--role", role_arn, "--code", f"S3Bucket={bucket},S3Key={package.name}",
            *configuration(options), "--tags", f"{PROJECT_TAG}={settings.project}",
        )  # fmt: skip
        wait_until(aws, settings, "function-active-v2")
    else:
        wait_until(aws, settings, "function-updated-v2")
        aws.change(
            "lambda", "update-function-code", "--function-name", settings.project,
            "--s3-bucket", bucket, "--s3-key", package.name,
        )  # fmt: skip
        wait_until(aws, settings, "function-updated-v2")
    # Lambda has its own copy; the empty bucket costs nothing.
    aws.change("s3api", "delete-object", *stored)


def wait_until(aws: Aws, settings: Settings, state: str) -> None:
    """Wait with the CLI's own `aws lambda wait`."""
    if not aws.dry_run:
        aws.read("lambda", "wait", state, "--function-name", settings.project)


def once_its_role_is_known(aws: Aws, *arguments: object) -> None:
    """aws.change(), again for a while if Lambda does not know a new role yet."""
    deadline = time.monotonic() + ROLE_S
    while True:
        try:
            aws.change(*arguments)
            return
        except AwsError as error:
            if "cannot be assumed" not in str(error) or time.monotonic() > deadline:
                raise
        print("Lambda does not know the role yet", flush=True)
        time.sleep(ROLE_POLL_S)


def environment(options: Deploy) -> dict[str, str]:
    """The function's variables."""
    return {"IMAGE_BUCKET": options.image_bucket} if options.image_bucket else {}


def configuration(options: Deploy) -> list[object]:
    """The CLI's options for what of the function may be changed later."""
    return [
        *("--memory-size", options.memory_mb, "--timeout", TIMEOUT_S),
        *("--environment", json.dumps({"Variables": environment(options)})),
    ]


def configure(aws: Aws, options: Deploy, has: dict[str, Any]) -> None:
    """Change what differs in a function that was there."""
    has_now = (has["MemorySize"], has["Timeout"], has.get("Environment", {}).get("Variables", {}))
    if has_now != (options.memory_mb, TIMEOUT_S, environment(options)):
        aws.change(
            "lambda", "update-function-configuration",
            "--function-name", options.settings.project, *configuration(options),
        )  # fmt: skip
        wait_until(aws, options.settings, "function-updated-v2")


def concurrency_to_set(aws: Aws, options: Deploy) -> int | None:
    """What to reserve for the function, 0 to take a reservation away, None if nothing changes.

    Raises UserError for more than the account may reserve: AWS keeps 100, or the whole of a smaller
    quota, for functions without a reservation.
    """
    asked = options.max_concurrency
    if asked is None:
        return None
    name = ("--function-name", options.settings.project)
    has = found(aws, "lambda", "get-function-concurrency", *name) or {}
    reserved = has.get("ReservedConcurrentExecutions", 0)
    if asked == reserved:
        return None
    if asked:
        limit = aws.read("lambda", "get-account-settings")["AccountLimit"]
        quota = limit["ConcurrentExecutions"]
        most = limit["UnreservedConcurrentExecutions"] + reserved - min(UNRESERVED, quota)
        if asked > most:
            raise UserError(
                f"max_concurrency is {asked}: of this account's quota of {quota:,} in "
                f"{aws.region_name} AWS lets {f'at most {max(most, 0):,}' if most > 0 else 'none'} "
                "be reserved: leave the option out (the quota limits the price too), or ask for "
                "more with: aws service-quotas request-service-quota-increase --service-code "
                f"lambda --quota-code L-B99A9384 --desired-value 1000 --region {aws.region_name}"
            )
    return asked


def set_concurrency(aws: Aws, settings: Settings, concurrency: int) -> None:
    """Reserve as many instances for the function; with 0 it shares the account's rest."""
    name = ("--function-name", settings.project)
    if concurrency:
        aws.change(
            "lambda", "put-function-concurrency", *name,
            "--reserved-concurrent-executions", concurrency,
        )  # fmt: skip
    else:
        aws.change("lambda", "delete-function-concurrency", *name)


def ensure_url(aws: Aws, options: Deploy) -> str:
    """The function's address, open to whom the options say."""
    name = ("--function-name", options.settings.project)
    kind = "NONE" if options.public else "AWS_IAM"
    url = found(aws, "lambda", "get-function-url-config", *name)
    policy = found(aws, "lambda", "get-policy", *name)
    allowed = {one["Sid"] for one in json.loads(policy["Policy"])["Statement"]} if policy else set()
    # Since October 2025 a public address needs both.
    wanted = {
        "public-url": ("lambda:InvokeFunctionUrl", "--function-url-auth-type", "NONE"),
        "public-invoke": ("lambda:InvokeFunction", "--invoked-via-function-url"),
    }
    for sid, (action, *condition) in wanted.items():
        if options.public and sid not in allowed:
            aws.change(
                "lambda", "add-permission", *name, "--statement-id", sid,
                "--action", action, "--principal", "*", *condition,
            )  # fmt: skip
        elif not options.public and sid in allowed:
            aws.change("lambda", "remove-permission", *name, "--statement-id", sid)
    if url is None:
        url = aws.change(
            "lambda", "create-function-url-config", *name, "--auth-type", kind,
            dry={"FunctionUrl": "<address>"},
        )  # fmt: skip
    elif url["AuthType"] != kind:
        aws.change("lambda", "update-function-url-config", *name, "--auth-type", kind)
    return url["FunctionUrl"]


# ------------------------------------------------------------------------------ removing


def remove(options: Remove, aws: Aws) -> None:
    """Delete the function, which ends its address first, then what was made for it."""
    settings = options.settings
    name = role_name(aws, settings)
    region, account, bucket = where(aws, settings)
    owner = ("--expected-bucket-owner", account)
    function, role = find_function(aws, settings), find_role(aws, settings)
    has_log = find_log_group(aws, settings) is not None
    has_bucket = found(aws, "s3api", "head-bucket", "--bucket", bucket, *owner) is not None
    lines = [
        *([f"function {settings.project}"] if function else []),
        *([f"role {name}"] if role else []),
        *([f"log {log_group(settings)}"] if has_log else []),
        *([f"bucket {bucket}"] if has_bucket else []),
    ]
    if not lines:
        print(f"there is no function {settings.project} in {region}, and nothing of it")
        return
    confirm(options, "deletes:\n  " + "\n  ".join(lines))
    if function:
        if found(aws, "lambda", "get-function-url-config", "--function-name", settings.project):
            aws.change(
                "lambda", "delete-function-url-config", "--function-name", settings.project
            )  # fmt: skip
        aws.change("lambda", "delete-function", "--function-name", settings.project)
    if has_log:
        aws.change("logs", "delete-log-group", "--log-group-name", log_group(settings))
    if has_bucket:
        # There only where a deployment was broken off.
        stored = ("--bucket", bucket, "--key", "function.zip", *owner)
        aws.change("s3api", "delete-object", *stored)
        aws.change("s3api", "delete-bucket", "--bucket", bucket, *owner)
    if role:
        policies = aws.read("iam", "list-role-policies", "--role-name", name)["PolicyNames"]
        for policy in policies:
            aws.change("iam", "delete-role-policy", "--role-name", name, "--policy-name", policy)
        aws.change("iam", "delete-role", "--role-name", name)
    if not aws.dry_run:
        print("all gone")


COMMANDS = {Deploy: deploy, Remove: remove}


def main() -> None:
    """Run one command."""
    options = parse_options(FunctionOptions, __doc__).command
    check_settings(options.settings)
    COMMANDS[type(options)](options, Aws(options.settings.region, options.dry_run))
    if options.dry_run:
        print("dry run: nothing was changed")


if __name__ == "__main__":
    run_stage(main)
