"""A stand-in for a Hugging Face hub on loopback: as much of its API as mirror and push use."""

import base64
import hashlib
import http.server
import json
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMIT = "0" * 40


def is_large(path: str) -> bool:
    """Whether a file is kept beside git; the real hub goes by content and .gitattributes too."""
    return path.endswith((".pt", ".safetensors", ".png", ".jpg", ".onnx"))


def blob(path: str, content: bytes) -> dict[str, Any]:
    """A file's hash as preupload tells it, and as the list of a repo's files does."""
    sha256 = hashlib.sha256(content).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\n"
    pointer += f"size {len(content)}\n"
    in_git = pointer.encode() if is_large(path) else content
    sha1 = hashlib.sha1(b"blob %d\0" % len(in_git) + in_git).hexdigest()
    if not is_large(path):
        return {"oid": sha1, "sibling": {"blobId": sha1}}
    lfs = {"sha256": sha256, "size": len(content), "pointerSize": len(pointer)}
    return {"oid": sha256, "sibling": {"blobId": sha1, "lfs": lfs}}


def ignored_by_git(ignore: str, paths: list[str]) -> set[str]:
    """Those of the paths that git itself ignores with this text as .gitignore."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, ".gitignore").write_text(ignore)
        subprocess.run(["git", "init", "--quiet", folder], check=True)
        checked = subprocess.run(
            ["git", "-C", folder, "check-ignore", "--no-index", "--stdin", "-z"],
            input="\0".join(paths),
            capture_output=True,
            text=True,
        )
    return set(checked.stdout.split("\0")) - {""}


class Hub(http.server.ThreadingHTTPServer):
    """Its repos are by type and name, such as models/user/repo; without a token it takes any."""

    def __init__(self, *repos: str) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repos: dict[str, dict[str, bytes]] = {repo: {} for repo in repos}
        self.private: dict[str, bool] = dict.fromkeys(repos, False)
        self.token = ""
        self.user, self.organizations, self.role = "user", ["lab"], "write"
        self.fault: Any = None  # a status to answer with, "hang"
        self.fault_at = ""  # the part of a path that alone is answered so; all, if empty
        self.lost: Callable[[], None] | None = None  # called in place of the answer to a commit
        self.stop_next = False  # halfway in the next large file, and never go on
        self.hurry = threading.Event()  # ends what hangs
        self.requests: list[tuple[str, str]] = []  # method and path
        self.created: list[dict[str, Any]] = []  # what each new repo was asked for with
        self.uploaded: dict[str, bytes] = {}  # large files by their SHA-256, before the commit
        self.verified: set[str] = set()  # those whose arrival the client has asked about
        self.commits: list[list[str]] = []  # the paths that each of them changed
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def close(self) -> None:
        self.hurry.set()
        self.shutdown()
        self.server_close()


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        """The tests read what arrived from `requests`."""

    def refused(self, path: str) -> bool:
        """Whether the request has been answered, or left without an answer, as `fault` says."""
        self.server.requests.append((self.command, path))
        if self.server.fault and self.server.fault_at in path:
            if self.server.fault == "hang":
                self.server.hurry.wait()
                self.close_connection = True
            else:
                self.answer(self.server.fault, {"error": "out of order"})
            return True
        given = self.headers.get("Authorization", "")
        if path.startswith("/large/") or not self.server.token:
            return False
        if given != f"Bearer {self.server.token}":
            self.answer(401, {"error": "Invalid credentials"})
            return True
        return False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if self.refused(path):
            return
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.validate(json.loads(body)["content"])
        elif path == "/large/verify":
            wanted = json.loads(body)
            self.server.verified.add(wanted["oid"])
            there = self.server.uploaded.get(wanted["oid"], b"")
            self.answer(200 if len(there) == wanted["size"] else 404, {})
        elif found := re.fullmatch(r"/(.*)\.git/info/lfs/objects/batch", path):
            self.answer(200, {"transfer": "basic", "objects": self.places(json.loads(body))})
        elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/(preupload|commit)/main", path):
            repo, action = found.groups()
            if repo not in self.server.repos:
                self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            elif action == "preupload":
                self.answer(200, {"files": self.modes(repo, json.loads(body))})
            else:
                self.commit(repo, body)
        else:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    def validate(self, card: str) -> None:
        """Of the rules for a card's head only the one on short_description."""
        found = re.search("^short_description: (.*)$", card, re.MULTILINE)
        if found and len(found[1]) > 60:
            told = '"short_description" must be at most 60 characters long'
            self.answer(400, {"errors": [{"message": told}], "warnings": []})
        else:
            self.answer(200, {"errors": [], "warnings": []})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or self.server.user}/{wanted['name']}"
        kind = wanted.get("type", "model")
        repo, address = f"{kind}s/{name}", f"{'' if kind == 'model' else f'{kind}s/'}{name}"
        url = {"url": f"{self.server.url}/{address}"}
        if repo in self.server.repos:
            self.answer(409, {"error": f"You already created this {kind} repo", **url})
            return
        if kind == "space" and wanted.get("sdk") not in ("gradio", "docker", "static"):
            self.answer(400, {"error": "a Space needs an sdk"})
            return
        first = {".gitattributes": b"*.onnx filter=lfs", "README.md": b"---\ntitle: New\n---\n"}
        self.server.created.append(wanted)
        self.server.repos[repo] = first if kind == "space" else {}
        is_private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.private[repo] = bool(is_private)
        self.answer(200, url)

    def modes(self, repo: str, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """How each file is to be sent, and whether .gitignore at the repo's root forbids it."""
        paths = [file["path"] for file in wanted["files"]]
        there = self.server.repos[repo]
        ignore = wanted.get("gitIgnore", there.get(".gitignore", b"").decode())
        ignored = ignored_by_git(ignore, paths)
        return [
            {
                "path": path,
                "uploadMode": "lfs" if is_large(path) else "regular",
                "shouldIgnore": path in ignored,
                "oid": blob(path, there[path])["oid"] if path in there else None,
            }
            for path in paths
        ]

    def places(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Where Git LFS's client puts each file; https://github.com/git-lfs, docs/api/batch.md."""
        large = f"{self.server.url}/large"
        verify = {"href": f"{large}/verify"}
        return [
            {**entry, "actions": {"upload": {"href": f"{large}/{entry['oid']}"}, "verify": verify}}
            for entry in wanted["objects"]
        ]

    def do_PUT(self) -> None:
        size = int(self.headers["Content-Length"])
        if self.server.stop_next:
            self.server.stop_next = False
            self.rfile.read(size // 2)
            self.server.hurry.wait()
            self.close_connection = True
            return
        body = self.rfile.read(size)
        oid = self.path.removeprefix("/large/")
        if self.refused(self.path):
            return
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "not what was announced"})
            return
        self.server.uploaded[oid] = body
        self.answer(200, {})

    def commit(self, repo: str, body: bytes) -> None:
        there, changed = self.server.repos[repo], []
        files = dict(there)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                assert value["oid"] in self.server.verified
                files[value["path"]] = self.server.uploaded[value["oid"]]
            if line["key"] == "deletedFile" and files.pop(value["path"], None) is None:
                missing = {"error": "A file with this name doesn't exist"}
                self.answer(404, missing, {"X-Error-Code": "EntryNotFound"})
                return
            changed += [value["path"]] if "path" in value else []
        there.clear()  # all of it or nothing
        there.update(files)
        self.server.commits.append(changed)
        if self.server.lost:
            self.server.lost()
            self.close_connection = True
            return
        url = f"{self.server.url}/{repo.removeprefix('models/')}/commit/{COMMIT}"
        self.answer(200, {"commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].replace("%2F", "/")
        if self.refused(path):
            return
        if path == "/api/whoami-v2":
            person = {"name": self.server.user, "type": "user"}
            groups = [{"name": name} for name in self.server.organizations]
            token = {"accessToken": {"displayName": "a token", "role": self.server.role}}
            self.answer(200, {**person, "orgs": groups, "auth": token})
        elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/main/(.*)", path):
            self.list_folder(*found.groups())
        elif (
            found := re.fullmatch(rf"/api/(\w+/[^/]+/[^/]+)(/revision/(main|{COMMIT}))?", path)
        ) and self.has(found[1]):
            name = found[1].partition("/")[2]
            siblings = [
                {"rfilename": path, "size": len(content), **blob(path, content)["sibling"]}
                for path, content in self.server.repos[found[1]].items()
            ]
            about = {"id": name, "sha": COMMIT, "private": self.server.private[found[1]]}
            self.answer(200, {**about, "tags": [], "downloads": 0, "siblings": siblings})
        elif found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/\w+/(.*)", path):
            content = self.server.repos.get(f"{found[1] or 'models'}/{found[2]}", {}).get(found[3])
            if content is None:
                self.answer(404, {}, {"X-Error-Code": "EntryNotFound"})
                return
            etag = hashlib.sha1(content).hexdigest()
            self.answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})
        else:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def has(self, repo: str) -> bool:
        return repo in self.server.repos

    def list_folder(self, repo: str, folder: str) -> None:
        if repo not in self.server.repos:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            return
        files = [
            {"type": "file", "oid": COMMIT, "path": name, "size": len(content)}
            for name, content in self.server.repos[repo].items()
            if name.startswith(f"{folder}/")
        ]
        missing = {"X-Error-Code": "EntryNotFound"}
        self.answer(200, files) if files else self.answer(404, {"error": "none"}, missing)

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response_only(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
