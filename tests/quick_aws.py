"""The real AWS CLI without its start: loaded once, and forked for each call.

A process of `aws` takes half a second to load its code and its descriptions of the services, and
0.1 s to do its work. Here a server loads them, and a call is a fork of that, with the caller's
arguments, environment, folder, input and output. What is called is `main()` of the CLI itself.
"""

import array
import contextlib
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from quick_start import take_over

# Imports little, for it is started for each call.
CLIENT = """#!{python} -SE
import _socket, array, json, os, sys
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({path!r})
fds = array.array("i", [0, 1, 2])
server.sendmsg([b"-"], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, fds)])
call = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
server.send(len(call).to_bytes(8, "big") + call)
code = server.recv(1)
os._exit(code[0] if code else 255)
"""


@contextlib.contextmanager
def quick_aws(folder: Path) -> Iterator[Path]:
    """A folder with an `aws`, for the front of PATH, that works while this is entered."""
    path = folder / "socket"
    bare = {key: value for key, value in os.environ.items() if not key.startswith("AWS_")}
    with subprocess.Popen([sys.executable, __file__, path], env=bare) as server:
        try:
            while not path.exists():
                assert server.poll() is None
                time.sleep(0.01)
            client = folder / "aws"
            client.write_text(CLIENT.format(python=sys.executable, path=str(path)))
            client.chmod(0o755)
            yield folder
        finally:
            server.terminate()


SERVICES = ("ec2", "iam", "lambda", "logs", "s3", "service-quotas", "ssm", "sts")


def load_cli() -> None:
    """Import the CLI with its plugins; read what services there are, and what those called can."""
    import awscli.handlers  # noqa: F401 (the CLI imports it by its name, at each start)
    from awscli.clidriver import botocore

    loaders, data = botocore.loaders, Path(botocore.__file__).parent / "data"
    load = functools.cache(loaders.JSONFileLoader().load_file)
    loaders.JSONFileLoader.load_file = lambda _, path: load(path)
    # The tests' own data add no service.
    services = functools.cache(loaders.Loader().list_available_services)
    loaders.Loader.list_available_services = lambda _, type_name: services(type_name)
    for type_name in ("service-2", "paginators-1", "waiters-2", "endpoint-rule-set-1"):
        services(type_name)
    newest = [max((data / service).iterdir()) for service in SERVICES]
    for folder in (data, Path(os.environ["AWS_DATA_PATH"]), *newest):
        for file in folder.glob("*.json*"):
            load(str(folder / file.name.partition(".")[0]))
    gc.collect()
    gc.freeze()  # the forks share its memory


def serve(path: str) -> None:
    """Fork for each call, until terminated."""
    import awscli.clidriver

    load_cli()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            if os.fork():
                connection.close()
                continue
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _, ancillary, _, _ = connection.recvmsg(1, socket.CMSG_SPACE(3 * 4))
            fds = array.array("i", ancillary[0][2])
            size = int.from_bytes(_receive(connection, 8), "big")
            arguments, environment, cwd = json.loads(_receive(connection, size))
            own_data = os.environ["AWS_DATA_PATH"]  # set as the CLI is loaded
            take_over(fds, environment, cwd)
            theirs = environment.get("AWS_DATA_PATH")
            os.environ["AWS_DATA_PATH"] = os.pathsep.join(filter(None, [theirs, own_data]))
            sys.argv = ["aws", *arguments]
            code = awscli.clidriver.main()
            sys.stdout.flush()
            sys.stderr.flush()
            connection.send(bytes([code]))
            os._exit(0)


def _receive(connection: socket.socket, size: int) -> bytes:
    received = b""
    while len(received) < size:
        received += connection.recv(size - len(received))
    return received


if __name__ == "__main__":
    serve(sys.argv[1])
