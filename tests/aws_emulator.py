"""An AWS on loopback for tests of the real AWS CLI: EC2, S3, SSM, IAM, STS, Lambda, quotas.

    python tests/aws_emulator.py PORT LOGFILE

PORT 0 takes a free one; the first line on stdout is the port. It is moto's server, mended by
mended_moto.py, in one process that forgets everything when it ends. Each call is a line of JSON in
LOGFILE: time, service, action, params, status and, where it was refused, code. In a test:

    with start_emulator(tmp_path) as emulator:
        subprocess.run([emulator.aws, "ec2", "describe-instances"], env=emulator.environment)
        emulator.fail("RunInstances", "InsufficientInstanceCapacity", zone="us-east-1a")
        emulator.interrupt(instance_id)
        assert [call["action"] for call in emulator.calls()] == ["DescribeInstances"]

What of AWS it shows beside moto's: spot requests of run-instances with their whole life, spot
prices that move, the volumes, snapshots, images and refusals that mended_moto.py lists.

What it does not show: time (an instance runs, stops and terminates at once, unless `set` says how
many looks it stays pending), permissions (every key may do everything, unless `fail` refuses),
EC2's quotas (asked for, not applied), the machines themselves, the two minutes of an interruption
notice.
"""

import contextlib
import dataclasses
import io
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.sax.saxutils import escape

REGION = "us-east-1"
# The status that AWS sends with an error, where it is not 400. The CLI tries anew after 500 and
# 503, and so counts as several requests (AWS_MAX_ATTEMPTS in its environment limits them).
ERROR_STATUS = {
    "UnauthorizedOperation": 403,
    "AccessDenied": 403,
    "AccessDeniedException": 400,
    "ExpiredToken": 400,
    "ExpiredTokenException": 400,
    "RequestExpired": 400,
    "AuthFailure": 401,
    "RequestLimitExceeded": 503,
    "InsufficientInstanceCapacity": 500,
    "InsufficientHostCapacity": 500,
    "InternalError": 500,
    "Unavailable": 503,
    "SlowDown": 503,
}
DRY_RUN = {
    "code": "DryRunOperation",
    "message": "Request would have succeeded, but DryRun flag is set.",
    "status": "412",
}
WAITER_DELAY_S = 0.1  # the CLI's own is 15


# --------------------------------------------------------------------------- for the tests


@dataclasses.dataclass
class Emulator:
    """A running emulator, as a test sees it."""

    port: int
    log: Path
    errors: Path
    environment: dict[str, str]
    process: subprocess.Popen[str]
    aws = Path(sys.executable).with_name("aws")

    def calls(self, action: str | None = None) -> list[dict[str, Any]]:
        """The calls so far, or those of one action, the first of them first."""
        calls = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [call for call in calls if action in (None, call["action"])]

    def clear(self) -> None:
        """Forget the calls, not what they have made."""
        os.truncate(self.log, 0)

    def control(self, verb: str, **values: object) -> Any:
        """Ask the emulator itself; the answer to /emulator/`verb`."""
        query = urllib.parse.urlencode({key: str(value) for key, value in values.items()})
        url = f"http://127.0.0.1:{self.port}/emulator/{verb}?{query}"
        try:
            with urllib.request.urlopen(url, data=b"", timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ValueError(error.read().decode()) from None

    def reset(self) -> None:
        """Forget all: resources, settings, faults and calls."""
        self.control("reset")
        self.clear()

    def check(self) -> None:
        """RuntimeError, where a call has met a bug of the emulator's or what moto lacks."""
        said = self.errors.read_text()
        os.truncate(self.errors, 0)
        if "Traceback" in said:
            raise RuntimeError(f"the emulator itself failed:\n{said}")

    def fail(
        self, action: str, code: str, message: str = "", times: int = 1, zone: str = "", **more: Any
    ) -> None:
        """Refuse the next `times` calls of `action` (0: all until `heal`) with AWS's error `code`.

        `zone`: only calls that name it or a subnet of it. `status`: another than AWS's own.
        `match`: only calls whose parameters, as JSON, hold this text. The code "drop" ends the
        connection without an answer; with `after=1` the call has been carried out all the same.
        """
        self.control(
            "fail", action=action, code=code, message=message, times=times, zone=zone, **more
        )

    def heal(self) -> None:
        """Refuse no call any more."""
        self.control("heal")

    def interrupt(self, instance_id: str, why: str = "no-capacity") -> str:
        """Take a spot instance's capacity back, as EC2 does; the request's status code."""
        return self.control("interrupt", instance=instance_id, why=why)

    def resume(self, instance_id: str) -> str:
        """Give an interrupted spot instance capacity again; the id of what runs now."""
        return self.control("resume", instance=instance_id)

    def shut_down(self, instance_id: str) -> str:
        """`shutdown` within the instance; the state that it has then."""
        return self.control("shut_down", instance=instance_id)

    def set(self, **values: object) -> None:
        """snapshot_describes, instance_describes: how many looks these stay pending, or going.

        concurrency: Lambda's quota of instances at once.

        has_capacity: 0 where a spot request has to wait once its instance was terminated.

        price_usd with instance_type and zone: the spot price from now on. score with zone: its
        placement score. quota with value: vCPUs.
        """
        self.control("set", **values)


@contextlib.contextmanager
def start_emulator(folder: Path) -> Iterator[Emulator]:
    """An emulator in a process of its own, whose log and the CLI's settings lie in `folder`.

    RuntimeError at the end, as Emulator.check.
    """
    log = folder / "aws_calls.jsonl"
    log.touch()
    waiters = write_quick_waiters(folder / "aws_data")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
        "AWS_ACCESS_KEY_ID": "AKIAtestonly",
        "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIsecret",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_PAGER": "",
        "AWS_DATA_PATH": str(waiters),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    errors = folder / "aws_errors.log"
    with (
        open(errors, "a") as trouble,  # which is cut while it is written to
        subprocess.Popen(
            [sys.executable, __file__, "0", str(log)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=trouble,
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            environment["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{port}"
            emulator = Emulator(port, log, errors, environment, process)
            yield emulator
        finally:
            process.terminate()
    emulator.check()


def write_quick_waiters(folder: Path) -> Path:
    """The CLI's own waiters with a short delay, where AWS_DATA_PATH=`folder` lets it find them."""
    import awscli

    for own in Path(awscli.__file__).parent.glob("botocore/data/ec2/*/waiters-2.json"):
        model = json.loads(own.read_text())
        for waiter in model["waiters"].values():
            waiter["delay"] = WAITER_DELAY_S
        quick = folder / "ec2" / own.parent.name / own.name
        quick.parent.mkdir(parents=True, exist_ok=True)
        quick.write_text(json.dumps(model))
    return folder


# ------------------------------------------------------------------------------ the server

Wsgi = Callable[[dict[str, Any], Callable[..., Any]], Any]


def main() -> None:
    """Serve until terminated."""
    port, log = int(sys.argv[1]), Path(sys.argv[2])
    os.environ["MOTO_PORT"] = str(port)
    import mended_moto
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it writes a line a request
    mended_moto.mend()
    moto = DomainDispatcherApplication(create_backend_app)
    with open(log, "a", buffering=1) as lines:
        server = make_server(
            "127.0.0.1",
            port,
            Front(moto, mended_moto, lines.write),
            threaded=True,
            request_handler=MotoRequestHandler,
        )
        print(server.port, flush=True)
        server.serve_forever()


class Front:
    """Stands before moto: writes the calls down, refuses what a test wants refused."""

    def __init__(self, moto: Wsgi, mended: ModuleType, write: Callable[[str], Any]) -> None:
        self.moto = moto
        self.mended = mended  # the module mended_moto, which the tests' own process need not import
        self.write = write
        self.faults: list[dict[str, Any]] = []
        self.lock = threading.Lock()  # moto's backends, and the mends, know no threads

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        path = environ.get("PATH_INFO", "")
        if path.startswith("/emulator/"):
            return self.answer_test(path.removeprefix("/emulator/"), environ, start_response)
        call = read_call(environ)
        with self.lock if call["service"] != "s3" else contextlib.nullcontext():
            return self.answer_call(call, environ, start_response)

    def answer_call(self, call: dict[str, Any], environ: Any, start_response: Any) -> Any:
        fault = self.fault_of(call)
        if call["service"] == "s3" and self.mended.is_another_accounts_bucket(
            call["params"]["Bucket"], environ.get("HTTP_X_AMZ_EXPECTED_BUCKET_OWNER")
        ):
            fault = {"code": "AccessDenied"}
        answer: dict[str, Any] = {}

        def keep(status: str, headers: list[tuple[str, str]], *_: Any) -> None:
            answer.update(status=status, headers=headers)

        if fault and not fault.get("after"):
            status, kind, body = error_of(call["service"], fault)
            answer.update(status=status, headers=[("Content-Type", kind)])
            parts = [body.encode()]
        else:
            try:
                parts = list(self.moto(environ, keep))
            except Exception:
                self.write(json.dumps({**call, "status": 500, "code": "EmulatorFailed"}) + "\n")
                raise
        call["status"] = int(answer["status"].split()[0])
        if call["action"] in ("DescribeInstances", "DescribeInstanceStatus"):
            self.mended.looked_at_instances()
        if call["params"].get("DryRun") == "true" and call["status"] == 200:
            # moto's describe calls know no DryRun.
            status, kind, body = error_of("ec2", DRY_RUN)
            answer.update(status=status, headers=[("Content-Type", kind)])
            parts, call["status"] = [body.encode()], 412
        if fault:
            call["code"] = fault["code"]
        elif call["status"] >= 400:
            call["code"] = code_in(b"".join(parts).decode(errors="replace"))
        self.write(json.dumps(call) + "\n")
        if fault and fault["code"] == "drop":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(answer["status"], answer["headers"])
        return parts

    def fault_of(self, call: dict[str, Any]) -> dict[str, Any] | None:
        for fault in self.faults:
            if fault["action"] not in ("*", call["action"]):
                continue
            if fault.get("zone") and fault["zone"] not in self.zones_of(call["params"]):
                continue
            if fault.get("match") and fault["match"] not in json.dumps(call["params"]):
                continue
            if fault["left"] == 1:
                self.faults.remove(fault)
            fault["left"] -= 1
            return fault
        return None

    def zones_of(self, params: dict[str, Any]) -> set[str]:
        """The zones that a call of EC2's names, itself or by a subnet."""
        zones = {value for key, value in params.items() if key.endswith("AvailabilityZone")}
        for key, value in params.items():
            if key.endswith("SubnetId"):
                with contextlib.suppress(Exception):  # unknown: moto will say so
                    zones.add(self.mended.backend().get_subnet(value).availability_zone)
        return zones

    def answer_test(self, verb: str, environ: Any, start_response: Any) -> Any:
        values = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", "")))
        with self.lock:
            try:
                answer = self.obey(verb, values)
                status = "200 OK"
            except Exception as error:
                answer, status = f"{type(error).__name__}: {error}", "400 Bad Request"
        start_response(status, [("Content-Type", "application/json")])
        return [json.dumps(answer).encode()]

    def obey(self, verb: str, values: dict[str, str]) -> Any:
        if verb == "fail":
            self.faults.append({**values, "left": int(values.get("times", 1))})
        elif verb == "heal":
            self.faults.clear()
        elif verb == "interrupt":
            return self.mended.interrupt(values["instance"], values.get("why", "no-capacity"))
        elif verb == "resume":
            return self.mended.resume(values["instance"])
        elif verb == "shut_down":
            return self.mended.shut_down(values["instance"])
        elif verb == "set":
            set_values(self.mended.settings, values)
        elif verb == "reset":
            from moto.moto_api._internal.models import moto_api_backend

            moto_api_backend.reset()
            self.faults.clear()
            self.mended.settings.__init__()
        else:
            raise ValueError(f"no such verb: {verb}")
        return None


def set_values(settings: Any, values: dict[str, str]) -> None:
    for key, value in values.items():
        if key in ("snapshot_describes", "instance_describes", "has_capacity", "concurrency"):
            setattr(settings, key, int(value))
        elif key == "price_usd":
            changes = settings.prices_usd.setdefault((values["instance_type"], values["zone"]), [])
            changes.append((time.time(), float(value)))
        elif key == "score":
            settings.scores[values["zone"]] = int(value)
        elif key == "quota":
            settings.quotas[value] = float(values["value"])
        elif key not in ("instance_type", "zone", "value"):
            raise ValueError(f"no such setting: {key}")


def read_call(environ: dict[str, Any]) -> dict[str, Any]:
    """What is asked of which service, from a request; its body can be read again."""
    call: dict[str, Any] = {"time": time.time(), "service": "s3", "action": "", "params": {}}
    # Credential=KEY/DATE/REGION/SERVICE/aws4_request in the Authorization or, presigned, the query.
    scope = environ.get("HTTP_AUTHORIZATION", "").partition("Credential=")[2].split(",")[0]
    if scope.count("/") == 4:
        call["service"] = scope.split("/")[3]
    if call["service"] == "s3":
        call.update(read_s3_call(environ))
        return call
    body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    target = environ.get("HTTP_X_AMZ_TARGET", "")
    if call["service"] == "lambda":  # REST, which names no action
        call["action"] = read_lambda_action(environ)
        call["params"] = json.loads(body or b"{}")
    elif target:  # JSON, as SSM and the quotas speak
        call["action"] = target.rpartition(".")[2]
        call["params"] = json.loads(body or b"{}")
    else:  # a form, as EC2, IAM and STS speak
        form = urllib.parse.parse_qsl(body.decode(), keep_blank_values=True)
        form += urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""))
        call["params"] = {key: value for key, value in form if key not in ("Action", "Version")}
        call["action"] = dict(form).get("Action", "")
    return call


def read_lambda_action(environ: dict[str, Any]) -> str:
    """Lambda's action, told from the method and the path: /2015-03-31/functions/NAME/KIND."""
    kind = "/".join(environ.get("PATH_INFO", "").split("/")[4:])
    things = {
        "": "Function",
        "code": "FunctionCode",
        "configuration": "FunctionConfiguration",
        "concurrency": "FunctionConcurrency",
        "url": "FunctionUrlConfig",
    }
    method = environ["REQUEST_METHOD"]
    if kind.startswith("policy"):
        return {"POST": "AddPermission", "DELETE": "RemovePermission"}.get(method, "GetPolicy")
    creates = method == "POST" or (kind == "concurrency" and method == "PUT")
    verb = "Create" if creates else {"PUT": "Update", "DELETE": "Delete"}.get(method, "Get")
    return verb + things.get(kind, kind)


def read_s3_call(environ: dict[str, Any]) -> dict[str, Any]:
    """S3 names no action: it is told from the method, the path and the query."""
    bucket, _, key = environ.get("PATH_INFO", "").removeprefix("/").partition("/")
    query = dict(urllib.parse.parse_qsl(environ.get("QUERY_STRING", ""), keep_blank_values=True))
    method = environ["REQUEST_METHOD"]
    verb = {"POST": "Put", "DELETE": "Delete"}.get(method, method.title())
    action = f"{verb}{'Object' if key else 'Bucket'}"
    if not bucket:
        action = "ListBuckets"
    elif "uploads" in query:
        action = "CreateMultipartUpload" if method == "POST" else "ListMultipartUploads"
    elif "uploadId" in query:
        action = {
            "PUT": "UploadPart",
            "POST": "CompleteMultipartUpload",
            "DELETE": "AbortMultipartUpload",
        }.get(method, "ListParts")
    elif method == "POST" and "delete" in query:
        action = "DeleteObjects"
    elif environ.get("HTTP_X_AMZ_COPY_SOURCE"):
        action = "CopyObject"
    elif not key and method == "GET" and (not query or {"list-type", "prefix"} & query.keys()):
        action = "ListObjectsV2"
    elif not key and method == "PUT" and not query:
        action = "CreateBucket"
    else:  # ?tagging, ?lifecycle, ?publicAccessBlock and so on
        for name, value in query.items():
            if not value and not name.startswith(("x-", "X-")):
                action += name[:1].upper() + name[1:]
    return {"action": action, "params": {"Bucket": bucket, "Key": key, **query}}


def error_of(service: str, fault: dict[str, Any]) -> tuple[str, str, str]:
    """Status line, content type and body of a refusal, as each protocol of AWS's has them."""
    code = fault["code"]
    message = fault.get("message") or f"The request was refused with {code}."
    status = int(fault.get("status") or ERROR_STATUS.get(code, 400))
    line, request_id = f"{status} Refused", uuid.uuid4()
    what = f"<Code>{escape(code)}</Code><Message>{escape(message)}</Message>"
    if service in ("ssm", "servicequotas", "logs", "lambda"):
        return line, "application/x-amz-json-1.1", json.dumps({"__type": code, "message": message})
    if service == "ec2":
        body = f"<Response><Errors><Error>{what}</Error></Errors><RequestID>{request_id}"
        return line, "text/xml", f"{body}</RequestID></Response>"
    if service == "s3":
        return line, "application/xml", f"<Error>{what}<RequestId>{request_id}</RequestId></Error>"
    body = f"<ErrorResponse><Error><Type>Sender</Type>{what}</Error><RequestId>{request_id}"
    return line, "text/xml", f"{body}</RequestId></ErrorResponse>"


def code_in(body: str) -> str:
    """AWS's error code in an answer, XML or JSON."""
    if "<Code>" in body:
        return body.partition("<Code>")[2].partition("<")[0]
    with contextlib.suppress(ValueError, AttributeError):
        return str(json.loads(body).get("__type", "")).rpartition("#")[2]
    return ""


if __name__ == "__main__":
    main()
