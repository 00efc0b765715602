"""AWS Lambda's runtime API on loopback: what a function's runtime client asks for its events.

Used by the tests and by benchmark_lambda.py, with AWS's own client, awslambdaric, and no Docker.
"""

import base64
import contextlib
import http.server
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from utils import EXIT_FAILED, UserError

ANSWER_LIMIT_S = 30


class Runtime:
    """The API, with the function that asks it for events."""

    function: subprocess.Popen  # awslambdaric, once it is started

    def __init__(self, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.events: queue.Queue[Any] = queue.Queue()
        self.answers: queue.Queue[tuple[str, Any]] = queue.Queue()  # path and content

    def ask(self, event: Any) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer to an event; UserError if there is no answer."""
        self.events.put(event)
        try:
            path, answer = self.answers.get(timeout=ANSWER_LIMIT_S)
        except queue.Empty:
            raise UserError(
                f"the function has not answered in {ANSWER_LIMIT_S} s", EXIT_FAILED
            ) from None
        if not path.endswith("/response") or "statusCode" not in answer:
            raise UserError(f"the function answered to {path} with {answer}", EXIT_FAILED)
        return answer["statusCode"], json.loads(answer["body"])


@contextlib.contextmanager
def started(
    task: Path, python: Sequence[str | Path], environment: Mapping[str, str]
) -> Iterator[Runtime]:
    """The function that lies in `task` under awslambdaric, from when its process starts."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            event = json.dumps(runtime.events.get()).encode()
            self.send_response(200)
            self.send_header("Lambda-Runtime-Aws-Request-Id", "request-1")
            self.send_header("Lambda-Runtime-Deadline-Ms", str(int(1e3 * (time.time() + 30))))
            self.send_header("Lambda-Runtime-Invoked-Function-Arn", "arn:aws:lambda:f")
            self.send_header("Content-Type", "application/json")  # without it the client crashes
            self.send_header("Content-Length", str(len(event)))
            self.end_headers()
            self.wfile.write(event)

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            runtime.answers.put((self.path, json.loads(body)))
            self.send_response(202)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # the function is killed while it waits for an event
    runtime = Runtime(server.server_port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    bare = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    runtime.function = subprocess.Popen(
        [*python, "-m", "awslambdaric", "handler.handler"],
        cwd=task,
        env={
            **bare,
            "AWS_LAMBDA_RUNTIME_API": runtime.address,
            "AWS_LAMBDA_FUNCTION_MEMORY_SIZE": "1769",
            "LAMBDA_TASK_ROOT": str(task),
            # In Lambda, nothing is compiled yet, and nothing can be kept.
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPYCACHEPREFIX": str(task / "no cache"),
            **environment,
        },
    )
    try:
        yield runtime
    finally:
        runtime.function.kill()
        runtime.function.wait()
        server.shutdown()
        server.server_close()


def post(body: str | bytes, method: str = "POST", kind: str = "image/jpeg") -> dict[str, Any]:
    """An event as a function URL makes it: payload format 2.0, bytes in base64."""
    in_base64 = isinstance(body, bytes)
    return {
        "version": "2.0",
        "rawPath": "/",
        "rawQueryString": "",
        "headers": {"content-type": kind, "host": "abc.lambda-url.us-east-1.on.aws"},
        "requestContext": {"http": {"method": method, "path": "/", "sourceIp": "192.0.2.1"}},
        "body": base64.b64encode(body).decode() if in_base64 else body,
        "isBase64Encoded": in_base64,
    }
