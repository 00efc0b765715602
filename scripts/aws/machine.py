"""A rented machine, through ssh: the code onto it, commands, files back."""

import collections
import contextlib
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from settings import REPOSITORY, Settings

from utils import FETCHED, UserError

FOLDER = "resnet50"  # of the code, in the home of who logs in
SSH_FAILED = 255  # ssh's own exit code, where the connection and not the command failed
MOST_CODE_BYTES = 100e6
BROKEN = "the connection broke: the same command again goes on"


def key_of(settings: Settings) -> Path:
    """The private key that logs in."""
    return Path(settings.ssh_key or f"~/.ssh/{settings.project}").expanduser()


def public_key_of(settings: Settings, make: bool) -> Path:
    """The public half of that key; both are made if asked to. Raises UserError."""
    key = key_of(settings)
    public = key.with_name(f"{key.name}.pub")
    if not key.exists() and not public.exists() and make:
        key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", settings.project, "-f", key],
            check=True,
        )
    if make and not public.exists():
        raise UserError(f"{public} is missing: ssh-keygen -y -f {key} > {public}")
    if not make and not key.exists():
        print(f"note: {key} is not on this computer: it cannot log in", file=sys.stderr)
    return public


class Machine:
    """How to reach one instance; in a dry run it shows what it would do there."""

    def __init__(self, settings: Settings, instance_id: str, address: str, dry_run: bool) -> None:
        if shutil.which("ssh") is None:
            raise UserError("ssh is not installed: apt-get install openssh-client")
        key = key_of(settings)
        self.dry_run, self.address = dry_run, f"{settings.ssh_user}@{address}"
        # The host's key is kept under the instance's id: its address changes with each start.
        self.ssh = [
            "ssh", "-i", str(key), "-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes",
            "-o", f"HostKeyAlias={instance_id}", "-o", "StrictHostKeyChecking=accept-new",
            "-o", f'UserKnownHostsFile="{key}.known_hosts"', "-o", "ConnectTimeout=10",
            "-o", "ServerAliveInterval=15", "-o", "LogLevel=ERROR",
            *shlex.split(settings.ssh_options),
        ]  # fmt: skip

    def command(self, command: str, terminal: bool = False) -> list[str]:
        """ssh with a command for the machine's shell."""
        return [*self.ssh, *(["-t"] if terminal else []), self.address, command]

    def wait(self, seconds: float) -> None:
        """Until it lets us log in; raises UserError with ssh's last complaint."""
        deadline = time.monotonic() + seconds
        while not self.dry_run:
            done = subprocess.run(self.command("true"), capture_output=True, text=True)
            if done.returncode == 0:
                return
            complaint = " ".join(done.stderr.split()) or "no answer"
            if "HOST IDENTIFICATION HAS CHANGED" in complaint:
                raise UserError(f"{self.address} shows another host key than before: not trusted")
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.address} does not let this computer log in ({complaint}): the same "
                    "command again tries again, and lets in the address that this computer has now"
                )
            time.sleep(2)

    def run(self, command: str, input: bytes = b"", check: bool = True) -> int:
        """Run a command there, its output here; raises UserError if it fails and `check` is set."""
        print(f"$ ssh {self.address} {shlex.quote(command)}", flush=True)
        if self.dry_run:
            return 0
        done = subprocess.run(self.command(command), input=input)
        if check and done.returncode == SSH_FAILED:
            raise UserError(BROKEN)
        if check and done.returncode:
            raise UserError("that failed, as told above: mend it, and give the same command again")
        return done.returncode

    def ask(self, command: str) -> str:
        """What a command says there; raises UserError if it cannot be asked."""
        if self.dry_run:
            return ""
        done = subprocess.run(self.command(command), capture_output=True, text=True)
        if done.returncode == SSH_FAILED:
            raise UserError(BROKEN)
        return done.stdout.strip()

    def run_detached(self, name: str, command: str) -> None:
        """Run a long command in the folder there, on its own, and follow what it says.

        It goes on if the connection breaks; given again, it is followed, not started twice. Raises
        UserError if it fails.
        """
        self._follow(f"cd {FOLDER} && bash scripts/aws/instance/detached.sh {name} {command}")
        self.run(f"cd {FOLDER} && exit $(cat {name}.status)")

    def wait_for_detached(self, name: str) -> None:
        """Follow such a command to its end, however it ends, where one runs there."""
        self._follow(
            f"cd {FOLDER} 2>/dev/null && [ -e {name}.lock ] || exit 0; "
            f"if ! flock --nonblock {name}.lock true; then "
            f"echo '{name} of another start runs there: waiting for its end'; "
            f"bash scripts/aws/instance/detached.sh {name} true; fi"
        )

    def _follow(self, command: str) -> None:
        """Run a command there that may be given again, until the connection holds to its end."""
        for tries_left in reversed(range(10)):
            if self.run(command, check=False) != SSH_FAILED:
                break
            if tries_left:
                print("the connection broke; it goes on there: trying to follow it", flush=True)
                time.sleep(5)

    def show(self, command: str) -> None:
        """Run a command there in this terminal, until it ends or Ctrl-C."""
        if not self.dry_run:
            with contextlib.suppress(KeyboardInterrupt):
                subprocess.run(self.command(command, terminal=True))

    def pull(self, folder: str, to: Path, leave_out: list[str]) -> None:
        """Copy the runs in a folder there; raises UserError where a run here is not from there."""
        there = self.ask(f"ls {folder}").split()
        runs = [name for name in there if name != "lost+found"]
        if not runs and not self.dry_run:
            raise UserError(f"there is no run in {folder} of {self.address} yet")
        for name in runs:
            here = to / name
            if here.exists() and not (here / FETCHED).exists():
                raise UserError(
                    f"{here} is there, and was not fetched, or was trained on here since: choose "
                    "another --to"
                )
        print(f"fetching {', '.join(runs)} from {self.address} to {to}", flush=True)
        if not runs:
            return
        to.mkdir(parents=True, exist_ok=True)
        for name in runs:
            (to / name).mkdir(exist_ok=True)
            (to / name / FETCHED).touch()
        without = [f"--exclude={name}" for name in leave_out]
        # Not compressed: weights become 7 % smaller, at 27 MB/s of a core that training may need.
        pack = shlex.join(["tar", "c", "-C", folder, *without, "--", *runs])
        with subprocess.Popen(self.command(pack), stdout=subprocess.PIPE) as packing:
            try:
                with tarfile.open(fileobj=packing.stdout, mode="r|") as tar:
                    # Which Python 3.11 has from its fourth release on.
                    tar.extraction_filter = getattr(tarfile, "data_filter", None)
                    tar.extractall(to)
            except tarfile.TarError:
                packing.wait()
        if packing.returncode not in (0, 1):  # 1: a file grew while it was read
            raise UserError("the runs could not be fetched whole: the same command again")

    def push_code(self) -> None:
        """Send this repository: what git tracks, what it does not ignore, and the commit's name."""
        print(f"sending this repository to {self.address}:{FOLDER}", flush=True)
        if self.dry_run:
            return
        with tempfile.TemporaryFile() as archive:
            with tarfile.open(fileobj=archive, mode="w:gz") as tar:
                for path in _repository_files():
                    tar.add(REPOSITORY / path, path, recursive=False)
                bundle = _commit_bundle()
                if bundle is not None:
                    tar.add(bundle, ".commit.bundle")
                    bundle.unlink()
            archive.seek(0)
            # Without the history config.json could not say which commit a run was made with.
            unpack = (
                f"mkdir -p {FOLDER} && cd {FOLDER} && tar xz && if [ -e .commit.bundle ]; then "
                "git init -q && git fetch -q .commit.bundle HEAD && git reset -q FETCH_HEAD; fi; "
                "status=$?; rm -f .commit.bundle; exit $status"
            )
            done = subprocess.run(self.command(unpack), stdin=archive)
        if done.returncode:
            raise UserError("the repository could not be sent: the same command again tries again")


def check_repository() -> None:
    """Raises UserError if there is more in this repository than its code, such as a data set."""
    sizes: dict[str, int] = collections.Counter()
    for name in _repository_files():
        sizes[name.partition("/")[0]] += (REPOSITORY / name).stat().st_size
    if sum(sizes.values()) > MOST_CODE_BYTES:
        largest = max(sizes, key=sizes.__getitem__)
        raise UserError(
            f"{REPOSITORY / largest} has {sizes[largest] / 1e6:,.0f} MB, which would be sent to "
            "the machine with the code: move it out of the repository, or into its data/"
        )


def _repository_files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    if listed.returncode == 0:
        names = listed.stdout.split("\0")
    else:  # downloaded without git
        ignored = {".venv", ".venv-sky", "data", "runs", "__pycache__"}
        paths = (path.relative_to(REPOSITORY) for path in REPOSITORY.rglob("*"))
        names = [str(path) for path in paths if not ignored & set(path.parts)]
    return [name for name in names if name and (REPOSITORY / name).is_file()]


def _commit_bundle() -> Path | None:
    """A file with the commit that is checked out and its history.

    None outside git, and in a shallow clone, whose bundle nobody could read.
    """
    shallow = subprocess.run(
        ["git", "rev-parse", "--is-shallow-repository"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    if shallow.stdout.strip() != "false":
        return None
    with tempfile.NamedTemporaryFile(suffix=".bundle", delete=False) as file:
        path = Path(file.name)
    done = subprocess.run(
        ["git", "bundle", "create", "-q", path, "HEAD"], cwd=REPOSITORY, capture_output=True
    )
    if done.returncode == 0:
        return path
    path.unlink()
    return None
