"""Commands without the start of their libraries: these are loaded once, and forked for each.

A stage takes 3 s of a core to load PyTorch and torchvision, and what is tested often less. Here a
server, one for each process of pytest, loads the libraries, never the project's own modules, and a
command is a fork of that: a process of its own and a child of the test's, with the arguments,
folder, environment and files that it was given, which reads the project's code from the disk. Its
end, its signals and its exit code are the system's own.

What only a real start shows is tested with one: a signal while libraries load, what they write
then, a part of a library that nobody imported, limits, namespaces and memory, and hashes of
strings, which differ from start to start.
"""

import ctypes
import functools
import gc
import inspect
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)
MESSAGE_BYTES = 2**17  # more than any command with its environment
# Variables that no library reads as it is loaded, but for huggingface_hub, which is not.
READ_WHEN_NEEDED = ("AWS_", "HF_", "http_proxy", "PYTEST_")
ONLY_AT_EXEC = ("preexec_fn", "pass_fds", "executable", "shell")
EXECUTE_CHILD = inspect.signature(subprocess.Popen._execute_child)


class Popen(subprocess.Popen):
    """subprocess.Popen, quick for [sys.executable, FILE or "-c", ...].

    With variables or options that only a start of their own can have, it has that.
    """

    def _execute_child(self, *arguments: Any) -> None:
        given = EXECUTE_CHILD.bind(self, *arguments).arguments
        interpreter, *command = map(os.fspath, given["args"])
        environment = dict(os.environ if given["env"] is None else given["env"])
        server = start_server()
        different = {name for name, _ in environment.items() ^ server.environment.items()}
        if not (
            interpreter == sys.executable
            and command[0].endswith((".py", "-c"))
            and all(name.startswith(READ_WHEN_NEEDED) for name in different)
            and not any(given[option] for option in ONLY_AT_EXEC)
            and given["umask"] == given["process_group"] == -1
        ):
            super()._execute_child(*arguments)
            return
        pipes = [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        files = [number if pipe == -1 else pipe for number, pipe in enumerate(pipes)]
        cwd = os.path.abspath(given["cwd"] or "")
        self.pid = server.fork((command, environment, cwd, given["start_new_session"]), files)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[end] for end in ends))


def run(command: list[Any], timeout: float, **options: Any) -> subprocess.CompletedProcess[str]:
    """subprocess.run with a text captured of each output."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, text=True, **pipes, **options) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


class Server:
    """The process that has loaded the libraries, as the tests see it."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.lock = threading.Lock()
        self.connection, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its_end:
            command = [sys.executable, __file__, str(its_end.fileno())]
            self.process = subprocess.Popen(
                command, env=environment, pass_fds=[its_end.fileno()], stdin=subprocess.DEVNULL
            )

    def fork(self, call: tuple[Any, ...], files: list[int]) -> int:
        """The process ID of a fork that carries out a call, a child of this process."""
        prctl = ctypes.CDLL(None).prctl
        with self.lock:
            # The server's child ends before its own child, whom the system then gives to us.
            assert prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
            try:
                socket.send_fds(self.connection, [pickle.dumps(call)], files)
                pid = int.from_bytes(self.connection.recv(8), "big")
            finally:
                prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        assert pid, "the server has ended"
        return pid


@functools.cache
def start_server() -> Server:
    """The server of this process, started when first needed; it ends with this process."""
    from conftest import COMMAND_ENVIRONMENT

    return Server(dict(COMMAND_ENVIRONMENT))


# ------------------------------------------------------------------------------ in the server


def load_libraries() -> None:
    """Import what the stages do, nothing of ours; raises AssertionError if a thread begins."""
    for name in ("torch", "torchvision", "torchsummary", "cv2", "simplejpeg", "zlib_ng", "tqdm"):
        __import__(name)
    for name in ("tyro", "PIL.Image", "matplotlib.figure", "boto3"):
        __import__(name)
    assert "huggingface_hub" not in sys.modules
    assert len(os.listdir("/proc/self/task")) == 1  # a fork has none but the thread that forks


def serve(connection: socket.socket) -> list[str]:
    """Fork for each call until the tests have ended; returns the command in each fork."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, MESSAGE_BYTES, 3)
        if not message:
            os._exit(0)
        told, tell = os.pipe()
        if (between := os.fork()) == 0:
            between = os.getpid()
            if (pid := os.fork()) == 0:
                while os.getppid() == between:  # not yet a child of the test's
                    time.sleep(0.001)
                command, environment, cwd, start_new_session = pickle.loads(message)
                if start_new_session:
                    os.setsid()
                take_over(files, environment, cwd)
                os.closerange(3, os.sysconf("SC_OPEN_MAX"))
                signal.signal(signal.SIGINT, signal.default_int_handler)
                sys.modules["numpy"].random.seed()  # as random does by itself
                return command
            os.write(tell, pid.to_bytes(8, "big"))
            os._exit(0)
        pid = os.read(told, 8)
        os.waitpid(between, 0)
        connection.send(pid)
        for file in (told, tell, *files):
            os.close(file)


def take_over(files: Sequence[int], environment: Mapping[str, str], cwd: str) -> None:
    """Take a caller's standard files, environment and folder, as exec would have."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        old = getattr(sys, name)
        mode = "w" if number else "r"
        new = open(  # noqa: SIM115 (it stays open)
            number, mode, encoding=old.encoding, errors=old.errors, closefd=False
        )
        by_lines = (name == "stderr" or new.isatty()) and not old.write_through
        new.reconfigure(line_buffering=by_lines, write_through=old.write_through)
        setattr(sys, name, new)
        setattr(sys, f"__{name}__", new)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends with the tests, without a word
    load_libraries()
    gc.collect()
    gc.freeze()  # the forks share its memory
    file, *options = serve(socket.socket(fileno=int(sys.argv[1])))
    sys.argv = [file, *options]
    sys.path[0] = "" if file == "-c" else os.path.dirname(os.path.realpath(file))
    main = types.ModuleType("__main__")
    sys.modules["__main__"], this = main, sys.modules["__main__"]
    if file == "-c":
        code = compile(sys.argv.pop(1), "<string>", "exec")
    else:
        main.__file__ = os.path.abspath(file)
        with open(file, "rb") as source:
            code = compile(source.read(), file, "exec")
    exec(code, main.__dict__)
