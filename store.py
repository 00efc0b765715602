"""One file instead of 1.3 million: all pictures of a data set, and their index, which is mapped.

    python3 scripts/prepare_data.py pack SOURCE STORE     writes one

A store is an uncompressed ZIP that every unzip tool opens (ZIP64 where it has to be):

    index/packing.json      format, version and settings; first, for packing that is continued
    train/<class>/<name>    the pictures, in the order of the source
    val/<class>/<name>
    index/records.npy       RECORD for each picture, sorted by part, class, name
    index/names.txt         "class/name" for each picture, a line each, in the same order
    index/store.json        classes, parts, settings, SHA-256 of the two before

The comment at the ZIP's end says where the index lies, how long the file is, and the SHA-256 of
store.json. So opening takes no walk through the ZIP's own directory: the index is used where it
lies, and shared by all processes that map the file. All times in it are 1980-01-01: the same
source gives the same bytes.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import io
import json
import mmap
import os
import struct
import weakref
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from zlib_ng import zlib_ng  # its CRC-32 takes half a microsecond for 40 kB, zlib's 7 or far more

from utils import UserError, check_writable, log, write_atomically

FORMAT = "resnet50 picture store"
VERSION = 1
PARTS = ("train", "val")

RECORD = np.dtype(
    [
        ("offset", "<u8"),  # of the picture's first byte in the file
        ("size", "<u4"),  # in bytes
        ("crc32", "<u4"),
        ("height", "<u2"),  # of a plain JPEG, in pixels; 0 for everything else
        ("width", "<u2"),
        ("label", "<u2"),  # position of the class among the sorted classes
    ]
)

# The records of a ZIP, as PKWARE's APPNOTE.TXT 6.3 has them (sections 4.3.7 to 4.3.16).
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")
_NEEDS = 45  # version 4.5: ZIP64
_DATE = 1 << 5 | 1  # 1980-01-01
_UTF8 = 0x800
_LIMIT16, _LIMIT32 = 0xFFFF, 0xFFFFFFFF

# What a picture's local header says beside: height and width, and whether it was re-encoded.
_EXTRA = struct.Struct("<2H2HB")
_EXTRA_ID = 0x4E52

_FIRST = "index/packing.json"
PARTIAL = ".partial"  # what the name of a store that is being packed ends with
_AGAIN = "copy it again, or remove it and pack it again with `python3 scripts/prepare_data.py pack`"


# ------------------------------------------------------------------------------ reading


@dataclasses.dataclass(frozen=True)
class Store:
    """An open store; its arrays are views of the mapped file, the pictures are read from it."""

    path: Path
    mapping: mmap.mmap
    descriptor: int  # of the same file; closed when the mapping goes
    classes: tuple[str, ...]  # sorted
    parts: dict[str, tuple[int, int]]  # "train" and "val": first position, and one past the last
    records: np.ndarray  # RECORD, (pictures,): train, then val, each sorted by class, then by name
    names: memoryview  # "class/name\n" for each picture, in the order of the records
    info: dict[str, Any]  # what index/store.json says

    def read(self, position: int) -> memoryview:
        """The encoded picture.

        Raises ValueError if its bytes are not those that were packed, OSError if the disk does not
        give them, and UserError if the file was cut short meanwhile.
        """
        self._refuse_cut()
        offset, size, crc, *_ = self.records.item(position)
        # Not from the mapping: there a disk that fails would end the process by SIGBUS.
        content = memoryview(os.pread(self.descriptor, size, offset))
        if zlib_ng.crc32(content) != crc:
            raise ValueError(
                f"{self.entry(position)} in {self.path} is damaged, or was changed after it was "
                f"packed: {_AGAIN}"
            )
        return content

    def read_ahead(self, positions: np.ndarray) -> None:
        """Have the kernel fetch pictures that will soon be read."""
        self._refuse_cut()
        places = self.records[positions]
        offsets, sizes = places["offset"].tolist(), places["size"].tolist()
        with open(self.path, "rb", buffering=0) as file:
            for offset, size in zip(offsets, sizes, strict=True):
                os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def forget(self, positions: np.ndarray) -> None:
        """Have the kernel drop pictures from memory; those that another process maps stay."""
        places = self.records[positions]
        offsets, sizes = places["offset"].tolist(), places["size"].tolist()
        with open(self.path, "rb", buffering=0) as file:
            os.fsync(file.fileno())  # what is not yet written stays in memory
            for offset, size in zip(offsets, sizes, strict=True):
                page = offset // mmap.PAGESIZE * mmap.PAGESIZE
                end = -(-(offset + size) // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages alone go
                os.posix_fadvise(file.fileno(), page, end - page, os.POSIX_FADV_DONTNEED)

    def _refuse_cut(self) -> None:
        """To touch what is mapped beyond the end of a file would end the process by SIGBUS."""
        if self.mapping.size() < len(self.mapping):
            raise UserError(
                f"{self.path} was cut short while it was in use: {_AGAIN}; then give the same "
                "command again"
            )

    def entry(self, position: int) -> str:
        """Name of a picture in the ZIP: "train/class/name". Takes milliseconds: for messages."""
        ends = np.flatnonzero(np.frombuffer(self.names, np.uint8) == ord("\n"))
        start = int(ends[position - 1]) + 1 if position else 0
        part = PARTS[position >= self.parts["val"][0]]
        return f"{part}/{os.fsdecode(bytes(self.names[start : int(ends[position])]))}"


def open_store(path: Path) -> Store:
    """Map a store into memory and check its index, not its pictures: `Store.read` does that.

    Raises UserError for a file that is no store, is not as long as it was, is of another version,
    or whose index is damaged.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_LOCAL.size + len(_FIRST))
            if not _begins_as_store(head):
                raise UserError(
                    f"{path} is no store of pictures: make one with `python3 "
                    "scripts/prepare_data.py pack`"
                )
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            descriptor = os.dup(file.fileno())
            weakref.finalize(mapping, _close, descriptor)
    except OSError as error:
        raise UserError(
            f"cannot open {path} ({error.strerror}): name a store that `python3 "
            "scripts/prepare_data.py pack` has written"
        ) from None
    try:
        comment = _read_comment(mapping)
        if comment["version"] != VERSION:
            raise UserError(
                f"{path} is a store of version {comment['version']}, this release reads version "
                f"{VERSION}: pack it again, or use the release that wrote it"
            )
        return _open_index(path, mapping, descriptor, comment)
    except (ValueError, KeyError, TypeError) as error:
        if str(path).endswith(PARTIAL):
            raise UserError(
                f"{path} is not finished: the command that began to pack it goes on with it"
            ) from None
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from None


def _close(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # of a disk that has gone
        os.close(descriptor)


def _begins_as_store(head: bytes) -> bool:
    return head.startswith(b"PK\3\4") and head[_LOCAL.size :] == _FIRST.encode()


def _read_comment(mapping: mmap.mmap) -> dict[str, Any]:
    """What the comment at the end of the ZIP says; raises ValueError if it is not as written."""
    tail = mapping[-(_LIMIT16 + _END.size) :]
    at = tail.rfind(b"PK\5\6")
    try:
        end = tail[at:] if at >= 0 else b""
        written = end[_END.size : _END.size + _END.unpack_from(end)[-1]]
        comment = json.loads(written)
        _check(comment["format"] == FORMAT, "it is of another kind")
        _check(comment["version"] != VERSION or written == _json(comment), "it was changed")
    except (struct.error, ValueError, KeyError, TypeError):
        raise ValueError(
            "its end is not that of a store: it was cut short or made longer"
        ) from None
    if comment["version"] == VERSION and comment["bytes"] != len(mapping):
        raise ValueError(f"it has {len(mapping):,} bytes, {comment['bytes']:,} were written")
    return comment


def _open_index(path: Path, mapping: mmap.mmap, descriptor: int, comment: dict[str, Any]) -> Store:
    """The store whose index lies where the comment says; raises ValueError if it is damaged."""
    view = memoryview(mapping)
    places = {name: comment[name] for name in ("records", "names", "store")}
    for start, size in places.values():
        _check(0 <= start <= start + size <= len(view), "its index lies outside the file")
    pictures_end = places["records"][0]
    # Pictures are read in random order, for which reading ahead is in vain; the index is read now.
    index_page = pictures_end // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_RANDOM, 0, max(index_page, mmap.PAGESIZE))
    mapping.madvise(mmap.MADV_WILLNEED, index_page)

    records_bytes, names, store_json = (
        view[start : start + size] for start, size in places.values()
    )
    digest = hashlib.sha256(store_json).hexdigest()
    _check(digest == comment["sha256"], "index/store.json is not what was written")
    info = json.loads(bytes(store_json))
    for name, content in (("records", records_bytes), ("names", names)):
        _check(hashlib.sha256(content).hexdigest() == info["sha256"][name], f"its {name} differ")

    header = io.BytesIO(records_bytes[:4096])
    np.lib.format.read_magic(header)
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    _check(dtype == RECORD and len(shape) == 1, "its records are of another kind")
    records = np.frombuffer(records_bytes, RECORD, count=shape[0], offset=header.tell())

    classes = tuple(info["classes"])
    parts = {part: tuple(info["parts"][part]) for part in PARTS}
    (first, middle), (again, last) = parts["train"], parts["val"]
    _check((first, middle, last) == (0, again, len(records)), "its parts are not its pictures")
    if len(records):
        offsets, sizes = records["offset"], records["size"]
        # Two comparisons, since the sum of a huge offset and a size begins at 0 again.
        inside = max(offsets.max(), (offsets + sizes).max()) <= pictures_end
        _check(inside, "its records point outside the pictures")
        _check(records["label"].max() < len(classes), "its labels are of no class")
    return Store(Path(path), mapping, descriptor, classes, parts, records, names, info)


def _check(holds: bool, complaint: str) -> None:
    if not holds:
        raise ValueError(complaint)


def _json(value: object) -> bytes:
    return json.dumps(value).encode()


# ------------------------------------------------------------------------------ writing


def partial_of(path: Path) -> Path:
    """Where a store lies while it is being packed."""
    return path.with_name(f"{path.name}{PARTIAL}")


def check_place(path: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError where no store can be written, or one was begun with other settings.

    Writes nothing, and reads no picture of what was begun.
    """
    check_writable(path.parent, "STORE")
    partial, beginning = partial_of(path), _beginning(settings)
    if partial.exists():
        with open(partial, "rb") as file:
            head = file.read(4096)
        if not beginning.startswith(head[: len(beginning)]):
            raise UserError(_other_beginning(partial, head))


class StoreWriter:
    """Writes a store, picture by picture, into STORE.partial, which `finish` renames to STORE.

    A partial store that is there already is continued: it is read and compared from its beginning,
    and cut at the first picture that is incomplete or damaged. Raises UserError if it was begun
    with other settings, if another process writes it or has finished the store, or if the disk
    takes no more.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.partial = partial_of(self.path)
        self.settings = dict(settings)
        self.reencoded = 0
        self._entries: dict[str, int] = {}  # positions in the file of each "train/class/name"
        self._offsets, self._sizes, self._crcs = array("Q"), array("I"), array("I")
        self._heights, self._widths = array("H"), array("H")
        self._sha = hashlib.sha256()
        self._end = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "a+b", buffering=0)  # noqa: SIM115 (`close` closes it)
        try:
            self._lock()
            if self.path.exists():  # even what was opened as STORE.partial may have become it
                raise UserError(
                    f"another process has finished {self.path} meanwhile: use it, or remove it to "
                    "pack it anew"
                )
            self._continue()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, entry: str) -> bool:
        return entry in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def entries(self) -> Sequence[str]:
        """Names of the pictures, "train/class/name", in the order of the file."""
        return tuple(self._entries)

    def crc(self, entry: str) -> int:
        """CRC-32 of a picture that it holds."""
        return self._crcs[self._entries[entry]]

    def close(self) -> None:
        """Close the file; what was added stays in STORE.partial."""
        self._file.close()

    def add(
        self, entry: str, content: bytes, height: int = 0, width: int = 0, reencoded: bool = False
    ) -> None:
        """Append a picture.

        Args:
            entry: "train/class/name" or "val/class/name", not added before
            content: the encoded picture, below 4 GiB
            height: in pixels, 0 for what is no plain JPEG
            width: likewise
            reencoded: whether its bytes are others than the source's
        """
        part, _, rest = entry.partition("/")
        if part not in PARTS or rest.count("/") != 1 or "\n" in entry or entry in self._entries:
            raise ValueError(f"{entry!r} is no name for a picture, or was added before")
        if len(content) >= _LIMIT32:
            raise UserError(f"{entry} has {len(content):,} bytes: a picture must be below 4 GiB")
        extra = _EXTRA.pack(_EXTRA_ID, _EXTRA.size - 4, height, width, reencoded)
        crc = zlib_ng.crc32(content)
        header = _local_header(entry, len(content), crc, extra)
        self._write(header + content)
        self._note(entry, len(content), crc, extra)

    def finish(self, skipped: Sequence[Sequence[str]] = ()) -> str:
        """Write the index, rename STORE.partial to STORE, and write STORE.sha256.

        Args:
            skipped: [entry, reason] for each picture that was left out

        Returns the SHA-256 of the file, in hex.
        """
        entries = self.entries
        # The order of (part, class, name), in one string each: no name holds a zero.
        keys = [entry.replace("/", "\0") for entry in entries]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        keys.sort()
        classes = sorted({key.split("\0")[1] for key in keys})
        if len(classes) > _LIMIT16:
            raise UserError(f"{len(classes):,} classes: a store holds up to {_LIMIT16:,}")
        labels = {class_: label for label, class_ in enumerate(classes)}

        records = np.empty(len(entries), RECORD)
        columns = (self._offsets, self._sizes, self._crcs, self._heights, self._widths)
        for field, column in zip(RECORD.names, columns, strict=False):
            records[field] = np.asarray(column)[order]
        records["label"] = [labels[key.split("\0")[1]] for key in keys]
        files = (key.partition("\0")[2].replace("\0", "/") for key in keys)
        names = b"".join(os.fsencode(f"{file}\n") for file in files)
        npy = io.BytesIO()
        np.save(npy, records)
        train = sum(key.startswith("train\0") for key in keys)
        store_json = _json(
            {
                "format": FORMAT,
                "version": VERSION,
                "classes": classes,
                "parts": {"train": [0, train], "val": [train, len(entries)]},
                "settings": self.settings,
                "reencoded": self.reencoded,
                "skipped": [list(pair) for pair in skipped],
                "sha256": {
                    "records": hashlib.sha256(npy.getbuffer()).hexdigest(),
                    "names": hashlib.sha256(names).hexdigest(),
                },
            }
        )
        first = _packing_json(self.settings)
        index = [(_FIRST, len(first), zlib_ng.crc32(first), 0)]
        places = {}
        for name, content in (
            ("records.npy", npy.getvalue()),
            ("names.txt", names),
            ("store.json", store_json),
        ):
            crc, start = zlib_ng.crc32(content), self._end
            header = _local_header(f"index/{name}", len(content), crc)
            self._write(header + content)
            index.append((f"index/{name}", len(content), crc, start))
            places[name.partition(".")[0]] = [start + len(header), len(content)]
        self._write_directory(entries, index, places, hashlib.sha256(store_json).hexdigest())
        os.fsync(self._file.fileno())

        digest = self._sha.hexdigest()
        # First the sum: a kill between the two leaves a store that is still to be finished.
        write_atomically(
            self.path.with_name(f"{self.path.name}.sha256"),
            digest.encode() + b"  " + os.fsencode(self.path.name) + b"\n",
        )
        os.replace(self.partial, self.path)
        folder = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
        self.close()
        return digest

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process writes {self.partial}: wait for its end, or name another store"
            ) from None

    def _note(self, entry: str, size: int, crc: int, extra: bytes) -> None:
        """Take a picture that has just been written, or read, into the lists."""
        _, _, height, width, reencoded = _EXTRA.unpack(extra)
        self._entries[entry] = len(self._entries)
        self._offsets.append(self._end - size)
        self._sizes.append(size)
        self._crcs.append(crc)
        self._heights.append(height)
        self._widths.append(width)
        self.reencoded += reencoded

    def _write(self, content: bytes) -> None:
        view = memoryview(content)
        try:
            while view:
                view = view[self._file.write(view) :]
        except OSError as error:
            raise UserError(
                f"cannot write {self.partial} ({error.strerror}): make room and give the same "
                "command again, which goes on from there"
            ) from None
        self._sha.update(content)
        self._end += len(content)

    def _continue(self) -> None:
        """Go to the end of what STORE.partial holds, or begin it."""
        beginning = _beginning(self.settings)
        size = os.fstat(self._file.fileno()).st_size
        with open(self.partial, "rb", buffering=1 << 20) as file:
            found = file.read(len(beginning))
            if found == beginning:
                log.info("checking the %s MB of %s", f"{size / 1e6:,.0f}", self.partial)
                self._sha.update(found)
                self._end = len(found)
                while (entry := _read_entry(file)) is not None:
                    header, name, extra, content, crc = entry
                    self._sha.update(header)
                    self._sha.update(content)
                    self._end += len(header) + len(content)
                    self._note(name, len(content), crc, extra)
                self._file.truncate(self._end)
                log.info("going on after %s pictures", f"{len(self):,}")
                return
            if not beginning.startswith(found):
                raise UserError(_other_beginning(self.partial, found + file.read(4096)))
        self._file.truncate(0)
        self._write(beginning)

    def _write_directory(
        self,
        entries: Sequence[str],
        index: list[tuple[str, int, int, int]],
        places: Mapping[str, list[int]],
        digest: str,
    ) -> None:
        """Write the ZIP's central directory, in the order of the file, and its end."""
        start = self._end
        chunks = [_central_header(*index[0])]
        held_bytes = 0
        columns = (self._sizes, self._crcs, self._offsets)
        for entry, size, crc, offset in zip(entries, *columns, strict=True):
            header_at = offset - _EXTRA.size - len(os.fsencode(entry)) - _LOCAL.size
            chunks.append(_central_header(entry, size, crc, header_at))
            held_bytes += len(chunks[-1])
            if held_bytes > 1 << 20:
                self._write(b"".join(chunks))
                chunks, held_bytes = [], 0
        chunks += [_central_header(*entry) for entry in index[1:]]
        self._write(b"".join(chunks))

        count, size = len(entries) + len(index), self._end - start
        end64 = b""
        if count >= _LIMIT16 or start >= _LIMIT32 or size >= _LIMIT32:
            made_by = 3 << 8 | _NEEDS
            end64 = _END64.pack(
                *(b"PK\6\6", _END64.size - 12, made_by, _NEEDS, 0, 0, count, count, size, start)
            ) + _LOCATOR64.pack(b"PK\6\7", 0, self._end, 1)
        fixed_bytes = self._end + len(end64) + _END.size
        total_bytes, comment = 0, b""
        while total_bytes != fixed_bytes + len(comment):  # it holds its own length
            total_bytes = fixed_bytes + len(comment)
            comment = _json(
                {
                    "format": FORMAT,
                    "version": VERSION,
                    "bytes": total_bytes,
                    **places,
                    "sha256": digest,
                }
            )
        count16 = min(count, _LIMIT16)
        end = _END.pack(
            *(b"PK\5\6", 0, 0, count16, count16, min(size, _LIMIT32), min(start, _LIMIT32)),
            len(comment),
        )
        self._write(end64 + end + comment)


def _packing_json(settings: Mapping[str, Any]) -> bytes:
    return _json({"format": FORMAT, "version": VERSION, "settings": dict(settings)}) + b"\n"


def _beginning(settings: Mapping[str, Any]) -> bytes:
    first = _packing_json(settings)
    return _local_header(_FIRST, len(first), zlib_ng.crc32(first)) + first


def _flags(name: bytes) -> int:
    """Bit 11 for a name in UTF-8; without it, tools take it for one of DOS."""
    try:
        return 0 if name.isascii() else _UTF8 * bool(name.decode())
    except UnicodeDecodeError:
        return 0


def _local_header(entry: str, size: int, crc: int, extra: bytes = b"") -> bytes:
    name = os.fsencode(entry)
    if len(name) > _LIMIT16:
        raise UserError(f"the name {entry[:80]}… is longer than a ZIP takes")
    fields = (_NEEDS, _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(extra))
    return _LOCAL.pack(b"PK\3\4", *fields) + name + extra


def _central_header(entry: str, size: int, crc: int, header_at: int) -> bytes:
    name = os.fsencode(entry)
    extra = struct.pack("<2HQ", 1, 8, header_at) if header_at >= _LIMIT32 else b""
    made_by, mode = 3 << 8 | _NEEDS, 0o100644 << 16  # of Unix: a file that all may read
    fields = (made_by, _NEEDS, _flags(name), 0, 0, _DATE, crc, size, size, len(name), len(extra))
    position = min(header_at, _LIMIT32)
    return _CENTRAL.pack(b"PK\1\2", *fields, 0, 0, 0, mode, position) + name + extra


def _read_entry(file: BinaryIO) -> tuple[bytes, str, bytes, bytes, int] | None:
    """The next picture of a partial store: header, name, extra field, bytes, CRC-32.

    None where no whole picture follows: at the end, at the index, and at a damaged picture.
    """
    fixed = file.read(_LOCAL.size)
    if len(fixed) < _LOCAL.size or not fixed.startswith(b"PK\3\4"):
        return None
    *_, crc, size, _, name_size, extra_size = _LOCAL.unpack(fixed)
    rest = file.read(name_size + extra_size)
    name, extra = os.fsdecode(rest[:name_size]), rest[name_size:]
    if not name.startswith(tuple(f"{part}/" for part in PARTS)) or name.count("/") != 2:
        return None
    if extra[:4] != struct.pack("<2H", _EXTRA_ID, _EXTRA.size - 4) or len(extra) != _EXTRA.size:
        return None
    header = fixed + rest
    if header != _local_header(name, size, crc, extra):
        return None
    content = file.read(size)
    if len(content) < size or zlib_ng.crc32(content) != crc:
        return None
    return header, name, extra, content, crc


def _other_beginning(partial: Path, head: bytes) -> str:
    """Why a partial store cannot be continued."""
    if not _begins_as_store(head[: _LOCAL.size + len(_FIRST)]):
        return f"{partial} is something else than a store being packed: remove it"
    try:
        size = _LOCAL.unpack_from(head)[7]
        packing = json.loads(head[_LOCAL.size + len(_FIRST) :][:size])
        if packing["version"] != VERSION:
            was = f"by a release that writes version {packing['version']}"
        else:
            was = "with " + ", ".join(
                f"{key} {value}" for key, value in packing["settings"].items()
            )
    except (ValueError, KeyError, TypeError, AttributeError):
        was = "and then damaged"
    return (
        f"{partial} was begun {was}: give the same settings again to go on, or remove it to begin "
        "anew"
    )
