"""A quick start is what a start is, but for its time."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import quick_start
from conftest import COMMAND_ENVIRONMENT

# All that a command can see of how it was started.
LOOK = """
import json, os, signal, sys, threading
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "main": [__name__, sys.modules["__main__"].__dict__ is globals(), globals().get("__file__")],
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "files": [os.fstat(file).st_mode for file in range(3)],
    "opened": sorted(os.listdir("/proc/self/fd")),
    "streams": [
        [stream.encoding, stream.errors, stream.line_buffering, stream.write_through,
         stream.newlines, stream is original]
        for stream, original in (
            (sys.stdin, sys.__stdin__), (sys.stdout, sys.__stdout__), (sys.stderr, sys.__stderr__)
        )
    ],
    "signals": [str(signal.getsignal(number)) for number in range(1, 32)],
    "mask": [str(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    "parent": os.getppid(),
    "group": [os.getpgid(0) == os.getpid(), os.getsid(0) == os.getpid()],
    "threads": [len(os.listdir("/proc/self/task")), threading.current_thread().name],
    "ours": "utils" in sys.modules,
}, indent=1))
print("loaded", "torch" in sys.modules)
print("said", file=sys.stderr)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("new_session", [False, True])
def test_a_command_sees_what_it_sees_in_a_new_interpreter(
    tmp_path: Path, new_session: bool
) -> None:
    (tmp_path / "look.py").write_text(LOOK)
    (tmp_path / "link.py").symlink_to(tmp_path / "look.py")
    for file in (["-c", LOOK], ["look.py"], [str(tmp_path / "look.py")], ["link.py"]):
        seen = []
        for popen in (subprocess.Popen, quick_start.Popen):
            process = popen(
                [sys.executable, *file, "3", "--name", "ö"],
                cwd=tmp_path,
                env={**COMMAND_ENVIRONMENT, "AWS_REGION": "here"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=new_session,
            )
            stdout, stderr = process.communicate(timeout=60)
            told, loaded, _ = stdout.rsplit("\n", 2)
            seen.append((json.loads(told), stderr, process.returncode))
        assert seen[0] == seen[1]
        assert seen[1][1:] == ("said\n", 3)
        assert seen[1][0]["parent"] == os.getpid()
        assert loaded == "loaded True"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_it_is_the_tests_own_child(number: signal.Signals) -> None:
    ended = []
    for popen in (subprocess.Popen, quick_start.Popen):
        process = popen(
            [sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)"],
            env=COMMAND_ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout.readline() == b"ready\n"
        assert process.poll() is None
        process.send_signal(number)
        process.stdout.close()
        ended.append(process.wait(30))
        with pytest.raises(ChildProcessError):
            os.waitpid(process.pid, 0)
    assert ended == [-number, -number]


def test_what_is_not_for_a_fork_has_a_start_of_its_own(tmp_path: Path) -> None:
    program = "import sys, os; print('torch' in sys.modules, os.environ.get('OMP_NUM_THREADS'))"
    command = [sys.executable, "-c", program]
    for options, told in (
        ({"env": COMMAND_ENVIRONMENT}, b"True 1\n"),
        ({"env": {**COMMAND_ENVIRONMENT, "OMP_NUM_THREADS": "2"}}, b"False 2\n"),
        ({"env": COMMAND_ENVIRONMENT, "preexec_fn": lambda: None}, b"False 1\n"),
    ):
        with quick_start.Popen(command, stdout=subprocess.PIPE, **options) as process:
            assert process.stdout.read() == told
        assert process.returncode == 0


def test_the_code_is_that_on_the_disk_and_chance_is_new(tmp_path: Path) -> None:
    code = "import random, numpy; print({}, random.random(), numpy.random.rand())"
    outputs = []
    for number in ("1", "2", "2"):
        (tmp_path / "stage.py").write_text(code.format(number))
        done = quick_start.run([sys.executable, tmp_path / "stage.py"], 60, env=COMMAND_ENVIRONMENT)
        outputs.append(done.stdout.split())
    assert [output[0] for output in outputs] == ["1", "2", "2"]
    assert len({output[1] for output in outputs}) == len({output[2] for output in outputs}) == 3


def test_a_command_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    program = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); "
    began = time.monotonic()
    with pytest.raises(subprocess.TimeoutExpired):
        quick_start.run(
            [sys.executable, "-c", program + "time.sleep(60)"], 2, env=COMMAND_ENVIRONMENT
        )
    assert time.monotonic() - began < 30
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()
