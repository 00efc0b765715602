"""What asks a run to save or to stop: real signals, and a metadata service on loopback."""

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import socketserver
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import quick_start
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images
from PIL import Image
from test_trainer import TIMES, as_options, outcome, run_folder, train

import checkpoint
import interruption
import sessions
from interruption import NOTICE_PATH, REBALANCE_PATH, TOKEN_PATH, MetadataService, Requests
from utils import UserError

# ------------------------------------------------------------------------------ signals


@pytest.fixture
def _handlers() -> Iterator[None]:
    """Put the handlers of signals back."""
    numbers = (*interruption.STOP_SIGNALS, interruption.SAVE_SIGNAL, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_handlers")
def test_signals_are_noted_and_a_second_one_does_no_harm() -> None:
    requests = interruption.note_signals()
    assert not requests.stop and not requests.save
    os.kill(os.getpid(), signal.SIGUSR1)
    assert requests.save and not requests.stop
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        assert requests.stop


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT])
def test_what_the_shell_lets_it_ignore_is_ignored(ignored: signal.Signals) -> None:
    signal.signal(ignored, signal.SIG_IGN)
    requests = interruption.note_signals()
    os.kill(os.getpid(), ignored)
    assert not requests.stop
    os.kill(os.getpid(), signal.SIGTERM)
    assert requests.stop


@pytest.mark.usefixtures("_handlers")
@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_to_save_the_first_signal_ends_it(first: signal.Signals) -> None:
    requests = interruption.note_signals(nothing_to_save=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), first)
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
    assert requests.stop


def test_a_file_is_written_on_when_the_terminal_has_gone(tmp_path: Path) -> None:
    """As of `python3 trainer.py > said`; the terminal's own output goes nowhere."""
    program = """if True:
        import os, signal, interruption
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        requests = interruption.note_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        print(requests.stop)
    """
    said = tmp_path / "said"
    with said.open("wb") as file:
        subprocess.run(
            [sys.executable, "-c", program],
            cwd=REPOSITORY,
            env=COMMAND_ENVIRONMENT,
            stdout=file,
            stderr=file,
            check=True,
        )
    assert said.read_text() == "True\n"


def test_storms_of_signals_neither_hang_nor_kill_until_the_very_end() -> None:
    program = """if True:
        import time, interruption, torch
        requests = interruption.note_signals()
        print("ready", flush=True)
        saves = 0
        ends_at = time.monotonic() + 2
        while time.monotonic() < ends_at:
            if requests.save:
                requests.save = False
                saves += 1
        print(requests.stop, saves > 10)
    """
    process = quick_start.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        for number in numbers:
            process.send_signal(number)
    process.kill()
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, "True True\n", "")


# ------------------------------------------------------------------------------ the service

Answer = Callable[[socket.socket], None]


def reply(status: int, body: bytes = b"", headers: str = "") -> Answer:
    """Send a whole answer."""
    head = f"HTTP/1.1 {status} Reason\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def raw(content: bytes) -> Answer:
    """Send bytes, and close the connection."""
    return lambda connection: connection.sendall(content)


def trickle(head: bytes, part: bytes) -> Answer:
    """Send a little again and again, each part well within any timeout of one read."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(part)
            time.sleep(0.05)

    return send


def hang(connection: socket.socket) -> None:
    """Say nothing until the other side goes."""
    connection.recv(1)


def notice(action: object = "terminate", time: object = "2026-11-24T08:22:00Z") -> bytes:
    return json.dumps({"action": action, "time": time}).encode()


def in_seconds(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + seconds))


NOT_FOUND = reply(404, b"<html>404 - Not Found</html>")
HTML = b"<!DOCTYPE html><html><body>Please sign in</body></html>"
ODD_ANSWERS: dict[str, Answer] = {
    "400": reply(400),
    "403": reply(403, b"IMDS is off"),
    "500": reply(500, notice()),
    "503": reply(503, notice(), "Retry-After: 1\r\n"),
    "redirect": reply(302, notice(), "Location: http://127.0.0.1:9/\r\n"),
    "no content": reply(204),
    "empty": reply(200),
    "a control character": reply(200, b"a\r\nb\x1b[31m"),
    "not latin": reply(200, b"\xff\xfe\x00\xd8"),
    "garbage": raw(random.Random(0).randbytes(3000)),
    "garbage after the head": raw(b"HTTP/1.1 200 OK\r\n" + random.Random(1).randbytes(3000)),
    "another protocol": raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "an endless line": raw(b"HTTP/1.1 200 " + 100_000 * b"a"),
    "too many headers": raw(b"HTTP/1.1 200 OK\r\n" + 200 * b"a: b\r\n"),
    "a broken chunk": raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\nabc"),
    "closed at once": raw(b""),
    "closed in the head": raw(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "slow head": trickle(b"", b"H"),
    "slow headers": trickle(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
    "continue for ever": trickle(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "slow body": trickle(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{", b" "),
    "silence": hang,
}
NO_NOTICES: dict[str, Answer] = {
    "html": reply(200, HTML),
    "closed early": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + notice()[:-2]),
    "deep": reply(200, 600 * b"["),
    "long": reply(200, b" " * 2000 + notice()),
    "null": reply(200, b"null"),
    "a number": reply(200, b"1e999"),
    "a list": reply(200, b"[" + notice() + b"]"),
    "a word": reply(200, b'"terminate"'),
    "no field": reply(200, b"{}"),
    "no time": reply(200, b'{"action": "terminate"}'),
    "no action": reply(200, b'{"time": "2026-11-24T08:22:00Z"}'),
    "unknown action": reply(200, notice("none")),
    "a list of actions": reply(200, notice(["terminate"])),
    "a number for a time": reply(200, notice(time=1_790_000_000)),
    "a word for a time": reply(200, notice(time="soon")),
    "no zone": reply(200, notice(time="2026-11-24T08:22:00")),
    "month 13": reply(200, notice(time="2026-13-24T08:22:00Z")),
}


class Service(socketserver.ThreadingTCPServer):
    """A metadata service on loopback, as EC2's but for the answers that a test gives it."""

    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), None)
        self.port = self.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.answers: dict[str, Answer] = {}  # by path; one for "" is given to all
        self.tokens: dict[str, float] = {}  # until when each is known
        self.asked: list[tuple[float, str, str, int]] = []  # when, method, path, seconds of token
        self.refused = 0  # requests without a token that is known
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def finish_request(self, request: socket.socket, _: object) -> None:
        request.settimeout(30)
        content = b""
        while b"\r\n\r\n" not in content:
            if not (part := request.recv(65536)):
                return
            content += part
        first, *lines = content.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        method, path, _ = first.split()
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        token_s = int(headers.get("x-aws-ec2-metadata-token-ttl-seconds", 0))
        self.asked.append((time.monotonic(), method, path, token_s))
        with contextlib.suppress(OSError):  # a client that had enough
            self.answer(method, path, headers.get("x-aws-ec2-metadata-token", ""), token_s)(request)

    def answer(self, method: str, path: str, token: str, token_s: int) -> Answer:
        """What EC2's User Guide says of each request, unless the test has an answer of its own."""
        chosen = self.answers.get(path, self.answers.get(""))
        if (method, path) == ("PUT", TOKEN_PATH):
            if chosen:
                return chosen
            if not 1 <= token_s <= 21_600:
                return reply(400)
            token = f"AQAEA{len(self.tokens):051d}="
            self.tokens[token] = time.monotonic() + token_s
            return reply(200, token.encode())
        if self.tokens.get(token, 0) < time.monotonic():
            self.refused += 1
            return reply(401)
        return chosen or NOT_FOUND

    def count(self, path: str) -> int:
        return sum(asked[2] == path for asked in self.asked)

    def handle_error(self, *_: object) -> None:
        pass  # connections that the client left

    def close(self) -> None:
        self.shutdown()
        self.server_close()


@pytest.fixture
def service() -> Iterator[Service]:
    running = Service()
    yield running
    running.close()


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interruption, "REQUEST_S", 0.3)


def stop_is_noticed(service: MetadataService, requests: Requests) -> bool:
    service.poll(requests)
    return requests.stop and not requests.save


def test_a_notice_stops_the_run_and_says_when(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    client, requests = MetadataService(service.endpoint), Requests()
    for _ in range(3):
        client.poll(requests)
    assert requests == Requests()
    assert caplog.text == ""
    service.answers[NOTICE_PATH] = reply(200, notice("stop", in_seconds(120)))
    before = time.monotonic()
    assert stop_is_noticed(client, requests)
    assert before <= requests.notice.seen_at <= time.monotonic()
    assert 117 < requests.notice.taken_at - time.time() < 121
    assert "EC2 gives notice to stop the instance at " in caplog.text
    # Version 2 only: a token first, once, and nothing without it.
    assert [asked[1:3] for asked in service.asked[:3]] == [
        ("PUT", TOKEN_PATH),
        ("GET", NOTICE_PATH),
        ("GET", REBALANCE_PATH),
    ]
    assert (service.count(TOKEN_PATH), service.refused) == (1, 0)


@pytest.mark.parametrize("action", ["stop", "terminate", "hibernate"])
@pytest.mark.parametrize(
    "when",
    [
        "1970-01-01T00:00:00Z",
        "2026-11-24T08:22:00.5+00:00",
        "9999-12-31T23:59:59-23:59",
        "0001-01-01T00:00:00+14:00",
    ],
)
def test_a_wrong_clock_changes_only_what_is_said(
    service: Service, action: str, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.answers[NOTICE_PATH] = reply(200, notice(action, when))
    requests = Requests()
    assert stop_is_noticed(MetadataService(service.endpoint), requests)
    caplog.set_level("INFO", "resnet50")
    interruption.tell_saved(requests)
    assert "UTC: saved 0.0 s after its notice, with " in caplog.text
    interruption.tell_saved(Requests(stop=True))  # a signal's stop says nothing of EC2
    assert caplog.text.count("to spare") == 1


def check_nothing_but_one_complaint(
    client: MetadataService, caplog: pytest.LogCaptureFixture
) -> None:
    requests = Requests()
    for _ in range(2):
        started = time.monotonic()
        client.poll(requests)
        assert time.monotonic() - started < 3 * interruption.REQUEST_S
    assert requests == Requests()
    (record,) = caplog.records
    assert "answers oddly" in record.message
    assert record.message.isprintable() and len(record.message) < 300
    assert "AQAEA" not in record.message


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("path", ["", NOTICE_PATH, REBALANCE_PATH])
@pytest.mark.parametrize("odd", ODD_ANSWERS)
def test_odd_answers_are_borne_and_told_once(
    service: Service, odd: str, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.answers[path] = ODD_ANSWERS[odd]
    client = MetadataService(service.endpoint)
    check_nothing_but_one_complaint(client, caplog)
    service.answers = {NOTICE_PATH: reply(200, notice())}
    assert stop_is_noticed(client, Requests())


@pytest.mark.parametrize("odd", NO_NOTICES)
def test_what_is_no_notice_stops_nothing(
    service: Service, odd: str, caplog: pytest.LogCaptureFixture
) -> None:
    service.answers[NOTICE_PATH] = NO_NOTICES[odd]
    client = MetadataService(service.endpoint)
    check_nothing_but_one_complaint(client, caplog)
    service.answers[NOTICE_PATH] = reply(200, notice())
    assert stop_is_noticed(client, Requests())


def test_a_404_is_no_notice_whatever_it_says(service: Service) -> None:
    service.answers[NOTICE_PATH] = reply(404, notice())
    assert not stop_is_noticed(MetadataService(service.endpoint), Requests())


def test_a_service_that_is_not_there_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    gone = Service()
    gone.close()
    client = MetadataService(gone.endpoint)
    check_nothing_but_one_complaint(client, caplog)
    back = Service(gone.port)
    try:
        back.answers[NOTICE_PATH] = reply(200, notice())
        assert stop_is_noticed(client, Requests())
    finally:
        back.close()


@pytest.mark.usefixtures("_quick")
def test_no_garbage_crashes_the_watch(service: Service) -> None:
    """Answers with some bytes changed, cut out or doubled, at every request."""
    draws = random.Random(2)
    client, requests = MetadataService(service.endpoint), Requests()
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 52\r\n\r\n"
    for whole in (head + notice(), head + b"AQAEA" + 47 * b"x", b"HTTP/1.1 404 Not Found\r\n\r\n"):
        for _ in range(150):
            content = bytearray(whole)
            for _ in range(draws.randrange(1, 6)):
                at = draws.randrange(len(content))
                content[at : at + draws.randrange(3)] = draws.randbytes(draws.randrange(4))
            service.answers = {draws.choice(["", NOTICE_PATH, REBALANCE_PATH]): raw(bytes(content))}
            client.poll(requests)
    service.answers = {NOTICE_PATH: reply(200, notice())}
    assert stop_is_noticed(client, Requests())


def test_the_token_is_renewed_before_it_expires_and_when_it_is_not_known(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "TOKEN_S", 1)
    client, requests = MetadataService(service.endpoint), Requests()
    ends_at = time.monotonic() + 1.6
    while time.monotonic() < ends_at:
        client.poll(requests)
        time.sleep(0.02)
    assert service.count(TOKEN_PATH) in (3, 4)
    assert service.refused == 0

    service.tokens.clear()
    service.answers[NOTICE_PATH] = reply(200, notice())
    assert stop_is_noticed(client, requests)  # within the same poll
    assert service.refused == 1


def test_tokens_that_are_never_known_are_an_odd_answer(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    service.answers[TOKEN_PATH] = reply(200, b"AQAEA-secret")
    check_nothing_but_one_complaint(MetadataService(service.endpoint), caplog)
    assert service.refused == 4


def test_a_rebalance_recommendation_saves_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    client, requests = MetadataService(service.endpoint), Requests()
    for when, saves in (("08:22:00", True), ("08:22:00", False), ("08:40:00", True)):
        body = json.dumps({"noticeTime": f"2026-11-24T{when}Z"}).encode()
        service.answers[REBALANCE_PATH] = reply(200, body)
        client.poll(requests)
        assert requests == Requests(save=saves)
        requests.save = False
    assert [record.message.count("rebalance recommendation") for record in caplog.records] == [1, 1]


def test_no_proxy_is_asked(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy = Service()
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, proxy.endpoint)
    monkeypatch.delenv("no_proxy", raising=False)
    service.answers[NOTICE_PATH] = reply(200, notice())
    assert stop_is_noticed(MetadataService(service.endpoint), Requests())
    assert proxy.asked == []
    proxy.close()


# ------------------------------------------------------------------------------ when it is asked


def watches() -> bool:
    return any(thread.name == "ec2" for thread in threading.enumerate())


def test_it_is_asked_on_an_instance_or_at_an_address_that_is_set(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(interruption, "POLL_S", 0.05)
    monkeypatch.setattr(interruption, "DEFAULT_ENDPOINT", service.endpoint)
    service.answers[NOTICE_PATH] = reply(200, notice())

    def is_asked(on_ec2: bool, endpoint: str = "", disabled: str = "") -> bool:
        monkeypatch.setattr(interruption, "on_ec2", lambda: on_ec2)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", disabled)
        requests = Requests()
        interruption.watch_ec2(requests)
        watched = watches()
        deadline = time.monotonic() + 5
        while watched and (watches() or not requests.stop) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert requests.stop == watched  # and the thread ends with the notice
        return watched

    assert not is_asked(on_ec2=False)
    assert is_asked(on_ec2=True)
    assert is_asked(on_ec2=True, disabled="false")
    assert not is_asked(on_ec2=True, disabled="true")
    assert is_asked(on_ec2=False, endpoint=service.endpoint + "/")
    assert not is_asked(on_ec2=False, endpoint=service.endpoint, disabled="True")


def test_an_instance_is_known_by_its_firmware(tmp_path: Path) -> None:
    cases = (
        ("class/dmi/id/sys_vendor", "Amazon EC2\n", True),
        ("class/dmi/id/board_vendor", "Amazon EC2\n", True),
        ("hypervisor/uuid", "ec2f2b9a-1234-1234-1234-123456789012\n", True),
        ("class/dmi/id/sys_vendor", "Xen\n", False),
        ("class/dmi/id/board_vendor", "", False),
        ("hypervisor/uuid", "2f9c1e07-ec2f-1234-1234-123456789012\n", False),
    )
    assert not interruption.on_ec2(tmp_path / "none")
    assert interruption.instance_type(tmp_path / "none") is None
    for number, (path, content, expected) in enumerate(cases):
        system = tmp_path / str(number)
        (system / path).parent.mkdir(parents=True)
        (system / path).write_text(content)
        assert interruption.on_ec2(system) == expected
        product = system / "class/dmi/id/product_name"
        product.parent.mkdir(parents=True, exist_ok=True)
        for name, known in (("g5.xlarge", expected), ("HVM domU", False)):
            product.write_text(f"{name}\n")
            assert interruption.instance_type(system) == (name if known else None)


@pytest.mark.parametrize(
    "endpoint",
    ["127.0.0.1:80", "https://127.0.0.1", "http://", "http://host:port", "http://[::1", "nonsense"],
)
def test_an_address_that_is_none_is_refused(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", endpoint)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "")
    with pytest.raises(UserError, match="AWS_EC2_METADATA_SERVICE_ENDPOINT is no address like"):
        interruption.watch_ec2(Requests())


def test_an_ipv6_address_is_asked() -> None:
    client = MetadataService("http://[fd00:ec2::254]")
    assert (client.host, client.port) == ("fd00:ec2::254", 80)


# ------------------------------------------------------------------------------ real runs


# EC2 is asked every second instead of every five.
PROGRAM = """
import interruption, trainer, utils
interruption.POLL_S = 1
utils.run_stage(trainer.main)
"""


def start(
    settings: dict[str, object], *options: str, **environment: str
) -> subprocess.Popen[bytes]:
    return quick_start.Popen(
        [sys.executable, "-c", PROGRAM, *as_options(settings), *options],
        cwd=REPOSITORY,
        env={**COMMAND_ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def wait_for(process: subprocess.Popen, condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def log_of(folder: Path) -> str:
    path = folder / "train.log"
    return path.read_text() if path.exists() else ""


def end_of(process: subprocess.Popen) -> tuple[int, bytes]:
    """Exit code and stderr."""
    try:
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, stderr


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[dict[str, object]]:
    """One epoch of eleven steps, and a validation of 42 batches, which takes seconds."""
    make_images(tmp_path / "images", classes=3, images=14)
    yield {
        "runs_folder": str(tmp_path / "runs"),
        "name": "run",
        "train_folder_name": str(tmp_path / "images/train"),
        "val_folder_name": str(tmp_path / "images/val"),
        "epochs": 1,
        "batch_size": 4,
        "val_batch_size": 1,
        "max_lr": 0.002,
        "train_px": 32,
        "val_px": 96,
        "val_resize_px": 96,
        "precision": "fp32",
        "workers": 1,
        "log_interval_s": 1e-9,
    }
    for path in tmp_path.rglob("*.pt"):  # hundreds of MB a run, which pytest would keep
        path.unlink()


def test_signals_in_training_and_both_validations_change_nothing(
    settings: dict[str, object],
) -> None:
    train(settings)
    stopped = {**settings, "name": "stopped"}
    folder = run_folder(stopped)

    def stop(process: subprocess.Popen) -> None:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        assert end_of(process) == (75, b"")

    # A storm of SIGUSR1 in the epoch saves and goes on.
    process = start(stopped)
    wait_for(process, lambda: "  step 1/11" in log_of(folder))
    for _ in range(200):
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.002)
    wait_for(process, lambda: "as asked, in " in log_of(folder))
    stop(process)
    step = checkpoint.load_latest(folder / "checkpoints")["step"]
    saved = [
        int(number)
        for number in re.findall(r"saved after step (\d+), as asked, in ", log_of(folder))
    ]
    assert saved == sorted(saved) and saved[-1] <= step
    assert f"interrupted in epoch 1, everything is saved after step {step}:" in log_of(folder)
    assert "EC2" not in log_of(folder)

    # In the validation the state is that of the end of training.
    process = start(stopped)
    wait_for(process, lambda: "  step 11/11" in log_of(folder))
    process.send_signal(signal.SIGUSR1)
    wait_for(process, lambda: "saved after step 11, as asked" in log_of(folder))
    stop(process)
    state = checkpoint.load_latest(folder / "checkpoints")
    assert (state["step"], state["history"]) == (11, [])

    # In the last evaluation the epoch is finished.
    process = start(stopped)
    wait_for(process, lambda: "epoch 1/1  train loss" in log_of(folder))
    stop(process)
    assert not (folder / "result.json").exists()
    assert len(checkpoint.load_latest(folder / "checkpoints")["history"]) == 1

    train(stopped)
    assert outcome(stopped) == outcome(settings)
    ends = [line["ended"] for line in sessions.read(folder) if line["ended"]]
    assert ends == ["signal", "signal", "signal", "finished"]


def test_a_terminal_that_is_closed_is_a_signal_to_save(settings: dict[str, object]) -> None:
    ours, its = os.openpty()
    os.set_blocking(ours, False)

    def take_terminal() -> None:
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        termios.tcsetwinsize(0, (24, 120))
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup

    process = subprocess.Popen(
        [sys.executable, "trainer.py", *as_options(settings)],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        preexec_fn=take_terminal,  # noqa: PLW1509
        **dict.fromkeys(("stdin", "stdout", "stderr"), its),
    )
    os.close(its)
    folder = run_folder(settings)
    shown = b""

    def has_stepped() -> bool:
        nonlocal shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(ours, 65536)
        assert process.poll() is None, shown
        # The bar is there, into which nothing can be written any more.
        return b"/11 [" in shown and "  step 3/11" in log_of(folder)

    wait_for(process, has_stepped)
    os.close(ours)
    assert end_of(process)[0] == 75
    step = checkpoint.load_latest(folder / "checkpoints")["step"]
    assert f"interrupted in epoch 1, everything is saved after step {step}:" in log_of(folder)
    assert [line["ended"] for line in sessions.read(folder)][-1] == "signal"


def test_a_state_that_is_saved_in_a_validation_is_like_any_other(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.randn(3))
    state = {"step": 1, "history": [], "epoch_s": 1.0, "weight": weight}
    saver = checkpoint.BackgroundSaver(tmp_path)
    with torch.inference_mode():
        saver.save(state)
        saver.wait()
    loaded = checkpoint.load_latest(tmp_path / "checkpoints")["weight"]
    assert torch.equal(loaded, state["weight"])
    assert not loaded.is_inference()


def test_a_signal_while_the_images_are_checked_ends_it_at_once(
    settings: dict[str, object], tmp_path: Path
) -> None:
    large = tmp_path / "images/val/class_0/val_0.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (1500, 2000, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    for number in range(3000):  # which take minutes
        os.link(large, large.with_name(f"link_{number}.jpg"))
    process = start(settings, "--skip-bad-images")
    held = Path(f"/proc/{process.pid}/fd")
    wait_for(process, lambda: any(str(large.parent) in _target(link) for link in held.iterdir()))
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    assert end_of(process) == (75, b"error: interrupted\n")
    assert not run_folder(settings).exists()


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # closed meanwhile
        return ""


def test_ec2s_notice_saves_in_time_after_all_kinds_of_odd_answers(
    settings: dict[str, object], service: Service
) -> None:
    """The real trainer, polling every second, until EC2 gives the two minutes' notice."""
    assert interruption.POLL_S == 5  # by itself, as AWS recommends
    endless = {**settings, "epochs": 10_000, "val_px": 32, "val_resize_px": 36}
    endless["val_batch_size"] = 64
    taken = {**endless, "name": "taken"}
    folder = run_folder(taken)
    environment = {
        "AWS_EC2_METADATA_DISABLED": "false",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT": service.endpoint,
        "http_proxy": "http://127.0.0.1:9",
    }

    def rows(settings: dict[str, object]) -> list[dict[str, object]]:
        path = run_folder(settings) / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = map(json.loads, lines)
        return [{key: row[key] for key in row if key not in TIMES} for row in found]

    advice = json.dumps({"noticeTime": in_seconds(0)}).encode()
    service.answers = {REBALANCE_PATH: ODD_ANSWERS["garbage"]}  # and 404 for the notice
    process = start(taken, **environment)
    wait_for(process, lambda: service.count(REBALANCE_PATH) > 0)
    service.tokens.clear()  # 401
    for answers in (
        {REBALANCE_PATH: reply(200, advice)},
        {NOTICE_PATH: reply(500, HTML)},
        {NOTICE_PATH: ODD_ANSWERS["slow body"]},
        {NOTICE_PATH: hang},
    ):
        service.answers = answers
        (path,) = answers
        asked = service.count(path)
        wait_for(process, lambda: service.count(path) > asked)  # noqa: B023
    assert "as asked, in " in log_of(folder)
    assert "interrupted" not in log_of(folder)
    assert service.refused == 1

    service.answers = {NOTICE_PATH: reply(200, notice("terminate", in_seconds(120)))}
    assert end_of(process) == (75, b"")
    whole = log_of(folder)
    assert whole.count("answers oddly") == 1
    assert whole.count("rebalance recommendation") == 1
    (told,) = [line for line in whole.splitlines() if "to spare" in line]
    words = told.split()
    assert 0 <= float(words[words.index("saved") + 1]) <= 10
    assert 100 < float(words[words.index("with") + 1]) <= 120
    state = checkpoint.load_latest(folder / "checkpoints")
    assert f"everything is saved after step {state['step']}:" in whole
    epochs = len(state["history"])
    waits_s = np.diff([asked[0] for asked in service.asked if asked[2] == NOTICE_PATH])
    assert sum(waits_s < 1) == 1  # with another token, at once after the 401
    assert max(waits_s) < 5  # the answer that did not come took two seconds more

    # Gone on with, and never disturbed: the same epochs to the last bit of their losses.
    for some in (taken, endless):
        process = start(some)
        wait_for(process, lambda: len(rows(some)) > epochs + 1, 120)  # noqa: B023
        process.send_signal(signal.SIGTERM)
        assert end_of(process) == (75, b"")
    assert rows(taken)[: epochs + 2] == rows(endless)[: epochs + 2]
