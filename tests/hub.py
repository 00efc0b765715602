"""A stand-in for a Hugging Face hub on loopback: as much of its API as mirror and push use."""

import base64
import hashlib
import http.server
import json
import re
import threading
from typing import Any

COMMIT = "0" * 40


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
        self.hurry = threading.Event()  # ends what hangs
        self.requests: list[tuple[str, str]] = []  # method and path
        self.uploaded: dict[str, bytes] = {}  # large files by their SHA-256, before the commit
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
            self.answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/(.*)\.git/info/lfs/objects/batch", path):
            self.answer(200, {"transfer": "basic", "objects": self.places(json.loads(body))})
        elif found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/(preupload|commit)/main", path):
            repo, action = found.groups()
            if repo not in self.server.repos:
                self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
            elif action == "preupload":
                self.answer(200, {"files": list(map(self.mode, json.loads(body)["files"]))})
            else:
                self.commit(repo, body)
        else:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or self.server.user}/{wanted['name']}"
        repo = f"{wanted.get('type', 'model')}s/{name}"
        if repo in self.server.repos:
            self.answer(409, {"error": "You already created this model repo"})
            return
        self.server.repos[repo] = {}
        is_private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.private[repo] = bool(is_private)
        self.answer(200, {"url": f"{self.server.url}/{name}"})

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        large = file["path"].endswith((".safetensors", ".png"))
        how = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": None}
        return {"path": file["path"], **how}

    def places(self, wanted: dict[str, Any]) -> list[dict[str, Any]]:
        """Where Git LFS's client puts each file; https://github.com/git-lfs, docs/api/batch.md."""
        return [
            {**entry, "actions": {"upload": {"href": f"{self.server.url}/large/{entry['oid']}"}}}
            for entry in wanted["objects"]
        ]

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.removeprefix("/large/")
        if self.refused(self.path):
            return
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer(400, {"error": "not what was announced"})
            return
        self.server.uploaded[oid] = body
        self.answer(200, {})

    def commit(self, repo: str, body: bytes) -> None:
        files, changed = self.server.repos[repo], []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                files[value["path"]] = self.server.uploaded[value["oid"]]
            if line["key"] == "deletedFile":
                del files[value["path"]]
            changed += [value["path"]] if "path" in value else []
        self.server.commits.append(changed)
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
        elif (found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)", path)) and self.has(found[1]):
            name = found[1].partition("/")[2]
            siblings = [{"rfilename": name} for name in self.server.repos[found[1]]]
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
