"""A run's files copied elsewhere while it trains, and fetched from there onto an empty machine.

    python3 trainer.py --mirror s3://bucket/prefix          any S3 store: AWS_ENDPOINT_URL names it
    python3 trainer.py --mirror hf://datasets/user/repo     or hf://user/repo, and folders therein
    python3 trainer.py --mirror file:///other/disk          a folder that is there

Below that address, <run name>/ has what a run's folder has: the newest checkpoints under their own
names, which bear their hash, and the files that go with them, whose hashes are in SHA256SUMS.

A thread copies after each checkpoint: always the newest one, so that a slow network skips some and
never has a queue. What it copies it then verifies there. An S3 store that keeps SHA-256 itself, as
Amazon's does, computes it as the file arrives, refuses a wrong one, and is asked for it; from all
others the file is read back. Nothing that fails there reaches training: it is logged when it begins
and when it ends, and tried again ever more seldom, at least once a minute.
"""

import base64
import contextlib
import dataclasses
import email.utils
import hashlib
import io
import itertools
import json
import os
import re
import secrets
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import checkpoint
import interruption
import sessions
from utils import (
    EXIT_NO_MIRROR,
    EXIT_USER_ERROR,
    RESULT_SETTINGS,
    UserError,
    changed_settings,
    format_duration,
    log,
    read_run,
    write_atomically,
)

TIMEOUT_S = 20.0  # without a byte from a store, or to it
LONGEST_WAIT_S = 60.0  # between two tries
PATIENCE_S = 600.0  # at a start that needs a store which may yet answer: another machine takes long
FINISHED_S = 60.0  # how long the last copies may take: of a run that is finished,
INTERRUPTED_S = 20.0  # of one that has to end, unless EC2 says how long it has,
COMPLETED_S = 3600.0  # and of one that was finished before, where nothing else waits
NOTICE_S, ENDING_S = 120.0, 10.0  # how long before EC2 gives notice, and what it takes to end

# What goes with the checkpoints: with these a run goes on, or is exported, on any machine.
# They have most of it in them: where there is time for one file more, it is the newest one.
BEFORE_CHECKPOINT = ("config.json",)
RESULTS = ("metrics.jsonl", "best.pt", "last.pt", "result.json")
COPIED_FILES = (*BEFORE_CHECKPOINT, sessions.FILE, *RESULTS)
SUMS = "SHA256SUMS"


class MirrorError(Exception):
    """Something is wrong with what a mirror holds; the text is ours, and may be shown."""


class Store(Protocol):
    """Where a mirror is: files by their names below the run's folder there."""

    def sizes(self) -> dict[str, int]:
        """Bytes of each file that is there; raises if the bucket, repo or disk is not."""

    def read(self, name: str) -> bytes:
        """A file's content."""

    def write(self, name: str, content: bytes) -> None:
        """Put a file there, in place of the one before."""

    def holds(self, name: str, content: bytes) -> bool:
        """Whether the file there has this content, by its hash."""

    def remove(self, name: str) -> None:
        """Remove a file."""


# ------------------------------------------------------------------------------ the stores


class _FolderStore:
    """A folder on another disk, which has to be there."""

    def __init__(self, root: Path, run_name: str) -> None:
        self.root, self.folder = root, root / run_name

    def sizes(self) -> dict[str, int]:
        next(self.root.iterdir(), None)  # a disk that is not mounted is no empty mirror
        there = {}
        for folder, _, names in os.walk(self.folder, onerror=self._raise):
            for path in (Path(folder, name) for name in names):
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    there[path.relative_to(self.folder).as_posix()] = path.stat().st_size
        return there

    def _raise(self, error: OSError) -> None:
        """What cannot be listed is not empty; but the folder may not be there yet."""
        if not isinstance(error, FileNotFoundError) or error.filename != str(self.folder):
            raise error

    def read(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)

    def holds(self, name: str, content: bytes) -> bool:
        return self.read(name) == content

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class _S3Store:
    """A prefix of an S3 bucket; the credentials are those that boto3 finds."""

    def __init__(self, bucket: str, folder: str) -> None:
        import botocore.exceptions

        self.bucket, self.folder = bucket, folder
        self.clock_ahead_s: float | None = None  # of this machine, by the store's last answer
        try:
            self._client = self._connect()
        except botocore.exceptions.CredentialRetrievalError:  # of another service, which may answer
            self._client = None
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            # Without the error's text: a password may stand in an address.
            raise UserError(
                f"S3 cannot be used as it is set up here ({type(error).__name__}): correct "
                "AWS_ENDPOINT_URL, AWS_PROFILE or ~/.aws/config"
            ) from None

    def _connect(self) -> Any:
        import boto3
        import botocore.config

        # By itself botocore gives an instance's role one second, once, to name its credentials.
        os.environ.setdefault("AWS_METADATA_SERVICE_TIMEOUT", "5")
        os.environ.setdefault("AWS_METADATA_SERVICE_NUM_ATTEMPTS", "3")
        # Without retries of its own: the mirror has them, and says so.
        config = botocore.config.Config(
            connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S, retries={"total_max_attempts": 1}
        )
        client = boto3.session.Session().client("s3", config=config)
        client.meta.events.register("after-call.s3", self._note_clock)
        return client

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Any]:
        """The client. After a failure it is made anew, but for one of the network or the store.

        For a client keeps what it found when it was made: no credentials, or those of a file that
        has been written anew since. Made at every try, they would keep the training threads busy.
        """
        import botocore.exceptions as trouble

        self._client = self._client or self._connect()
        try:
            yield self._client
        except (trouble.ConnectionError, trouble.HTTPClientError):
            raise
        except Exception as error:
            status, _ = _answer(error) or (0, "")
            if status < 500:
                self._client = None
            raise

    def _note_clock(self, parsed: dict[str, Any], **_: object) -> None:
        with contextlib.suppress(KeyError, ValueError, TypeError):
            date = parsed["ResponseMetadata"]["HTTPHeaders"]["date"]
            there = email.utils.parsedate_to_datetime(date).timestamp()
            self.clock_ahead_s = time.time() - there

    def sizes(self) -> dict[str, int]:
        with self._connected() as client:
            pages = client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=f"{self.folder}/"
            )
            files = [file for page in pages for file in page.get("Contents", ())]
        return {file["Key"].removeprefix(f"{self.folder}/"): file["Size"] for file in files}

    def read(self, name: str) -> bytes:
        with self._connected() as client:
            return client.get_object(**self._named(name))["Body"].read()

    def write(self, name: str, content: bytes) -> None:
        digest = base64.b64encode(hashlib.sha256(content).digest()).decode()
        with self._connected() as client:
            client.put_object(
                **self._named(name),
                Body=io.BytesIO(content),  # sent block by block, each with the whole timeout
                ChecksumAlgorithm="SHA256",
                ChecksumSHA256=digest,
            )

    def holds(self, name: str, content: bytes) -> bool:
        with self._connected() as client:
            head = client.head_object(**self._named(name), ChecksumMode="ENABLED")
        if head["ContentLength"] != len(content):
            return False
        if "ChecksumSHA256" not in head:
            return self.read(name) == content
        return base64.b64decode(head["ChecksumSHA256"]) == hashlib.sha256(content).digest()

    def remove(self, name: str) -> None:
        with self._connected() as client:
            client.delete_object(**self._named(name))

    def _named(self, name: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": f"{self.folder}/{name}"}


class _HuggingFaceStore:
    """A folder in a model or dataset repo of a Hugging Face hub, under the token that is found.

    Each file is a commit, so that the repo's history keeps what is removed.
    """

    def __init__(self, repo_type: str, repo_id: str, folder: str) -> None:
        self.hub = quiet_hub()
        # Without retries of its own here too: six tries of one that hangs take minutes, silently.
        self.hub.utils.http_backoff.__kwdefaults__["max_retries"] = 0
        self.api = self.hub.HfApi()
        self.repo, self.folder = {"repo_type": repo_type, "repo_id": repo_id}, folder

    def sizes(self) -> dict[str, int]:
        try:
            found = list(
                self.api.list_repo_tree(**self.repo, path_in_repo=self.folder, recursive=True)
            )
        except self.hub.errors.EntryNotFoundError:  # the repo is there, the folder not yet
            return {}
        files = [entry for entry in found if isinstance(entry, self.hub.hf_api.RepoFile)]
        return {file.path.removeprefix(f"{self.folder}/"): file.size for file in files}

    def read(self, name: str) -> bytes:
        path = f"{self.folder}/{name}"
        with tempfile.TemporaryDirectory() as folder:  # not the cache, which keeps everything
            return Path(
                self.hub.hf_hub_download(**self.repo, filename=path, local_dir=folder)
            ).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        path = f"{self.folder}/{name}"
        self.api.upload_file(**self.repo, path_or_fileobj=content, path_in_repo=path)

    def holds(self, name: str, content: bytes) -> bool:
        return self.read(name) == content

    def remove(self, name: str) -> None:
        self.api.delete_file(f"{self.folder}/{name}", **self.repo)


def quiet_hub() -> Any:
    """The package huggingface_hub, told to give up after TIMEOUT_S and to print nothing.

    By itself it waits for ever, shows bars, and prints the addresses that failed, of which some are
    signed. Large files go by Git LFS: their other way, hf_xet's, heeds no limit that is set here.
    """
    import huggingface_hub
    import huggingface_hub.constants
    import huggingface_hub.errors
    import huggingface_hub.hf_api
    import huggingface_hub.utils

    limits = dict.fromkeys(("connect", "read", "write", "pool"), TIMEOUT_S)
    hooks = {"request": [lambda request: request.extensions.update(timeout=limits)]}
    client = type(huggingface_hub.utils.get_session())
    huggingface_hub.set_client_factory(lambda: client(follow_redirects=True, event_hooks=hooks))
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.utils.disable_progress_bars()
    huggingface_hub.utils.logging.set_verbosity_error()
    return huggingface_hub


def open_store(url: str, run_name: str) -> Store:
    """The store at an address, not contacted yet; raises UserError if there can be none."""
    scheme, _, place = url.partition("://")
    parts = [part for part in place.split("/") if part]
    try:
        if scheme == "file" and place.startswith("/") and parts:
            return _FolderStore(Path(urllib.parse.unquote(place)), run_name)
        plain = (
            place[:1] != "/" and parts and all(re.fullmatch(r"[\w.=+-]+", part) for part in parts)
        )
        if scheme == "s3" and plain:
            return _S3Store(parts[0], "/".join([*parts[1:], run_name]))
        if scheme == "hf" and plain:
            repo_type = "dataset" if parts[0] == "datasets" else "model"
            parts = parts[1:] if parts[0] in ("datasets", "models") else parts
            if len(parts) >= 2 and parts[0] not in ("spaces", "buckets"):
                folder = "/".join([*parts[2:], run_name])
                return _HuggingFaceStore(repo_type, "/".join(parts[:2]), folder)
    except ImportError as error:
        raise UserError(f"--mirror needs {error.name}: pip install -r requirements.txt") from None
    # Not repeated here, since a password may stand in it.
    raise UserError(
        "that is no address for --mirror: write s3://BUCKET/PREFIX, hf://datasets/USER/REPO, "
        "hf://USER/REPO or file:///FOLDER; credentials come from the environment"
    )


# ------------------------------------------------------------------------------ the mirror


def last_copies_s(requests: interruption.Requests) -> float:
    """How long the last copies may take of a run that was asked to stop, or is out of budget."""
    if not requests.stop:
        return FINISHED_S
    if requests.notice is None:
        return INTERRUPTED_S
    left_s = requests.notice.taken_at - time.time() - ENDING_S
    return min(max(INTERRUPTED_S, left_s), NOTICE_S - ENDING_S)  # one of the clocks may be wrong


def start(url: str, folder: Path) -> "Mirror":
    """The mirror of a run's folder; with an empty address it does nothing.

    If the folder has no checkpoint that is whole, the newest one of the mirror is fetched, with
    what goes with it. Raises UserError for a wrong address; if the folder has none and the mirror
    cannot be read, with EXIT_NO_MIRROR where that may pass by itself; and if the mirror's run is
    another than the folder's, or further on.
    """
    if not url:
        return Mirror(url, folder, None)
    store = _open_other(url, folder)
    mirror = Mirror(url, folder, store)
    newest = _newest_whole(folder)
    here = newest[0] if newest else None
    fetched: dict[str, bytes] = {}
    try:
        fetched = mirror.later_than(here) if here else _patiently(mirror)
    except UserError:
        raise
    except Exception as error:  # boto3's, huggingface_hub's and the system's have nothing in common
        words = in_words(error)
        if here is None:
            raise UserError(
                f"the mirror {url} cannot be read ({words}), and {folder} has no checkpoint: a run "
                "that is there would be begun anew: mend it, or leave out --mirror",
                EXIT_NO_MIRROR if _may_pass(error) else EXIT_USER_ERROR,
            ) from None
        log.warning("the mirror %s cannot be read (%s): training goes on", url, words)
    paid_here = folder / sessions.FILE
    if sessions.FILE in fetched and paid_here.exists():
        known = set(paid_here.read_bytes().splitlines())
        if known >= set(fetched[sessions.FILE].splitlines()):
            del fetched[sessions.FILE]
    if fetched:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        with contextlib.closing(checkpoint.lock(folder)):
            if _newest_whole(folder) != newest:
                raise UserError(
                    f"another process has just saved to {folder}: give the same command again, to "
                    "go on from there"
                )
            for name, content in fetched.items():
                whole = content
                if name == sessions.FILE and paid_here.exists():  # what was paid here counts too
                    whole = sessions.merged(content, paid_here.read_bytes())
                write_atomically(folder / name, whole)
        log.info("fetched %s from %s", ", ".join(fetched), url)
    return mirror


def _open_other(url: str, folder: Path) -> Store:
    """The store of a run's mirror; raises UserError if there can be none, or it is the run's."""
    store = open_store(url, folder.name)
    if isinstance(store, _FolderStore) and store.folder.resolve() == folder.resolve():
        raise UserError(f"--mirror {url} is where the run itself is: name another disk")
    return store


@dataclasses.dataclass(frozen=True)
class Access:
    """What a mirror lets this machine do."""

    checkpoints: list[str]  # names of those that are there, the newest first
    refused: dict[str, str]  # of "list", "write", "read" and "remove" those that fail, and why
    advice: str = ""  # what to do about it
    left_behind: str = ""  # name of a file that could not be removed
    clock_ahead_s: float | None = None  # of this machine's clock, by that of an S3 store
    sessions: bytes = b""  # the run's, as they are there
    other_settings: list[str] = dataclasses.field(default_factory=list)  # see Mirror


def try_access(url: str, folder: Path) -> Access:
    """Do with a small file what a mirror has to be able to do, and remove it.

    Each is tried once, in a repo of Hugging Face as two commits. Raises UserError for an address
    that can be none.
    """
    store = _open_other(url, folder)
    name = f"preflight-{secrets.token_hex(8)}"
    refused: dict[str, str] = {}
    there: dict[str, int] = {}
    written, paid, different = False, b"", []
    is_new = isinstance(store, _FolderStore) and not store.folder.exists()
    try:
        there = store.sizes()
    except Exception as error:  # of many kinds, as in start
        refused["list"] = in_words(error)
    # Where something else than a permission is missing, all others would fail likewise.
    if not refused or " 403" in refused["list"]:
        for action, try_it in (
            ("write", lambda: store.write(name, name.encode())),
            ("read", lambda: _expect(store.read(name) == name.encode())),
            ("remove", lambda: store.remove(name)),
        ):
            try:
                try_it()
            except Exception as error:
                refused[action] = in_words(error)
                if action == "write":
                    break
            written = written or action == "write"
        try:
            paid = store.read(sessions.FILE) if sessions.FILE in there else b""
            different = Mirror(url, folder, store).other_settings(there)
        except Exception as error:
            refused["read"] = in_words(error)
        if is_new:
            with contextlib.suppress(OSError):
                store.folder.rmdir()
    return Access(
        newest_first(_checkpoints(there)),
        refused,
        _advise(url, refused),
        name if written and "remove" in refused else "",
        getattr(store, "clock_ahead_s", None),
        paid,
        different,
    )


def _expect(same: bool) -> None:
    if not same:
        raise MirrorError("what was sent comes back changed")


S3_PERMISSIONS = {
    "list": "s3:ListBucket",
    "write": "s3:PutObject",
    "read": "s3:GetObject",
    "remove": "s3:DeleteObject",
}


def _advise(url: str, refused: dict[str, str]) -> str:
    """What to do where a mirror refuses something."""
    whys = " ".join(refused.values())
    scheme, _, place = url.partition("://")
    bucket = place.split("/")[0]
    missing = ", ".join(S3_PERMISSIONS[action] for action in refused)
    cases = {
        "RequestTimeTooSkewed": "set this machine's clock",
        "no credentials": "without them there is no mirror",
    }
    if scheme == "s3":
        cases["AccessDenied"] = f"allow this machine's role or user {missing} on bucket {bucket}"
        cases[" 404"] = f"create bucket {bucket}, or correct the address"
        cases |= dict.fromkeys((" 403", " 400"), "give it credentials that are valid")
    elif scheme == "hf":
        token = "create the repo, or set HF_TOKEN to a token that may write to it"
        cases |= dict.fromkeys((" 401", " 403", " 404"), token)
    else:
        return "mount that disk, or let this user write there"
    network = "mend the network, or correct the address (AWS_ENDPOINT_URL names another S3 store)"
    return next((advice for sign, advice in cases.items() if sign in whys), network)


class Mirror:
    """Copies a run's newest files in a thread; see the module's docstring."""

    def __init__(self, url: str, folder: Path, store: Store | None) -> None:
        self.url, self.folder, self.store = url, folder, store
        self.ours: set[str] = set()  # checkpoints there that are of this run, as far as is known
        self.copied: dict[str, tuple[int, ...]] = {}  # what the thread has verified; see _version
        self._is_ours = False  # whether the run there is known to be this one
        self._changed = threading.Condition()
        # How often copies were asked for, and up to which one they are made, or being made.
        self._asked = self._answered = self._copying = 0
        self._finishing = False
        self._trouble = ""  # why the last try failed
        self._thread: threading.Thread | None = None

    def copy(self) -> None:
        """Ask for copies of the newest files; returns at once."""
        if self.store is None:
            return
        with self._changed:
            self._asked += 1
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mirror", daemon=True)
                self._thread.start()

    def finish(self, timeout_s: float) -> bool:
        """Copy what is missing yet, for at most so long; says and returns whether all is there."""
        if self.store is None:
            return True
        log.info("copying the last files to %s, for at most %.0f s", self.url, timeout_s)
        with self._changed:
            self._finishing = True
        self.copy()
        with self._changed:
            # Where an hour is allowed, it is for a slow network, not for one that fails.
            self._changed.wait_for(
                lambda: self.is_complete() or (self._trouble and timeout_s >= COMPLETED_S),
                timeout_s,
            )
            complete = self.is_complete()
            trouble = self._trouble or "it takes too long"
        if complete:
            log.info("the mirror %s is complete", self.url)
        else:
            log.warning(
                "the mirror %s is not complete (%s): the same command again completes it",
                self.url, trouble,
            )  # fmt: skip
        return complete

    def is_complete(self) -> bool:
        """Whether all copies that were asked for are there; of none, where there is no mirror."""
        return self._answered == self._asked

    def _work(self) -> None:
        wait_s = 1.0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._asked > self._answered)
                asked = self._copying = self._asked
            try:
                self._copy_newest()
            except Exception as error:  # whatever it is, training shall not know
                words = in_words(error)
                with self._changed:
                    failed_before, self._trouble = self._trouble, words
                    self._changed.notify_all()
                    if not failed_before:
                        log.warning(
                            "copying to %s fails (%s): training goes on, copying is tried again",
                            self.url, words,
                        )  # fmt: skip
                    if self._finishing:
                        self._changed.wait(1.0)
                    else:
                        self._changed.wait_for(lambda: self._finishing, wait_s)
                wait_s = min(2 * wait_s, LONGEST_WAIT_S)
            else:
                with self._changed:
                    if self._trouble:
                        log.info("copying to %s works again", self.url)
                    self._trouble, self._answered, wait_s = "", asked, 1.0
                    self._changed.notify_all()

    def _copy_newest(self) -> None:
        """Bring the mirror to where the folder is, in an order in which it is whole at any time."""
        there = self.store.sizes()
        newest = _newest_whole(self.folder)
        self._refuse_another(newest[0] if newest else None, there)
        self._copy_files(there, BEFORE_CHECKPOINT)
        if newest:
            self._copy_checkpoint(*newest, there)
            there = self.store.sizes()
        self._copy_files(there, COPIED_FILES)

    def _copy_checkpoint(self, name: str, content: bytes, there: dict[str, int]) -> None:
        """Copy a checkpoint, and only then remove older ones."""
        path = f"checkpoints/{name}"
        if path not in there or path not in self.copied:
            self._put(path, content, there)
            self.copied[path] = ()
            self.ours.add(name)
        found = newest_first({*_checkpoints(there), name})
        kept = found[found.index(name) :][: checkpoint.GENERATIONS_KEPT]
        # A later one that is here too must be damaged here: then the copy is the only good one.
        mending = {
            other
            for other in found
            if age(other) > age(name) and (self.folder / "checkpoints" / other).exists()
        }
        for other in set(found) - set(kept) - mending:
            self.store.remove(f"checkpoints/{other}")
        for file in there:  # of a process that was killed while copying to another disk
            if re.fullmatch(r"checkpoints/\.epochs-.*\.tmp", file):
                self.store.remove(file)

    def _copy_files(self, there: dict[str, int], names: tuple[str, ...]) -> None:
        if SUMS not in there:
            self.copied.clear()  # to be listed, they are verified once more
        changed = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                version = _version(self.folder / name)
                if name not in there or self.copied.get(name) != version:
                    changed[name] = version, (self.folder / name).read_bytes()
        if not changed:
            return
        # While they are replaced, both the old and the new ones are right.
        before = self._sums(there)
        new = {
            (hashlib.sha256(content).hexdigest(), name) for name, (_, content) in changed.items()
        }
        self._write_sums(before | new)
        for name, (version, content) in changed.items():
            if self._finishing and self._asked > self._copying:
                return  # there is a newer checkpoint, and little time
            self._put(name, content, there)
            self.copied[name] = version
        self._write_sums(new | {line for line in before if line[1] not in changed})

    def _put(self, name: str, content: bytes, there: dict[str, int]) -> None:
        """Write and verify a file, unless it is there from before a restart."""
        if there.get(name) == len(content) and self.store.holds(name, content):
            return
        self.store.write(name, content)
        if not self.store.holds(name, content):
            raise MirrorError(f"{name} is not there as it was sent")

    def _sums(self, there: dict[str, int]) -> set[tuple[str, str]]:
        """Hash and name of each line in the mirror's SHA256SUMS."""
        text = self.store.read(SUMS).decode("ascii", "replace") if SUMS in there else ""
        pairs = (line.partition("  ") for line in text.splitlines())
        return {(digest, name) for digest, _, name in pairs}

    def _write_sums(self, lines: set[tuple[str, str]]) -> None:
        ordered = sorted(lines, key=lambda line: line[::-1])
        text = "".join(f"{digest}  {name}\n" for digest, name in ordered)
        self._put(SUMS, text.encode(), {})

    def other_settings(self, there: dict[str, int]) -> list[str]:
        """In words, settings for which the run there cannot be the folder's; none if it may be.

        Nothing is known where one of them has no config.json. Epochs may be added to a run, once.
        """
        if not _checkpoints(there) or "config.json" not in there:
            return []
        content = self._whole_files(there, ("config.json",)).get("config.json", b"{}")
        with contextlib.suppress(UserError, ValueError, KeyError, TypeError):
            config, *_ = read_run(self.folder)
            before = json.loads(content)["config"]
            added = config.extra_epochs, before.get("extra_epochs", 0)
            may_differ = {"extra_epochs"} if 0 in added else set()
            return changed_settings(before, config, RESULT_SETTINGS - may_differ)
        return []

    def _refuse_another(self, here: str | None, there: dict[str, int]) -> None:
        """Raise MirrorError if the mirror has another run, or later checkpoints than ours."""
        different = [] if self._is_ours else self.other_settings(there)
        if different:
            raise MirrorError("it holds another run of that name")
        self._is_ours = True
        others = [name for name in _checkpoints(there) if name not in self.ours]
        later = [name for name in others if here and age(name) > age(here)]
        if later:
            raise MirrorError(f"it holds a run of that name that is further on, {later[0]}")

    def later_than(self, here: str | None) -> dict[str, bytes]:
        """The mirror's newest checkpoint that is whole and later than the one named `here`.

        Before it the files that go with it; of these the sessions even where there is no such
        checkpoint, and nothing else where there is a `here`. By their names in the run's folder.
        Raises UserError as in `start`.
        """
        there = self.store.sizes()
        found = newest_first(_checkpoints(there))
        later = [name for name in found if here is None or age(name) > age(here)]
        if here or any((self.folder / name).exists() for name in RESULTS):
            refuse_other(self.url, self.folder.name, self.other_settings(there))
        # One that is here too, damaged, is this run's; another one may be of anybody.
        if here and later and not (self.folder / "checkpoints" / later[0]).exists():
            raise UserError(
                f"the mirror {self.url} holds run {self.folder.name} further on ({later[0]}) than "
                f"{self.folder} does ({here}): to go on with the mirror's, move that folder away; "
                "to keep this one, take another --mirror"
            )
        self.ours.update(found)
        self._is_ours = True
        for name in later:
            log.info("reading %s from %s", name, self.url)
            content = self.store.read(f"checkpoints/{name}")
            if is_whole(name, content):
                files = self._whole_files(there, (sessions.FILE,) if here else COPIED_FILES)
                return {**files, f"checkpoints/{name}": content}
            log.warning("%s is damaged in %s: left aside", name, self.url)
        if later and here is None:
            raise UserError(
                f"every checkpoint of run {self.folder.name} in {self.url} is damaged: remove it "
                "there, or begin again with another --name"
            )
        return self._whole_files(there, (sessions.FILE,))

    def _whole_files(self, there: dict[str, int], names: tuple[str, ...]) -> dict[str, bytes]:
        sums = self._sums(there)
        whole = {}
        for name in names:
            if name in there:
                content = self.store.read(name)
                if (hashlib.sha256(content).hexdigest(), name) in sums:
                    whole[name] = content
                else:
                    log.warning("%s is damaged in %s: left aside", name, self.url)
        return whole


# ------------------------------------------------------------------------------ small helpers


def refuse_other(url: str, name: str, other_settings: list[str]) -> None:
    """Raise UserError where a mirror's run has other settings than the folder's."""
    if other_settings:
        raise UserError(
            f"the mirror {url} holds another run named {name}, which this one would replace (there "
            f"and here: {'; '.join(other_settings)}): take another --name or --mirror, or remove "
            "it there"
        )


def age(name: str) -> tuple[int, int]:
    """Finished epochs and steps of a checkpoint, by which a later one is greater."""
    return checkpoint.parse_name(name)[:2]


def newest_first(names: Iterable[str]) -> list[str]:
    """Names of checkpoints in order."""
    return sorted(names, key=checkpoint.parse_name, reverse=True)


def is_whole(name: str, content: bytes) -> bool:
    """Whether a checkpoint has the hash that is in its name."""
    return hashlib.sha256(content).hexdigest().startswith(checkpoint.parse_name(name)[2])


def _checkpoints(there: Iterable[str]) -> list[str]:
    """The checkpoints among a mirror's files, by their names alone."""
    names = [path.removeprefix("checkpoints/") for path in there if path.startswith("checkpoints/")]
    return [name for name in names if checkpoint.parse_name(name)]


def _newest_whole(folder: Path) -> tuple[str, bytes] | None:
    """Name and content of a run's newest checkpoint that is whole; raises OSError like a list."""
    paths = checkpoint.generations(folder / "checkpoints")
    for name in newest_first(path.name for path in paths):
        try:
            content = (folder / "checkpoints" / name).read_bytes()
        except PermissionError:
            raise
        except OSError:  # a newer one was saved, and this one removed; or the disk fails here
            continue
        if is_whole(name, content):
            return name, content
    return None


def _version(path: Path) -> tuple[int, ...]:
    """What differs once a file is replaced or added to; raises FileNotFoundError."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def _patiently(mirror: Mirror) -> dict[str, bytes]:
    """What a mirror has for an empty folder, or what the last of some tries raised.

    Three, within seconds; what may pass by itself is tried for PATIENCE_S, and told once a minute.
    """
    started, told = time.monotonic(), 0
    for tries in itertools.count(1):
        try:
            return mirror.later_than(None)
        except UserError:
            raise
        except Exception as error:
            past_s, may_pass = time.monotonic() - started, _may_pass(error)
            if tries >= 3 and not (may_pass and past_s < PATIENCE_S):
                raise
            if may_pass and past_s >= 60 * told:
                told += 1
                log.warning(
                    "the mirror %s cannot be read yet (%s): it is tried again, for up to %s",
                    mirror.url, in_words(error), format_duration(PATIENCE_S),
                )  # fmt: skip
            time.sleep(min(2 ** (tries - 1), 20))  # which a signal ends


def _may_pass(error: Exception) -> bool:
    """Whether a store that fails so may answer later, without anybody's doing."""
    error = _cause(error)
    answer = _answer(error)
    if answer:
        return answer[0] == 429 or answer[0] >= 500
    kinds = [kind.__name__ for kind in type(error).__mro__]
    return any(part in kind for part in _TROUBLES for kind in kinds)


def _cause(error: Exception) -> Exception:
    """What huggingface_hub wraps in a RuntimeError where a large file fails; others as they are."""
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        return error.__cause__
    return error


def _answer(error: Exception) -> tuple[int, str] | None:
    """Status of a store's answer, and S3's code beside it; None if there was none."""
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):  # boto3's
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return status, str(answer.get("Error", {}).get("Code", ""))
    return (answer.status_code, "") if hasattr(answer, "status_code") else None  # the hub's


def in_words(error: Exception) -> str:
    """What went wrong at a store; never its own text, in which a signed address may stand."""
    if isinstance(error, MirrorError):
        return str(error)
    error = _cause(error)
    answer = _answer(error)
    if answer:
        words = [word for word in map(str, answer) if re.fullmatch(r"\w{1,40}", word)]
        return f"it answers {' '.join(dict.fromkeys(words))}"
    kinds = [kind.__name__ for kind in type(error).__mro__]
    for part, words in _TROUBLES.items():
        if any(part in kind for kind in kinds):
            return words
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return kinds[0]


# By parts of the names of errors; each may pass.
_TROUBLES = {
    "NoCredentials": "no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the "
    "instance a role",
    "Timeout": "it does not answer",
    "EndpointConnection": "it cannot be reached",
    "ConnectError": "it cannot be reached",
    "LocalEntryNotFound": "it cannot be reached",
    "CredentialRetrieval": "whoever has the credentials does not answer",
    "ConnectionClosed": "the connection broke off",
    "NetworkError": "the connection broke off",
    "RemoteProtocol": "the connection broke off",
    "ResponseStreaming": "the connection broke off",
    "IncompleteRead": "the connection broke off",
}
