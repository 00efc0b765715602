"""The state of a run, kept so that no kill, full disk or flipped bit can lose it.

A checkpoint is a file `checkpoints/epochs-003-step-00008580-0f3a….pt`: the epochs that it has
finished, the steps that it has taken, and the beginning of its SHA-256, as torch.hub names its
weights, so that content and hash reach the disk in one rename. It is written beside its place,
flushed and renamed, and only then are older ones removed. Loading checks the hash first and falls
back to the generation before.
"""

import contextlib
import errno
import fcntl
import hashlib
import io
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from utils import (
    EXIT_FAILED,
    RESULT_SETTINGS,
    Config,
    UserError,
    changed_settings,
    check_writable,
    log,
    write_atomically,
    write_metrics,
)

GENERATIONS_KEPT = 2
HASH_DIGITS = 16
_NAME = re.compile(rf"epochs-(\d{{3,}})-step-(\d{{8,}})-([0-9a-f]{{{HASH_DIGITS}}})\.pt")


def encode(state: Any) -> bytes:
    """A value as the bytes that torch.load reads; tensors of any device."""
    buffer = io.BytesIO()
    torch.save(_on_cpu(state), buffer)  # a file with tensors of a GPU opens only where there is one
    return buffer.getvalue()


def save(folder: Path, state: dict[str, Any]) -> Path:
    """Write a checkpoint durably and remove all but the newest ones; raises OSError.

    The state holds "step" and "history", the rows of the finished epochs, beside what else it may.
    Weights that are not numbers are no state to go on from: they raise UserError.
    """
    # By NumPy, in this thread alone: once PyTorch has computed in parallel beside the thread that
    # trains, OpenMP has all threads sleep between operations, and a CPU trains slower from then on.
    weights = state.get("model", {}).values()
    if not all(np.isfinite(weight.cpu().numpy()).all() for weight in weights):
        raise UserError(
            f"after step {state['step']} there are weights that are not numbers: nothing is saved, "
            "the last checkpoint is kept; begin again with a lower --max-lr, under another --name",
            EXIT_FAILED,
        )
    content = encode(state)
    digest = hashlib.sha256(content).hexdigest()[:HASH_DIGITS]
    path = folder / f"epochs-{len(state['history']):03d}-step-{state['step']:08d}-{digest}.pt"
    if not folder.exists():  # somebody removed it: the state is still here
        folder.mkdir(parents=True)
    if shutil.disk_usage(folder).free < len(content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    write_atomically(path, content)
    # What seems newer is damaged or could not be read, or it would have been loaded.
    found = generations(folder)
    kept = found[found.index(path) :][:GENERATIONS_KEPT]
    leftovers = folder.glob(".epochs-*.tmp")  # of a process killed while saving, or damaged
    for other in (*set(found) - set(kept), *leftovers):
        try:
            other.unlink(missing_ok=True)
        except OSError as error:  # it only takes room: no reason to stop a run
            log.warning("%s cannot be removed (%s)", other, error.strerror)
    return path


def load_latest(folder: Path, tidy: bool = True) -> dict[str, Any] | None:
    """The newest checkpoint that is whole, on the CPU; None if the folder holds none at all.

    Damaged ones are renamed, unless `tidy` is false; what the disk does not read now, it may read
    later. Raises UserError if there are some, and none can be loaded.
    """
    damaged, unread = [], []
    for path in generations(folder):
        try:
            state = _load(path)
        except (PermissionError, MemoryError):  # nothing is damaged
            raise
        # torch.load has many errors for what another program wrote.
        except Exception as error:
            if "DefaultCPUAllocator" in str(error):  # PyTorch's MemoryError
                raise
            reason = (str(error) or repr(error)).partition("\n")[0]
            is_lasting = isinstance(error, FileNotFoundError | IsADirectoryError)
            if isinstance(error, OSError) and not is_lasting:
                log.warning("%s cannot be read (%s): passed over", path, reason)
                unread.append(path)
            else:
                log.warning("%s is damaged (%s): left aside", path, reason)
                damaged.append(path)
            continue
        # Lest the next save keeps one of them as its second generation.
        for other in damaged if tidy else ():
            with contextlib.suppress(OSError):
                other.rename(other.with_name(f".{other.name}.tmp"))
        return state
    if damaged or unread:
        raise UserError(
            f"every checkpoint in {folder} is damaged{' or cannot be read' * bool(unread)}: put a "
            "copy there, or begin again with another --name"
        )
    return None


def _read(path: Path) -> bytes:
    """A checkpoint's content; raises OSError, and ValueError if it is not what was saved."""
    content = path.read_bytes()
    if not hashlib.sha256(content).hexdigest().startswith(parse_name(path.name)[2]):
        raise ValueError("its content is not what was saved")
    return content


def _is_whole(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return bool(_read(path))
    return False


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; raises ValueError, among others, if it is not what was saved."""
    state = torch.load(io.BytesIO(_read(path)), map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not {"step", "history"} <= state.keys():
        raise ValueError("it holds something else than a run")
    if (len(state["history"]), state["step"]) != _age(path):
        raise ValueError("its name is not the one that it was saved under")
    return state


def generations(folder: Path) -> list[Path]:
    """Checkpoints of a folder, the newest first; raises OSError if it cannot be read."""

    # Where a disk fails, glob finds nothing without a word, and the run would begin anew.
    try:
        found = [path for path in folder.iterdir() if parse_name(path.name)]
    except (FileNotFoundError, NotADirectoryError):  # prepare_folder says the latter
        return []
    return sorted(found, key=_age, reverse=True)


def _age(path: Path) -> tuple[int, int]:
    """Finished epochs and steps of a checkpoint."""
    return parse_name(path.name)[:2]


def parse_name(name: str) -> tuple[int, int, str] | None:
    """Finished epochs, step and hash digits of a checkpoint by its name; None for another file."""
    match = _NAME.fullmatch(name)
    return match and (int(match[1]), int(match[2]), match[3])


def write_results(folder: Path, state: dict[str, Any]) -> None:
    """Bring a run's metrics.jsonl, best.pt, and where an epoch has just ended last.pt, to a state.

    Only once that is on the disk as a checkpoint: another attempt at an epoch may come out
    otherwise, and the weights have to be those of the row that stays. Raises OSError.
    """
    files = {}
    if state.get("best") is not None:
        files["best.pt"] = state["best"].numpy().tobytes()
    if state["history"] and not state["epoch_s"]:
        files["last.pt"] = encode(state["average"] or state["model"])
    for name, content in files.items():
        path = folder / name
        if not (path.is_file() and path.read_bytes() == content):
            write_atomically(path, content)
    write_metrics(folder / "metrics.jsonl", state["history"])


class BackgroundSaver:
    """Copies the state at once and writes it while training goes on, one checkpoint at a time.

    Keeps a run's results too, by write_results, and then calls `on_saved` in its thread.
    """

    def __init__(self, folder: Path, on_saved: Callable[[], None] = lambda: None) -> None:
        """`folder`: the run's."""
        self.folder = folder
        self._on_saved = on_saved
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._underway: Future | None = None

    def save(self, state: dict[str, Any]) -> None:
        """Start to save; waits for the save before it and raises what that one ran into."""
        self.wait()
        self._underway = self._thread.submit(self._save, _on_cpu(state, copy=True))

    def _save(self, state: dict[str, Any]) -> None:
        save(self.folder / "checkpoints", state)
        if state["history"] and not state["epoch_s"]:  # within an epoch they stay what they were
            write_results(self.folder, state)
        self._on_saved()

    def check(self) -> None:
        """Raise what the last save ran into, if it has ended; waits for nothing."""
        if self._underway is not None and self._underway.done():
            self.wait()

    def wait(self) -> None:
        """Return once the last checkpoint is on the disk; raises OSError if it could not be."""
        if self._underway is not None:
            underway, self._underway = self._underway, None
            underway.result()


def _on_cpu(value: Any, copy: bool = False) -> Any:
    """The same nested dicts and lists with their tensors on the CPU, as copies if asked."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=copy)
    if isinstance(value, dict):
        return {key: _on_cpu(item, copy) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(item, copy) for item in value)
    return value


# ------------------------------------------------------------------------------ before training


def prepare_folder(folder: Path, weights_bytes: int, checkpoint_bytes: int) -> None:
    """Make a run's folder; raises UserError as check_room does."""
    # Before, so that a refusal leaves no folder behind.
    check_room(folder, weights_bytes, checkpoint_bytes)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)


def check_room(folder: Path, weights_bytes: int, checkpoint_bytes: int) -> tuple[int, int]:
    """Bytes that are free for a run's folder, and that it still needs, 0 or more.

    Raises UserError if it cannot be written to or has too little room.
    """
    existing = check_writable(folder, "--runs-folder")
    # Checkpoints, of which one may be under way, and two weight files, of which the same holds.
    needed_bytes = (GENERATIONS_KEPT + 1) * checkpoint_bytes + 3 * weights_bytes
    held_bytes = 0
    # Nothing else is replaced; an export, which is as large, stays.
    for path in (*generations(folder / "checkpoints"), folder / "best.pt", folder / "last.pt"):
        with contextlib.suppress(FileNotFoundError):  # another process trains there
            held_bytes += path.stat().st_size
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes + held_bytes < needed_bytes:
        raise UserError(
            f"{existing} has {free_bytes / 1e6:,.0f} MB free, the run needs "
            f"{(needed_bytes - held_bytes) / 1e6:,.0f} MB for checkpoints: make room, or choose "
            "another --runs-folder"
        )
    return free_bytes, max(0, needed_bytes - held_bytes)


def lock(folder: Path) -> BinaryIO:
    """Keep a run's folder to this process until the file is closed, or the process ends somehow.

    Raises UserError if another process trains there.
    """
    file = open(folder / ".lock", "ab")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"another process trains in {folder}: wait for its end, or take another --name"
        ) from None
    return file


def check_newest(folder: Path, state: dict[str, Any] | None) -> None:
    """Refuse to go on from a state that is no longer the newest one; raises UserError.

    Another process may have saved between loading and locking, one that a signal has just ended.
    Going on would undo its work. A newer one that cannot be read is no reason to stand still.
    """
    standing = (-1, -1) if state is None else (len(state["history"]), state["step"])
    if any(_age(path) > standing and _is_whole(path) for path in generations(folder)):
        raise UserError(
            f"another process has just saved to {folder}: give the same command again, to go on "
            "from there; where machines have folders of their own, beside a mirror, move this away"
        )


def check_settings(state: dict[str, Any], config: Config) -> None:
    """Refuse to go on with a run under settings that change its result; raises UserError."""
    before = state["config"]
    may_extend = {"extra_epochs"} if not before.get("extra_epochs") else set()  # a run, once
    different = changed_settings(before, config, RESULT_SETTINGS - may_extend)
    if different:
        raise UserError(
            f"run {config.name} was begun with other settings ({'; '.join(different)}): give it "
            "those, or begin another run with another --name"
        )


def check_images(state: dict[str, Any], images: dict[str, Any]) -> None:
    """Refuse to go on with a run on other images than it began with; raises UserError."""
    changed = [part for part in ("train", "val") if state["images"][part] != images[part]]
    if changed:
        raise UserError(
            f"the {' and '.join(changed)} images are not those that this run was begun with: bring "
            "those back, or begin another run with another --name"
        )
