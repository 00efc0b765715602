"""scripts/prepare_data.py: the real command, and its download from a server on this machine."""

import functools
import hashlib
import http.server
import importlib.util
import io
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torchvision
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, run_stage_command
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits

import image_files
import utils

SCRIPT = REPOSITORY / "scripts" / "prepare_data.py"
DONE = "1442 training and 355 validation images"
WAIT_S = 60  # for what takes two seconds on an idle machine


def prepare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_stage_command(SCRIPT, *arguments)


def files_in(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    stats = {str(path.relative_to(folder)): path.stat() for path in folder.rglob("*.*")}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


# ------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data" / "digits"
    done = prepare("digits", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith(f"{folder}: {DONE}\n")
    assert [path.name for path in folder.parent.iterdir()] == ["digits"]
    return folder


def test_digits_are_a_data_set_for_the_trainer(digits: Path) -> None:
    train, val = (image_files.open_image_set(str(digits / part), part) for part in ("train", "val"))
    image_files.check_same_classes(train, val)
    assert train.classes == tuple("0123456789")
    assert (len(train.files), len(val.files)) == (1442, 355)
    assert np.bincount(train.labels).min() > 130 and np.bincount(val.labels).min() > 30
    for images in (train, val):
        assert image_files.find_bad_images(images, 1, decode_all=True) == {}
    contents = [
        images.path(index).read_bytes()
        for images in (train, val)
        for index in range(len(images.files))
    ]
    assert len(set(contents)) == 1797  # none is in both


def test_digits_show_what_their_folder_says(digits: Path) -> None:
    bunch, seen, shown = load_digits(), [0] * 10, []
    for label in bunch.target:
        seen[label] += 1
        part = "val" if seen[label] % 5 == 0 else "train"
        with Image.open(digits / part / str(label) / f"{label}_{seen[label]:03d}.jpg") as image:
            assert image.size == (64, 64)
            grey = np.asarray(image.convert("L"), dtype=float)
        shown.append((255 - grey.reshape(8, 8, 8, 8).mean(axis=(1, 3))) * 16 / 255)  # 16 is black
    expected = bunch.images.reshape(1797, 64)
    distances = cdist(np.reshape(shown, (1797, 64)), expected, "cityblock") / 64
    # Enlarging smooths edges, by up to 1.04 on average over a picture. No other digit is as near,
    # but for a pair that is nearly alike.
    assert distances.diagonal().max() < 1.2
    assert (distances.argmin(axis=1) != np.arange(1797)).sum() <= 1


def test_a_second_run_changes_nothing(digits: Path) -> None:
    before = files_in(digits)
    done = prepare("digits", digits)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{digits} is there already\n" in done.stdout and DONE in done.stdout
    assert files_in(digits) == before
    other = prepare("imagenette", digits)
    assert other.returncode == 2
    assert "holds other classes than Imagenette, such as 0: name a folder that" in other.stderr


def test_digits_of_which_some_are_missing_are_told(tmp_path: Path) -> None:
    assert prepare("digits", tmp_path / "digits").returncode == 0
    (tmp_path / "digits/val/7/7_005.jpg").unlink()
    done = prepare("digits", tmp_path / "digits")
    assert done.returncode == 2
    assert "digits/val holds 354 of the 355 pictures of the digits: remove" in done.stderr


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine" / "train" / "0").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "0" / "precious.jpg").write_bytes(b"1")
    before = files_in(tmp_path)
    done = prepare("digits", tmp_path / "mine")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'mine'} is there, but ")
    assert done.stderr.count("\n") == 1
    assert files_in(tmp_path) == before


def test_a_killed_run_is_begun_anew(tmp_path: Path) -> None:
    folder, partial = tmp_path / "digits", tmp_path / "digits.partial"
    process = subprocess.Popen([sys.executable, SCRIPT, "digits", folder], env=COMMAND_ENVIRONMENT)
    deadline = time.monotonic() + WAIT_S
    while not partial.is_dir() or not files_in(partial):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not folder.exists()
    (partial / "train" / "0").mkdir(parents=True, exist_ok=True)
    (partial / "train" / "0" / "old.jpg").write_bytes(b"left over")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/precious.jpg").write_bytes(b"1")
    (partial / "link").symlink_to(tmp_path / "mine")

    done = prepare("digits", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert DONE in done.stdout
    assert not partial.exists()
    assert sorted(path.name for path in folder.iterdir()) == ["train", "val"]
    assert (tmp_path / "mine/precious.jpg").exists()


def test_somebody_elses_partial_folder_is_left_alone(tmp_path: Path) -> None:
    folder, partial = tmp_path / "digits", tmp_path / "digits.partial"
    partial.mkdir()
    (partial / "precious.jpg").write_bytes(b"1")
    for _ in range(2):
        done = prepare("digits", folder)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"error: {partial} holds what this script has not put there, such as precious.jpg: "
            "move it away, or name another folder\n"
        )
        assert [path.name for path in tmp_path.rglob("*")] == ["digits.partial", "precious.jpg"]
    (partial / "precious.jpg").unlink()
    assert DONE in prepare("digits", folder).stdout  # an empty one is taken


def test_two_at_once_do_not_fill_the_same_folder(tmp_path: Path) -> None:
    folder, partial = tmp_path / "digits", tmp_path / "digits.partial"
    command = [sys.executable, SCRIPT, "digits", folder]
    first = subprocess.Popen(command, env=COMMAND_ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + WAIT_S
    while not partial.is_dir() or not files_in(partial):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    first.send_signal(signal.SIGSTOP)
    second = prepare("digits", folder)
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 2
    assert second.stderr.startswith(f"error: another process fills {folder}: wait for its end")
    assert DONE in first.communicate(timeout=WAIT_S)[0] and first.returncode == 0


# ------------------------------------------------------------------------------ imagenette


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Address of an HTTP server of tmp_path/www."""
    (tmp_path / "www").mkdir()
    handler = functools.partial(QuietHandler, directory=tmp_path / "www")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def archive(folder: str) -> bytes:
    """A small one in the layout of the true ones: all ten classes, a picture in each."""
    file = io.BytesIO()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "JPEG")
    with tarfile.open(fileobj=file, mode="w:gz") as tar:
        names = [f"{folder}/noise_imagenette.csv"]
        for wnid in torchvision.datasets.Imagenette._WNID_TO_CLASS:
            names += [f"{folder}/{part}/{wnid}/{wnid}_1.JPEG" for part in ("train", "val")]
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = len(picture.getvalue())
            tar.addfile(entry, io.BytesIO(picture.getvalue()))
    return file.getvalue()


@pytest.fixture
def prepare_data(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, which asks no proxy, leaves the log as it found it, and takes
    `archive`'s twenty pictures for the whole of Imagenette."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(utils.log, "handlers", [])
    specification = importlib.util.spec_from_file_location("prepare_data", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert module.IMAGENETTE == {"train": 9469, "val": 3925}  # github.com/fastai/imagenette
    monkeypatch.setattr(module, "IMAGENETTE", {"train": 10, "val": 10})
    return module


def download(
    prepare_data: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    content: bytes,
    *arguments: str | Path,
) -> None:
    """Run the stage's main, for which the archive of 320 px is at `url` and has that content."""
    checksum = hashlib.md5(content).hexdigest()
    archives = {
        "full": ("http://127.0.0.1:9/", ""),
        "320px": (url, checksum),
        "160px": ("http://127.0.0.1:9/", ""),
    }
    monkeypatch.setattr(torchvision.datasets.Imagenette, "_ARCHIVES", archives)
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "imagenette", *map(str, arguments)])
    prepare_data.run_stage(prepare_data.main)


def test_what_another_process_has_just_finished_is_left_as_it_is(
    prepare_data: ModuleType, tmp_path: Path
) -> None:
    """Between the look whether DIR is there and the lock, which that process holds no more."""
    (tmp_path / "digits").mkdir()
    with (
        pytest.raises(utils.UserError, match=r"just filled .*digits: give the same command again"),
        prepare_data.filling(tmp_path / "digits"),
    ):
        raise AssertionError("nothing is to be filled")
    assert list(tmp_path.rglob("*")) == [tmp_path / "digits"]


def test_imagenette_is_downloaded_and_unpacked(
    prepare_data: ModuleType, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive("imagenette2-320")
    (tmp_path / "www" / "imagenette2-320.tgz").write_bytes(content)
    folder = tmp_path / "imagenette"
    url = f"{server}/imagenette2-320.tgz"
    download(prepare_data, monkeypatch, url, content, folder)
    assert sorted(path.name for path in folder.iterdir()) == [".imagenette_size", "train", "val"]
    train, val = (image_files.open_image_set(str(folder / part), part) for part in ("train", "val"))
    image_files.check_same_classes(train, val)
    assert train.files[:2] == ("n01440764/n01440764_1.JPEG", "n02102040/n02102040_1.JPEG")
    assert len(train.files) == len(val.files) == 10
    assert image_files.find_bad_images(val, 1, decode_all=True) == {}
    assert not (tmp_path / "imagenette.partial").exists()

    before = files_in(folder)
    (tmp_path / "www" / "imagenette2-320.tgz").unlink()
    download(prepare_data, monkeypatch, url, content, folder)  # asks for nothing
    assert files_in(folder) == before


def test_another_size_or_less_of_imagenette_is_not_taken_for_it(
    prepare_data: ModuleType,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    content, folder = archive("imagenette2-320"), tmp_path / "imagenette"
    (tmp_path / "www" / "imagenette2-320.tgz").write_bytes(content)
    fetch = functools.partial(
        download, prepare_data, monkeypatch, f"{server}/imagenette2-320.tgz", content, folder
    )

    def refusal(*arguments: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            fetch(*arguments)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    fetch()
    before = files_in(tmp_path)
    assert f"error: {folder} holds Imagenette of --size 320px: " in refusal("--size", "160px")
    assert files_in(tmp_path) == before
    next(folder.glob("val/*/*")).unlink()
    assert refusal() == (
        f"error: {folder}/val holds 9 of the 10 pictures of Imagenette: remove {folder}, and the "
        "same command makes it anew"
    )
    (folder / ".imagenette_size").unlink()  # somebody's own choice of them
    fetch("--size", "160px")


class NoHttp(http.server.BaseHTTPRequestHandler):
    """A server of something else."""

    def handle(self) -> None:
        self.rfile.readline()
        self.wfile.write(b"220 smtp ready\r\n")


@pytest.mark.parametrize("trouble", ["damaged", "missing", "gone", "no HTTP"])
def test_a_download_that_fails_leaves_no_folder(
    trouble: str,
    prepare_data: ModuleType,
    server: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    content = archive("imagenette2-320")
    if trouble == "damaged":
        (tmp_path / "www" / "imagenette2-320.tgz").write_bytes(content[:-100])
    elif trouble == "gone":
        server = "http://127.0.0.1:9"  # nobody listens there
    elif trouble == "no HTTP":
        monkeypatch.setattr(QuietHandler, "handle", NoHttp.handle)
    url, folder = f"{server}/imagenette2-320.tgz", tmp_path / "imagenette"
    with pytest.raises(SystemExit) as end:
        download(prepare_data, monkeypatch, url, content, folder)
    assert end.value.code == 2
    assert not folder.exists()
    *progress, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: Imagenette could not be downloaded: ")
    assert not any("error" in line.lower() or "Traceback" in line for line in progress)

    if trouble == "damaged":  # what is left of it does not hinder the next
        (tmp_path / "www" / "imagenette2-320.tgz").write_bytes(content)
        download(prepare_data, monkeypatch, url, content, folder)
        assert len(list(folder.glob("*/*/*"))) == 20


def test_other_sizes_are_asked_for_by_name(
    prepare_data: ModuleType, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = archive("imagenette2-320")
    url = f"{server}/imagenette2-320.tgz"
    (tmp_path / "www" / "imagenette2-320.tgz").write_bytes(content)
    with pytest.raises(SystemExit):  # of the other archives there is none
        download(prepare_data, monkeypatch, url, content, tmp_path / "small", "--size", "160px")
    download(prepare_data, monkeypatch, url, content, tmp_path / "small", "--size", "320px")
