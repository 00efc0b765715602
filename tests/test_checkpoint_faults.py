"""A fault at every single I/O step of saving, and every kind of damage to what was saved."""

import errno
import hashlib
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import COMMAND_ENVIRONMENT, REPOSITORY
from test_checkpoint import make_state, same

import checkpoint
from utils import UserError

LEFTOVER = ".epochs-000-step-00000001-0123456789abcdef.pt.tmp"  # of a process killed while saving
FAULTS = {
    "killed": ("signal=KILL", -signal.SIGKILL),
    "disk full": ("error=ENOSPC", errno.ENOSPC),
    "disk broken": ("error=EIO", errno.EIO),
}

# Imports PyTorch once, and for every folder on stdin forks a process that saves a checkpoint there.
# That one waits for a byte, so that strace can take hold of it; any process may (Linux's Yama would
# leave it to the parent). Its end is told as an exit code: an errno, or minus the signal.
SERVER = """if True:
    import ctypes, os, resource, sys, tempfile
    from pathlib import Path
    import torch
    import checkpoint

    PR_SET_PTRACER, ANY = 0x59616D61, ctypes.c_ulong(-1)
    state = torch.load(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(Path(folder), state)  # so that PyTorch has read what it reads only once
    print("ready", flush=True)
    while folder := os.read(0, 4096).decode():
        pid = os.fork()
        if pid == 0:
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ANY, 0, 0, 0)
            print(os.getpid(), flush=True)
            most_bytes = int(os.read(0, 100))
            if most_bytes:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
            code = 0
            try:
                checkpoint.save(Path(folder), state)
            except OSError as error:
                code = error.errno
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def _strace() -> None:
    if shutil.which("strace") is None:
        pytest.fail("these tests need strace: apt-get install strace, or bash scripts/test.sh")


@pytest.fixture(scope="module")
def server(
    _strace: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[subprocess.Popen[bytes]]:
    state_path = tmp_path_factory.mktemp("state") / "state.pt"
    torch.save(make_state(3), state_path)
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, state_path],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        yield process
        process.stdin.close()


def save_traced(
    server: subprocess.Popen[bytes], folder: Path, *options: str, most_bytes: int = 0
) -> tuple[int, list[tuple[str, str]]]:
    """Save step 3 in a process under strace: its exit code, and its I/O as (name, whole line)."""
    trace = folder.with_name(f"{folder.name}.trace")
    server.stdin.write(str(folder).encode())
    pid = server.stdout.readline().decode().strip()
    command = ["strace", "-f", "-y", "-e", "trace=%file,%desc", "-o", trace, *options, "-p", pid]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as strace:
        answer = strace.stderr.readline()
        server.stdin.write(f"{most_bytes} ".encode())  # it saves now
        code = int(server.stdout.readline())
    if "attached" not in answer:
        pytest.fail(f"strace cannot trace here, which these tests need (ptrace allowed?): {answer}")
    calls = re.findall(r"^\d+ +(\w+)\(.*$", trace.read_text(), re.MULTILINE)
    lines = re.findall(r"^\d+ +\w+\(.*$", trace.read_text(), re.MULTILINE)
    return code, [call for call in zip(calls, lines, strict=True) if "<pipe:" not in call[1]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two generations, steps 1 and 2, and what a killed process left."""
    return new_folder(tmp_path / "checkpoints")


def new_folder(folder: Path) -> Path:
    folder.mkdir()
    for step in (1, 2):
        checkpoint.save(folder, make_state(step))
    (folder / LEFTOVER).write_bytes(b"half")
    return folder


def whole_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder; every one must be whole."""
    return [checkpoint._load(path)["step"] for path in checkpoint.generations(folder)]


def position(calls: list[tuple[str, str]], name: str, *parts: str) -> list[int]:
    """Where calls stand that begin with this name, as openat with open, and hold all the parts."""
    return [
        number
        for number, (called, line) in enumerate(calls)
        if called.startswith(name) and all(part in line for part in parts)
    ]


def test_saving_writes_flushes_renames_flushes_the_folder_and_only_then_removes(
    server: subprocess.Popen[bytes], folder: Path
) -> None:
    code, calls = save_traced(server, folder)
    assert code == 0
    new = next(folder.glob("*-step-00000003-*.pt")).name
    temporary = f"{folder}/.{new}.tmp"
    (opened,) = position(calls, "open", temporary, "O_CREAT")
    writes = position(calls, "write", temporary)
    (flushed,) = position(calls, "fsync", temporary)
    (renamed,) = position(calls, "rename", f'"{temporary}"', f'"{folder}/{new}"')
    (folder_flushed,) = position(calls, "fsync", f"<{folder}>")
    removed = position(calls, "unlink", f"{folder}/")
    assert len(removed) == 2  # the oldest, and the leftover
    order = [opened, *writes, flushed, renamed, folder_flushed, *removed]
    assert order == sorted(order)
    # Nothing else may change a file.
    changes = r"write|sync|trunc|rename|link|fallocate|mkdir|rmdir|O_CREAT|O_WRONLY|O_RDWR"
    without_paths = [re.sub('"[^"]*"|<[^>]*>', "", line) for _, line in calls]
    assert [
        number for number, line in enumerate(without_paths) if re.search(changes, line)
    ] == order


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_any_io_step_of_saving_loses_nothing(
    server: subprocess.Popen[bytes],
    tmp_path: Path,
    fault: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    injection, expected_code = FAULTS[fault]
    _, calls = save_traced(server, new_folder(tmp_path / "listed"))
    (renamed,) = position(calls, "rename")
    durable = position(calls, "fsync")[-1]
    assert len(calls) >= 10
    for number, (name, line) in enumerate(calls):
        nth = sum(other == name for other, _ in calls[: number + 1])
        folder = new_folder(tmp_path / f"{fault} {number}")
        code, done = save_traced(server, folder, "-e", f"inject={name}:{injection}:when={nth}")
        where = f"{fault} at {line}"
        # The fault was where it was meant to be: all went as listed until then, and not beyond.
        assert [called for called, _ in done[: number + 1]] == [
            called for called, _ in calls[: number + 1]
        ], where
        if fault == "killed":
            assert (code, len(done)) == (expected_code, number + 1), where
        else:
            assert "(INJECTED)" in done[number][1], where
            # What saving can do without may fail: a question to the file, a removal.
            harmless = name in ("ioctl", "lseek", "newfstatat", "fstat", "statx")
            allowed = {0, expected_code} if harmless or number > durable else {expected_code}
            assert code in allowed, where

        saved = code == 0 or number > renamed
        assert same(checkpoint.load_latest(folder), make_state(3 if saved else 2)), where
        assert len(whole_steps(folder)) >= 2, where  # another one to fall back to
        assert "damaged" not in caplog.text, where
        # The next save works, and clears away what the fault left.
        checkpoint.save(folder, make_state(4))
        assert whole_steps(folder) == [4, 3 if saved else 2], where
        assert len(list(folder.iterdir())) == 2, where


def test_a_file_that_may_not_grow_is_given_up(
    server: subprocess.Popen[bytes], folder: Path
) -> None:
    """A write that is really cut short, by the limit on a file's size: half of it is written."""
    code, calls = save_traced(server, folder, most_bytes=2000)
    assert code == errno.EFBIG
    assert any(line.endswith("= 2000") for name, line in calls if name == "write")
    assert sorted(whole_steps(folder)) == [1, 2]
    assert not list(folder.glob("*step-00000003*"))


def test_a_disk_that_loses_what_it_said_it_wrote_costs_one_generation(
    server: subprocess.Popen[bytes], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    size = len(checkpoint.encode(make_state(3)))
    code, _ = save_traced(server, folder, "-e", f"inject=write:retval={size}:when=1")
    assert code == 0  # nobody told
    assert same(checkpoint.load_latest(folder), make_state(2))
    assert "step-00000003" in caplog.text and "is damaged" in caplog.text


def test_whatever_a_power_cut_keeps_of_the_steps_a_checkpoint_is_left(
    server: subprocess.Popen[bytes], folder: Path, tmp_path: Path
) -> None:
    """Every state of the disk that the order of the steps allows, as in ALICE (OSDI 2014).

    After a cut, of the changes that were not flushed any may have reached the disk, in any order,
    and of a file's content any part.
    """
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    _, calls = save_traced(server, folder)
    new = next(folder.glob("*-step-00000003-*.pt"))
    content, temporary = new.read_bytes(), f".{new.name}.tmp"

    def leave(files: dict[str, bytes]) -> Path:
        left = tmp_path / "left"
        shutil.rmtree(left, ignore_errors=True)
        left.mkdir()
        for name, kept in files.items():
            (left / name).write_bytes(kept)
        return left

    states = 0
    for end in range(len(calls) + 1):
        done = calls[:end]
        flushed = position(done, "fsync", temporary)
        folder_flushed = position(done, "fsync", f"<{folder}>")
        contents = [content, *([] if flushed else [b"", content[:1000], bytes(len(content))])]
        places = [temporary, *([new.name] if position(done, "rename") else [])]
        removed = [Path(line.split('"')[1]).name for name, line in done if "unlink" in name]
        for place in [new.name] if folder_flushed else places:
            for kept in contents:
                for number in range(2 ** len(removed)):
                    gone = {name for bit, name in enumerate(removed) if number >> bit & 1}
                    files = {name: old for name, old in before.items() if name not in gone}
                    step = checkpoint.load_latest(leave({**files, place: kept}))["step"]
                    is_saved = place == new.name and kept == content
                    assert step == (3 if is_saved else 2), (place, len(kept), gone)
                    assert is_saved or not folder_flushed
                    states += 1
    assert states > len(calls)


# ------------------------------------------------------------------------------ damage


def test_of_a_thousand_flipped_bytes_none_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save(tmp_path, make_state(1))
    path = checkpoint.save(tmp_path, make_state(2))
    whole = path.read_bytes()
    draws = random.Random(0)
    for place in draws.sample(range(len(whole)), 1000):
        damaged = bytearray(whole)
        damaged[place] ^= draws.randrange(1, 256)
        path.write_bytes(damaged)
        caplog.clear()
        assert checkpoint.load_latest(tmp_path)["step"] == 1, place
        assert f"{path} is damaged" in caplog.text
    path.write_bytes(whole)
    assert checkpoint.load_latest(tmp_path)["step"] == 2


def test_of_64_cuts_none_is_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path, make_state(1))
    path = checkpoint.save(tmp_path, make_state(2))
    whole = path.read_bytes()
    lengths = [0, 1, len(whole) - 1, *random.Random(0).sample(range(2, len(whole) - 1), 61)]
    for length in lengths:
        path.write_bytes(whole[:length])
        caplog.clear()
        assert checkpoint.load_latest(tmp_path)["step"] == 1, length
        assert f"{path} is damaged" in caplog.text


def foreign(content: bytes) -> Callable[[Path], None]:
    """Other content in a checkpoint's place, under a name that has its hash."""

    def damage(path: Path) -> None:
        path.unlink()
        digest = hashlib.sha256(content).hexdigest()[: checkpoint.HASH_DIGITS]
        path.with_name(f"epochs-000-step-00000002-{digest}.pt").write_bytes(content)

    return damage


def renamed(old: str, new: str) -> Callable[[Path], None]:
    """The name of a checkpoint with one part replaced."""

    def damage(path: Path) -> None:
        name = re.sub(old, new, path.name)
        assert name != path.name
        path.rename(path.with_name(name))

    return damage


def flip_in_the_hash(path: Path) -> None:
    stem, digit = path.stem[:-1], path.stem[-1]
    path.rename(path.with_name(f"{stem}{int(digit, 16) ^ 1:x}.pt"))


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


DAMAGES = {
    "a digit of the hash in the name": flip_in_the_hash,
    "the step in the name": renamed("step-00000002", "step-00000006"),
    "the epochs in the name": renamed("epochs-000", "epochs-001"),
    "a folder": become_a_folder,
    "a link to nothing": lead_nowhere,
    "nothing": foreign(b""),
    "text": foreign(b"no checkpoint\n"),
    "half a checkpoint": foreign(checkpoint.encode(make_state(2))[:-100]),
    "weights": foreign(checkpoint.encode(make_state(2)["model"])),
    "a list": foreign(checkpoint.encode([1, 2])),
    "an object of Python": foreign(pickle.dumps(Path("/"), protocol=2)),
    "a run without its rows": foreign(checkpoint.encode({"step": 2, "history": None})),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_stands_in_a_checkpoints_place_is_left_aside_and_training_goes_on(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = checkpoint.save(tmp_path, make_state(1))
    DAMAGES[damage](checkpoint.save(tmp_path, make_state(2)))
    assert same(checkpoint.load_latest(tmp_path), make_state(1))
    (message,) = caplog.messages
    assert re.search(r"step-0000000\d-[0-9a-f]{16}\.pt is damaged \(.+\): left aside$", message)
    assert first.name not in message and len(message.splitlines()) == 1

    # Saved again, or later, it takes no damaged one for its second generation.
    for step in (2, 3):
        again = {**make_state(step), "elapsed_s": 1.0}  # which no two runs share
        checkpoint.save(tmp_path, again)
        assert whole_steps(tmp_path) == [step, step - 1]
        assert same(checkpoint.load_latest(tmp_path), again)


def test_no_checkpoint_is_run_as_a_program(tmp_path: Path) -> None:
    """Whoever can write to a mirror shall not thereby command the machines that read it."""

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = tmp_path / "checkpoints"
    folder.mkdir()
    checkpoint.save(folder, make_state(1))
    content = checkpoint.encode({**make_state(2), "best": Trap()})
    foreign(content)(checkpoint.save(folder, make_state(2)))
    assert same(checkpoint.load_latest(folder), make_state(1))
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_that_the_disk_does_not_read_for_a_while_is_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, make_state(1))
    newest = checkpoint.save(tmp_path, make_state(2))
    read, unreadable = Path.read_bytes, {newest}

    def read_bytes(path: Path) -> bytes:
        if path in unreadable:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    older = checkpoint.load_latest(tmp_path)
    assert same(older, make_state(1))
    assert f"{newest} cannot be read" in caplog.text and "damaged" not in caplog.text
    checkpoint.check_newest(tmp_path, older)  # for good, perhaps: the run goes on
    unreadable.clear()
    with pytest.raises(UserError, match="give the same command again"):
        checkpoint.check_newest(tmp_path, older)
    assert same(checkpoint.load_latest(tmp_path), make_state(2))

    unreadable.update(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged or cannot be read"):
        checkpoint.load_latest(tmp_path)
    unreadable.remove(newest)
    for step in (3, 4):
        checkpoint.save(tmp_path, make_state(step))
    assert whole_steps(tmp_path) == [4, 3]


def test_too_little_memory_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make_state(1))
    newest = checkpoint.save(tmp_path, make_state(2))

    def load(*_: object, **__: object) -> None:  # in the words of PyTorch 2, under a limit
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 120000000 bytes. Error code 12 (Cannot allocate memory)"
        )

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        checkpoint.load_latest(tmp_path)
    assert newest.exists() and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_where_all_are_damaged_the_run_does_not_begin_anew(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, make_state(1)).write_bytes(b"damaged")
    DAMAGES[damage](checkpoint.save(tmp_path, make_state(2)))
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.usefixtures("_strace")
def test_a_folder_that_cannot_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    """A loading process whose disk fails at the list of checkpoints: it ends, and says so."""
    folder = new_folder(tmp_path / "checkpoints")
    program = f"import checkpoint, pathlib; checkpoint.load_latest(pathlib.Path({str(folder)!r}))"
    trace = tmp_path / "trace"
    fault = ["-e", "trace=getdents64", "-e", "inject=getdents64:error=EIO", "-P", folder]
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", "-o", trace, *fault, sys.executable, "-c", program],
        cwd=REPOSITORY,
        env=COMMAND_ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert "(INJECTED)" in trace.read_text(), done.stderr
    assert done.returncode == 1
    assert "Input/output error" in done.stderr
