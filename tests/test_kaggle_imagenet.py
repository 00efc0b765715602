"""scripts/kaggle_imagenet.py: the real Kaggle CLI, before a server that answers as Kaggle's does.

The CLI, told to talk to a server on this machine (KAGGLE_API_ENVIRONMENT=LOCALHOST), takes
http://localhost and no port; as a proxy, the tests' server gets what is meant for that, and for
Kaggle's storage. What it answers is what kaggle 2.2 and kagglesdk 0.1 look for.
"""

import email.utils
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY
from test_packing import ENTRIES, KAGGLE, TREE, entries, picture

import store

SLUG = "imagenet-object-localization-challenge"
RULES = f"https://www.kaggle.com/competitions/{SLUG}/rules"
MB = 1 << 20  # the CLI writes so much at once
WAIT_S = 60
SECRETS = ("t0ken-of-tests", "k3y-of-tests", "s1gnature-of-tests")
API = "http://localhost/api/v1/"
INTROSPECT = f"{API}security.OAuthService/IntrospectToken"
DOWNLOAD = f"{API}competitions.CompetitionApiService/DownloadDataFiles"
METADATA = f"{API}datasets.DatasetApiService/GetDatasetMetadata"
DOWNLOAD_SET = f"{API}datasets.DatasetApiService/DownloadDataset"
STORAGE = "http://storage.googleapis.com/"

# As Kaggle lays it out, with the list of the training pictures, and 4 MB that nobody packs.
TREE = {
    **TREE,
    "ILSVRC/ImageSets/CLS-LOC/train_cls.txt": b"n01/n01_1 1\nn01/n01_2 2\nn02/n02_1 3\nn02/n02_2 4",
    f"{KAGGLE}/test/ILSVRC2012_test_00000002.JPEG": bytes(range(256)) * (4 * MB // 256),
    "LOC_synset_mapping.txt": b"n01 tench\nn02 goldfish",
}
TREE_100K = {
    "tusonggao/imagenet-train-subset-100k": {
        f"imagenet_subtrain/{name}/{name}_{number}.JPEG": picture(number)
        for name in ("n01", "n02")
        for number in (1, 2)
    },
    "chiragtagadiya/val-imagenet-1000": {
        f"archive/val/{name}/ILSVRC2012_val_0000000{number}.JPEG": picture(number)
        for number, name in enumerate(("n01", "n02"), 5)
    },
}


def make_zip(path: Path, tree: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in tree.items():
            archive.writestr(name, content)
    return path


# ------------------------------------------------------------------------------ the server


class Kaggle(http.server.ThreadingHTTPServer):
    """Kaggle's API and storage, with a log of what was asked and a fault on request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.contents: dict[str, bytes] = {}  # by path, in the storage
        self.log: list[tuple[str, str, str]] = []  # address, Range, Authorization
        self.token = SECRETS[0]
        self.refusal: tuple[int, str] | None = None  # of downloads: code and message
        self.is_storage_open = True
        self.break_after: int | None = None  # bytes of a body, of the next downloads
        self.breaks = 0
        self.hang = threading.Event()  # is waited for where a body broke

    @property
    def ranges(self) -> list[str]:
        """Ranges asked of the storage; "" is the whole."""
        return [asked for address, asked, _ in self.log if address.startswith(STORAGE)]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Kaggle

    def log_message(self, *_: object) -> None:
        pass

    def note(self) -> str:
        address = self.path.partition("?")[0]
        entry = [self.headers.get(name, "") for name in ("Range", "Authorization")]
        self.server.log.append((address, *entry))
        return address

    def answer(self, code: int, value: object, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("X-Kaggle-APIVersion", "99.0.0")  # of which the CLI warns
        for name, text in headers.items():
            self.send_header(name, text)
        self.send_header("Content-Type", "application/json; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        address = self.note()
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if address == INTROSPECT:
            is_known = request["token"] == self.server.token
            self.answer(200, {"active": is_known, "username": "tester" if is_known else ""})
        elif self.headers.get("Authorization", "").startswith("Basic "):  # no such key is known
            self.send_response(401)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif address == METADATA:
            self.answer(200, {"info": {"licenses": [{"name": "other"}]}})
        elif self.server.refusal is not None:
            code, message = self.server.refusal
            self.answer(code, {"code": code, "message": message})
        elif address == DOWNLOAD:
            self.redirect(request["competitionName"])
        elif address == DOWNLOAD_SET:
            self.redirect(f"{request['ownerSlug']}/{request['datasetSlug']}")

    def redirect(self, name: str) -> None:
        location = f"{STORAGE}{name}/bundle/archive.zip?Expires=1&Signature={SECRETS[2]}"
        self.answer(302, {}, Location=location)

    def do_GET(self) -> None:
        if not self.server.is_storage_open:
            self.note()
            self.answer(403, {})
            return
        name = self.note().removeprefix(STORAGE).removesuffix("/bundle/archive.zip")
        content = self.server.contents[name]
        etag = f'"{hash(content):x}"'
        first = 0
        if self.headers.get("If-Range", etag) == etag:
            first = int(re.sub(r"bytes=(\d+)-", r"\1", self.headers.get("Range", "bytes=0-")))
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "application/zip")
        self.send_header("Content-Length", str(len(content) - first))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", etag)
        self.send_header("Last-Modified", email.utils.formatdate(1.6e9, usegmt=True))
        self.end_headers()
        try:
            if self.server.break_after is None:
                self.wfile.write(content[first:])
                return
            self.wfile.write(content[first : first + self.server.break_after])
            self.server.breaks += 1
            self.server.hang.wait(WAIT_S)
            self.close_connection = True
        except OSError:
            pass  # the CLI looks at the headers first, and asks for the rest in another request


@pytest.fixture
def kaggle() -> Iterator[Kaggle]:
    with Kaggle() as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        yield server
        server.hang.set()
        server.shutdown()


# ------------------------------------------------------------------------------ the command

# Other counts than ImageNet's; the rest is as it is.
SMALL = """
import dataclasses, sys
sys.path.insert(0, "scripts")
import kaggle_imagenet, prepare_data
def small(data_set, **counts):
    archives = [dataclasses.replace(archive, about_bytes=0) for archive in data_set.archives]
    return dataclasses.replace(data_set, archives=archives, classes=2, **counts)
kaggle_imagenet.IMAGENET_1K = small(
    kaggle_imagenet.IMAGENET_1K, pictures={"train": 4, "val": 2}, class_pictures={"val": 1}
)
kaggle_imagenet.IMAGENET_100K = small(
    kaggle_imagenet.IMAGENET_100K,
    pictures={"train": 4, "val": 2},
    class_pictures={"train": 2, "val": 1},
)
"""
RUN = "prepare_data.run_stage(prepare_data.main)"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A user's folder with a token that Kaggle knows."""
    folder = tmp_path / "home" / ".kaggle"
    folder.mkdir(parents=True)
    (folder / "access_token").write_text(f"{SECRETS[0]}\n")
    return folder


def environment(kaggle: Kaggle, home: Path) -> dict[str, str]:
    kept = {
        name: value
        for name, value in COMMAND_ENVIRONMENT.items()
        if not name.startswith(("KAGGLE_", "XDG_")) and not name.lower().endswith("_proxy")
    }
    return {
        **kept,
        "HOME": str(home.parent),
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
        "http_proxy": f"http://127.0.0.1:{kaggle.server_port}",
    }


def command(*arguments: object, fault: str = "") -> list[str]:
    script = "\n".join((SMALL, fault, RUN))
    return [sys.executable, "-c", script, *map(str, arguments)]


def prepare(
    kaggle: Kaggle, home: Path, *arguments: object, fault: str = "", **more: str
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments, fault=fault),
        cwd=REPOSITORY,
        env={**environment(kaggle, home), **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert not any(secret in done.stdout + done.stderr for secret in SECRETS)
    return done


def error_line(done: subprocess.CompletedProcess[str], exit_code: int = 2) -> str:
    assert done.returncode == exit_code, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def succeeded(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path.name: path.stat() for path in folder.iterdir()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return make_zip(tmp_path / "made.zip", TREE).read_bytes()


@pytest.fixture
def folder(kaggle: Kaggle, content: bytes, tmp_path: Path) -> Path:
    """Not made yet; Kaggle has the archive for it."""
    kaggle.contents[SLUG] = content
    return tmp_path / "data" / "imagenet"


# ------------------------------------------------------------------------------ all goes well


def test_from_nothing_to_a_store(kaggle: Kaggle, home: Path, folder: Path) -> None:
    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--quality", 80))
    size = f"{len(kaggle.contents[SLUG]) / 1e9:.1f} GB"
    archive = folder / f"{SLUG}.zip"
    for line in (
        f"its rules must be accepted once, by your account, at {RULES}",
        f"$ kaggle competitions download {SLUG} -p {folder} -q",
        f"{archive}: {size}, whole",
        f"{archive} has 4 training and 2 validation pictures in 2 classes, as it should",
        f"{folder / 'imagenet.store'} is finished: nothing more to do",
    ):
        assert f"  {line}\n" in said
    opened = store.open_store(folder / "imagenet.store")
    assert entries(opened) == ENTRIES
    assert opened.info["settings"] == {"max_side": 400, "quality": 80}
    assert archive.read_bytes() == kaggle.contents[SLUG]
    # The CLI introduces itself twice; the storage never sees the token.
    asked = [address for address, _, _ in kaggle.log]
    assert asked[-2:] == [DOWNLOAD, f"{STORAGE}{SLUG}/bundle/archive.zip"]
    assert kaggle.log[-2][2] == f"Bearer {SECRETS[0]}" and kaggle.log[-1][2] == ""

    before, kaggle.log = files_in(folder), []
    again = ("imagenet", folder, "--quality", 80)
    for step in ("all", "download", "check", "pack"):
        said = succeeded(prepare(kaggle, home, *again, "--step", step))
        assert said.endswith("imagenet.store is finished: nothing more to do\n")
    for other in ((), ("--quality", 80, "--max-side", 200)):
        line = error_line(prepare(kaggle, home, "imagenet", folder, *other, "--remove-archive"))
        assert line.startswith(
            f"{folder / 'imagenet.store'} is finished already, with other settings (max_side 400, "
            "quality 80): give these"
        )
    assert (files_in(folder), kaggle.log) == (before, [])

    damaged = (folder / "imagenet.store").read_bytes()
    at = damaged.index(picture(1)) + 20
    (folder / "imagenet.store").write_bytes(damaged[:at] + b"x" + damaged[at + 1 :])
    line = error_line(prepare(kaggle, home, *again, "--remove-archive"))
    assert "imagenet.store.sha256 says, so nothing was removed" in line
    assert archive.exists()
    (folder / "imagenet.store").write_bytes(damaged)
    sums = folder / "imagenet.store.sha256"
    kept = sums.read_bytes()
    for lost in (sums.unlink, lambda: sums.write_bytes(b"")):
        lost()
        line = error_line(prepare(kaggle, home, *again, "--remove-archive"))
        assert "imagenet.store.sha256, which the store is compared with, is missing or em" in line
        assert archive.exists()
    sums.write_bytes(kept)
    own = folder / f"{SLUG}.old.zip"  # the user's
    own.write_bytes(archive.read_bytes())
    said = succeeded(prepare(kaggle, home, *again, "--remove-archive"))
    assert f"removed {archive}, {size}\n" in said
    assert not archive.exists() and own.exists() and kaggle.log == []


def test_steps_alone(kaggle: Kaggle, home: Path, folder: Path) -> None:
    line = error_line(prepare(kaggle, home, "imagenet", folder, "--step", "check"))
    assert line.startswith(f"{SLUG} is not in {folder} yet") and line.endswith("--step download")
    assert kaggle.log == []
    # Before hours of downloading, that the store was begun otherwise.
    with store.StoreWriter(folder / "imagenet.store", {"max_side": 200, "quality": 90}) as begun:
        line = error_line(prepare(kaggle, home, "imagenet", folder))
        assert "was begun with max_side 200, quality 90: give the same settings again" in line
        begun.partial.unlink()
    assert kaggle.log == []

    succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "download"))
    archive, asked = folder / f"{SLUG}.zip", len(kaggle.log)
    assert not (folder / "imagenet.store").exists()
    before = files_in(folder)
    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "download"))
    assert f"{archive} is downloaded already\n" in said
    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "check"))
    assert "pictures in 2 classes, as it should\n" in said
    assert {**files_in(folder), ".kaggle.lock": None} == {**before, ".kaggle.lock": None}

    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "pack"))
    assert entries(store.open_store(folder / "imagenet.store")) == ENTRIES
    assert len(kaggle.log) == asked


def test_pictures_that_were_left_out_are_not_missed_afterwards(
    kaggle: Kaggle, home: Path, folder: Path, tmp_path: Path
) -> None:
    tree = {**TREE, f"{KAGGLE}/train/n02/n02_1.JPEG": b"no picture"}
    kaggle.contents[SLUG] = make_zip(tmp_path / "made.zip", tree).read_bytes()
    for _ in range(2):
        said = succeeded(prepare(kaggle, home, "imagenet", folder, "--skip-bad-images"))
        assert said.endswith("imagenet.store is finished: nothing more to do\n")
    assert len(store.open_store(folder / "imagenet.store").records) == 5


def test_100k_of_two_data_sets_without_an_account(
    kaggle: Kaggle, home: Path, tmp_path: Path
) -> None:
    (home / "access_token").unlink()
    of_a_mac = {"__MACOSX/a/n01/n01_3.JPEG": b"", "a/n01/._n01_1.JPEG": b"", ".b/n03/1.JPEG": b""}
    for name, tree in TREE_100K.items():
        archive = make_zip(tmp_path / "made.zip", {**of_a_mac, **tree})
        kaggle.contents[name] = archive.read_bytes()
    folder = tmp_path / "small"
    said = succeeded(prepare(kaggle, home, "imagenet-100k", folder, "--remove-archive"))
    assert "has 4 training and 2 validation pictures in 2 classes, as it should\n" in said
    assert "accepted" not in said
    opened = store.open_store(folder / "imagenet-100k.store")
    assert entries(opened) == [
        *(f"train/{name}/{name}_{number}.JPEG" for name in ("n01", "n02") for number in (1, 2)),
        *("val/n01/ILSVRC2012_val_00000005.JPEG", "val/n02/ILSVRC2012_val_00000006.JPEG"),
    ]
    seeds = (1, 2, 1, 2, 5, 6)
    assert [bytes(opened.read(at)) for at in range(6)] == [picture(seed) for seed in seeds]
    assert not list(folder.glob("*.zip"))


def test_other_counts_of_100k_are_told_but_packed(
    kaggle: Kaggle, home: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "small"
    folder.mkdir()
    (train, val) = TREE_100K
    fewer = {name: TREE_100K[train][name] for name in list(TREE_100K[train])[1:]}
    make_zip(folder / "imagenet-train-subset-100k.zip", fewer)
    make_zip(folder / "val-imagenet-1000.zip", {**TREE_100K[val], "flat.JPEG": picture(1)})
    line = error_line(prepare(kaggle, home, "imagenet-100k", folder))
    assert f"flat.JPEG in {folder / 'val-imagenet-1000.zip'} lies in no folder of a class" in line
    make_zip(folder / "val-imagenet-1000.zip", TREE_100K[val])
    said = succeeded(prepare(kaggle, home, "imagenet-100k", folder))
    assert (
        f"{folder} has 3 training and 2 validation pictures in 2 classes, but ImageNet-1k with 100 "
        "training pictures a class has 4 training and 2 validation pictures in 2 classes "
        "(train/n01 1 instead of 2)"
    ) in said
    assert len(store.open_store(folder / "imagenet-100k.store").records) == 5


# ------------------------------------------------------------------------------ broken off


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_the_server_breaks_off_the_cli_continues(
    kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    kaggle.break_after = 5 * MB // 2

    def mend() -> None:
        wait_until(lambda: kaggle.breaks)
        kaggle.break_after = None
        kaggle.hang.set()

    mender = threading.Thread(target=mend)
    mender.start()
    often = "kaggle_imagenet.LOG_INTERVAL_S = 0.5"
    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "download", fault=often))
    mender.join()
    # While the CLI waits, for two to three seconds, nothing comes.
    assert "  downloading 0.0 GB of 0.0 GB  0.0 MB/s  ETA ?\n" in said
    assert kaggle.ranges == ["", f"bytes={2 * MB}-"]
    assert (folder / f"{SLUG}.zip").read_bytes() == content
    assert sorted(files_in(folder)) == [".kaggle.lock", f"{SLUG}.zip"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_download_is_continued_by_the_same_command(
    number: signal.Signals, kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    kaggle.break_after = 5 * MB // 2
    archive = folder / f"{SLUG}.zip"
    process = subprocess.Popen(
        command("imagenet", folder, "--step", "download"),
        cwd=REPOSITORY,
        # With this, the CLI would read the archive into memory before it wrote a byte.
        env={**environment(kaggle, home), "VERBOSE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(lambda: archive.exists() and archive.stat().st_size == 2 * MB)
    (cli,) = children(process.pid)
    line = error_line(prepare(kaggle, home, "imagenet", folder))
    assert line == f"another process prepares {folder}: wait for it, or end it first"
    process.send_signal(number)
    _, complaint = process.communicate(timeout=WAIT_S)
    wait_until(lambda: not is_running(cli))
    if number == signal.SIGKILL:
        assert (process.returncode, complaint) == (-signal.SIGKILL, "")
    else:
        assert process.returncode == 75
        assert complaint == "error: interrupted: the same command goes on with the download\n"
    line = error_line(prepare(kaggle, home, "imagenet", folder, "--step", "pack"))
    assert line.startswith(f"{SLUG} is not whole in {folder} yet")

    kaggle.break_after, kaggle.log = None, []
    said = succeeded(prepare(kaggle, home, "imagenet", folder))
    assert "0.0 GB of 0.0 GB are here already" in said
    # The first is for the headers, of which the CLI wants the ETag; its body is left unread.
    assert kaggle.ranges == ["", f"bytes={2 * MB}-"]
    assert archive.read_bytes() == content
    assert entries(store.open_store(folder / "imagenet.store")) == ENTRIES


def leave_half(folder: Path, content: bytes) -> dict[str, tuple[int, int]]:
    """What a CLI leaves that is killed in the middle."""
    folder.mkdir(parents=True)
    (folder / f"{SLUG}.zip").write_bytes(content)
    marker = {"validator": '"1"', "size": 10 * MB}
    (folder / f"{SLUG}.zip.kaggle-partial").write_text(json.dumps(marker))
    return files_in(folder)


def test_an_error_page_in_the_archives_place_is_not_continued(
    kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    leave_half(folder, b"<?xml version='1.0'?><Error><Code>ServiceUnavailable</Code></Error>")
    marker = {"validator": f'"{hash(content):x}"', "size": len(content)}
    (folder / f"{SLUG}.zip.kaggle-partial").write_text(json.dumps(marker))
    said = succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "download"))
    assert "does not begin as a zip does: it is downloaded anew" in said
    assert kaggle.ranges == [""]
    assert (folder / f"{SLUG}.zip").read_bytes() == content


# A disk of 3 MB, of which the archive takes more; then one of 30.
SMALL_DISK = """
set -eu
mount -t tmpfs -o size=3m tmpfs "$DISK"
code=0; "$@" || code=$?
echo "exit $code"; (cd "$DISK"; stat --printf '%n %s\n' *)
mount -o remount,size=30m "$DISK"
"$@"
cp "$DISK/imagenet.store" "$KEPT"
"""


def test_a_full_disk_is_told_and_the_download_goes_on_after_room_is_made(
    kaggle: Kaggle, home: Path, folder: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(
        [
            *("unshare", "--mount", "--map-root-user", "bash", "-c", SMALL_DISK, "disk"),
            *command("imagenet", disk, fault="kaggle_imagenet.PACKED_BYTES = 0"),
        ],
        cwd=REPOSITORY,
        env={**environment(kaggle, home), "DISK": str(disk), "KEPT": str(tmp_path / "kept.store")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line == (
        f"error: {disk}: No space left on device: make room, and give the same command again; "
        "0.0 GB are kept, and the same command goes on from there"
    )
    left = re.search(
        rf"^exit 2\n{SLUG}\.zip (\d+)\n{SLUG}\.zip\.kaggle-partial \d+\n", done.stdout, re.MULTILINE
    )
    # Two whole writes, and as much of the third as fits, where the CLI had come to it.
    assert left and 2 * MB <= int(left[1]) < 3 * MB
    # The CLI was ended at once; alone it would have asked five times more, for a minute.
    assert kaggle.ranges == ["", "", f"bytes={left[1]}-"]
    assert entries(store.open_store(tmp_path / "kept.store")) == ENTRIES


# ------------------------------------------------------------------------------ refusals

TOKEN = "make a new token at https://www.kaggle.com/settings/api and save it as ~/.kaggle/access_t"
REFUSALS: dict[str, tuple[dict[str, object], str]] = {
    "token": (
        {"token": "another"},
        "Kaggle does not accept the credentials in HOME/access_token: ",
    ),
    "rules": (
        {"refusal": (403, "You must accept this competition's rules before you'll be able to do")},
        f"Kaggle does not let this account download {SLUG} yet: accept the rules at {RULES}, where",
    ),
    "gone": (
        {"refusal": (404, "Not found")},
        f"Kaggle has no {SLUG} for this account (Not found): look at {RULES}, whether",
    ),
    "trouble": (
        {"refusal": (503, "backend error")},
        "the Kaggle CLI failed (backend error): give the same command again",
    ),
    "storage": (
        {"is_storage_open": False},
        f"the download of {SLUG} broke off (403 Client Error: Forbidden for url: {STORAGE}{SLUG}/"
        "bundle/archive.zip?…): give the same command again",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_kaggle_refuses_is_told_with_the_next_thing_to_do(
    case: str, kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    state, told = REFUSALS[case]
    before = leave_half(folder, content[: 2 * MB])
    for name, value in state.items():
        setattr(kaggle, name, value)
    line = error_line(prepare(kaggle, home, "imagenet", folder))
    assert line.startswith(told.replace("HOME", str(home)))
    assert line.endswith("; 0.0 GB are kept, and the same command goes on from there")
    assert (TOKEN in line) == (case == "token")
    assert before.items() <= files_in(folder).items()
    assert len(kaggle.ranges) == (case == "storage")


@pytest.mark.parametrize("place", ["environment", "file"])
def test_a_wrong_key_is_told(place: str, kaggle: Kaggle, home: Path, folder: Path) -> None:
    (home / "access_token").unlink()
    key = {"username": "tester", "key": SECRETS[1]}
    if place == "file":
        (home / "kaggle.json").write_text(json.dumps(key))
        more = {}
    else:
        more = {f"KAGGLE_{name.upper()}": value for name, value in key.items()}
    line = error_line(prepare(kaggle, home, "imagenet", folder, **more))
    source = {"environment": "KAGGLE_USERNAME and KAGGLE_KEY", "file": home / "kaggle.json"}[place]
    assert line.startswith(f"Kaggle does not accept the credentials in {source}: make a new token")
    assert kaggle.log[-1][0] == DOWNLOAD


@pytest.mark.parametrize("with_key", [False, True])
def test_no_network_is_told(with_key: bool, kaggle: Kaggle, home: Path, folder: Path) -> None:
    nowhere = {"http_proxy": "http://127.0.0.1:9"}
    if with_key:  # with a token, the CLI fails earlier, with a traceback
        nowhere |= {"KAGGLE_USERNAME": "tester", "KAGGLE_KEY": SECRETS[1]}
        (home / "access_token").unlink()
    line = error_line(prepare(kaggle, home, "imagenet", folder, **nowhere))
    assert line == (
        "Kaggle cannot be reached (Connection refused): mend the network, and give the same "
        "command again"
    )


ELSEWHERE = "import shutil; kaggle_imagenet.sys.executable = '/nowhere/python3'"


def test_a_missing_cli_is_told(kaggle: Kaggle, home: Path, folder: Path) -> None:
    line = error_line(prepare(kaggle, home, "imagenet", folder, fault=ELSEWHERE, PATH="/bin"))
    assert line == "the Kaggle CLI is missing: pip install kaggle"


def test_an_old_cli_is_refused(kaggle: Kaggle, home: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "kaggle").write_text("#!/bin/sh\necho Kaggle API 1.7.4.5\n")
    (tmp_path / "kaggle").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    line = error_line(prepare(kaggle, home, "imagenet", folder, fault=ELSEWHERE, PATH=path))
    assert line.startswith(f"{tmp_path / 'kaggle'} is version 1.7.4: ")
    assert line.endswith(" takes 2.2.4: pip install --upgrade kaggle")


def test_missing_credentials_are_told(kaggle: Kaggle, home: Path, folder: Path) -> None:
    (home / "access_token").unlink()
    line = error_line(prepare(kaggle, home, "imagenet", folder))
    assert line.startswith("no Kaggle credentials: make a token at https://www.kaggle.com/settings")
    assert kaggle.log == []


def test_too_small_a_disk_is_refused_before_anything_is_asked(
    kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    # 10 GB of which 4 are there, and 6 pictures that the store has a gigabyte for, 2.5 there.
    leave_half(folder, content)
    os.truncate(folder / f"{SLUG}.zip", 4 * 10**9)
    marker = {"validator": '"1"', "size": 10**10}
    (folder / f"{SLUG}.zip.kaggle-partial").write_text(json.dumps(marker))
    with store.StoreWriter(folder / "imagenet.store", {"max_side": 400, "quality": 90}) as begun:
        pass
    os.truncate(begun.partial, 25 * 10**8)
    fault = """
kaggle_imagenet.PACKED_BYTES = 10**9
kaggle_imagenet.shutil.disk_usage = lambda path: type("Usage", (), {"free": 94 * 10**8})
"""
    line = error_line(prepare(kaggle, home, "imagenet", folder, fault=fault))
    assert line == (
        f"{folder} has 9.4 GB free, ImageNet-1k needs about 9.5 GB more: 6.0 GB to download, "
        "3.5 GB for the store: make room, or name a folder on a larger disk"
    )
    assert {address for address, _, _ in kaggle.log} == {INTROSPECT}  # `kaggle --version` does
    for path in folder.iterdir():
        path.unlink()
    fault = fault.replace("94 *", "1 *")
    line = error_line(prepare(kaggle, home, "imagenet", folder, fault=fault))
    assert "about 6.0 GB more: 0.0 GB to download, 6.0 GB for the store" in line
    # The archive alone has room.
    succeeded(prepare(kaggle, home, "imagenet", folder, "--step", "download", fault=fault))
    assert (folder / f"{SLUG}.zip").read_bytes() == content


# ------------------------------------------------------------------------------ wrong archives


def without(*names: str) -> dict[str, bytes]:
    return {name: content for name, content in TREE.items() if name not in names}


LACKS = "has {} pictures in 2 classes, but ImageNet-1k has 4 training and 2 validation pictures in"
WRONG: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "train": (
        without(f"{KAGGLE}/train/n02/n02_1.JPEG"),
        [LACKS.format("3 training and 2 validation"), "(train/n02 1 instead of 2): remove it"],
    ),
    "train, without its list": (
        without(f"{KAGGLE}/train/n02/n02_1.JPEG", "ILSVRC/ImageSets/CLS-LOC/train_cls.txt"),
        [LACKS.format("3 training and 2 validation"), "2 classes: remove it"],
    ),
    "one moved from class to class": (
        {
            **without(f"{KAGGLE}/train/n02/n02_1.JPEG"),
            f"{KAGGLE}/train/n01/n02_1.JPEG": picture(3),
        },
        ["(train/n01 3 instead of 2, train/n02 1 instead of 2)"],
    ),
    "val": (
        {
            **TREE,
            f"{KAGGLE}/val/ILSVRC2012_val_00000003.JPEG": picture(8),
            "LOC_val_solution.csv": TREE["LOC_val_solution.csv"] + b"ILSVRC2012_val_00000003,n02 1",
        },
        [LACKS.format("4 training and 3 validation"), "(val/n02 2 instead of 1)"],
    ),
    "a class": (
        without(f"{KAGGLE}/val/ILSVRC2012_val_00000001.JPEG"),
        ["n02 missing under val/"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_counts_are_refused_before_packing(
    case: str, kaggle: Kaggle, home: Path, folder: Path
) -> None:
    tree, told = WRONG[case]
    folder.mkdir(parents=True)
    make_zip(folder / f"{SLUG}.zip", tree)
    line = error_line(prepare(kaggle, home, "imagenet", folder))
    for text in (str(folder / f"{SLUG}.zip"), *told):
        assert text in line
    assert sorted(files_in(folder)) == [".kaggle.lock", f"{SLUG}.zip"]
    assert kaggle.log == []


def changed(content: bytes, name: str, after: int = 0) -> bytes:
    """An archive with one byte changed: of a member's content, or of its entry at the end."""
    at = content.rindex(name.encode()) if after < 0 else content.index(name.encode()) + len(name)
    at += after
    return content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :]


SPOILT: dict[str, tuple[object, str]] = {
    "cut": (
        lambda content: content[:-100],
        "ARCHIVE is broken or cut short: remove it, and the same command downloads it again",
    ),
    "no archive": (lambda _: b"<html>", "ARCHIVE is broken or cut short: remove it"),
    "directory": (
        lambda content: changed(content, f"{KAGGLE}/train/n01/n01_1.JPEG", -46),
        "copy or download it again; once ARCHIVE is removed, the same command with --step download",
    ),
    "picture": (
        lambda content: changed(content, f"{KAGGLE}/train/n01/n01_1.JPEG", 100),
        "train/n01/n01_1.JPEG (damaged in the archive: Bad CRC-32",
    ),
    "labels": (
        lambda content: changed(content, "LOC_val_solution.csv", 30),
        "LOC_val_solution.csv in ARCHIVE is damaged in the archive: Bad CRC-32",
    ),
    "list": (
        lambda content: changed(content, "CLS-LOC/train_cls.txt", 2),
        "ILSVRC/ImageSets/CLS-LOC/train_cls.txt in ARCHIVE is damaged in the archive: Bad CRC-32",
    ),
}


@pytest.mark.parametrize("case", SPOILT)
def test_a_damaged_archive_is_refused(
    case: str, kaggle: Kaggle, home: Path, folder: Path, content: bytes
) -> None:
    spoil, told = SPOILT[case]
    archive = folder / f"{SLUG}.zip"
    folder.mkdir(parents=True)
    archive.write_bytes(spoil(content))
    archive.with_suffix(".sha256").write_text("its sum, which is no archive")
    line = error_line(prepare(kaggle, home, "imagenet", folder))
    assert told.replace("ARCHIVE", str(archive)) in line
    assert archive.exists() and not (folder / "imagenet.store").exists()
    assert kaggle.log == []
    if case == "picture":  # removed and downloaded again, it goes on with what was packed
        assert f"remove {archive}, and give the same command again" in line
        archive.unlink()
        succeeded(prepare(kaggle, home, "imagenet", folder))
        assert entries(store.open_store(folder / "imagenet.store")) == ENTRIES
