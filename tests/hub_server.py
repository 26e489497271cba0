"""A hub on 127.0.0.1: the few endpoints of the Hugging Face hub that its client uses to push and to fetch a model."""

import base64
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_owner"
LARGE = (".safetensors", ".bin", ".pkl")
"""Files that go through LFS: announced, put elsewhere, then named by their hash in the commit."""


class Hub:
    """Repositories in memory, and the server that shows them; a context manager.

    `repositories` maps `owner/name` to {"private", "branches": name to commit, "commits": commit to {path: content}}.
    """

    def __init__(self):
        self.repositories, self.large, self.fetched, self.lock = {}, {}, [], Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self):
        Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *details):
        self.stop()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name, changes, branch="main"):
        """Add files (None removes one) to what is in a branch; returns the hash of the commit."""
        with self.lock:
            repository = self.repositories[name]
            before = repository["branches"].get(branch)
            files = {**repository["commits"].get(before, {}), **changes}
            files = {path: content for path, content in files.items() if content is not None}
            commit = hashlib.sha1(f"{name} {before} {len(repository['commits'])} {sorted(files)}".encode()).hexdigest()
            repository["commits"][commit] = files
            repository["branches"][branch] = commit
            return commit

    def files(self, name, revision="main"):
        return self.repositories[name]["commits"][self.repositories[name]["branches"].get(revision, revision)]


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        path = urlsplit(self.path).path
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            found = self._commit(match[1], match[2] or "main")
            if found:
                self._json({"id": match[1], "sha": found[0], "siblings": [{"rfilename": one} for one in found[1]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            found = self._commit(match[1], match[2])
            if found:
                self._json([_entry(*file) for file in found[1].items()])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            found = self._commit(match[1], match[2])
            if found and match[3] not in found[1]:
                self._error(404, "EntryNotFound")
            elif found:
                content = found[1][match[3]]
                etag = _entry(match[3], content).get("lfs", {}).get("oid") or _git_hash(content)
                if self.command == "GET":
                    self.hub.fetched.append((found[0], match[3]))
                self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": found[0]})
        else:
            self._error(404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = unquote(urlsplit(self.path).path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._error(401)
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.hub.repositories
            if not known:
                self.hub.repositories[name] = {
                    "private": asked["visibility"] == "private",
                    "branches": {},
                    "commits": {},
                }
                self.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs"})
            self._json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            branches = self.hub.repositories[match[1]]["branches"]
            known = match[2] in branches
            branches.setdefault(match[2], branches["main"])
            self._json({}, 409 if known else 201)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._json({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            changes = {}
            for line in body.splitlines():
                key, value = (json.loads(line)[name] for name in ("key", "value"))
                if key == "file":
                    changes[value["path"]] = base64.b64decode(value["content"])
                elif key == "lfsFile":
                    changes[value["path"]] = self.hub.large[value["oid"]]
                elif key == "deletedFile":
                    changes[value["path"]] = None
            commit = self.hub.commit(match[1], changes, match[2])
            self._json({"commitUrl": f"{self.hub.url}/{match[1]}/commit/{commit}", "commitOid": commit})
        else:
            self._error(404)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = self.path.removeprefix("/large/")
        if hashlib.sha256(content).hexdigest() != name:
            self._error(400)
        else:
            self.hub.large[name] = content
            self._answer(200, b"", {})

    def _commit(self, name, revision):
        repository = self.hub.repositories.get(name)
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository["private"] and not allowed):
            self._error(401, "RepoNotFound")
            return None
        commit = repository["branches"].get(unquote(revision), revision)
        if commit not in repository["commits"]:
            self._error(404, "RevisionNotFound")
            return None
        return commit, repository["commits"][commit]

    def _json(self, value, status=200):
        self._answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status, code=None):
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status, content, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _git_hash(content):
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def _entry(path, content):
    entry = {"type": "file", "path": path, "size": len(content), "oid": _git_hash(content)}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
