"""What asks a run to save or to stop: signals, and EC2 before it takes a spot instance away.

    kill PID          finish the step or the batch of validation, save, end with exit code 75
    kill -USR1 PID    save, and go on

Ctrl-C does what kill does, and so does a terminal that is closed, unless under nohup. On an EC2
instance its metadata service is asked every 5 seconds, in version 2 only: on a notice of
interruption the run saves at once and ends as above; on a rebalance recommendation it saves and
goes on. The SDKs' variables AWS_EC2_METADATA_SERVICE_ENDPOINT and AWS_EC2_METADATA_DISABLED=true do
here what they do there. Elsewhere nobody is asked.

AWS's formats are in its EC2 User Guide: "Spot Instance interruption notices", "EC2 instance
rebalance recommendations", "Use the Instance Metadata Service to access instance metadata".
"""

import atexit
import contextlib
import dataclasses
import datetime
import http.client
import json
import os
import re
import signal
import socket
import stat
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

from utils import UserError, log, write_nowhere

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAVE_SIGNAL = signal.SIGUSR1

DEFAULT_ENDPOINT = "http://169.254.169.254"
TOKEN_PATH = "/latest/api/token"
NOTICE_PATH = "/latest/meta-data/spot/instance-action"
REBALANCE_PATH = "/latest/meta-data/events/recommendations/rebalance"
ACTIONS = ("hibernate", "stop", "terminate")
POLL_S = 5.0  # what AWS recommends
REQUEST_S = 2.0  # for a whole request, however its bytes trickle in
TOKEN_S = 21_600  # six hours, the longest that EC2 allows
ANSWER_BYTES = 512  # a token has 56, a notice about as many


@dataclasses.dataclass(frozen=True)
class Notice:
    """That EC2 takes the instance."""

    taken_at: float  # seconds since 1970, by EC2's clock
    seen_at: float  # by time.monotonic()


@dataclasses.dataclass
class Requests:
    """What a run has been asked for; it looks after each step, and clears `save` when it saves.

    Plain values, no Events: an Event has a lock, and a signal may come while it is held.
    """

    stop: bool = False
    save: bool = False
    notice: Notice | None = None  # where EC2 asks for the stop
    nothing_to_save: bool = False  # while it is true, a signal to stop raises KeyboardInterrupt


def note_signals(nothing_to_save: bool = False) -> Requests:
    """What signals ask for from now on; a second one does no harm."""
    requests = Requests(nothing_to_save=nothing_to_save)

    def stop(*_: object) -> None:
        is_first, requests.stop = not requests.stop, True
        if is_first and requests.nothing_to_save:
            raise KeyboardInterrupt

    def save(*_: object) -> None:
        requests.save = True

    def ignore_all() -> None:
        for number in (*STOP_SIGNALS, SAVE_SIGNAL, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def hang_up(*_: object) -> None:
        for output in (1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISCHR(os.fstat(output).st_mode):  # the terminal, which is gone
                    write_nowhere(output)
        stop()

    signal.signal(signal.SIGTERM, stop)
    # As nohup ignores the one, and a script the other for what it starts with `&`: there, Ctrl-C is
    # meant for something else.
    for number, heed in ((signal.SIGHUP, hang_up), (signal.SIGINT, stop)):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, heed)
    signal.signal(SAVE_SIGNAL, save)
    # While Python ends, which takes a moment with PyTorch loaded, it puts the system's handlers
    # back: a late signal would change the exit code.
    atexit.register(ignore_all)
    return requests


def tell_saved(requests: Requests) -> None:
    """Say how long the checkpoint took from EC2's notice, if it was EC2 that asked for it."""
    if requests.notice is not None:
        log.info(
            "EC2 takes the instance at %s UTC: saved %.1f s after its notice, with %.0f s to spare",
            _clock(requests.notice.taken_at), time.monotonic() - requests.notice.seen_at,
            requests.notice.taken_at - time.time(),
        )  # fmt: skip


# ------------------------------------------------------------------------------ EC2


def watch_ec2(requests: Requests) -> None:
    """Let a thread ask EC2 for its notices if there is somebody to ask; see metadata_service."""
    service = metadata_service()
    if service is not None:
        threading.Thread(target=service.watch, args=[requests], name="ec2", daemon=True).start()


def metadata_service() -> "MetadataService | None":
    """EC2's, if this is an instance or an address is set; raises UserError for one that is none."""
    endpoint = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", "")
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return None
    return MetadataService(endpoint or DEFAULT_ENDPOINT) if endpoint or on_ec2() else None


def on_ec2(system: Path = Path("/sys")) -> bool:
    """Whether the machine says that it is an EC2 instance: Nitro by its maker, Xen by its UUID."""
    for path, beginning in (
        ("class/dmi/id/sys_vendor", "Amazon EC2"),
        ("class/dmi/id/board_vendor", "Amazon EC2"),
        ("hypervisor/uuid", "ec2"),
    ):
        with contextlib.suppress(OSError):
            if (system / path).read_text(errors="replace").startswith(beginning):
                return True
    return False


def instance_type(system: Path = Path("/sys")) -> str | None:
    """Type of this EC2 instance, such as g5.xlarge; None elsewhere, and on Xen, which hides it."""
    with contextlib.suppress(OSError):
        name = (system / "class/dmi/id/product_name").read_text(errors="replace").strip()
        if on_ec2(system) and re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+", name):
            return name
    return None


class OddAnswer(Exception):
    """What the metadata service said, or did not say, cannot be used."""


class MetadataService:
    """EC2's instance metadata service, asked in its version 2, with a token."""

    def __init__(self, endpoint: str) -> None:
        try:
            address = urllib.parse.urlsplit(endpoint)
            self.host, self.port = address.hostname or "", address.port or 80
        except ValueError:  # a port or an IPv6 address that is none
            self.host = ""
        if not self.host or address.scheme != "http":
            raise UserError(
                "AWS_EC2_METADATA_SERVICE_ENDPOINT is no address like "
                f"{DEFAULT_ENDPOINT}: correct it, or unset it"
            )
        self.token, self.token_until = "", 0.0  # by time.monotonic()
        self.recommended = ""  # the time of the last rebalance recommendation
        self.complained = False

    def watch(self, requests: Requests) -> None:
        """Poll until the run is asked to stop."""
        while not requests.stop:
            self.poll(requests)
            time.sleep(POLL_S)

    def poll(self, requests: Requests) -> None:
        """Ask once, and pass on what there is; an odd answer is none, and is told once."""
        try:
            notice = self.item(NOTICE_PATH)
            if notice is not None:
                action, taken_at = notice.get("action"), _seconds(notice.get("time"))
                if action not in ACTIONS:
                    raise OddAnswer(f"GET {NOTICE_PATH}: an unknown action")
                log.warning(
                    "EC2 gives notice to %s the instance at %s UTC, in %.0f s: saving",
                    action, _clock(taken_at), taken_at - time.time(),
                )  # fmt: skip
                requests.notice = Notice(taken_at, time.monotonic())
                requests.stop = True
                return
            advice = self.item(REBALANCE_PATH)
            if advice is not None and advice.get("noticeTime") != self.recommended:
                recommended_at = _seconds(advice.get("noticeTime"))
                self.recommended = advice["noticeTime"]
                log.warning(
                    "EC2 may soon take the instance (rebalance recommendation of %s UTC): saving",
                    _clock(recommended_at),
                )
                requests.save = True
        except OddAnswer as odd:
            if not self.complained:
                self.complained = True
                log.warning(
                    "EC2's metadata service at %s port %d answers oddly (%s): a notice may be "
                    "missed; it is asked again every %.0f s",
                    self.host, self.port, odd, POLL_S,
                )  # fmt: skip

    def item(self, path: str) -> dict[str, Any] | None:
        """A JSON object, None where the service has none; raises OddAnswer."""
        status, body = self._get(path)
        if status == 404:
            return None
        with contextlib.suppress(ValueError):
            value = json.loads(body)
            if status == 200 and isinstance(value, dict):
                return value
        raise OddAnswer(f"GET {path}: status {status}, {len(body)} bytes")

    def text(self, path: str) -> str:
        """A word, such as the instance's type; raises OddAnswer."""
        status, body = self._get(path)
        if status == 200 and re.fullmatch(rb"[\w.-]{1,40}", body):
            return body.decode()
        raise OddAnswer(f"GET {path}: status {status}, {len(body)} bytes")

    def _get(self, path: str) -> tuple[int, bytes]:
        for _ in range(2):
            if time.monotonic() >= self.token_until:
                self._renew_token()
            status, body = self._ask("GET", path, {"X-aws-ec2-metadata-token": self.token})
            if status != 401:  # the token is no longer known
                break
            self.token_until = 0.0
        return status, body

    def _renew_token(self) -> None:
        asked_at = time.monotonic()
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_S)}
        status, body = self._ask("PUT", TOKEN_PATH, headers)
        token = body.decode("latin-1")
        if status != 200 or not token or not (token.isascii() and token.isprintable()):
            raise OddAnswer(f"PUT {TOKEN_PATH}: status {status}, {len(body)} bytes")
        self.token, self.token_until = token, asked_at + TOKEN_S / 2

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """Status and body of one request, within REQUEST_S; raises OddAnswer.

        Never through a proxy, which would ask for its own machine; redirects are not followed.
        """
        try:
            with contextlib.closing(http.client.HTTPConnection(self.host, self.port)) as connection:
                connection.sock = _BoundedSocket.to(self.host, self.port)
                connection.request(method, path, headers=headers)
                with connection.getresponse() as response:
                    return response.status, response.read(ANSWER_BYTES)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise OddAnswer(f"{method} {path}: {type(error).__name__}") from None


class _BoundedSocket(socket.socket):
    """A connection that ends REQUEST_S after its beginning: a timeout by itself is one a read."""

    @classmethod
    def to(cls, host: str, port: int) -> "_BoundedSocket":
        ends_at = time.monotonic() + REQUEST_S
        connected = cls(fileno=socket.create_connection((host, port), REQUEST_S).detach())
        connected.ends_at = ends_at
        connected.settimeout(REQUEST_S)
        return connected

    def recv_into(self, *arguments: Any) -> int:
        left_s = self.ends_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self.settimeout(left_s)
        return super().recv_into(*arguments)


def _seconds(value: object) -> float:
    """A time of EC2's, such as 2026-11-24T08:22:00Z, in seconds since 1970; raises OddAnswer."""
    with contextlib.suppress(ValueError):
        moment = datetime.datetime.fromisoformat(value if isinstance(value, str) else "")
        if moment.tzinfo is not None:
            return moment.timestamp()
    raise OddAnswer("a time that is none")


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S", time.gmtime(seconds))
