"""From a Kaggle account to one packed file, for `prepare_data.py imagenet` and `imagenet-100k`.

    download   Kaggle's own CLI fetches the archive, and goes on with a half-finished one
    check      the names in it are counted, before a picture is read
    pack       packing.py makes DIR/NAME.store of it; nothing is unpacked

A step that is done is not done again. DIR needs room for the archive and the store alone.

The CLI writes an archive under its own name and keeps, beside a half-finished one, a file
NAME.kaggle-partial with the archive's ETag and size (kaggle 2.2.4 and later). With the same ETag it
asks for the rest only; it compares the length at the end, but no checksum. That every picture is
whole is checked by packing, which reads each against the CRC-32 in the zip and decodes it.
"""

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import packing
import tqdm
from verifying import IMAGENET, IMAGENET_VAL

import image_files
from interruption import note_signals
from store import PARTS, check_place, open_store
from utils import EXIT_INTERRUPTED, UserError, format_duration, log, on_terminal

CLI_VERSION = (2, 2, 4)  # the first that knows whether a half-finished file is of the same archive
BETTER_VERSION = (2, 2, 5)  # the first that keeps it when the server fails while it goes on
ARCHIVE_ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MARKER = ".kaggle-partial"
TOKEN_PAGE = "https://www.kaggle.com/settings/api"
POLL_S = 0.5
LOG_INTERVAL_S = 10.0
FULL_BYTES = 1 << 20  # as much as the CLI writes at once
# A picture of ImageNet, as it comes (147.9 GB of training pictures in ImageNet's own archive), and
# packed at the default of 400 px and quality 90 (benchmarks/data.json).
ORIGINAL_BYTES, PACKED_BYTES, PACKED_PX = 115_000, 36_000, 400


@dataclasses.dataclass(frozen=True)
class Archive:
    """What one call of Kaggle's CLI downloads."""

    kind: Literal["competitions", "datasets"]
    name: str  # as the CLI has it: a competition, or owner/data set
    about_bytes: int  # for the room on the disk, until Kaggle has told its size
    part: str = ""  # "train" or "val", where it is a folder a class of that part alone

    @property
    def slug(self) -> str:
        """Its file's name, without the ending."""
        return self.name.rpartition("/")[2]

    @property
    def is_competition(self) -> bool:
        """Whether there are rules to be accepted."""
        return self.kind == "competitions"

    @property
    def page(self) -> str:
        """Where a person reads about it; of a competition, where its rules are accepted."""
        return f"https://www.kaggle.com/{self.kind}/{self.name}{'/rules' * self.is_competition}"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set on Kaggle, and what it has to hold."""

    title: str
    store_name: str
    archives: tuple[Archive, ...]
    classes: int
    pictures: dict[str, int]  # in each part
    class_pictures: dict[str, int]  # in each class of a part, where all have as many
    is_exact: bool  # whether other counts are refused; else they are told


IMAGENET_1K = DataSet(
    title="ImageNet-1k",
    store_name="imagenet.store",
    archives=(Archive("competitions", "imagenet-object-localization-challenge", 167_000_000_000),),
    classes=1000,
    pictures=IMAGENET,
    class_pictures={"val": IMAGENET_VAL},
    is_exact=True,
)
# Private people's uploads, which may change: 100 training pictures of each class, drawn at random
# (kaggle.com/code/tusonggao/create-imagenet-train-subset-100k), and ImageNet's validation pictures.
IMAGENET_100K = DataSet(
    title="ImageNet-1k with 100 training pictures a class",
    store_name="imagenet-100k.store",
    archives=(
        Archive("datasets", "tusonggao/imagenet-train-subset-100k", 11_500_000_000, "train"),
        Archive("datasets", "chiragtagadiya/val-imagenet-1000", 6_800_000_000, "val"),
    ),
    classes=1000,
    pictures={"train": 100_000, "val": IMAGENET["val"]},
    class_pictures={"train": 100, "val": IMAGENET_VAL},
    is_exact=False,
)


def prepare(
    data_set: DataSet,
    folder: Path,
    step: Literal["all", "download", "check", "pack"],
    max_side: int,
    quality: int,
    workers: int,
    skip_bad_images: bool,
    remove_archive: bool,
) -> None:
    """Do the steps that are not done yet; raises UserError for whatever a person can mend.

    Args:
        data_set: which one
        folder: for the archives and the store
        step: one step alone, or all
        max_side: as packing.pack has it, like the three after it
        quality: of JPEGs that are made smaller
        workers: threads that decode and encode
        skip_bad_images: leave out pictures that cannot be read
        remove_archive: remove the archives once the store is there and has been read again
    """
    store_path = folder / data_set.store_name
    if not store_path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        note_signals(nothing_to_save=True)  # SIGTERM ends it as Ctrl-C does
        with _alone_in(folder):
            check_place(store_path, {"max_side": max_side, "quality": quality})
            if step in ("all", "download"):
                per_picture = PACKED_BYTES if 0 < max_side <= PACKED_PX else ORIGINAL_BYTES
                store_bytes = per_picture * sum(data_set.pictures.values()) * (step == "all")
                download(data_set, folder, store_bytes)
            if step == "download":
                return
            source, entries, members = check(data_set, folder)
            if step == "check":
                return
            try:
                packing.pack_pictures(
                    *(source, entries, members, store_path),
                    *(max_side, quality, workers, skip_bad_images),
                )
            except UserError as error:
                if packing.DAMAGED not in str(error):
                    raise
                paths = [str(find_archive(archive, folder)) for archive in data_set.archives]
                raise UserError(
                    f"{error}; or download what is damaged again: remove {' or '.join(paths)}, and "
                    "give the same command again"
                ) from None
    opened = open_store(store_path)
    packing.check_settings(opened, max_side, quality)
    left_out = collections.Counter(entry.partition("/")[0] for entry, *_ in opened.info["skipped"])
    counts = {part: end - first + left_out[part] for part, (first, end) in opened.parts.items()}
    is_whole = counts == data_set.pictures and len(opened.classes) == data_set.classes
    if data_set.is_exact and not is_whole:
        _complain(data_set, f"{store_path} has {_counts(counts, len(opened.classes))}")
    log.info("%s is finished: nothing more to do", store_path)
    if remove_archive:
        _remove_archives(data_set, folder, store_path)


# ------------------------------------------------------------------------------ download


def download(data_set: DataSet, folder: Path, store_bytes: int) -> None:
    """Have the CLI download the archives that are not whole yet.

    Raises UserError if it cannot: no CLI, no credentials, no room, no network, or Kaggle refuses.

    Args:
        data_set: which one
        folder: where to
        store_bytes: room that is to be left for what comes after
    """
    missing = []
    for archive in data_set.archives:
        path = find_archive(archive, folder)
        if path is None:
            missing.append(archive)
        else:
            log.info("%s is downloaded already", path)
    if not missing:
        return
    cli = _find_cli()
    credentials = _credentials()
    if not credentials and any(archive.is_competition for archive in missing):
        raise UserError(
            f"no Kaggle credentials: make a token at {TOKEN_PAGE} and save it as "
            "~/.kaggle/access_token, or in KAGGLE_API_TOKEN; or log in with `kaggle auth login`"
        )
    _check_room(data_set, missing, folder, store_bytes)
    for archive in missing:
        if archive.is_competition:
            log.info("its rules must be accepted once, by your account, at %s", archive.page)
        _fetch(archive, folder, cli, credentials)


def find_archive(archive: Archive, folder: Path) -> Path | None:
    """The archive, if it is whole; None if it is not there or half there.

    Raises UserError if it is there but is no archive, or is cut short and cannot be continued.
    """
    for ending in ARCHIVE_ENDINGS:
        path = folder / f"{archive.slug}{ending}"
        if not path.is_file() or _marker(path).exists():
            continue  # not there, or half of it
        with open(path, "rb") as file:
            is_zip = file.read(4) == b"PK\3\4"
        with contextlib.suppress(EOFError):  # a tar.gz that is nearly empty
            # A zip's directory is at its end.
            if zipfile.is_zipfile(path) if is_zip else tarfile.is_tarfile(path):
                return path
        raise UserError(
            f"{path} is broken or cut short: remove it, and the same command downloads it again"
        )
    return None


def _marker(path: Path) -> Path:
    return path.with_name(path.name + MARKER)


def _half_finished(archive: Archive, folder: Path) -> tuple[Path | None, int, int]:
    """A half-finished archive, its size so far and at the end; 0 for what is not known."""
    for ending in ARCHIVE_ENDINGS:
        path = folder / f"{archive.slug}{ending}"
        marker = _marker(path)
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return path, path.stat().st_size, int(json.loads(marker.read_text())["size"] or 0)
    return None, 0, 0


def _find_cli() -> str:
    """Path of Kaggle's CLI; raises UserError if there is none, or too old a one."""
    beside = Path(sys.executable).parent  # of an environment that is not activated
    cli = shutil.which("kaggle", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")
    if cli is None:
        raise UserError("the Kaggle CLI is missing: pip install kaggle")
    answer = subprocess.run([cli, "--version"], capture_output=True, text=True, env=_environment())
    numbers = re.search(r"(\d+)\.(\d+)\.(\d+)", answer.stdout)
    version = tuple(map(int, numbers.groups())) if numbers else (0,)
    if version < CLI_VERSION:
        raise UserError(
            f"{cli} is version {numbers[0] if numbers else 'unknown'}: going on with a "
            f"half-finished download takes {'.'.join(map(str, CLI_VERSION))}: pip install "
            "--upgrade kaggle"
        )
    if version < BETTER_VERSION:
        log.info(
            "Kaggle CLI %s may begin anew where Kaggle's server fails while it goes on with a "
            "download; %s does not: pip install --upgrade kaggle",
            *(numbers[0], ".".join(map(str, BETTER_VERSION))),
        )
    return cli


def _environment() -> dict[str, str]:
    """For the CLI: where VERBOSE is set, it prints credentials, and reads archives into memory."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("VERBOSE", "VERBOSE_OUTPUT")
    }


def _credentials() -> list[str]:
    """Where the CLI finds credentials, in its order; it takes the first that Kaggle accepts."""
    home = Path.home() / ".kaggle"
    xdg = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    config = os.environ.get("KAGGLE_CONFIG_DIR") or (home if home.exists() else xdg / "kaggle")
    found = [name for name in ("KAGGLE_API_V1_TOKEN", "KAGGLE_API_TOKEN") if os.environ.get(name)]
    tokens = (home / "access_token", home / "access_token.txt")
    found += [str(path) for path in tokens if path.exists()]
    if os.environ.get("KAGGLE_USERNAME") and os.environ.get("KAGGLE_KEY"):
        found.append("KAGGLE_USERNAME and KAGGLE_KEY")
    files = (Path(config) / "kaggle.json", home / "credentials.json")  # the latter: `auth login`
    return found + [str(path) for path in files if path.exists()]


def _check_room(
    data_set: DataSet, missing: Sequence[Archive], folder: Path, store_bytes: int
) -> None:
    """Refuse to begin what the disk has no room for."""
    archive_bytes = 0
    for archive in missing:
        _, done, total = _half_finished(archive, folder)
        archive_bytes += max(0, (total or archive.about_bytes) - done)
    partial = folder / f"{data_set.store_name}.partial"
    if partial.exists():
        store_bytes = max(0, store_bytes - partial.stat().st_size)
    free = shutil.disk_usage(folder).free
    if free < archive_bytes + store_bytes:
        raise UserError(
            f"{folder} has {_gb(free)} free, {data_set.title} needs about "
            f"{_gb(archive_bytes + store_bytes)} more: {_gb(archive_bytes)} to download, "
            f"{_gb(store_bytes)} for the store: make room, or name a folder on a larger disk"
        )


def _fetch(archive: Archive, folder: Path, cli: str, credentials: Sequence[str]) -> None:
    """Let the CLI download one archive; raises UserError with what to do if it does not."""
    path, done, total = _half_finished(archive, folder)
    if path is not None and path.suffix == ".zip" and done:
        with open(path, "rb") as file:
            is_spoilt = file.read(4) != b"PK\3\4"[:done]
        if is_spoilt:  # kaggle 2.2.4 may have written a server's error page over it
            log.info("%s does not begin as a zip does: it is downloaded anew", path)
            path.unlink()
            _marker(path).unlink()
            done = 0
    arguments = [archive.kind, "download", archive.name, "-p", str(folder), "-q"]
    log.info("$ %s", shlex.join(["kaggle", *arguments]))
    if done:
        log.info("%s of %s are here already", _gb(done), _gb(total) if total else "it")
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [cli, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(),
            preexec_fn=_die_with_parent,  # noqa: PLW1509 (no other thread has begun yet)
        )
        try:
            is_full = _follow(process, archive, folder)
        finally:
            process.kill()
            process.wait()
        output.seek(0)
        words = output.read().strip() or f"exit code {process.returncode}"
    _, done, _ = _half_finished(archive, folder)
    kept = f"; {_gb(done)} are kept, and the same command goes on from there" if done else ""
    if is_full or process.returncode:
        raise UserError(_explain(archive, folder, words, is_full, credentials) + kept)
    path = find_archive(archive, folder)
    if path is None:
        raise UserError(f"the Kaggle CLI ended before {archive.slug} was whole{kept}")
    log.info("%s: %s, whole", path, _gb(path.stat().st_size))


_LIBC = ctypes.CDLL(None)


def _die_with_parent() -> None:
    """Else a CLI whose parent was killed would go on, beside the one that the next start starts."""
    _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG of <linux/prctl.h>


def _follow(process: subprocess.Popen, archive: Archive, folder: Path) -> bool:
    """Show progress until the CLI ends, or the disk is full, which it would wait out for a minute.

    Returns whether the disk is full.
    """
    told_at, told_bytes = time.monotonic(), _half_finished(archive, folder)[1]
    hidden = not on_terminal()
    with tqdm.tqdm(
        desc="downloading", unit="B", unit_scale=True, disable=hidden, file=sys.stdout, leave=False
    ) as bar:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
                    return False
                _, done, total = _half_finished(archive, folder)
                bar.total, bar.n = total or None, done
                bar.refresh()
                if done < total and shutil.disk_usage(folder).free < FULL_BYTES:
                    return True
                now = time.monotonic()
                if now - told_at >= LOG_INTERVAL_S:
                    rate = (done - told_bytes) / (now - told_at)
                    left = format_duration((total - done) / rate) if rate > 0 < total else "?"
                    log.debug(
                        "downloading %s of %s  %.1f MB/s  ETA %s",
                        *(_gb(done), _gb(total) if total else "?", rate / 1e6, left),
                    )
                    told_at, told_bytes = now, done
        except KeyboardInterrupt:
            raise UserError(
                "interrupted: the same command goes on with the download", EXIT_INTERRUPTED
            ) from None


# What the CLI says: Kaggle's message or, without one, the code (kaggle 2.2, cli.py: main).
_SIGNS = {
    "full": r"No space left on device|Disk quota exceeded",
    "storage": r"storage\.googleapis\.com",
    "credentials": r"Authentication required|\b401 Client Error",
    "forbidden": r"accept this competition's rules|don't have access|was denied|\b403 Client Error",
    "missing": r"[Nn]ot found|\b404 Client Error",
    "network": r"Max retries exceeded|Connection ?(?:Error|aborted|broken|reset)|timed out",
}


def _explain(
    archive: Archive, folder: Path, words: str, is_full: bool, credentials: Sequence[str]
) -> str:
    """Why the CLI failed and what to do, in a line."""
    # The first line says it, but of a traceback the last, and the system's own words say it best.
    # An address may carry a signature that lets anybody download.
    # Warnings, of a newer release or of a readable key, come before it or behind it.
    lines = [line for line in words.splitlines() if not line.startswith("Warning:")] or [words]
    line = lines[-1 if "Traceback (most" in words else 0]
    system = re.search(r"\[Errno -?\d+\] ([^'\")]+)", line)
    detail = system[1] if system else re.sub(r"\?[^\s'\")]*", "?…", line)[:300]
    again = "give the same command again"
    gone = (
        f"Kaggle has no {archive.name} for this account ({detail}): look at {archive.page}, "
        "whether it is still there"
    )
    advice = {
        "full": f"{folder}: No space left on device: make room, and {again}",
        "storage": f"the download of {archive.slug} broke off ({detail}): {again}",
        "credentials": (
            f"Kaggle does not accept the credentials in {', '.join(credentials) or 'no place'}: "
            f"make a new token at {TOKEN_PAGE} and save it as ~/.kaggle/access_token, or in "
            "KAGGLE_API_TOKEN"
        ),
        "forbidden": (
            f"Kaggle does not let this account download {archive.slug} yet: accept the rules at "
            f"{archive.page}, where Kaggle may ask for a telephone number, and {again}"
            if archive.is_competition
            else gone
        ),
        "missing": gone,
        "network": f"Kaggle cannot be reached ({detail}): mend the network, and {again}",
        "": f"the Kaggle CLI failed ({detail}): {again}",
    }
    sign = next((name for name, pattern in _SIGNS.items() if re.search(pattern, words)), "")
    return advice["full" if is_full else sign]


# ------------------------------------------------------------------------------ check


class ClassFolders:
    """Archives of class folders under whatever folders, each as one part of a data set."""

    def __init__(self, sources: dict[str, packing.Source]) -> None:
        self.sources = list(sources.values())
        self.path = self.sources[0].path.parent
        self.names: list[str] = []
        for part, source in sources.items():
            self.names += [_class_and_file(name, part, source) for name in source.names]

    def contents(self, members: Sequence[int]) -> Iterator[packing.Read]:
        """For each of `members`, ascending positions in `names`, what reads it."""
        first = 0
        for source in self.sources:
            end = first + len(source.names)
            yield from source.contents([at - first for at in members if first <= at < end])
            first = end


def _class_and_file(name: str, part: str, source: packing.Source) -> str:
    """Of a picture "…/class/name": "part/class/name"; nothing of anything else."""
    *inside, file = name.split("/")
    is_hidden = any(step.startswith(".") or step == "__MACOSX" for step in (*inside, file))
    if is_hidden or not name.lower().endswith(image_files.IMAGE_ENDINGS):
        return ""
    if not inside:
        raise UserError(
            f"{name} in {source.path} lies in no folder of a class: Kaggle's data set has changed; "
            "bring its pictures into train/<class>/ and val/<class>/ and pack that folder with "
            "`python3 scripts/prepare_data.py pack`"
        )
    return f"{part}/{inside[-1]}/{file}"


def check(
    data_set: DataSet, folder: Path
) -> tuple[packing.Source | ClassFolders, list[str], list[int]]:
    """Count the names in the archives; returns them as packing.pack_pictures takes them.

    Raises UserError if an archive is missing or broken, or if it holds other counts than it should
    and those are known for sure.
    """
    sources = {}
    for archive in data_set.archives:
        path = find_archive(archive, folder)
        if path is None:
            half = " whole" if _half_finished(archive, folder)[0] else ""
            raise UserError(
                f"{archive.slug} is not{half} in {folder} yet: download it with the same command "
                "and --step download"
            )
        log.info("reading the names in %s", path)
        try:
            sources[archive.part] = packing.open_source(path)
        except UserError as error:
            raise UserError(
                f"{error}; once {path} is removed, the same command with --step download does that"
            ) from None
    source = sources[""] if "" in sources else ClassFolders(sources)
    entries, members = packing.list_pictures(source, None)
    found = collections.Counter(entry.rpartition("/")[0] for entry in entries)
    counts = {part: sum(found[name] for name in found if name.startswith(part)) for part in PARTS}
    classes = len({name.partition("/")[2] for name in found})
    summary = f"{source.path} has {_counts(counts, classes)}"
    wanted = _pictures_a_class(data_set, source, found)
    unlike = [
        f"{name} {found[name]:,} instead of {number:,}"
        for name, number in sorted(wanted.items())
        if found[name] != number
    ]
    if counts != data_set.pictures or classes != data_set.classes or unlike:
        _complain(data_set, summary, unlike)
    else:
        log.info("%s, as it should", summary)
    return source, entries, members


def _pictures_a_class(
    data_set: DataSet, source: packing.Source | ClassFolders, found: Iterable[str]
) -> dict[str, int]:
    """How many pictures each "part/class" has to hold, as far as that is known."""
    wanted = collections.Counter(
        {
            name: data_set.class_pictures[part]
            for name in found
            if (part := name.partition("/")[0]) in data_set.class_pictures
        }
    )
    # Kaggle's archive of ImageNet lists its training pictures: "n01440764/n01440764_10026 1".
    lists = [at for at, name in enumerate(source.names) if name.endswith("CLS-LOC/train_cls.txt")]
    for read in source.contents(lists[:1]):
        try:
            lines = read().decode().splitlines()
        except ValueError as error:
            raise UserError(
                f"{source.names[lists[0]]} in {source.path} is {error}: remove the archive, and "
                "the same command downloads it again"
            ) from None
        wanted.update(f"train/{line.partition('/')[0]}" for line in lines)
    return wanted


def _counts(counts: dict[str, int], classes: int) -> str:
    return (
        f"{counts['train']:,} training and {counts['val']:,} validation pictures in {classes:,} "
        "classes"
    )


def _complain(data_set: DataSet, summary: str, unlike: Sequence[str] = ()) -> None:
    """Refuse other counts than those of the data set, or tell them where they may have changed."""
    text = f"{summary}, but {data_set.title} has {_counts(data_set.pictures, data_set.classes)}"
    if unlike:
        text += f" ({packing.some(unlike)})"
    if data_set.is_exact:
        raise UserError(
            f"{text}: remove it, and the same command gets it anew; to pack it as it is, use "
            "`python3 scripts/prepare_data.py pack`"
        )
    log.info("%s: who keeps it on Kaggle may have changed it; going on with what is there", text)


# ------------------------------------------------------------------------------ afterwards


def _remove_archives(data_set: DataSet, folder: Path, store_path: Path) -> None:
    """Remove the archives if the store is, byte for byte, what was written."""
    paths = [path for archive in data_set.archives if (path := find_archive(archive, folder))]
    if not paths:
        return
    log.info("comparing %s with its SHA-256 before the archive is removed", store_path)
    sums = store_path.with_name(f"{store_path.name}.sha256")
    expected = sums.read_text().split() if sums.exists() else []
    if not expected:
        raise UserError(
            f"{sums}, which the store is compared with, is missing or empty, so nothing was "
            "removed: bring it back, or remove the archive yourself"
        )
    with open(store_path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected[0]:
        raise UserError(
            f"{store_path} is not what {sums} says, so nothing was removed: remove the store, and "
            "the same command packs it again"
        )
    for path in paths:
        size = path.stat().st_size
        path.unlink()
        log.info("removed %s, %s", path, _gb(size))


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Refuse to work beside another process that fills the same folder."""
    with open(folder / ".kaggle.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another process prepares {folder}: wait for it, or end it first"
            ) from None
        yield


def _gb(size_bytes: float) -> str:
    return f"{size_bytes / 1e9:,.1f} GB"
