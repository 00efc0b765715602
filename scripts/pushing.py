"""How files get onto a Hugging Face hub: the token, the repo, the question, one commit.

What push_model.py and push_space.py share. What fails leaves the repo's files as they were, unless
the hub has made the commit and only its answer was lost: then that is told.
"""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import mirror
from utils import EXIT_FAILED, EXIT_INTERRUPTED, UserError

NO_FILES = {".gitattributes"}  # what a hub puts into every new repo
NO_APP = {"README.md"}  # and into a new Space
REFUSED = {413, 415, 422}  # what the same command will be answered again
TOKENS_PAGE = "https://huggingface.co/settings/tokens"


def is_repo_name(name: str) -> bool:
    """Whether a hub would take it, with or without an owner before a slash."""
    hub = mirror.quiet_hub()
    try:
        hub.utils.validate_repo_id(name)
    except hub.errors.HFValidationError:
        return False
    return True


def check_repo(repo: str) -> None:
    """Raise UserError unless it is USER/REPO in a hub's letters."""
    if repo.count("/") != 1 or not is_repo_name(repo):
        raise UserError(
            f"{repo!r} is no name for a repo: write USER/REPO, each of at most 96 letters, digits, "
            "'-', '_' and '.'"
        )


def list_files(files: Mapping[str, bytes]) -> None:
    """Print each file's size and name."""
    for name, content in files.items():
        print(f"{len(content):>12,} bytes  {name}")


@contextlib.contextmanager
def hub_errors(
    repo: str, done_so_far: Callable[[], str] = lambda: "nothing was sent"
) -> Iterator[None]:
    """Turn what a hub or the way to it does into a UserError, without its own text.

    Addresses that are signed may stand in that. `done_so_far` is asked once something has failed.
    """
    try:
        yield
    except UserError:
        raise
    except KeyboardInterrupt:
        raise UserError(f"interrupted; {done_so_far()}", EXIT_INTERRUPTED) from None
    except Exception as raised:  # httpx's, huggingface_hub's, hf_xet's and the system's
        if str(raised).startswith("Invalid metadata in README.md"):  # what a hub says of its YAML
            raise UserError(f"{raised}; {done_so_far()}", EXIT_FAILED) from None
        # Of a large file's upload the hub's answer is only the cause.
        error = raised.__cause__ if isinstance(raised.__cause__, Exception) else raised
        status = getattr(getattr(error, "response", None), "status_code", None)
        told = mirror.in_words(error)
        advice = {
            401: "the hub does not know this token: give `hf auth login` or HF_TOKEN a new one",
            402: "the hub wants to be paid for it: a Gradio Space on the free CPU needs PRO, see "
            "https://huggingface.co/pricing",
            403: f"this token may not write to {repo}: make one that may, at {TOKENS_PAGE}, or "
            "name another repo",
            **dict.fromkeys(REFUSED, f"the hub does not take it ({told})"),
        }.get(
            status,
            f"the hub is out of reach or out of order ({told}): try the same command again later",
        )
        raise UserError(f"{advice}; {done_so_far()}", EXIT_FAILED) from None


def push(
    files: Mapping[str, bytes],
    repo: str,
    message: str,
    *,
    public: bool,
    yes: bool,
    is_space: bool = False,
    hardware: str | None = None,
) -> str:
    """Put the files into the repo in one commit; returns a line that tells where they are.

    A model repo keeps what else it has, a Space loses it in the same commit. A new repo is private
    unless it shall be public. `hardware` is that of a new Space, None the hub's default. Raises
    UserError, which tells what has become of the repo's files.
    """
    hub = mirror.quiet_hub()
    api, kind = hub.HfApi(), "space" if is_space else "model"
    check_permission(hub, api, repo)
    address = f"{api.endpoint}/{'spaces/' * is_space}{repo}"
    with hub_errors(repo):
        try:
            found = api.repo_info(repo, repo_type=kind, files_metadata=True)
        except hub.errors.RepositoryNotFoundError:
            found = None
    there = files_of(found)
    changed = differing(files, there)
    stays = "; it stays private, as it was" * (found is not None and found.private and public)
    others = sorted(there.keys() - files.keys())
    removed = others if is_space else []
    if found is not None:
        if not found.private and not public:
            raise UserError(
                f"{repo} is public: give --public, or name another repo; nothing was sent"
            )
        if not changed and not removed:
            return f"nothing was sent: {address} is up to date{stays}"
        if there.keys() - (NO_APP if is_space else set()):
            changes = {
                "replaced": [name for name in changed if name in there],
                "added": [name for name in changed if name not in there],
                "removed": removed,
                "left": [] if is_space else others,
            }
            ask(repo, changes, yes)
    if found is None:
        place = {"space_sdk": "gradio", "space_hardware": hardware} if is_space else {}
        with hub_errors(repo):
            api.create_repo(repo, repo_type=kind, private=not public, **place)
    operations = [hub.CommitOperationAdd(name, files[name]) for name in changed]
    operations += [hub.CommitOperationDelete(name, is_folder=False) for name in removed]

    def done() -> str:  # for the answer may be lost of what was done
        try:
            now = files_of(api.repo_info(repo, repo_type=kind, files_metadata=True))
        except Exception:
            return f"whether {repo} was changed is not known: the same command tells"
        if differing(files, now) != changed or not now.keys() >= set(removed):
            return f"{repo} was changed all the same: the same command checks it"
        return f"{repo} is as it was" if found else f"the new repo {repo} is empty"

    with hub_errors(repo, done):
        commit = api.create_commit(repo, operations, commit_message=message, repo_type=kind)
    with hub_errors(repo, lambda: f"the commit was made, but not checked: {commit.commit_url}"):
        sent = api.repo_info(repo, repo_type=kind, revision=commit.oid, files_metadata=True)
    if missing := differing(files, files_of(sent)):  # what .gitignore in the repo forbids
        raise UserError(
            f"the hub did not take {', '.join(missing)}: look at .gitignore in {address}",
            EXIT_FAILED,
        )
    return f"sent to {address}{stays}"


def check_permission(hub: Any, api: Any, repo: str) -> None:
    """Raise UserError unless there is a token that may write and that belongs to the owner."""
    token = hub.get_token()
    if token is None or not token.isascii():
        what = "no token" if token is None else "the token has letters that no hub's token has"
        raise UserError(
            f"{what}: give `hf auth login` one that may write, or set HF_TOKEN; they are made at "
            f"{TOKENS_PAGE}"
        )
    owner = repo.partition("/")[0]
    with hub_errors(repo):
        person = api.whoami()
    owners = [person["name"], *(group["name"] for group in person.get("orgs", ()))]
    if owner not in owners:
        raise UserError(
            f"{repo} belongs to {owner}, and this token to {person['name']}: name a repo of "
            f"{' or '.join(owners)}"
        )
    if person.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(f"this token may only read: make one that may write, at {TOKENS_PAGE}")


def files_of(found: Any) -> dict[str, Any]:
    """A repo's files by their names, as the hub describes them; None: there is no such repo."""
    siblings = found.siblings or () if found else ()
    return {file.rfilename: file for file in siblings if file.rfilename not in NO_FILES}


def differing(files: Mapping[str, bytes], there: Mapping[str, Any]) -> list[str]:
    """The names of the files that the hub does not have as they are here."""
    return [name for name, content in files.items() if not is_same(content, there.get(name))]


def is_same(content: bytes, there: Any) -> bool:
    """Whether a file on the hub has this content; None: it is not there."""
    if there is None:
        return False
    if there.lfs:
        return there.lfs.sha256 == hashlib.sha256(content).hexdigest()
    return there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def ask(repo: str, changes: Mapping[str, list[str]], yes: bool) -> None:
    """Tell what changes in a repo that has files; UserError if they are not to be changed."""
    told = "; ".join(f"{what}: {', '.join(names)}" for what, names in changes.items() if names)
    question = f"{repo} has files already ({told})"
    if yes:
        print(question)
    elif not sys.stdin.isatty():
        raise UserError(f"{question}: give --yes to go on; nothing was sent")
    else:
        try:
            answer = input(f"{question}. Go on? [y/N] ")
        except EOFError:  # Ctrl-D
            answer = ""
        if answer.strip().lower() not in ("y", "yes"):
            raise UserError("nothing was sent")
