"""store.py: what is written is what is read, and nothing else is; the zip is one for every tool."""

import errno
import gc
import hashlib
import io
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from array import array
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMAND_ENVIRONMENT, REPOSITORY
from PIL import Image

import store
from utils import UserError

SETTINGS = {"max_side": 400, "quality": 90}


def jpeg(seed: int, height: int = 20, width: int = 30) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


# In the order of a source, which is not the order of the index. "a-b" sorts before "a/": "-" is
# below "/"; as a class it comes after "a".
PICTURES = {
    "val/b/3.JPEG": (jpeg(3), 20, 30),
    "train/a-b/1.JPEG": (jpeg(1), 20, 30),
    "train/a/2.png": (b"any bytes", 0, 0),
    "train/b/ä \udcff.jpg": (jpeg(4), 20, 30),
    "train/a/10.jpg": (jpeg(5, 31, 8), 31, 8),
    "val/a/1.jpg": (jpeg(6), 20, 30),
    "val/a-b/1.jpg": (jpeg(7), 20, 30),
}
IN_ORDER = [
    *("train/a/10.jpg", "train/a/2.png", "train/a-b/1.JPEG", "train/b/ä \udcff.jpg"),
    *("val/a/1.jpg", "val/a-b/1.jpg", "val/b/3.JPEG"),
]


def write(path: Path, skipped: tuple = (), pictures: dict | None = None) -> str:
    """A store of PICTURES; goes on with a partial one. Returns its SHA-256."""
    with store.StoreWriter(path, SETTINGS) as writer:
        for entry, (content, height, width) in (pictures or PICTURES).items():
            if entry not in writer:
                writer.add(entry, content, height, width, reencoded=entry.endswith("2.png"))
        return writer.finish(skipped)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    write(tmp_path / "pictures.store")
    return tmp_path / "pictures.store"


# ------------------------------------------------------------------------------ writing and reading


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "pictures.store"
    digest = write(path, [("train/a/3.jpg", "the file is empty")])
    opened = store.open_store(path)
    assert opened.path == path
    assert opened.classes == ("a", "a-b", "b")
    assert opened.parts == {"train": (0, 4), "val": (4, 7)}
    assert opened.records["label"].tolist() == [0, 0, 1, 2, 0, 1, 2]
    assert [opened.entry(position) for position in range(7)] == IN_ORDER
    assert bytes(opened.names) == b"".join(
        os.fsencode(entry.partition("/")[2]) + b"\n" for entry in IN_ORDER
    )
    for position, entry in enumerate(IN_ORDER):
        content, height, width = PICTURES[entry]
        record = opened.records[position]
        assert bytes(opened.read(position)) == content
        assert (record["height"], record["width"]) == (height, width)
        assert record["crc32"] == zlib.crc32(content)
    assert opened.info["settings"] == SETTINGS
    assert opened.info["reencoded"] == 1
    assert opened.info["skipped"] == [["train/a/3.jpg", "the file is empty"]]

    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in path.parent.iterdir()) == [path.name, f"{path.name}.sha256"]
    checked = subprocess.run(
        ["sha256sum", "-c", f"{path.name}.sha256"], cwd=path.parent, capture_output=True, text=True
    )
    assert (checked.returncode, checked.stdout) == (0, f"{path.name}: OK\n")


def test_nothing_is_copied_to_open_it(written: Path) -> None:
    opened = store.open_store(written)
    whole = np.frombuffer(opened.mapping, np.uint8)
    for view in (opened.records, np.frombuffer(opened.names, np.uint8)):
        assert np.shares_memory(whole, np.asarray(view))
    assert not opened.records.flags.writeable
    with pytest.raises(TypeError):
        opened.mapping[0] = 1


def test_it_is_a_zip_for_other_tools(written: Path) -> None:
    with zipfile.ZipFile(written) as archive:
        assert archive.testzip() is None
        infos = archive.infolist()
        names = [info.filename for info in infos]
        plain = [name for name in PICTURES if name.isascii()]
        assert [name for name in names if name in plain] == plain  # in the order of the source
        for name in plain:
            assert archive.read(name) == PICTURES[name][0]
        assert names[0] == "index/packing.json"
        assert names[-3:] == ["index/records.npy", "index/names.txt", "index/store.json"]
        assert {info.date_time for info in infos} == {(1980, 1, 1, 0, 0, 0)}
        assert {info.external_attr >> 16 for info in infos} == {0o100644}
        records = np.load(io.BytesIO(archive.read("index/records.npy")))
        assert records.dtype == store.RECORD and len(records) == 7
        assert json.loads(archive.comment)["bytes"] == written.stat().st_size
    if shutil.which("unzip"):
        tested = subprocess.run(["unzip", "-tq", written], capture_output=True, text=True)
        assert tested.returncode == 0, tested.stdout


def test_names_in_utf8_are_marked_as_such(tmp_path: Path) -> None:
    write(tmp_path / "store", pictures={"train/Bär/ü.jpg": (jpeg(1), 20, 30)})
    with zipfile.ZipFile(tmp_path / "store") as archive:
        assert archive.testzip() is None
        assert "train/Bär/ü.jpg" in archive.namelist()


def test_the_same_pictures_give_the_same_bytes(tmp_path: Path) -> None:
    assert write(tmp_path / "one") == write(tmp_path / "two")


def test_many_entries_need_zip64(tmp_path: Path) -> None:
    pictures = {f"train/{i % 7}/{i}.jpg": (b"%d" % i, 0, 0) for i in range(70_000)}
    write(tmp_path / "store", pictures=pictures)
    with zipfile.ZipFile(tmp_path / "store") as archive:
        assert len(archive.infolist()) == 70_004
        assert archive.testzip() is None
    opened = store.open_store(tmp_path / "store")
    assert opened.parts == {"train": (0, 70_000), "val": (70_000, 70_000)}
    for position in (0, 12_345, 69_999):
        assert bytes(opened.read(position)) == pictures[opened.entry(position)][0]


def test_entries_behind_4_gib_need_zip64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole in the file stands for 5 GiB of pictures: it takes no room on the disk."""
    with store.StoreWriter(tmp_path / "store", SETTINGS) as writer:
        writer.add("train/a/1.jpg", b"first")
        writer._file.truncate(writer._end + 5 * 2**30)
        writer._end += 5 * 2**30
        writer.add("val/a/2.jpg", b"second")
        writer.finish()
    with zipfile.ZipFile(tmp_path / "store") as archive:
        assert archive.read("train/a/1.jpg") == b"first"
        assert archive.read("val/a/2.jpg") == b"second"
        assert archive.getinfo("val/a/2.jpg").header_offset > 5 * 2**30
    opened = store.open_store(tmp_path / "store")
    assert bytes(opened.read(1)) == b"second"
    assert opened.records["offset"][1] > 5 * 2**30


@pytest.mark.parametrize(
    "entry", ["test/a/1.jpg", "train/1.jpg", "train/a/b/1.jpg", "train/a/1\n.jpg", "train/a/1.jpg"]
)
def test_a_picture_has_a_part_a_class_a_name_and_comes_once(tmp_path: Path, entry: str) -> None:
    with store.StoreWriter(tmp_path / "store", SETTINGS) as writer:
        writer.add("train/a/1.jpg", b"x")
        with pytest.raises(ValueError, match="is no name for a picture, or was added before"):
            writer.add(entry, b"y")
        assert len(writer) == 1


# ------------------------------------------------------------------------------ damage


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        store.open_store(path)
    text = str(refused.value)
    assert str(path) in text and "\n" not in text
    return text


def change(path: Path, at: int, flip: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= flip
    path.write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"\x89PNG" + bytes(500), b"x" * 100_000])
def test_other_files_are_no_stores(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    assert "is no store of pictures: make one with" in refusal(tmp_path / "file")


def test_what_cannot_be_opened_is_told(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing")
    assert "Is a directory" in refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("train/a/1.jpg", jpeg(1))
    assert "is no store of pictures" in refusal(tmp_path / "other.zip")


@pytest.mark.parametrize("missing", [1, 100, 500, 3000])
def test_a_store_that_was_cut_short_is_refused(written: Path, missing: int) -> None:
    os.truncate(written, written.stat().st_size - missing)
    text = refusal(written)
    assert "cut short or made longer): copy it again, or remove it and pack it again with" in text


@pytest.mark.parametrize("more", [1, 1000, 100_000])
def test_a_store_that_was_made_longer_is_refused(written: Path, more: int) -> None:
    with open(written, "ab") as file:
        file.write(bytes(more))
    text = refusal(written)
    assert "were written" in text or "made longer" in text


def test_bytes_lost_in_the_middle_are_noticed(written: Path) -> None:
    content = written.read_bytes()
    written.write_bytes(content[:500] + content[600:])
    text = refusal(written)
    assert f"it has {len(content) - 100:,} bytes, {len(content):,} were written" in text


def test_any_flipped_bit_of_index_or_comment_is_refused(written: Path) -> None:
    content = written.read_bytes()
    end = content.rfind(b"PK\5\6")
    comment = json.loads(content[end + 22 :])
    places = [comment[name] for name in ("records", "names", "store")]
    index = [at for start, size in places for at in range(start, start + size)]
    positions = index[:: max(1, len(index) // 150)] + list(range(end + 22, len(content)))
    for at in positions:
        for bit in (1, 32):
            changed = bytearray(content)
            changed[at] ^= bit
            written.write_bytes(changed)
            assert "again" in refusal(written)


def test_a_store_of_another_version_is_refused(written: Path) -> None:
    content = written.read_bytes()
    end = content.rfind(b"PK\5\6")
    later = content[end:].replace(b'"version": 1', b'"version": 2').replace(b"names", b"files")
    written.write_bytes(content[:end] + later)
    text = refusal(written)
    assert text.endswith("is a store of version 2, this release reads version 1: pack it again, or use the release that wrote it")  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("field", ["offset", "size", "label"])
def test_records_that_point_elsewhere_are_refused(
    tmp_path: Path, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where every hash matches: as if another program had written it."""
    save = np.save

    def save_wrongly(file: io.BytesIO, records: np.ndarray) -> None:
        records[field][1] = np.iinfo(records[field].dtype).max
        save(file, records)

    monkeypatch.setattr(np, "save", save_wrongly)
    write(tmp_path / "store")
    text = refusal(tmp_path / "store")
    assert "point outside the pictures" in text or "labels are of no class" in text


@pytest.mark.parametrize("fault", ["label", "parts"])
def test_an_index_that_is_wrong_by_one_is_refused(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every hash matches: one class beyond the last, one picture in neither part."""
    save, as_json = np.save, store._json

    def save_wrongly(file: io.BytesIO, records: np.ndarray) -> None:
        records["label"][1] = 3  # of the classes 0, 1 and 2
        save(file, records)

    def as_json_wrongly(value: dict) -> bytes:
        if "parts" in value:
            value["parts"]["train"][1] -= 1
        return as_json(value)

    with monkeypatch.context() as patched:
        if fault == "label":
            patched.setattr(np, "save", save_wrongly)
        else:
            patched.setattr(store, "_json", as_json_wrongly)
        write(tmp_path / "store")
    told = {"label": "its labels are of no class", "parts": "its parts are not its pictures"}
    assert told[fault] in refusal(tmp_path / "store")


def test_a_store_that_nothing_uses_any_more_is_closed(written: Path) -> None:
    def opened_files() -> list[str]:
        folder = Path("/proc/self/fd")
        return [os.readlink(link) for link in folder.iterdir() if link.is_symlink()]

    opened = store.open_store(written)
    opened.read(0)
    assert str(written) in opened_files()
    del opened
    gc.collect()
    assert str(written) not in opened_files()


def test_a_changed_picture_is_refused_when_it_is_read(written: Path) -> None:
    record = store.open_store(written).records[0]
    change(written, int(record["offset"]) + 50)
    opened = store.open_store(written)
    with pytest.raises(ValueError) as refused:
        opened.read(0)
    assert str(refused.value) == (
        f"train/a/10.jpg in {written} is damaged, or was changed after it was packed: copy it "
        "again, or remove it and pack it again with `python3 scripts/prepare_data.py pack`"
    )
    assert bytes(opened.read(1)) == b"any bytes"


# ------------------------------------------------------------------------------ going on


def test_a_store_gets_its_name_once_it_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Content, its sum, name, folder: a loss of power leaves none that is not whole."""
    order = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        order.append(f"flush {path.name} {path.stat().st_size if path.is_file() else 'folder'}")
        real_fsync(descriptor)

    def replace(old: Path, new: Path) -> None:
        order.append(f"rename {Path(old).name}")
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    write(tmp_path / "store")
    size, sum_size = ((tmp_path / name).stat().st_size for name in ("store", "store.sha256"))
    assert order == [
        f"flush store.partial {size}",
        f"flush .store.sha256.tmp {sum_size}",
        "rename .store.sha256.tmp",
        f"flush {tmp_path.name} folder",
        "rename store.partial",
        f"flush {tmp_path.name} folder",
    ]


@pytest.mark.parametrize("finished", [False, True])
def test_a_partial_store_is_continued_from_any_length(tmp_path: Path, finished: bool) -> None:
    """`finished`: as after a kill while the index was being written."""
    digest = write(tmp_path / "whole")
    path = tmp_path / "store"
    with store.StoreWriter(path, SETTINGS) as writer:
        for entry, (content, height, width) in PICTURES.items():
            writer.add(entry, content, height, width, reencoded=entry.endswith("2.png"))
    partial = tmp_path / "store.partial"
    content = (tmp_path / "whole").read_bytes() if finished else partial.read_bytes()
    first = partial.stat().st_size if finished else 0
    for length in {*range(first, len(content), 97), first + 1, len(content) - 1, len(content)}:
        partial.write_bytes(content[:length])
        assert write(path) == digest
        assert path.read_bytes() == (tmp_path / "whole").read_bytes()
        assert not partial.exists()
        path.unlink()


def test_a_partial_store_is_cut_at_a_damaged_picture(tmp_path: Path) -> None:
    digest = write(tmp_path / "whole")
    path, partial = tmp_path / "store", tmp_path / "store.partial"
    content = (tmp_path / "whole").read_bytes()
    for at in range(200, len(content), 211):
        changed = bytearray(content)
        changed[at : at + 60] = bytes(60)  # as a loss of power leaves it
        partial.write_bytes(changed)
        assert write(path) == digest
        path.unlink()


def test_a_partial_store_is_cut_at_a_damaged_header(tmp_path: Path) -> None:
    """Even where size and checksum are right: other tools would not read the picture."""
    digest = write(tmp_path / "whole")
    path, partial = tmp_path / "store", tmp_path / "store.partial"
    content = (tmp_path / "whole").read_bytes()
    header = content.index(b"train/a-b/1.JPEG") - 30
    for field in (4, 6, 8, 10, 12, 22):  # version, flags, method, time, date, size as unpacked
        changed = bytearray(content)
        changed[header + field] ^= 1
        partial.write_bytes(changed)
        assert write(path) == digest
        path.unlink()


def test_a_partial_store_of_other_settings_is_refused(tmp_path: Path) -> None:
    path, partial = tmp_path / "store", tmp_path / "store.partial"
    with store.StoreWriter(path, {"max_side": 500, "quality": 90}) as writer:
        writer.add("train/a/1.jpg", b"x")
    before = partial.read_bytes()
    with pytest.raises(UserError, match=r"was begun with max_side 500, quality 90: give the same"):
        store.StoreWriter(path, SETTINGS)
    assert partial.read_bytes() == before
    partial.write_bytes(before.replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(UserError, match="by a release that writes version 9"):
        store.StoreWriter(path, SETTINGS)
    partial.write_bytes(b"somebody's notes")
    with pytest.raises(UserError, match="is something else than a store being packed: remove it"):
        store.StoreWriter(path, SETTINGS)
    assert partial.read_bytes() == b"somebody's notes"


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        store.StoreWriter(tmp_path / "store", SETTINGS),
        pytest.raises(UserError, match=r"another process writes .*store.partial"),
    ):
        store.StoreWriter(tmp_path / "store", SETTINGS)


def test_a_store_that_another_writer_finishes_meanwhile_is_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "store"
    first = store.StoreWriter(path, SETTINGS)
    first.add("train/a/1.jpg", b"x")
    lock = store.StoreWriter._lock

    def lock_late(writer: store.StoreWriter) -> None:
        first.finish()  # what the second has opened by now is the finished store
        lock(writer)

    monkeypatch.setattr(store.StoreWriter, "_lock", lock_late)
    with pytest.raises(UserError, match=f"another process has finished {path} meanwhile: use it"):
        store.StoreWriter(path, SETTINGS)
    sums = (tmp_path / "store.sha256").read_text()
    assert sums.split()[0] == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.undo()
    with pytest.raises(UserError, match=f"another process has finished {path} meanwhile: use it"):
        store.StoreWriter(path, SETTINGS)
    store.open_store(path)


def test_a_disk_that_takes_no_more_is_told(tmp_path: Path) -> None:
    """A true failing write, by the limit that the kernel sets to the size of a file."""
    digest = write(tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    program = (
        "import sys, test_store; from pathlib import Path; from utils import run_stage\n"
        "run_stage(lambda: test_store.write(Path(sys.argv[1])))"
    )
    paths = os.pathsep.join(map(str, (REPOSITORY, REPOSITORY / "tests")))
    for limit in (10, size // 3, size - 300):
        failed = subprocess.run(
            [sys.executable, "-c", program, tmp_path / "store"],
            env={**COMMAND_ENVIRONMENT, "PYTHONPATH": paths},
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),  # noqa: B023
            capture_output=True,
            text=True,
        )
        assert failed.returncode == 2
        assert failed.stderr == (
            f"error: cannot write {tmp_path / 'store.partial'} ({os.strerror(errno.EFBIG)}): make "
            "room and give the same command again, which goes on from there\n"
        )
        assert (tmp_path / "store.partial").stat().st_size == limit
    assert write(tmp_path / "store") == digest


def test_a_disk_without_room_for_the_last_byte_is_told(tmp_path: Path) -> None:
    """The last write is a short one: what is not whole does not get the store's name."""
    digest = write(tmp_path / "whole")
    size = (tmp_path / "whole").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
    try:
        with pytest.raises(UserError, match="make room and give the same command again"):
            write(tmp_path / "store")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "store").exists()
    assert write(tmp_path / "store") == digest


# ------------------------------------------------------------------------------ at full size


def write_large_index(path: Path, pictures: int) -> None:
    """A store of so many empty pictures in 1,000 classes: a true index at ImageNet's size."""
    writer = store.StoreWriter(path, SETTINGS)
    per_class = pictures // 1000 + 1
    for at in range(pictures):
        wnid, number = f"n{at // per_class:08d}", at % per_class
        writer._entries[f"train/{wnid}/{wnid}_{number}.JPEG"] = None
    writer._offsets = array("Q", [100]) * pictures
    for column, kind in (("_sizes", "I"), ("_crcs", "I"), ("_heights", "H"), ("_widths", "H")):
        setattr(writer, column, array(kind, [0]) * pictures)
    writer.finish()


def test_an_index_of_1281167_pictures_opens_in_little_memory(tmp_path: Path) -> None:
    write_large_index(tmp_path / "store", 1_281_167)
    program = (
        "import resource, sys, store\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "opened = store.open_store(sys.argv[1])\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(opened.records), after - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "store"],
        env={**COMMAND_ENVIRONMENT, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    records, grown_kib = map(int, done.stdout.split())
    assert records == 1_281_167
    assert grown_kib < 200_000


def test_the_records_are_as_long_as_told() -> None:
    assert store.RECORD.itemsize == struct.calcsize("<QIIHHH") == 22
