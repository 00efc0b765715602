"""scripts/packing.py through the real command: sources, labels, pictures, and how it goes on."""

import errno
import functools
import hashlib
import io
import itertools
import os
import re
import resource
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from conftest import COMMAND_ENVIRONMENT, REPOSITORY, run_stage_command
from PIL import Image

sys.path.insert(0, str(REPOSITORY / "scripts"))

import packing

import image_files
import store
from utils import UserError

SCRIPT = REPOSITORY / "scripts" / "prepare_data.py"
KAGGLE = "ILSVRC/Data/CLS-LOC"
WAIT_S = 60


@functools.cache
def picture(
    seed: int, height: int = 24, width: int = 32, kind: str = "JPEG", **save: object
) -> bytes:
    """Smooth noise, so that a smaller copy of it can be compared."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, kind, **save)
    return file.getvalue()


def solution(labels: dict[str, str]) -> bytes:
    rows = [f"{image},{wnid} 1 2 3 4 {wnid} 5 6 7 8 " for image, wnid in labels.items()]
    return "\n".join(["ImageId,PredictionString", *rows, ""]).encode()


# As Kaggle lays it out, with what lies beside the pictures there.
TREE: dict[str, bytes] = {
    "ILSVRC/Annotations/CLS-LOC/train/n01/n01_1.xml": b"<annotation/>",
    "ILSVRC/Annotations/CLS-LOC/val/ILSVRC2012_val_00000001.xml": b"<annotation/>",
    f"{KAGGLE}/test/ILSVRC2012_test_00000001.JPEG": picture(90),
    f"{KAGGLE}/train/n01/n01_1.JPEG": picture(1),
    f"{KAGGLE}/train/n01/n01_2.JPEG": picture(2, 300, 500, quality=95),
    f"{KAGGLE}/train/n02/n02_1.JPEG": picture(3, 700, 600, quality=95),
    f"{KAGGLE}/train/n02/n02_2.JPEG": picture(4, 30, 40, "PNG"),
    f"{KAGGLE}/train/n02/.hidden.JPEG": picture(91),
    f"{KAGGLE}/val/ILSVRC2012_val_00000001.JPEG": picture(5),
    f"{KAGGLE}/val/ILSVRC2012_val_00000002.JPEG": picture(6),
    "ILSVRC/ImageSets/CLS-LOC/val.txt": b"ILSVRC2012_val_00000001 1",
    "__MACOSX/ILSVRC/Data/CLS-LOC/train/n01/n01_9.JPEG": picture(92),
    "LOC_val_solution.csv": solution(
        {"ILSVRC2012_val_00000001": "n02", "ILSVRC2012_val_00000002": "n01"}
    ),
}
UNLABELLED = {name: content for name, content in TREE.items() if not name.endswith(".csv")}
ENTRIES = [
    *("train/n01/n01_1.JPEG", "train/n01/n01_2.JPEG"),
    *("train/n02/n02_1.JPEG", "train/n02/n02_2.JPEG"),
    *("val/n01/ILSVRC2012_val_00000002.JPEG", "val/n02/ILSVRC2012_val_00000001.JPEG"),
]
# The shortest one in class folders.
SMALL = {f"{part}/{name}/{name}.jpg": picture(7) for part in ("train", "val") for name in "ab"}


def make_source(path: Path, tree: dict[str, bytes]) -> Path:
    """`tree` as a folder, or as an archive of the kind that the path's ending names."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in tree.items():
                archive.writestr(name, content)
    elif path.suffix in (".tar", ".gz"):
        with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
            for name, content in tree.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    else:
        for name, content in tree.items():
            folder, _, file = name.rpartition("/")
            (path / folder).mkdir(parents=True, exist_ok=True)
            if file:
                (path / name).write_bytes(content)
    return path


def pack(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_stage_command(SCRIPT, "pack", *arguments)


def entries(opened: store.Store) -> list[str]:
    return [opened.entry(position) for position in range(len(opened.records))]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------ sources


@pytest.mark.parametrize("name", ["folder", "kaggle.zip", "kaggle.tar", "kaggle.tar.gz"])
def test_kaggles_imagenet_is_packed_from(name: str, tmp_path: Path) -> None:
    source, path = make_source(tmp_path / name, TREE), tmp_path / "store"
    done = pack(source, path)
    assert (done.returncode, done.stderr) == (0, "")
    opened = store.open_store(path)
    assert entries(opened) == ENTRIES
    assert opened.classes == ("n01", "n02")
    assert opened.parts == {"train": (0, 4), "val": (4, 6)}
    assert opened.records["label"].tolist() == [0, 0, 1, 1, 0, 1]
    assert opened.info["settings"] == {"max_side": 400, "quality": 90}
    assert opened.info["reencoded"] == 2
    # What is small stays as it is, byte for byte; only plain JPEGs have a size in the index.
    kept = {0: picture(1), 3: picture(4, 30, 40, "PNG"), 4: picture(6), 5: picture(5)}
    for position, content in kept.items():
        assert bytes(opened.read(position)) == content
    assert opened.records["height"].tolist() == [24, 240, 400, 0, 24, 24]
    assert opened.records["width"].tolist() == [32, 400, 343, 0, 32, 32]

    table = re.sub(r" +", " ", done.stdout)
    assert "class train val\nn01 2 1\nn02 2 1\nall 4 2\n" in table
    size = path.stat().st_size
    assert f"{path}: 6 pictures in 2 classes, {size:,} bytes, 2 re-encoded, 0 left out" in table
    assert f"SHA-256 {sha256(path)}, also in {path}.sha256" in table
    assert (tmp_path / "store.sha256").read_text() == f"{sha256(path)}  store\n"
    say = f"train on it: python3 trainer.py --train-folder-name {path} --val-folder-name {path}\n"
    assert done.stdout.endswith(say)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None

    again = pack(source, path)
    assert again.returncode == 0
    assert again.stdout.endswith(
        f"{path} is finished already (max_side 400, quality 90), and was not compared with "
        f"{source}: to pack that anew, remove it or name another\n"
    )
    assert pack(source, tmp_path / "other", "--workers", 3).returncode == 0
    assert sha256(tmp_path / "other") == sha256(path)


def test_a_smaller_picture_shows_the_same(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side: shown 500 high, 300 wide
    tree = {
        "train/a/plain.jpg": picture(1, 300, 500, quality=95),
        "train/a/turned.jpg": picture(1, 300, 500, quality=95, exif=turned.tobytes()),
        "train/a/large.png": picture(1, 300, 500, "PNG"),
        "train/a/thin.png": picture(1, 2, 1000, "PNG"),
        "val/a/huge.jpg": picture(1, 1800, 3000, quality=95),
    }
    make_source(tmp_path / "source", tree)
    done = pack(tmp_path / "source", tmp_path / "store", "--max-side", 100, "--quality", 95)
    assert done.returncode == 0, done.stderr
    opened = store.open_store(tmp_path / "store")
    assert opened.info["reencoded"] == 5
    for position, entry in enumerate(entries(opened)):
        content = bytes(opened.read(position))
        shown = image_files.decode(tree[entry])
        height, width, _, subsampling = simplejpeg.decode_jpeg_header(content)
        record = opened.records[position]
        assert (height, width) == (record["height"], record["width"])
        assert max(height, width) == 100
        assert height == max(1, round(100 * shown.shape[0] / max(shown.shape)))
        assert subsampling == "420"
        resized = Image.fromarray(shown).resize((width, height), Image.Resampling.BOX)
        difference = image_files.decode(content).astype(float) - np.asarray(resized)
        if height > 1:
            assert np.abs(difference).mean() < 4, entry


def test_max_side_0_keeps_every_picture(tmp_path: Path) -> None:
    tree = {f"{part}/a/1.jpg": picture(1, 600, 800) for part in ("train", "val")}
    make_source(tmp_path / "source.zip", tree)
    done = pack(tmp_path / "source.zip", tmp_path / "store", "--max-side", 0)
    assert done.returncode == 0, done.stderr
    opened = store.open_store(tmp_path / "store")
    assert [bytes(opened.read(position)) for position in (0, 1)] == list(tree.values())
    assert opened.records["height"].tolist() == [600, 600]


def test_a_tar_may_begin_with_val(tmp_path: Path) -> None:
    """In Kaggle's layout, in which the class folders alone are known by their names."""
    tree = dict(sorted(TREE.items(), key=lambda item: "/val/" not in item[0]))
    done = pack(make_source(tmp_path / "kaggle.tar", tree), tmp_path / "store")
    assert (done.returncode, done.stderr) == (0, "")
    opened = store.open_store(tmp_path / "store")
    assert entries(opened) == ENTRIES
    assert bytes(opened.read(4)) == TREE[f"{KAGGLE}/val/ILSVRC2012_val_00000002.JPEG"]
    assert bytes(opened.read(0)) == TREE[f"{KAGGLE}/train/n01/n01_1.JPEG"]


def test_labels_are_looked_for_beside_the_source_and_where_told(tmp_path: Path) -> None:
    source = make_source(tmp_path / "kaggle.tar.gz", UNLABELLED)
    swapped = {"ILSVRC2012_val_00000001": "n01", "ILSVRC2012_val_00000002": "n02"}
    (tmp_path / "LOC_val_solution.csv").write_bytes(TREE["LOC_val_solution.csv"])
    (tmp_path / "mine.csv").write_bytes(b"\xef\xbb\xbf" + solution(swapped))  # as Excel saves it
    assert pack(source, tmp_path / "one").returncode == 0
    done = pack(source, tmp_path / "two", "--val-labels", tmp_path / "mine.csv")
    assert done.returncode == 0, done.stderr
    assert entries(store.open_store(tmp_path / "one")) == ENTRIES
    assert entries(store.open_store(tmp_path / "two"))[4:] == [
        *("val/n01/ILSVRC2012_val_00000001.JPEG", "val/n02/ILSVRC2012_val_00000002.JPEG")
    ]


# ------------------------------------------------------------------------------ refusals


BAD_LABELS: dict[str, tuple[dict[str, bytes], list[str]]] = {
    "pictures directly under train": (
        {**SMALL, "train/1.jpg": picture(1), "train/2.jpg": picture(2)},
        ["2 pictures lie directly under train/, the first", "1.jpg: put each into the folder"],
    ),
    "val both ways": (
        {**SMALL, "val/1.jpg": picture(1)},
        ["1 pictures lie directly under val/", "and 2 in class folders"],
    ),
    "a picture that the CSV does not know": (
        {**TREE, f"{KAGGLE}/val/ILSVRC2012_val_00000003.JPEG": picture(8)},
        ["1 of 3 pictures of val are not in", "val_00000003.JPEG: name the file", "--val-labels"],
    ),
    "no CSV": (
        UNLABELLED,
        [
            "have no class folders, and no LOC_val_solution.csv is in it or beside it",
            "--val-labels",
        ],
    ),
    "another CSV": (
        {**TREE, "LOC_val_solution.csv": b"image;class\n1;2\n"},
        ["LOC_val_solution.csv in", "needs the columns ImageId and PredictionString"],
    ),
    "a CSV that says two things of one picture": (
        {
            **TREE,
            "LOC_val_solution.csv": TREE["LOC_val_solution.csv"] + b"ILSVRC2012_val_00000001,n01 1",
        },
        ["says of ILSVRC2012_val_00000001 that it is n02 and that it is n01: download it again"],
    ),
    "a class that val lacks": (
        {**SMALL, "train/c/1.jpg": picture(1), "train/d/1.jpg": picture(1)},
        ["4 classes under train/ and 2 under val/: c, d missing under val/"],
    ),
    "a class that train lacks": (
        {**SMALL, "val/c/1.jpg": picture(1)},
        ["c missing under train/"],
    ),
    "a class that only the CSV has": (
        {
            **TREE,
            "LOC_val_solution.csv": solution(
                {"ILSVRC2012_val_00000001": "n02", "ILSVRC2012_val_00000002": "n03"}
            ),
        },
        ["n01 missing under val/; n03 missing under train/"],
    ),
    "an empty class": (
        {**SMALL, "train/c/readme.txt": b"later", "val/c/": b""},
        ["train/c, val/c in", "hold no picture: fill or remove them"],
    ),
    "no train": ({"val/a/1.jpg": picture(1)}, ["no pictures under train/"]),
    "no val": ({"x/train/a/1.jpg": picture(1)}, ["no pictures under val/"]),
    "nothing": ({"photos/1.jpg": picture(1)}, ["has no pictures in train/<class>/<name> and val/"]),
    "two data sets": (
        {f"{top}/{name}": content for top in ("one", "two") for name, content in SMALL.items()},
        ["holds several data sets", "one/train/a/a.jpg", "two/train/a/a.jpg"],
    ),
    "a line break": ({**SMALL, "val/a/1\n2.jpg": picture(1)}, ["has a line break in its name"]),
}


@pytest.mark.parametrize("case", BAD_LABELS)
def test_missing_and_mixed_labels_are_named(case: str, tmp_path: Path) -> None:
    tree, told = BAD_LABELS[case]
    done = pack(make_source(tmp_path / "source", tree), tmp_path / "store")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for text in told:
        assert text in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # nothing was begun


def test_two_members_of_one_name_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "twice.tar"
    make_source(source, {**SMALL, "./train/a/a.jpg": picture(1)})
    done = pack(source, tmp_path / "store")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: train/a/a.jpg and ./train/a/a.jpg in {source} are both train/a/a.jpg: rename or "
        "remove one\n"
    )


def encrypt(path: Path) -> None:
    """Set the flag by which a zip says that its members are encrypted."""
    content = bytearray(make_source(path, SMALL).read_bytes())
    for signature, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(signature)
        while start >= 0:
            content[start + at] |= 1
            start = content.find(signature, start + 1)
    path.write_bytes(content)


def cut(path: Path) -> None:
    content = make_source(path, SMALL).read_bytes()
    path.write_bytes(content[: len(content) // 3])


def cut_between(path: Path) -> None:
    """A tar that is lost from its last picture on, with no half of one left."""
    content = make_source(path, SMALL).read_bytes()
    path.write_bytes(content[: content.index(b"val/b/b.jpg")])


def damage_a_header(path: Path) -> None:
    """In the middle of a tar: all before it can be read."""
    content = make_source(path, SMALL).read_bytes()
    path.write_bytes(content.replace(b"val/b/b.jpg", b"val/b/c.jpg", 1))  # another checksum


def damage_the_sum(path: Path) -> None:
    """A compressed tar whose checksum, behind the tar's own end, is not that of its content."""
    content = bytearray(make_source(path, SMALL).read_bytes())
    content[-8] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "told"),
    [
        ("source.zip", encrypt, "is encrypted (train/a/a.jpg): decrypt it first"),
        ("source.zip", cut, "is broken or cut short"),
        ("source.tar", cut, "is broken or cut short"),
        ("source.tar", cut_between, "is broken or cut short (it ends without"),
        ("source.tar", damage_a_header, "is broken or cut short (it ends without"),
        ("source.tar.gz", cut, "is broken or cut short"),
        ("source.tar.gz", damage_the_sum, "is broken or cut short (CRC check failed"),
        ("notes.txt", lambda path: path.write_text("x" * 2000), "is no zip or tar, or its"),
        ("nothing.zip", lambda path: None, "no folder, zip or tar"),
    ],
)
def test_archives_that_cannot_be_read_are_told(
    name: str, spoil: object, told: str, tmp_path: Path
) -> None:
    spoil(tmp_path / name)
    done = pack(tmp_path / name, tmp_path / "store")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr and str(tmp_path / name) in done.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["a", "b", "--max-side", "-1"], "max_side is -1: it must be 0 to 65,535"),
        (["a", "b", "--quality", "101"], "quality is 101: it must be 1 to 100"),
        (["a", "b", "--workers", "0"], "workers is 0: it must be 1 to 1,024"),
        (["a", "b", "--max-side", "x"], "--max-side: invalid literal"),
        (["a"], "STORE"),
    ],
)
def test_wrong_options_are_told(arguments: list[str], told: str) -> None:
    done = pack(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert told in done.stderr


def test_a_file_in_the_stores_place_is_left_alone(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", SMALL)
    (tmp_path / "store").write_bytes(b"somebody's notes")
    done = pack(source, tmp_path / "store")
    assert done.returncode == 2
    assert "is no store of pictures" in done.stderr
    assert (tmp_path / "store").read_bytes() == b"somebody's notes"
    done = pack(source, source)
    assert done.returncode == 2 and f"STORE {source} is a folder: name a file" in done.stderr


# ------------------------------------------------------------------------------ bad pictures


def test_bad_pictures_are_listed_and_then_mended_or_left_out(tmp_path: Path) -> None:
    whole = picture(1, 200, 300)
    bad = {
        "train/a/empty.jpg": (b"", "the file is empty"),
        "train/b/cut.jpg": (whole[: len(whole) // 2], "Premature end"),
        "val/a/page.jpg": (b"<html>Not found</html>", "not an image that can be read"),
    }
    tree = {**SMALL, **{name: content for name, (content, _) in bad.items()}}
    source, path = make_source(tmp_path / "source.zip", tree), tmp_path / "store"
    done = pack(source, path)
    assert done.returncode == 2
    listed = [line for line in done.stdout.splitlines() if "cannot be read: " in line]
    assert len(listed) == 3
    for line, (name, (_, reason)) in zip(listed, bad.items(), strict=True):
        assert f"cannot be read: {name} (" in line and reason in line
    assert done.stderr.startswith("error: 3 of 7 pictures cannot be read, listed above, the first ")
    assert done.stderr.count("\n") == 1 and "--skip-bad-images" in done.stderr
    partial = tmp_path / "store.partial"
    assert not path.exists() and partial.exists()
    with pytest.raises(UserError, match=r"store\.partial is not finished: the command that began"):
        store.open_store(partial)

    done = pack(source, path, "--skip-bad-images")
    assert done.returncode == 0, done.stderr
    assert "4 pictures in 2 classes" in done.stdout and "3 left out" in done.stdout
    opened = store.open_store(path)
    assert entries(opened) == list(SMALL)
    assert [entry for entry, _ in opened.info["skipped"]] == list(bad)
    pack(source, tmp_path / "at once", "--skip-bad-images")
    assert sha256(tmp_path / "at once") == sha256(path)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.EIO, "Input/output error"), "was not read (Input/output error), which is"),
        (MemoryError(), "takes more memory than there is: use fewer --workers"),
    ],
    ids=["disk", "memory"],
)
def test_what_is_not_the_pictures_fault_leaves_none_out(
    error: Exception, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, path = make_source(tmp_path / "source", SMALL), tmp_path / "store"
    options = (400, 90, 2, None, True)  # True: skip what is bad

    def prepare_but_one(read: packing.Read, *settings: int) -> packing.Prepared:
        if next(count) == 2:
            raise error
        return prepare(read, *settings)

    prepare, count = packing.prepare, itertools.count()
    with monkeypatch.context() as patched:
        patched.setattr(packing, "prepare", prepare_but_one)
        with pytest.raises(UserError, match=re.escape(said)) as told:
            packing.pack(source, path, *options)
    assert told.value.exit_code == 1 and "goes on from" in str(told.value)
    assert not path.exists()
    packing.pack(source, path, *options)
    assert entries(store.open_store(path)) == list(SMALL)


def test_a_store_that_cannot_be_written_is_told_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "broken.tar").write_bytes(b"x")
    blocked = tmp_path / "broken.tar/store"
    done = pack(tmp_path / "broken.tar", blocked)
    assert done.returncode == 2
    assert f"cannot write to {blocked.parent}: Not a directory: choose another STORE" in done.stderr
    (tmp_path / "store.partial").write_bytes(b"notes")
    done = pack(tmp_path / "broken.tar", tmp_path / "store")
    assert "store.partial is something else than a store being packed" in done.stderr


def test_a_class_of_bad_pictures_alone_cannot_be_left_out(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", {**SMALL, "val/b/b.jpg": b"x"})
    done = pack(source, tmp_path / "store", "--skip-bad-images")
    assert done.returncode == 2
    assert "error: no picture in val/b can be read: mend some" in done.stderr
    make_source(tmp_path / "source", SMALL)  # mends it
    assert pack(source, tmp_path / "store").returncode == 0
    assert entries(store.open_store(tmp_path / "store")) == list(SMALL)


# ------------------------------------------------------------------------------ going on

LARGE = {
    f"{part}/{name}/{number}.jpg": picture(number % 9, 1200, 1600)
    for part in ("train", "val")
    for name in "ab"
    for number in range(60)
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A source that takes a second or more to pack, as a tar, and the SHA-256 of its store."""
    folder = tmp_path_factory.mktemp("large")
    source = make_source(folder / "large.tar", LARGE)
    assert pack(source, folder / "store").returncode == 0
    return source, sha256(folder / "store")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_same_command_goes_on(
    number: signal.Signals, large: tuple[Path, str], tmp_path: Path
) -> None:
    source, digest = large
    path, partial = tmp_path / "store", tmp_path / "store.partial"
    command = [sys.executable, SCRIPT, "pack", source, path, "--workers", "1"]
    process = subprocess.Popen(
        command, env=COMMAND_ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + WAIT_S
    while not partial.exists() or partial.stat().st_size < 30_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.send_signal(number)
    _, complaint = process.communicate(timeout=WAIT_S)
    assert not path.exists()
    assert partial.stat().st_size >= 30_000
    if number != signal.SIGKILL:
        assert process.returncode == 75
        assert re.fullmatch(
            rb"error: interrupted after \d+ of 240 pictures: the same command goes on from .*\n",
            complaint,
        )
    with open(partial, "r+b") as file:  # as if the kill had hit the middle of a write
        file.truncate(partial.stat().st_size - 1)

    done = pack(source, path)
    assert done.returncode == 0, done.stderr
    after = int(re.search(r"going on after (\d+) pictures", done.stdout)[1])
    assert 0 < after < 240
    assert sha256(path) == digest
    assert not partial.exists()


def test_a_disk_that_takes_no_more_is_told_and_gone_on_from(
    large: tuple[Path, str], tmp_path: Path
) -> None:
    """RLIMIT_FSIZE makes a true write fail, in the middle of a picture, as a full disk does."""
    source, digest = large
    failed = subprocess.run(
        [sys.executable, SCRIPT, "pack", source, tmp_path / "store"],
        env=COMMAND_ENVIRONMENT,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 2
    assert failed.stderr == (
        f"error: cannot write {tmp_path / 'store.partial'} (File too large): make room and give "
        "the same command again, which goes on from there\n"
    )
    assert (tmp_path / "store.partial").stat().st_size == 200_000
    assert pack(source, tmp_path / "store").returncode == 0
    assert sha256(tmp_path / "store") == digest


def test_a_partial_store_of_another_source_or_setting_is_refused(tmp_path: Path) -> None:
    bad = {**SMALL, "train/a/bad.jpg": b"x"}
    source, path = make_source(tmp_path / "source", bad), tmp_path / "store"
    assert pack(source, path).returncode == 2  # leaves a partial store
    before = (tmp_path / "store.partial").read_bytes()
    done = pack(source, path, "--max-side", 300)
    assert done.returncode == 2
    assert "was begun with max_side 400, quality 90: give the same settings again" in done.stderr
    other = make_source(
        tmp_path / "other", {name.replace("a.jpg", "1.jpg"): SMALL[name] for name in SMALL}
    )
    done = pack(other, path)
    assert done.returncode == 2
    assert f"holds 2 pictures that {other} has not, such as train/a/a.jpg" in done.stderr
    same_names = make_source(tmp_path / "larger", {name: picture(8) for name in bad})
    done = pack(same_names, path)
    assert done.returncode == 2
    assert f"store.partial holds another train/a/a.jpg than {same_names}: pack" in done.stderr
    assert (tmp_path / "store.partial").read_bytes() == before

    assert pack(source, path, "--skip-bad-images").returncode == 0
    done = pack(source, path, "--quality", 80)
    assert done.returncode == 2
    assert "finished already, with other settings (max_side 400, quality 90)" in done.stderr


def test_what_may_be_damaged_or_is_left_aside_is_told(tmp_path: Path) -> None:
    """Re-encoded, a picture shows no more that libjpeg complained of it."""
    large = picture(1, 500, 600)
    odd = {"train/a/odd.jpg": large[:-2] + b"left over" + large[-2:]}
    aside = {"train/a/picture.jfif": picture(2), "Annotations/train/a/a.xml": b""}
    done = pack(make_source(tmp_path / "source.zip", {**SMALL, **odd, **aside}), tmp_path / "store")
    assert done.returncode == 0, done.stderr
    assert "perhaps damaged, but packed: train/a/odd.jpg (Corrupt JPEG data" in done.stdout
    assert done.stdout.count("perhaps damaged") == 1
    assert "left aside: 1 files in classes that end in none of .jpg .jpeg " in done.stdout
    assert "the first train/a/picture.jfif\n" in done.stdout


def test_what_is_said_of_a_damaged_picture_is_not_said_of_the_next(tmp_path: Path) -> None:
    """A byte of its Huffman tables is lost: libjpeg complains of it, and Pillow gives up."""
    content = picture(1)
    at = content.index(b"\xff\xc4") + 30
    lost = {"train/a/0_lost.jpg": content[:at] + content[at + 1 :]}
    source = make_source(tmp_path / "source.zip", {**lost, **SMALL})  # in one thread's few
    done = pack(source, tmp_path / "store", "--skip-bad-images")
    assert done.returncode == 0, done.stderr
    assert "cannot be read: train/a/0_lost.jpg" in done.stdout
    assert "perhaps damaged" not in done.stdout


def test_unreadable_files_of_a_folder_are_bad_pictures(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source", SMALL)
    os.symlink("nowhere", source / "train" / "a" / "lost.jpg")
    done = pack(source, tmp_path / "store", "--skip-bad-images")
    assert done.returncode == 0, done.stderr
    opened = store.open_store(tmp_path / "store")
    assert opened.info["skipped"] == [["train/a/lost.jpg", "No such file or directory"]]


def test_links_that_point_upward_are_left_aside(tmp_path: Path) -> None:
    source, path = make_source(tmp_path / "source", SMALL), tmp_path / "store"
    links = {"up": "..", "train/a/all": "../..", "train/b/a": "../a", "train/a/b": "../b"}
    for name, target in links.items():
        (source / name).symlink_to(target)
    make_source(tmp_path / "elsewhere", {"c.jpg": picture(8)})
    for part in ("train", "val"):  # others are followed
        (source / part / "c").symlink_to(tmp_path / "elsewhere")
    done = run_stage_command(SCRIPT, "pack", source, path, timeout=WAIT_S)
    assert (done.returncode, done.stderr) == (0, "")
    classes = [f"{part}/{name}/{name}.jpg" for part in ("train", "val") for name in "abc"]
    assert entries(store.open_store(path)) == classes
    told = re.findall("left aside: (.*), a link to a folder that it lies in", done.stdout)
    upward = ("train/a/all", "train/a/b/a", "train/b/a/all", "train/b/a/b", "up/source")
    assert sorted(told) == [f"{source}/{name}" for name in upward]
