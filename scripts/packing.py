"""Packing a data set into a store: what `python3 scripts/prepare_data.py pack SOURCE STORE` does.

SOURCE is a folder, a zip or a tar with pictures in train/<class>/<name> and val/<class>/<name>,
under whatever folder, or in Kaggle's layout of ImageNet, in which val/ has no class folders and
LOC_val_solution.csv says what a picture shows. All names are looked at before the first picture, so
that what is wrong with the labels is told at once: a tar is read once for its names, and again for
its pictures. Archives are read where they lie; nothing is unpacked to the disk.
"""

import collections
import contextlib
import csv
import functools
import io
import itertools
import lzma
import os
import shlex
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import tqdm
from zlib_ng import zlib_ng

import image_files
import tiled_jpeg
from interruption import note_signals
from store import PARTS, Store, StoreWriter, check_place, open_store
from utils import EXIT_FAILED, EXIT_INTERRUPTED, UserError, format_duration, log, on_terminal

LABELS_FILE = "LOC_val_solution.csv"
LOG_INTERVAL_S = 10.0
CHECKED_AGAIN = 16  # pictures of a partial store, or up to twice as many
DAMAGED = "damaged in the archive"
BROKEN = (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError)

Read = Callable[[], bytes]  # called by a worker; raises ValueError or OSError
Prepared = tuple[bytes, int, int, bool]  # encoded picture, height, width, whether it is new

# ------------------------------------------------------------------------------ sources


class FolderSource:
    """The files under a folder, sorted; links are followed, but not to folders that they lie in."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []  # "a/b/c.jpg"; those of folders end in "/"
        on_the_way = {os.fspath(path): {_identity(path)}}  # of folders that are still to be walked
        for folder, folders, files in os.walk(path, onerror=_raise, followlinks=True):
            above = on_the_way.pop(folder)
            for name in sorted(folders):
                inner = os.path.join(folder, name)
                if (identity := _identity(inner)) in above:
                    log.info("left aside: %s, a link to a folder that it lies in", inner)
                    folders.remove(name)
                else:
                    on_the_way[inner] = above | {identity}
            folders.sort()
            inside = os.path.relpath(folder, path)
            self.names.append(f"{inside}/")
            self.names += [f"{inside}/{file}" for file in sorted(files)]

    def contents(self, members: Sequence[int]) -> Iterator[Read]:
        """For each of `members`, positions in `names`, what reads it."""
        for member in members:
            yield functools.partial(_read_file, os.path.join(self.path, self.names[member]))


class ZipSource:
    """The members of a zip, in the order of its directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with broken_as_user_error(path):
            self.archive = zipfile.ZipFile(path)
        self.infos = self.archive.infolist()
        self.names = [info.filename for info in self.infos]

    def contents(self, members: Sequence[int]) -> Iterator[Read]:
        """For each of `members`, positions in `names`, what reads it."""

        def read(info: zipfile.ZipInfo) -> bytes:
            try:
                return self.archive.read(info)
            except (*BROKEN, NotImplementedError) as error:
                raise ValueError(f"{DAMAGED}: {error}") from None

        for member in members:
            if self.infos[member].flag_bits & 1:
                raise UserError(
                    f"{self.path} is encrypted ({self.names[member]}): decrypt it first, for "
                    "example by unpacking it"
                )
            yield lambda info=self.infos[member]: read(info)


class TarSource:
    """The members of a tar, compressed or not, in its order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        log.info("reading the names in %s", path)
        self.names = [f"{member.name}{'/' * member.isdir()}" for _, member in self._members()]

    def contents(self, members: Sequence[int]) -> Iterator[Read]:
        """For each of `members`, ascending positions in `names`, what hands it over."""
        wanted = iter(members)
        number = next(wanted, None)
        if number is None:
            return
        for at, (archive, member) in enumerate(self._members()):
            if at < number:
                continue
            if not member.isreg():
                yield lambda: _refuse("no file of its own, but a link in the archive")
            else:
                with broken_as_user_error(self.path):
                    content = archive.extractfile(member).read()
                yield lambda content=content: content
            number = next(wanted, None)
            if number is None:
                return

    def _members(self) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
        with broken_as_user_error(self.path), tarfile.open(self.path) as archive:
            while (member := archive.next()) is not None:
                yield archive, member
                archive.members = []  # else it would keep a kilobyte for each of them
            # A tar ends in blocks of zeros; tarfile takes a header cut or damaged for its end too.
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it ends without the mark of its end")
            while archive.fileobj.read(1 << 20):  # gzip's checksum is at its very end
                pass


Source = FolderSource | ZipSource | TarSource


@contextlib.contextmanager
def broken_as_user_error(path: Path) -> Iterator[None]:
    """Turn what an archive module raises for a broken file into one line that names the file."""
    try:
        yield
    except (*BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; gzip's have no number
        raise UserError(
            f"{path} is broken or cut short ({error}): copy or download it again"
        ) from None


def open_source(path: Path) -> Source:
    """List what a folder, a zip or a tar holds; raises UserError if it is none or is broken."""
    if path.is_dir():
        return FolderSource(path)
    if not path.is_file():
        raise UserError(f"no folder, zip or tar {path}: name the one that holds the pictures")
    with open(path, "rb") as file:
        if file.read(4) == b"PK\3\4":
            return ZipSource(path)
    with broken_as_user_error(path):
        if tarfile.is_tarfile(path):
            return TarSource(path)
    raise UserError(f"{path} is no zip or tar, or its beginning is lost: name another, or a folder")


def _identity(folder: str | Path) -> tuple[int, int]:
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def _raise(error: OSError) -> None:
    raise error


def _read_file(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def _refuse(reason: str) -> bytes:
    raise ValueError(reason)


# ------------------------------------------------------------------------------ names and labels


def list_pictures(source: Source, val_labels: Path | None) -> tuple[list[str], list[int]]:
    """The pictures of a source, in its order, and where they stand in `source.names`.

    Raises UserError for every way in which a picture would be without a label or with a wrong one.

    Args:
        source: where the pictures are
        val_labels: file like LOC_val_solution.csv; None looks for it in the source and beside it

    Returns their names as "train/class/name" or "val/class/name", and their members.
    """
    entries: list[str] = []
    members: list[int] = []
    flat: dict[str, list[int]] = {part: [] for part in PARTS}
    elsewhere: list[int] = []
    unknown: dict[str, list[int]] = {}  # by root: in a class, and no picture by its ending
    roots: dict[str, str] = {}  # folder that holds train/ and val/, and a name in it
    folders: set[tuple[str, str, str]] = set()  # root, part and class, whatever is in them
    for member, name in enumerate(source.names):
        place = _place(name)
        if place is None:
            continue
        root, part, class_ = place
        if class_:
            folders.add(place)
        if not name.lower().endswith(image_files.IMAGE_ENDINGS):
            if class_ and not name.endswith("/"):
                unknown.setdefault(root, []).append(member)
            continue
        if class_:
            entries.append(f"{part}/{class_}/{name.rpartition('/')[2]}")
            members.append(member)
        elif part:
            flat[part].append(member)
        else:
            elsewhere.append(member)
            continue
        roots.setdefault(root, name)
        if "\n" in name:
            raise UserError(f"{name!r} in {source.path} has a line break in its name: rename it")
    _check_layout(source, roots, entries, flat)
    (root,) = roots
    _tell_left_aside(source, elsewhere, "pictures outside train/<class>/ and val/<class>/")
    kinds = " ".join(image_files.IMAGE_ENDINGS)
    _tell_left_aside(source, unknown.get(root, []), f"files in classes that end in none of {kinds}")
    if flat["val"]:
        entries += _label(source, flat["val"], val_labels)
        members += flat["val"]
        order = sorted(range(len(members)), key=members.__getitem__)
        entries, members = [entries[at] for at in order], [members[at] for at in order]
    _check_classes(source, entries, {(part, class_) for at, part, class_ in folders if at == root})
    first: dict[str, int] = {}
    for entry, member in zip(entries, members, strict=True):
        if first.setdefault(entry, member) != member:
            raise UserError(
                f"{source.names[first[entry]]} and {source.names[member]} in {source.path} are "
                f"both {entry}: rename or remove one"
            )
    return entries, members


def _tell_left_aside(source: Source, members: Sequence[int], what: str) -> None:
    if members:
        first = source.names[members[0]]
        log.info("left aside: %s %s, the first %s", f"{len(members):,}", what, first)


def _place(name: str) -> tuple[str, str, str] | None:
    """What a path says of a picture, or of a folder if it ends in "/": root, part, class.

    No class directly under train/ or val/, and no part elsewhere; None for what is of no use:
    hidden files, and the pictures of test/, which have no labels.
    """
    *inside, file = name.split("/")
    inside = [step for step in inside if step not in ("", ".")]
    if any(step.startswith(".") or step == "__MACOSX" for step in (*inside, file)):
        return None
    *above, part, class_ = ["", "", *inside]
    if part not in PARTS:
        above, part, class_ = [*above, part], class_, ""
    if "test" in (*above, part if part not in PARTS else ""):
        return None
    return "/".join(filter(None, above)), part if part in PARTS else "", class_


def _label(source: Source, members: Sequence[int], val_labels: Path | None) -> list[str]:
    """Names of validation pictures that lie in no class folders: "val/class/name"."""
    labels = read_labels(source, val_labels)
    names = [source.names[member].rpartition("/")[2] for member in members]
    unknown = [name for name in names if Path(name).stem not in labels]
    if unknown:
        raise UserError(
            f"{len(unknown):,} of {len(names):,} pictures of val are not in {LABELS_FILE}, the "
            f"first {unknown[0]}: name the file that knows them with --val-labels"
        )
    return [f"val/{labels[Path(name).stem]}/{name}" for name in names]


def _check_layout(
    source: Source, roots: dict[str, str], entries: list[str], flat: dict[str, list[int]]
) -> None:
    """Refuse pictures that do not lie in one train/ and one val/, each of one kind."""
    wanted = "train/<class>/<name> and val/<class>/<name>"
    if not roots:
        raise UserError(f"{source.path} has no pictures in {wanted}: name what holds both")
    if len(roots) > 1:
        one, other = list(roots.values())[:2]
        raise UserError(
            f"{source.path} holds several data sets ({one} and {other}): name the folder of one of "
            "them"
        )
    if flat["train"]:
        raise UserError(
            f"{len(flat['train']):,} pictures lie directly under train/, the first "
            f"{source.names[flat['train'][0]]}: put each into the folder of its class"
        )
    in_classes = {part: sum(entry.startswith(f"{part}/") for entry in entries) for part in PARTS}
    if flat["val"] and in_classes["val"]:
        raise UserError(
            f"{len(flat['val']):,} pictures lie directly under val/, the first "
            f"{source.names[flat['val'][0]]}, and {in_classes['val']:,} in class folders: put all "
            "of them into class folders, or none"
        )
    for part in PARTS:
        if not in_classes[part] + len(flat[part]):
            raise UserError(f"{source.path} has no pictures under {part}/: it needs {wanted}")


def _check_classes(source: Source, entries: list[str], folders: set[tuple[str, str]]) -> None:
    """Refuse empty classes, and classes of one part that the other lacks."""
    classes: dict[str, set[str]] = {part: set() for part in PARTS}
    for entry in entries:
        part, class_, _ = entry.split("/")
        classes[part].add(class_)
    empty = sorted((part, class_) for part, class_ in folders if class_ not in classes[part])
    if empty:
        names = some([f"{part}/{class_}" for part, class_ in empty])
        raise UserError(f"{names} in {source.path} hold no picture: fill or remove them")
    complaints = [
        f"{some(sorted(classes[has] - classes[lacks]))} missing under {lacks}/"
        for has, lacks in (PARTS, PARTS[::-1])
        if classes[has] - classes[lacks]
    ]
    if complaints:
        raise UserError(
            f"{source.path} has {len(classes['train']):,} classes under train/ and "
            f"{len(classes['val']):,} under val/: {'; '.join(complaints)}"
        )


def some(names: Sequence[str]) -> str:
    """The first five of some names, and how many there are."""
    return ", ".join(names[:5]) + (f", … ({len(names):,} in all)" if len(names) > 5 else "")


def read_labels(source: Source, path: Path | None) -> dict[str, str]:
    """Class of each validation picture by its name without ending, from Kaggle's CSV.

    Raises UserError if there is no such file, or it has not the columns ImageId, PredictionString.
    """
    if path is None:
        inside = [
            member
            for member, name in enumerate(source.names)
            if name.rpartition("/")[2] == LABELS_FILE and "__MACOSX" not in name
        ]
        beside = source.path.resolve().parent / LABELS_FILE
        if inside:
            place = f"{source.names[inside[0]]} in {source.path}"
            try:
                content = next(source.contents(inside[:1]))()
            except ValueError as error:
                raise UserError(f"{place} is {error}: copy or download it again") from None
        elif beside.is_file():
            place, content = str(beside), beside.read_bytes()
        else:
            raise UserError(
                f"the pictures under val/ in {source.path} have no class folders, and no "
                f"{LABELS_FILE} is in it or beside it: name it with --val-labels"
            )
    elif path.is_file():
        place, content = str(path), path.read_bytes()
    else:
        raise UserError(f"no file {path}: name a {LABELS_FILE} with --val-labels")
    try:
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"))))
        pairs = [(row["ImageId"], row["PredictionString"].split()[0]) for row in rows]
    except (ValueError, KeyError, IndexError, AttributeError, csv.Error):
        pairs = []
    labels = dict(pairs)
    for name, class_ in pairs:
        if labels[name] != class_:
            raise UserError(
                f"{place} says of {name} that it is {class_} and that it is {labels[name]}: "
                "download it again"
            )
    # A class becomes a folder's name.
    if not labels or any("/" in class_ or class_.startswith(".") for class_ in labels.values()):
        raise UserError(
            f"{place} is not like Kaggle's {LABELS_FILE}: it needs the columns ImageId and "
            "PredictionString, the latter beginning with the class"
        )
    return labels


# ------------------------------------------------------------------------------ one picture


def prepare(read: Read, max_side: int, quality: int) -> Prepared:
    """A picture as the store holds it; raises ValueError or OSError if it cannot be decoded.

    Where its larger side is at most max_side, its bytes are kept, whatever the format. Else it
    becomes a JPEG of that size: decoded at the smallest DCT scale that is at least as large, then
    averaged down.

    Args:
        read: what returns the bytes
        max_side: larger side in pixels; 0 keeps every picture as it is
        quality: of the JPEG, 1 to 100

    Returns the bytes, height and width (0 for what is no plain JPEG), and whether they are new.
    """
    content = read()
    size = image_files.plain_jpeg_size(content)
    shrinks = size is not None and 0 < max_side < max(size)
    target = _shrunk(size, max_side) if shrinks else (0, 0)
    picture = image_files.decode(content, *target)  # the check, also of what is kept
    if not shrinks:
        if not 0 < max_side < max(picture.shape[:2]):
            height, width = size if size is not None and max(size) <= 0xFFFF else (0, 0)
            return content, height, width, False
        target = _shrunk(picture.shape[:2], max_side)
    height, width = target
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return tiled_jpeg.encode(resized, quality), height, width, True


def _shrunk(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """(height, width) whose larger one is max_side."""
    height, width = (max(1, round(side * max_side / max(size))) for side in size)
    return height, width


# ------------------------------------------------------------------------------ all of them


class Progress:
    """Says how work is going: a bar on a terminal, else a line in the log every ten seconds."""

    def __init__(self, doing: str, total: int, done: int = 0) -> None:
        self.doing, self.total, self.done, self.done_before = doing, total, done, done
        self.bytes = 0
        self.started = self.told_at = time.monotonic()
        hidden = not on_terminal()
        self.bar = tqdm.tqdm(
            total=total, initial=done, desc=doing, disable=hidden, file=sys.stdout, leave=False
        )

    def tell(self, size_bytes: int) -> None:
        """Count a picture, and write a line if one is due."""
        self.done += 1
        self.bytes += size_bytes
        self.bar.update()
        now = time.monotonic()
        if now - self.told_at < LOG_INTERVAL_S:
            return
        self.told_at = now
        rate = (self.done - self.done_before) / (now - self.started)
        log.debug(
            "%s %s/%s  %.0f pictures/s  %.1f MB/s  ETA %s",
            *(self.doing, f"{self.done:,}", f"{self.total:,}", rate),
            self.bytes / 1e6 / (now - self.started),
            format_duration((self.total - self.done) / rate),
        )


def add_pictures(
    writer: StoreWriter,
    source: Source,
    entries: Sequence[str],
    members: Sequence[int],
    workers: int,
) -> list[tuple[str, str]]:
    """Pack the pictures that the store does not hold yet, in the order of the source.

    Threads decode and encode; this one writes. A few dozen pictures are in memory, more where there
    are more threads.
    Raises UserError if it is interrupted; what is written stays.

    Returns the name and the reason of each that cannot be read.
    """
    kept = [at for at, entry in enumerate(entries) if entry in writer]
    again = set(kept[:: max(1, len(kept) // CHECKED_AGAIN)])
    todo = [at for at, entry in enumerate(entries) if entry not in writer or at in again]
    requests = note_signals()
    progress = Progress("packing", len(entries), len(entries) - len(todo))
    bad: list[tuple[str, str]] = []
    underway: collections.deque = collections.deque()
    settings = writer.settings["max_side"], writer.settings["quality"]

    def prepare_few(few: list[tuple[str, Read]]) -> list[tuple[str, Prepared | Exception]]:
        results: list[tuple[str, Prepared | Exception]] = []
        for entry, read in few:
            image_files.take_complaint()  # of one before, that was refused in the end
            try:
                results.append((entry, prepare(read, *settings)))
                if complaint := image_files.take_complaint():
                    log.info("perhaps damaged, but packed: %s (%s)", entry, complaint)
            except (ValueError, OSError, MemoryError, cv2.error) as error:
                results.append((entry, error))
        return results

    def write_oldest() -> None:
        for entry, result in underway.popleft().result():
            if fault := image_files.system_fault(entry, result):
                raise UserError(f"{fault}, which goes on from {writer.partial}", EXIT_FAILED)
            if entry in writer:
                if isinstance(result, Exception) or zlib_ng.crc32(result[0]) != writer.crc(entry):
                    raise UserError(
                        f"{writer.partial} holds another {entry} than {source.path}: pack from the "
                        "same source again to go on, or remove it to begin anew"
                    )
                progress.tell(len(result[0]))
            elif isinstance(result, Exception):
                # Without the path, which another machine has not.
                reason = getattr(result, "strerror", None) or " ".join(str(result).split())
                bad.append((entry, reason))
                progress.tell(0)
            else:
                writer.add(entry, *result)
                progress.tell(len(result[0]))

    pool = ThreadPoolExecutor(workers, "pack")
    try:
        reads = source.contents([members[at] for at in todo])
        pairs = zip((entries[at] for at in todo), reads, strict=True)
        # A few pictures a task, since handing over has a price of its own.
        while not requests.stop and (few := list(itertools.islice(pairs, 4))):
            underway.append(pool.submit(prepare_few, few))
            if len(underway) > 4 + 2 * workers:
                write_oldest()
        while underway and not requests.stop:
            write_oldest()
    finally:
        pool.shutdown(cancel_futures=True)
        progress.bar.close()
    if requests.stop:
        raise UserError(
            f"interrupted after {len(writer):,} of {len(entries):,} pictures: the same command "
            f"goes on from {writer.partial}",
            EXIT_INTERRUPTED,
        )
    return bad


def pack(
    source_path: Path,
    store_path: Path,
    max_side: int,
    quality: int,
    workers: int,
    val_labels: Path | None,
    skip_bad_images: bool,
) -> None:
    """Pack a source into a store, going on with a partial one; a finished one is left as it is.

    Raises UserError for whatever a person can mend.
    """
    if store_path.is_dir():
        raise UserError(f"STORE {store_path} is a folder: name a file")
    if store_path.exists():
        settings = check_settings(open_store(store_path), max_side, quality)
        log.info(
            "%s is finished already (%s), and was not compared with %s: to pack that anew, remove "
            "it or name another", store_path, settings, source_path,
        )  # fmt: skip
        return
    check_place(store_path, {"max_side": max_side, "quality": quality})
    source = open_source(source_path)
    entries, members = list_pictures(source, val_labels)
    pack_pictures(source, entries, members, store_path, max_side, quality, workers, skip_bad_images)


def check_settings(store: Store, max_side: int, quality: int) -> str:
    """The settings that a finished store was packed with; raises UserError if they are others."""
    settings = ", ".join(f"{key} {value}" for key, value in store.info["settings"].items())
    if store.info["settings"] != {"max_side": max_side, "quality": quality}:
        raise UserError(
            f"{store.path} is finished already, with other settings ({settings}): give these, name "
            "another place for the new one, or remove it to pack it anew"
        )
    return settings


def pack_pictures(
    source: Source,
    entries: Sequence[str],
    members: Sequence[int],
    store_path: Path,
    max_side: int,
    quality: int,
    workers: int,
    skip_bad_images: bool,
) -> None:
    """Pack what list_pictures found in a source, going on with a partial store.

    Raises UserError for whatever a person can mend.
    """
    started = time.monotonic()
    with StoreWriter(store_path, {"max_side": max_side, "quality": quality}) as writer:
        strangers = set(writer.entries) - set(entries)
        if strangers:
            raise UserError(
                f"{writer.partial} holds {len(strangers):,} pictures that {source.path} has not, "
                f"such as {min(strangers)}: pack from the same source again to go on, or remove "
                "it to begin anew"
            )
        bad = add_pictures(writer, source, entries, members, workers)
        for entry, reason in bad:
            log.info("cannot be read: %s (%s)", entry, reason)
        if bad and not skip_bad_images:
            raise UserError(
                f"{len(bad):,} of {len(entries):,} pictures cannot be read, listed above, the "
                f"first {bad[0][0]} ({bad[0][1]}): mend them or leave them out with "
                f"--skip-bad-images; the same command goes on from {writer.partial}, and does not "
                "read again what that has: to mend a picture in there too, remove it"
            )
        _check_emptied(entries, bad)
        digest = writer.finish(bad)
    report(open_store(store_path))
    log.info("SHA-256 %s, also in %s.sha256", digest, store_path)
    log.info("packed in %s", format_duration(time.monotonic() - started))
    log.info(
        "train on it: python3 trainer.py --train-folder-name %s --val-folder-name %s",
        *[shlex.quote(str(store_path))] * 2,
    )


def _check_emptied(entries: Sequence[str], bad: Sequence[tuple[str, str]]) -> None:
    """Refuse to leave out all pictures of a class in a part."""
    left_out = {entry for entry, _ in bad}
    before, after = (
        {entry.rpartition("/")[0] for entry in kept}
        for kept in (entries, itertools.filterfalse(left_out.__contains__, entries))
    )
    if before != after:
        raise UserError(
            f"no picture in {some(sorted(before - after))} can be read: mend some, or remove the "
            "class from train/ and val/"
        )


def report(store: Store) -> None:
    """Print what a store holds: pictures a class, in all, bytes, and how many are new."""
    counts = {
        part: np.bincount(store.records["label"][first:end], minlength=len(store.classes))
        for part, (first, end) in store.parts.items()
    }
    rows = [*zip(store.classes, counts["train"].tolist(), counts["val"].tolist(), strict=True)]
    rows.append(("all", sum(counts["train"].tolist()), sum(counts["val"].tolist())))
    width = max(len(class_) for class_, _, _ in [*rows, ("class", 0, 0)])
    print(f"{'class':<{width}}  {'train':>10}  {'val':>10}")
    for class_, train, val in rows:
        print(f"{class_:<{width}}  {train:>10,}  {val:>10,}")
    log.info(
        "%s: %s pictures in %s classes, %s bytes, %s re-encoded, %s left out",
        store.path,
        *(f"{number:,}" for number in (len(store.records), len(store.classes))),
        *(f"{number:,}" for number in (len(store.mapping), store.info["reencoded"])),
        f"{len(store.info['skipped']):,}",
    )
