"""Copies elsewhere: onto a disk, an S3 emulator and a stand-in for a hub, through all that fails.

The emulator is moto's server; what goes wrong on the way to it, a small proxy does.
"""

import base64
import contextlib
import dataclasses
import errno
import hashlib
import http.client
import http.server
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.exceptions
import pytest
import quick_start
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, make_images, run_stage_command
from hub import Hub
from test_checkpoint import make_state
from test_trainer import as_options, outcome, undisturbed  # noqa: F401 (a fixture)

import checkpoint
import interruption
import mirror
from utils import Config, UserError, write_atomically, write_json

SECRET = "wJalrXUtnFEMIsecret"
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIAtestonly",
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------ the servers


@pytest.fixture(scope="module")
def emulator() -> Iterator[int]:
    """The port of an S3 emulator on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        env=COMMAND_ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def answers() -> bool:
        assert process.poll() is None
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers)
    yield port
    process.terminate()
    process.wait()


class Proxy(http.server.ThreadingHTTPServer):
    """Stands between a mirror and the emulator, and does to the requests what `fault` says."""

    allow_reuse_address = True
    fault: Any = None  # a status to answer with, "hang", "slow", "forget checksums"
    knows = ""  # the key that has not expired; any, if empty
    damage_next = ""  # the method whose next body is altered on its way
    upstream: int

    def __init__(self, upstream: int, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), ProxyHandler)
        self.upstream = upstream
        self.requests: list[tuple[str, str]] = []  # method and path of what was let through
        self.connections: list[socket.socket] = []
        self.hurry = threading.Event()  # ends what hangs
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    def get_request(self) -> tuple[socket.socket, Any]:
        self.connections.append(super().get_request()[0])
        return self.connections[-1], self.connections[-1].getpeername()

    def handle_error(self, *_: object) -> None:
        """A client that gave up, or a connection that was ended, is what the tests are about."""

    def close(self) -> None:
        """End the connections, and refuse new ones."""
        self.hurry.set()
        self.shutdown()
        self.server_close()
        for connection in self.connections:
            with contextlib.suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)


class ProxyHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def pass_on(self) -> None:
        if self.server.fault == "hang":  # what follows the headers is not even read
            self.server.hurry.wait()
            self.close_connection = True
            return
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if isinstance(self.server.fault, int):
            self.refuse(self.server.fault, "AccessDenied" if self.server.fault == 403 else "Error")
            return
        if self.server.knows not in self.headers.get("Authorization", ""):
            self.refuse(400, "ExpiredToken")
            return
        if self.server.fault == "slow":
            time.sleep(0.2)
        headers = dict(self.headers)
        if self.server.fault == "forget checksums":
            headers = {key: headers[key] for key in headers if "checksum" not in key.lower()}
        if self.server.damage_next == self.command and "checkpoints/" in self.path:
            self.server.damage_next = ""
            body = b"\0" + body[1:]
        # The emulator believes whatever checksum it is given; S3 does not.
        given = headers.get("x-amz-checksum-sha256")
        if given and given != base64.b64encode(hashlib.sha256(body).digest()).decode():
            self.refuse(400, "BadDigest")
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.upstream, timeout=60)
        upstream.request(self.command, self.path, body, headers)
        answer = upstream.getresponse()
        content = answer.read()
        self.server.requests.append((self.command, self.path))
        self.answer(answer.status, dict(answer.headers), content)
        upstream.close()

    def refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>{SECRET}</Message></Error>"
        self.answer(status, {"Content-Type": "text/xml"}, text.encode())

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = pass_on

    def answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response_only(status)
        length = headers.pop("Content-Length", len(content))  # that of HEAD is of the file
        for key, value in headers.items():
            if key.lower() not in ("connection", "transfer-encoding"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def proxy(emulator: int) -> Iterator[Proxy]:
    proxy = Proxy(emulator)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(mirror, "PATIENCE_S", 2.0)
    caplog.set_level(logging.INFO, "resnet50")


class Bucket:
    """A new bucket of the emulator, as the test sees it, past the proxy."""

    def __init__(self, emulator: int) -> None:
        self.name = f"runs-{uuid.uuid4()}"
        self.client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{emulator}")
        self.client.create_bucket(Bucket=self.name)
        self.url = f"s3://{self.name}/some/prefix"

    def files(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        keys = [file["Key"] for file in found]
        assert all(key.startswith("some/prefix/run/") for key in keys)
        return {
            key.removeprefix("some/prefix/run/"): self.client.get_object(Bucket=self.name, Key=key)[
                "Body"
            ].read()
            for key in keys
        }

    def put(self, name: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=f"some/prefix/run/{name}", Body=content)


@pytest.fixture
def bucket(emulator: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
    return Bucket(emulator)


class Disk:
    """A folder as a mirror, as the test sees it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()
        self.url = f"file://{root}"

    def files(self) -> dict[str, bytes]:
        return contents(self.root / "run")

    def put(self, name: str, content: bytes) -> None:
        (self.root / "run" / name).write_bytes(content)


# ------------------------------------------------------------------------------ a run's folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The empty folder of a run."""
    folder = tmp_path / "runs" / "run"
    (folder / "checkpoints").mkdir(parents=True)
    return folder


def save(folder: Path, step: int, epochs: int = 0) -> Path:
    """What the trainer writes after an epoch or within one, in small."""
    write_atomically(folder / "metrics.jsonl", b'{"epoch": 1}\n' * epochs)
    for name in ("last.pt", "best.pt"):
        write_atomically(folder / name, random.Random(f"{name} {epochs}").randbytes(100_000))
    return checkpoint.save(folder / "checkpoints", make_state(step, epochs))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def assert_complete(place: "Bucket | Disk", folder: Path) -> None:
    """The newest checkpoint and what goes with it are there, byte for byte, and the sums are right.

    The checkpoint before it may be another one than in the folder: not every one is copied.
    """
    there, here = place.files(), contents(folder)
    sums = there.pop(mirror.SUMS).decode()
    files = {name: there[name] for name in there if not name.startswith("checkpoints/")}
    assert files == {name: here[name] for name in here if name in mirror.COPIED_FILES}
    expected = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    assert sums == "".join(expected)

    saved = sorted(name for name in there if name not in files)
    assert 1 <= len(saved) <= checkpoint.GENERATIONS_KEPT
    assert saved[-1] == max(name for name in here if name.startswith("checkpoints/"))
    assert there[saved[-1]] == here[saved[-1]]
    assert all(mirror.is_whole(Path(name).name, there[name]) for name in saved)


def said(caplog: pytest.LogCaptureFixture, text: str) -> int:
    return sum(text in record.getMessage() for record in caplog.records)


# ------------------------------------------------------------------------------ copying


@pytest.mark.parametrize("kind", ["s3", "file"])
def test_the_mirror_becomes_what_the_folder_is(
    kind: str, folder: Path, tmp_path: Path, request: pytest.FixtureRequest, caplog: Any
) -> None:
    place = request.getfixturevalue("bucket") if kind == "s3" else Disk(tmp_path / "other disk")
    copies = mirror.start(place.url, folder)
    for epochs, step in enumerate((5, 10, 15)):
        save(folder, step, epochs)
        copies.copy()
        wait_for(lambda: copies._asked == copies._answered)
        assert_complete(place, folder)
    write_atomically(folder / "result.json", b"{}\n")  # after the last checkpoint
    assert copies.finish(10)
    assert_complete(place, folder)
    assert said(caplog, f"the mirror {place.url} is complete") == 1
    if kind == "file":
        done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=place.root / "run")
        assert done.returncode == 0

    # A later start of the run finds it all there: nothing is sent again.
    again = mirror.start(place.url, folder)
    if kind == "s3":
        before = len(request.getfixturevalue("proxy").requests)
        assert again.finish(10)
        later = request.getfixturevalue("proxy").requests[before:]
        assert [
            path for method, path in later if method == "PUT" and "SHA256SUMS" not in path
        ] == []
    assert again.finish(10)
    assert_complete(place, folder)


def test_the_newest_checkpoint_is_sent_first(folder: Path, tmp_path: Path) -> None:
    """Where time is short, what a checkpoint has in it can wait."""
    copies = mirror.start(Disk(tmp_path / "other disk").url, folder)
    sent, write = [], copies.store.write

    def note(name: str, content: bytes) -> None:
        write(name, content)
        if name != mirror.SUMS:
            sent.append(name)
        if name == "last.pt" and len(newest) == 1:  # EC2 gives notice while older ones are sent
            newest.append(f"checkpoints/{save(folder, 9, epochs=2).name}")
            asked.start()
            wait_for(lambda: copies._finishing and copies._asked > copies._copying)

    copies.store.write = note
    asked = threading.Thread(target=copies.finish, args=[10])
    write_atomically(folder / "config.json", b"{}\n")
    newest = [f"checkpoints/{save(folder, 5, epochs=1).name}"]
    write_atomically(folder / "result.json", b"{}\n")
    copies.copy()
    wait_for(lambda: copies._asked == copies._answered == 2)
    asked.join()
    assert sent == [
        *("config.json", newest[0], "metrics.jsonl", "best.pt", "last.pt"),
        *(newest[1], "metrics.jsonl", "best.pt", "last.pt", "result.json"),
    ]


@pytest.mark.parametrize(
    ("taken_in_s", "copies_s"),
    [(None, 20), (119, 109), (90, 80), (15, 20), (-300, 20), (3600, 110)],
)
def test_the_last_copies_get_the_time_that_ec2_leaves(
    taken_in_s: float | None, copies_s: float
) -> None:
    requests = interruption.Requests()
    assert mirror.last_copies_s(requests) == 60  # out of budget: nothing presses
    requests.stop = True
    if taken_in_s is not None:
        taken_at = time.time() + taken_in_s
        requests.notice = interruption.Notice(taken_at, time.monotonic())
    assert mirror.last_copies_s(requests) == pytest.approx(copies_s, abs=1)


@pytest.mark.parametrize("arrived", [False, True])
def test_wherever_copying_ends_each_file_there_is_the_old_or_the_new_one(
    arrived: bool, folder: Path, tmp_path: Path
) -> None:
    """`arrived`: whether the last write did, as where only its answer was lost."""

    class Gone(Exception):
        """The machine was taken."""

    place = Disk(tmp_path / "other disk")
    (folder / "config.json").write_text("{}\n")
    save(folder, 5, epochs=1)
    assert mirror.start(place.url, folder).finish(10)
    old, before = contents(folder), tmp_path / "before"
    place.root.rename(before)
    save(folder, 10, epochs=2)
    (folder / "config.json").write_text("{ }\n")
    new = contents(folder)
    names = [name for name in mirror.COPIED_FILES if name in old]
    assert [name for name in names if old[name] != new[name]] == names
    for writes in range(100):
        shutil.copytree(before, place.root)
        copies = mirror.start(place.url, folder)
        real, left = copies.store.write, writes

        def write(name: str, content: bytes, real: Any = real) -> None:
            nonlocal left
            left -= 1
            if left >= 0 or arrived:
                real(name, content)
            if left < 0:
                raise Gone

        copies.store.write = write
        with contextlib.suppress(Gone):
            copies._copy_newest()
        empty = tmp_path / f"machine {writes}" / "run"
        mirror.start(place.url, empty)
        fetched = contents(empty)
        for name in names:
            assert fetched.get(name) in (old[name], new[name]), (writes, name)
        assert checkpoint.generations(empty / "checkpoints")
        shutil.rmtree(place.root)
        if left >= 0:
            break
    assert writes > len(names)
    assert fetched.items() <= new.items()


def test_nothing_is_mirrored_without_an_address(folder: Path) -> None:
    copies = mirror.start("", folder)
    copies.copy()
    assert copies.finish(0)
    assert contents(folder) == {}


def test_a_slow_network_gets_the_newest_and_no_queue(
    folder: Path, bucket: Bucket, proxy: Proxy
) -> None:
    copies = mirror.start(bucket.url, folder)
    saver = checkpoint.BackgroundSaver(folder, copies.copy)
    write_atomically(folder / "config.json", b"{}\n")
    proxy.fault = "slow"
    started = time.monotonic()
    for step in range(1, 41):
        saver.save(make_state(step))
    saver.wait()
    assert time.monotonic() - started < 4  # at 0.2 s a request, 40 copies would take 16 and more
    assert copies.finish(20)
    assert_complete(bucket, folder)
    sent = [path for method, path in proxy.requests if method == "PUT" and "checkpoints" in path]
    assert len(set(sent)) == len(sent) <= 10


FAULTS = [
    (500, "it answers 500 Error"),
    (403, "it answers 403 AccessDenied"),
    ("hang", "it does not answer"),
    ("down", "it cannot be reached"),
]


def begin(fault: object, proxy: Proxy) -> None:
    if fault == "down":
        proxy.close()
    proxy.fault = fault


def mend(fault: object, proxy: Proxy) -> Proxy:
    """A proxy that works, at the same port."""
    proxy.fault = None
    proxy.hurry.set()
    return Proxy(proxy.upstream, proxy.server_port) if fault == "down" else proxy


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_a_store_that_fails_and_comes_back_is_made_complete(
    fault: object,
    words: str,
    folder: Path,
    bucket: Bucket,
    proxy: Proxy,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "TIMEOUT_S", 0.5)
    copies = mirror.start(bucket.url, folder)
    save(folder, 1)
    copies.copy()
    wait_for(lambda: copies._answered == 1)

    begin(fault, proxy)
    for step in range(2, 6):
        save(folder, step, epochs=1)
        started = time.monotonic()
        copies.copy()
        assert time.monotonic() - started < 0.1
    wait_for(lambda: said(caplog, f"fails ({words})"))
    time.sleep(3)  # some more tries, without a word
    assert said(caplog, "fails") == 1

    working = mend(fault, proxy)
    wait_for(lambda: said(caplog, "works again"))
    assert copies.finish(10)
    assert said(caplog, "works again") == 1
    assert_complete(bucket, folder)
    assert SECRET not in caplog.text and CREDENTIALS["AWS_ACCESS_KEY_ID"] not in caplog.text
    if working is not proxy:
        working.close()


@pytest.mark.parametrize(
    ("earlier", "words"), [("", "no credentials: "), ("AKIAold", "it answers 400 ExpiredToken")]
)
def test_credentials_that_are_written_while_it_runs_are_found(
    earlier: str,
    words: str,
    folder: Path,
    bucket: Bucket,
    proxy: Proxy,
    tmp_path: Path,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "credentials"

    def write(key: str) -> None:
        lines = (f"aws_access_key_id={key}", f"aws_secret_access_key={SECRET}") if key else ()
        file.write_text("\n".join(("[default]", *lines)))

    write(earlier)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    proxy.knows = "AKIAnew"
    save(folder, 1)
    copies = mirror.start(bucket.url, folder)
    copies.copy()
    wait_for(lambda: said(caplog, f"fails ({words}"))
    write("AKIAnew")
    assert copies.finish(10)
    assert_complete(bucket, folder)


@pytest.mark.parametrize("fault", [500, "hang", "down"])
def test_the_last_copies_are_bounded_in_time(
    fault: object, folder: Path, bucket: Bucket, proxy: Proxy, caplog: Any
) -> None:
    copies = mirror.start(bucket.url, folder)
    save(folder, 1)
    begin(fault, proxy)
    started = time.monotonic()
    assert not copies.finish(1.5)
    assert 1.5 <= time.monotonic() - started < 2.5
    assert said(caplog, "is not complete") == 1
    mend(fault, proxy)


def test_a_store_that_stops_reading_is_given_up(
    bucket: Bucket, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "TIMEOUT_S", 0.5)
    store = mirror.open_store(bucket.url, "run")
    proxy.fault = "hang"
    started = time.monotonic()
    with pytest.raises(botocore.exceptions.ConnectionClosedError):
        store.write("best.pt", bytes(50_000_000))
    assert time.monotonic() - started < 5


def test_tries_are_up_to_a_minute_apart_and_begin_anew_once_one_was_good(
    folder: Path, tmp_path: Path
) -> None:
    copies = mirror.start(Disk(tmp_path / "disk").url, folder)
    waits: list[float] = []
    wait, sizes, failures = copies._changed.wait_for, copies.store.sizes, 8

    def hardly_wait(condition: Any, seconds: float | None = None) -> bool:
        if seconds is None:
            return wait(condition)
        waits.append(seconds)
        return wait(condition, 0.001)

    def fail() -> dict[str, int]:
        nonlocal failures
        if failures:
            failures -= 1
            raise TimeoutError
        return sizes()

    copies._changed.wait_for, copies.store.sizes = hardly_wait, fail
    for step in (1, 2):
        save(folder, step)
        copies.copy()
        wait_for(copies.is_complete)
        failures = 1
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 1]


def test_a_wait_for_another_try_ends_with_the_run(
    folder: Path, bucket: Bucket, proxy: Proxy
) -> None:
    copies = mirror.start(bucket.url, folder)
    save(folder, 1)
    proxy.fault = 500
    copies.copy()
    time.sleep(4)  # the tries after 0, 1 and 3 seconds; the next one would come after 7
    proxy.fault = None
    started = time.monotonic()
    assert copies.finish(10)
    assert time.monotonic() - started < 2
    assert_complete(bucket, folder)


@pytest.mark.parametrize("checksums", [True, False])
def test_what_arrives_altered_is_noticed_and_sent_again(
    checksums: bool, folder: Path, bucket: Bucket, proxy: Proxy, caplog: Any
) -> None:
    """By the store itself, or by reading back from one that keeps no checksums."""
    copies = mirror.start(bucket.url, folder)
    path = save(folder, 1)
    proxy.fault = None if checksums else "forget checksums"
    proxy.damage_next = "PUT"
    copies.copy()
    noticed = f"checkpoints/{path.name} is not there as it was sent"
    words = "it answers 400 BadDigest" if checksums else noticed
    wait_for(lambda: said(caplog, f"fails ({words})"))
    assert copies.finish(10)
    assert_complete(bucket, folder)


def test_a_copy_that_somebody_removed_is_sent_again(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    path = save(folder, 1)
    copies.copy()
    wait_for(lambda: copies._answered == 1)
    for name in ("best.pt", f"checkpoints/{path.name}", mirror.SUMS):
        (place.root / "run" / name).unlink()
    assert copies.finish(10)
    there = place.files()
    assert (
        f"{hashlib.sha256(there['best.pt']).hexdigest()}  best.pt\n"
        in there.pop(mirror.SUMS).decode()
    )
    assert there == contents(folder)


def test_a_damaged_checkpoint_is_never_copied(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    good = save(folder, 1)
    save(folder, 2).write_bytes(b"damaged")
    assert copies.finish(10)
    names = [name for name in place.files() if name.startswith("checkpoints/")]
    assert names == [f"checkpoints/{good.name}"]


# ------------------------------------------------------------------------------ fetching


def mirrored(place: "Bucket | Disk", folder: Path) -> list[Path]:
    """Mirror two checkpoints and remove the folder; returns their paths, the older one first."""
    copies = mirror.start(place.url, folder)
    paths = []
    for step in (5, 9):
        paths.append(save(folder, step, epochs=1))
        copies.copy()
        wait_for(lambda: copies._asked == copies._answered)
    for path in sorted(folder.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    folder.rmdir()
    return paths


def test_an_empty_machine_gets_everything(folder: Path, bucket: Bucket) -> None:
    mirrored(bucket, folder)
    copies = mirror.start(bucket.url, folder)
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 9
    there = bucket.files()
    there.pop(mirror.SUMS)
    got = contents(folder)
    assert got == {name: there[name] for name in got}
    assert set(got) >= {"best.pt", "last.pt", "metrics.jsonl"}

    save(folder, 12, epochs=1)
    assert copies.finish(10)
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 12
    assert bucket.files().keys() >= contents(folder).keys()


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_copy_is_left_aside_for_the_one_before(
    damage: str, folder: Path, bucket: Bucket, caplog: Any
) -> None:
    older, newer = mirrored(bucket, folder)
    name = f"checkpoints/{newer.name}"
    whole = bucket.files()[name]
    flipped = whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:]
    bucket.put(name, {"flipped": flipped, "cut": whole[:-1], "empty": b""}[damage])
    bucket.put("best.pt", b"damaged")
    copies = mirror.start(bucket.url, folder)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [older.name]
    assert said(caplog, f"{newer.name} is damaged in s3://") == 1
    assert said(caplog, "best.pt is damaged in s3://") == 1
    assert not (folder / "best.pt").exists()

    # The run that goes on from there puts its own in their place.
    save(folder, 7, epochs=1)
    assert copies.finish(10)
    assert_complete(bucket, folder)

    for name in bucket.files():
        if name.startswith("checkpoints/"):
            bucket.put(name, b"damaged")
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"damaged here too")
    with pytest.raises(UserError, match=r"every checkpoint of run run in s3://.* is damaged"):
        mirror.start(bucket.url, folder)


def test_damaged_checkpoints_here_are_mended_from_the_mirror(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    save(folder, 5)
    newest = save(folder, 9)
    assert copies.finish(10)
    whole = contents(folder)
    newest.write_bytes(b"damaged")
    mirror.start(place.url, folder)  # the older one is whole: only the newest is fetched
    assert contents(folder) == whole
    for path in (folder / "checkpoints").iterdir():
        path.write_bytes(b"damaged")
    mirror.start(place.url, folder)
    assert newest.read_bytes() == whole[f"checkpoints/{newest.name}"]


def test_what_another_process_saves_here_while_the_mirror_is_read_is_not_replaced(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Disk(tmp_path / "disk")
    save(folder, 9, epochs=1)
    assert mirror.start(place.url, folder).finish(10)
    shutil.rmtree(folder)
    (folder / "checkpoints").mkdir(parents=True)
    read, saved = mirror._FolderStore.read, {}

    def read_meanwhile(store: Any, name: str) -> bytes:
        if not saved:
            save(folder, 12, epochs=2)
            saved.update(contents(folder))
        return read(store, name)

    monkeypatch.setattr(mirror._FolderStore, "read", read_meanwhile)
    with pytest.raises(UserError, match=r"another process has just saved to .*same command again"):
        mirror.start(place.url, folder)
    assert contents(folder) == saved


def test_a_mirror_that_is_further_on_is_neither_followed_nor_replaced(
    folder: Path, bucket: Bucket, proxy: Proxy, caplog: Any
) -> None:
    mirrored(bucket, folder)
    (folder / "checkpoints").mkdir(parents=True)
    save(folder, 7, epochs=1)
    before = bucket.files()
    with pytest.raises(UserError, match=r"further on .*move that folder away.*another --mirror"):
        mirror.start(bucket.url, folder)
    # Nor if it could not be read at the start.
    proxy.fault = 500
    copies = mirror.start(bucket.url, folder)
    proxy.fault = None
    assert not copies.finish(1)
    assert said(caplog, "it holds a run of that name that is further on") == 2
    assert bucket.files() == before
    # Once this one has overtaken it, it is.
    save(folder, 10, epochs=1)
    assert copies.finish(10)
    assert_complete(bucket, folder)


def write_config(folder: Path, without: str = "", **settings: Any) -> None:
    config = {**dataclasses.asdict(Config()), **settings}
    config.pop(without, None)
    write_json(folder / "config.json", {"config": config, "classes": ["a", "b"]})


def test_another_run_of_the_same_name_is_not_replaced(
    folder: Path, bucket: Bucket, proxy: Proxy, caplog: Any
) -> None:
    write_config(folder, max_lr=0.1)
    mirrored(bucket, folder)
    (folder / "checkpoints").mkdir(parents=True)
    write_config(folder, max_lr=0.2, workers=3)
    save(folder, 11, epochs=1)
    before = bucket.files()
    told = r"holds another run named run, .* max_lr was 0.1, is 0.2\): take another --name or"
    with pytest.raises(UserError, match=told) as error:
        mirror.start(bucket.url, folder)
    assert error.value.exit_code == 2
    assert mirror.try_access(bucket.url, folder).other_settings == ["max_lr was 0.1, is 0.2"]
    # Nor if it could not be read at the start.
    proxy.fault = 500
    copies = mirror.start(bucket.url, folder)
    proxy.fault = None
    assert not copies.finish(1)
    assert said(caplog, "it holds another run of that name") == 2
    assert bucket.files() == before
    # Nor does it take the place of what is left here of this one.
    shutil.rmtree(folder / "checkpoints")
    left = contents(folder)
    with pytest.raises(UserError, match=told):
        mirror.start(bucket.url, folder)
    assert contents(folder) == left


@pytest.mark.parametrize(
    ("there", "here"),
    [
        ({"epochs": 5}, {"epochs": 5, "workers": 3, "extra_epochs": 2}),
        ({"extra_epochs": 2}, {}),
        ({"without": "blurpool"}, {}),  # of an older version
        ({"without": "extra_epochs"}, {"extra_epochs": 2}),
    ],
)
def test_the_same_run_goes_on_in_its_mirror(
    there: dict[str, Any], here: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    place = Disk(tmp_path / "disk")
    write_config(folder, **there)
    save(folder, 5)
    assert mirror.start(place.url, folder).finish(10)
    write_config(folder, **here)
    save(folder, 9)
    assert mirror.start(place.url, folder).finish(10)
    assert_complete(place, folder)


def test_a_run_that_was_extended_otherwise_is_another_one(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    write_config(folder, extra_epochs=2)
    mirrored(place, folder)
    (folder / "checkpoints").mkdir(parents=True)
    write_config(folder, extra_epochs=3)
    save(folder, 11, epochs=1)
    with pytest.raises(UserError, match=r"holds another run .*extra_epochs was 2, is 3"):
        mirror.start(place.url, folder)


def test_a_run_that_fell_back_replaces_what_it_copied_itself(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    save(folder, 5)
    later = save(folder, 9)
    copies.copy()
    wait_for(lambda: copies._answered == 1)
    later.unlink()
    save(folder, 6)
    assert copies.finish(10)
    names = [name for name in place.files() if "step-00000009" in name]
    assert names == []


def test_the_only_good_copy_of_a_checkpoint_is_kept(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    save(folder, 5)
    later = save(folder, 9)
    copies.copy()
    wait_for(lambda: copies._answered == 1)
    good = later.read_bytes()
    later.write_bytes(b"damaged on this disk")
    assert copies.finish(10)
    assert place.files()[f"checkpoints/{later.name}"] == good


@pytest.mark.parametrize("where", ["run", "run/checkpoints"])
def test_a_folder_that_cannot_be_listed_is_no_empty_mirror(
    where: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Disk(tmp_path / "disk")
    mirrored(place, folder)
    closed, list_it = place.root / where, os.scandir

    def scandir(path: Any) -> Any:
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return list_it(path)

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"cannot be read \(Permission denied\)") as error,
    ):
        patch.setattr(os, "scandir", scandir)
        mirror.start(place.url, folder)
    assert error.value.exit_code == 2


def test_checkpoints_here_that_cannot_be_listed_are_not_fetched_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(folder, 5)

    def closed(path: Any) -> Any:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        for name in ("scandir", "listdir"):  # glob uses the one, iterdir the other
            patch.setattr(os, name, closed)
        mirror.start(f"file://{tmp_path}/disk", folder)


def test_a_checkpoint_here_that_the_disk_cannot_read_is_fetched(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Disk(tmp_path / "disk")
    copies = mirror.start(place.url, folder)
    older, newest = save(folder, 5), save(folder, 9)
    assert copies.finish(10)
    there, read = newest.stat().st_ino, Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path.name == newest.name and path.stat().st_ino == there:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert mirror._newest_whole(folder)[0] == older.name
    mirror.start(place.url, folder)
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 9


def test_what_a_killed_process_left_there_is_removed(folder: Path, tmp_path: Path) -> None:
    place = Disk(tmp_path / "disk")
    leftover = (
        tmp_path / "disk" / folder.name / "checkpoints" / ".epochs-000-step-00000002-x.pt.tmp"
    )
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    save(folder, 5)
    copies = mirror.start(place.url, folder)
    assert copies.finish(10)
    assert not leftover.exists()
    assert_complete(place, folder)


def test_an_hour_is_for_a_slow_mirror_not_for_one_that_fails(
    folder: Path, bucket: Bucket, proxy: Proxy, caplog: Any
) -> None:
    copies = mirror.start(bucket.url, folder)
    save(folder, 1)
    begin("down", proxy)
    started = time.monotonic()
    assert not copies.finish(mirror.COMPLETED_S)
    assert time.monotonic() - started < 30
    assert said(caplog, "is not complete") == 1


@pytest.mark.parametrize(("fault", "words"), FAULTS)
def test_an_unreachable_mirror_stops_a_run_at_its_beginning_only(
    fault: object,
    words: str,
    folder: Path,
    bucket: Bucket,
    proxy: Proxy,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "TIMEOUT_S", 0.5)
    begin(fault, proxy)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"cannot be read \({words}\).*leave out --mirror"
    ) as error:
        mirror.start(bucket.url, folder)
    assert time.monotonic() - started < 8
    assert error.value.exit_code == (2 if fault == 403 else 78)  # a mistake, or what may pass
    save(folder, 1)
    mirror.start(bucket.url, folder)
    assert said(caplog, f"cannot be read ({words}): training goes on") == 1
    assert SECRET not in caplog.text + str(error.value)


def test_places_that_are_not_there_are_no_empty_mirrors(
    folder: Path, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror.time, "sleep", lambda _: None)
    for url, words in (
        ("s3://no-such-bucket/runs", "it answers 404 NoSuchBucket"),
        (f"file://{tmp_path}/not/mounted", "No such file or directory"),
    ):
        with pytest.raises(UserError, match=words):
            mirror.start(url, folder)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no credentials: set AWS_ACCESS_KEY_ID") as error:
        mirror.start(bucket.url, folder)
    assert error.value.exit_code == 78


@pytest.mark.parametrize(
    ("fault", "words"), [(503, "it answers 503 Error"), ("no credentials", "no credentials: ")]
)
def test_at_a_start_what_passes_by_itself_is_waited_for(
    fault: object,
    words: str,
    folder: Path,
    bucket: Bucket,
    proxy: Proxy,
    tmp_path: Path,
    caplog: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, newest = mirrored(bucket, folder)
    monkeypatch.setattr(mirror, "PATIENCE_S", 60.0)
    file = tmp_path / "credentials"
    if fault == "no credentials":
        monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
    else:
        proxy.fault = fault

    def pass_by() -> None:
        proxy.fault = None
        file.write_text(f"[default]\naws_access_key_id=AKIA\naws_secret_access_key={SECRET}\n")

    timer = threading.Timer(5, pass_by)  # later than the three tries of what does not pass
    timer.start()
    mirror.start(bucket.url, folder)
    timer.join()
    assert newest.exists()
    assert said(caplog, f"cannot be read yet ({words}") == 1


def test_an_error_that_nobody_knows_is_told_by_its_name_alone() -> None:
    class OddError(Exception):
        """Its own text has the signed address that failed."""

    assert mirror.in_words(OddError(f"GET https://host/key?sig={SECRET}")) == "OddError"


@pytest.mark.parametrize(
    ("status", "may_pass"),
    [(429, True), (500, True), (503, True), (400, False), (403, False), (404, False)],
)
def test_a_store_that_is_busy_is_waited_for_and_one_that_refuses_is_not(
    status: int, may_pass: bool
) -> None:
    """As boto3 tells it, and as huggingface_hub does."""
    answer = {"ResponseMetadata": {"HTTPStatusCode": status}}
    from_hub = OSError("busy")
    from_hub.response = types.SimpleNamespace(status_code=status)
    for error in (botocore.exceptions.ClientError(answer, "ListObjectsV2"), from_hub):
        assert mirror._may_pass(error) == may_pass


@pytest.mark.parametrize(
    "url",
    [
        *("bucket/prefix", "ftp://host/runs", "s3://", "s3:///prefix", "file://runs", "file:///"),
        *("hf://user", "hf://datasets/user", "hf://spaces/user/app", "hf://user/repo@main"),
        *(f"s3://key:{SECRET}@bucket/runs", f"https://user:{SECRET}@host/", f"s3://b/p?k={SECRET}"),
    ],
)
def test_what_is_no_address_is_refused_at_once_and_not_repeated(url: str, folder: Path) -> None:
    with pytest.raises(UserError, match="no address for --mirror") as error:
        mirror.start(url, folder)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "error_class"),
    [
        ("AWS_ENDPOINT_URL", "localhost:9000", "ValueError"),
        ("AWS_ENDPOINT_URL", f"http//user:{SECRET}@host", "ValueError"),
        ("AWS_PROFILE", "nope", "ProfileNotFound"),
        ("AWS_CONFIG_FILE", "broken", "ConfigParseError"),
    ],
)
def test_what_boto3_cannot_use_is_a_mistake_of_one_line(
    name: str,
    value: str,
    error_class: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if value == "broken":
        value = str(tmp_path / "config")
        Path(value).write_text("[default\n")
    monkeypatch.setenv(name, value)
    save(folder, 1)  # whether there is something here or not
    with pytest.raises(UserError, match=rf"\({error_class}\): correct AWS_ENDPOINT_URL") as error:
        mirror.start("s3://bucket/runs", folder)
    assert error.value.exit_code == 2
    assert SECRET not in str(error.value)


def test_addresses_name_their_stores(tmp_path: Path) -> None:
    store = mirror.open_store("s3://bucket", "run")
    assert (store.bucket, store.folder) == ("bucket", "run")
    store = mirror.open_store("s3://bucket/a/b/", "run")
    assert (store.bucket, store.folder) == ("bucket", "a/b/run")
    for url, repo_type, folder in (
        ("hf://user/repo", "model", "run"),
        ("hf://models/user/repo/a/b", "model", "a/b/run"),
        ("hf://datasets/user/repo", "dataset", "run"),
    ):
        store = mirror.open_store(url, "run")
        assert store.repo == {"repo_type": repo_type, "repo_id": "user/repo"}
        assert store.folder == folder
    assert mirror.open_store("file:///a%20b/c", "run").folder == Path("/a b/c/run")
    assert mirror.open_store("file:///a b/c", "run").folder == Path("/a b/c/run")


@pytest.mark.parametrize(
    ("url", "package"), [("s3://bucket", "boto3"), ("hf://user/repo", "huggingface_hub")]
)
def test_a_missing_package_is_named(
    url: str, package: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f"needs {package}: pip install"):
        mirror.start(url, folder)


def test_a_mirror_in_the_runs_own_place_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="is where the run itself is"):
        mirror.start(f"file://{folder.parent}", folder)


# ------------------------------------------------------------------------------ a hub


# In a process of its own, since the hub's address is read when the package is imported.
HUB_PROGRAM = """if True:
    import sys, logging, pathlib
    import mirror, utils
    utils.start_log(None)
    url, folder, *timeout_s = sys.argv[1:]
    if timeout_s:
        mirror.TIMEOUT_S = float(timeout_s[0])
    if url.endswith("hang"):
        mirror.open_store(url, "run").remove("best.pt")
    def main():
        copies = mirror.start(url, pathlib.Path(folder))
        sys.exit(not copies.finish(10))
    utils.run_stage(main)
"""


LARGE = ("best.pt", "last.pt")  # among others


def test_a_hub_holds_the_copies_too(folder: Path) -> None:
    hub = Hub("datasets/user/repo")
    there_now = hub.repos["datasets/user/repo"]
    token = "hf_" + SECRET

    def run(
        url: str = "hf://datasets/user/repo/runs", *timeout_s: str
    ) -> subprocess.CompletedProcess:
        hub_at = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token}
        done = quick_start.run(
            [sys.executable, "-c", HUB_PROGRAM, url, str(folder), *timeout_s],
            cwd=REPOSITORY,
            env={**COMMAND_ENVIRONMENT, **hub_at, "HF_HUB_DISABLE_TELEMETRY": "1"},
            timeout=120,
        )
        assert token not in done.stdout + done.stderr
        return done

    def there() -> dict[str, bytes]:
        prefix = "runs/run/"
        assert all(name.startswith(prefix) for name in there_now)
        files = {name.removeprefix(prefix): content for name, content in there_now.items()}
        return {name: content for name, content in files.items() if name != mirror.SUMS}

    for step in (5, 9, 12):
        save(folder, step, epochs=1)
        done = run()
        assert done.returncode == 0, done.stdout + done.stderr
    assert there() == contents(folder)
    assert {f"/large/{hashlib.sha256(there()[name]).hexdigest()}" for name in LARGE} <= {
        path for method, path in hub.requests if method == "PUT"
    }

    # A transfer that stops halfway is given up, told, and begun again.
    write_atomically(folder / "best.pt", random.Random(0).randbytes(30_000_000))
    hub.stop_next = True
    stopped = run("hf://datasets/user/repo/runs", "1")
    assert not hub.stop_next
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert stopped.stdout.count("fails (it does not answer)") == 1, stopped.stdout
    assert there() == contents(folder)

    # Onto an empty machine; and the hub's repo may be missing, or the hub out of order.
    for path in folder.rglob("*"):
        if path.is_file():
            path.unlink()
    missing = run("hf://datasets/user/other")
    assert missing.returncode == 2
    assert "cannot be read (it answers 404)" in missing.stderr
    assert run().returncode == 0
    assert checkpoint.load_latest(folder / "checkpoints")["step"] == 12
    assert (folder / "best.pt").read_bytes() == there()["best.pt"]
    save(folder, 13, epochs=1)
    hub.fault = 403
    failed = run()
    assert failed.returncode == 1
    assert "cannot be read (it answers 403): training goes on" in failed.stdout
    assert "is not complete (it answers 403)" in failed.stdout
    hub.fault = "hang"
    assert "ReadTimeout" in run("hf://datasets/user/repo/hang", "0.5").stderr
    hub.close()


# ------------------------------------------------------------------------------ training


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, object]:
    """Two epochs of three steps, a checkpoint after each."""
    make_images(tmp_path / "images", classes=3, images=7)
    return {
        "runs_folder": str(tmp_path / "runs"),
        "name": "plain",
        "train_folder_name": str(tmp_path / "images" / "train"),
        "val_folder_name": str(tmp_path / "images" / "val"),
        "epochs": 2,
        "batch_size": 8,
        "max_lr": 0.02,
        "train_px": 32,
        "val_px": 32,
        "val_resize_px": 36,
        "precision": "fp32",
        "workers": 1,
        "checkpoint_minutes": 0,
        "log_interval_s": 1e-9,
    }


def start_trainer(settings: dict[str, object], output: Path) -> subprocess.Popen:
    with open(output, "w") as file:
        return quick_start.Popen(
            [sys.executable, "trainer.py", *as_options(settings)],
            cwd=REPOSITORY,
            env={**COMMAND_ENVIRONMENT, **{name: os.environ[name] for name in AWS_NAMES}},
            stdout=file,
            stderr=subprocess.STDOUT,
        )


AWS_NAMES = (*CREDENTIALS, "AWS_ENDPOINT_URL")


def test_a_run_goes_on_from_its_mirror_on_an_empty_machine(
    settings: dict[str, object],
    undisturbed: dict[str, object],
    bucket: Bucket,
    proxy: Proxy,
    tmp_path: Path,
) -> None:
    """Stopped, its folder lost, and the mirror out of order for part of both halves."""
    mirrored = {**settings, "name": "run", "mirror": bucket.url}
    folder, output = tmp_path / "runs" / "run", tmp_path / "output"

    def runs_until(text: str) -> None:
        wait_for(lambda: text in output.read_text() or process.poll() is not None)
        assert text in output.read_text(), output.read_text()

    process = start_trainer(mirrored, output)
    runs_until("epoch 1/2  step 1/3")
    proxy.fault = 500
    runs_until("epoch 2/2  step 1/3")
    proxy.fault = None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert f"the mirror {bucket.url} is complete" in output.read_text()
    assert_complete(bucket, folder)
    shutil.rmtree(folder)

    process = start_trainer(mirrored, output)
    runs_until("resumed after 1 epochs and ")
    proxy.close()
    runs_until("finished in ")
    revived = Proxy(proxy.upstream, proxy.server_port)
    assert process.wait(90) == 0
    text = output.read_text()
    assert text.count(" fails (") == 1  # in the middle of a copy, or at the beginning of one
    assert text.count("works again") == 1
    assert f"the mirror {bucket.url} is complete" in text
    assert SECRET not in text + (folder / "config.json").read_text()
    assert_complete(bucket, folder)
    assert outcome(mirrored) == outcome(undisturbed)

    # What is finished is so on any machine.
    shutil.rmtree(folder)
    done = run_stage_command("trainer.py", *as_options(mirrored), env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    assert "is finished" in done.stdout
    revived.close()


# The trainer, which gives a mirror up sooner.
IMPATIENT = """if True:
    import mirror, trainer, utils
    mirror.FINISHED_S = mirror.PATIENCE_S = 2.0
    utils.run_stage(trainer.main)
"""


def test_a_finished_run_says_by_its_exit_code_that_its_mirror_is_not_complete(
    settings: dict[str, object], tmp_path: Path
) -> None:
    def ends_with(code: int, text: str, *options: str) -> None:
        done = quick_start.run(
            [sys.executable, "-c", IMPATIENT, *as_options(settings), "--mirror", url, *options],
            cwd=REPOSITORY,
            env=COMMAND_ENVIRONMENT,
            timeout=120,
        )
        assert done.returncode == code, done.stdout + done.stderr
        assert text in done.stdout

    settings |= {"epochs": 1, "price_per_hour": 1.0}
    disk, url = tmp_path / "disk", ""
    ends_with(0, "finished in ")
    url = f"file://{disk}"
    incomplete = f"the mirror {url} is not complete"
    ends_with(77, incomplete)
    ends_with(76, incomplete, "--extra-epochs", "1", "--budget-usd", "1e-6")
    ends_with(77, incomplete, "--extra-epochs", "1")  # at the end of training, too
    disk.mkdir()
    ends_with(0, f"the mirror {url} is complete", "--extra-epochs", "1")
    there = contents(disk / "plain")
    assert there.items() >= {"best.pt": (tmp_path / "runs/plain/best.pt").read_bytes()}.items()


def test_nothing_is_begun_anew_while_the_mirror_cannot_be_read(
    settings: dict[str, object], bucket: Bucket, proxy: Proxy
) -> None:
    options = as_options({**settings, "mirror": bucket.url})

    def ends_with(code: int, why: str) -> None:
        done = quick_start.run(
            [sys.executable, "-c", IMPATIENT, *options],
            cwd=REPOSITORY,
            env={**COMMAND_ENVIRONMENT, **os.environ},
            timeout=120,
        )
        assert done.returncode == code
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"error: the mirror {bucket.url} cannot be read ({why})")
        assert not Path(str(settings["runs_folder"])).exists()

    proxy.fault = 403
    ends_with(2, "it answers 403 AccessDenied")
    proxy.close()
    ends_with(78, "it cannot be reached")


def test_a_start_that_waits_for_its_mirror_ends_at_a_signal(
    settings: dict[str, object], bucket: Bucket, proxy: Proxy, tmp_path: Path
) -> None:
    proxy.fault = 503
    output = tmp_path / "output"
    process = start_trainer({**settings, "mirror": bucket.url}, output)
    wait_for(lambda: len(output.read_text().split("cannot be read yet")) == 2 or process.poll())
    time.sleep(4)  # in the third or fourth pause
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75
    assert output.read_text().endswith("error: interrupted\n")
