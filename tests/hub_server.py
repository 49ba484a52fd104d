"""A stand-in of the hub's HTTP API on this machine, for huggingface_hub itself: repositories, commits, files.

It knows the requests that an upload by LFS and a download consist of (huggingface_hub 0.30 to 2.4). It accepts one
token, ``TOKEN``, whose owner is "me".
"""

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN = "hf_token_of_me"
# /api/models/me/name/action/revision, /me/name/resolve/revision/file, /me/name.git/info/lfs/objects/batch
_PATH = re.compile(r"/(api/models/)?(me/[\w.-]+?)(?:\.git)?(?:/(\w+))?(?:/([^/]+))?(?:/(.+))?")


@dataclasses.dataclass
class Repository:
    """``branches``: name -> {path: content}; ``commits``: (branch, message), the first first."""

    private: bool
    branches: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=lambda: {"main": {}})
    commits: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Hub:
    """Attributes: ``url``; ``repositories``: "me/name" -> Repository; ``requests``: "METHOD /path", in order."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.blobs: dict[str, bytes] = {}

    def answer(self, method: str, url: str, body: bytes, token: str | None) -> tuple[int, Any, dict[str, str]]:
        """Returns the status, the body (bytes, or a value for JSON) and further headers."""
        parts = urlsplit(url)
        path, query = parts.path, parse_qs(parts.query)
        self.requests.append(f"{method} {unquote(path)}")
        if match := re.fullmatch(r"/blobs/(\w+)", path):
            self.blobs[match[1]] = body
            assert hashlib.sha256(body).hexdigest() == match[1]
            return 200, b"", {}
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        found = _PATH.fullmatch(path)
        api, repo_id, action, revision, rest = found.groups() if found else (None, "", None, None, None)
        repository = self.repositories.get(repo_id)
        if repository is None or (repository.private and token != TOKEN):
            return 401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
        if method == "POST" and token != TOKEN and "create_pr" not in query and not path.endswith("/objects/batch"):
            return 403, {"error": "You have no write access"}, {}
        revision = unquote(revision or "main")
        if api and method == "GET":
            return self.describe(repo_id, repository, action, self.branch_of(repository, revision))
        if api and action == "branch":
            if revision in repository.branches:
                return 409, {"error": "Reference already exists"}, {}
            repository.branches[revision] = dict(repository.branches["main"])
            return 200, b"", {}
        if api and action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}, {}
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**item, "actions": {"upload": {"href": f"{self.url}/blobs/{item['oid']}", "header": {}}}}
                for item in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}, {}
        if api and action == "commit":
            return self.commit(repo_id, repository, revision, body, "create_pr" in query)
        if action == "resolve":
            return self.file(repository, self.branch_of(repository, revision), unquote(rest or ""))
        return 404, {"error": f"the stand-in does not know {method} {path}"}, {}

    def create(self, content: dict[str, Any], token: str | None) -> tuple[int, Any, dict[str, str]]:
        if token != TOKEN:
            return 401, {"error": "Invalid username or password."}, {}
        repo_id = f"{content.get('organization') or 'me'}/{content['name']}"
        if not repo_id.startswith("me/"):
            return 403, {"error": f"You don't have the rights to create a model under {repo_id}"}, {}
        url = {"url": f"{self.url}/{repo_id}"}
        if repo_id in self.repositories:
            return 409, {"error": "You already created this model repo", **url}, {}
        # huggingface_hub sent "private" before it sent "visibility".
        self.repositories[repo_id] = Repository(content.get("private") or content.get("visibility") == "private")
        return 200, url, {}

    @staticmethod
    def validate(card: str) -> tuple[int, Any, dict[str, str]]:
        front = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
        try:
            assert front and isinstance(yaml.safe_load(front[1]), dict)
        except (AssertionError, yaml.YAMLError):
            return 400, {"errors": [{"message": "the front matter is no mapping"}], "warnings": []}, {}
        return 200, {"errors": [], "warnings": []}, {}

    @staticmethod
    def branch_of(repository: Repository, revision: str) -> str:
        shas = {sha_of(files): name for name, files in repository.branches.items()}
        return shas.get(revision, revision)

    @staticmethod
    def describe(repo_id, repository, action, branch) -> tuple[int, Any, dict[str, str]]:
        if branch not in repository.branches:
            return 404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"}
        files = repository.branches[branch]
        if action == "tree":
            return (
                200,
                [{"type": "file", "path": name, "size": len(x), "oid": "0" * 40} for name, x in files.items()],
                {},
            )
        siblings = [{"rfilename": name} for name in files]
        content = {"id": repo_id, "sha": sha_of(files), "private": repository.private, "siblings": siblings}
        return 200, content, {}

    def commit(self, repo_id, repository, revision, body, create_pr) -> tuple[int, Any, dict[str, str]]:
        lines = [json.loads(line) for line in body.splitlines()]
        branch = (
            f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.branches)}" if create_pr else revision
        )
        if branch not in repository.branches and not create_pr:
            return 404, {"error": f"Invalid rev id: {branch}"}, {"X-Error-Code": "RevisionNotFound"}
        files = dict(repository.branches["main" if create_pr else branch])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.blobs[value["oid"]]
        repository.branches[branch] = files
        repository.commits.append((branch, lines[0]["value"]["summary"]))
        answer = {"commitUrl": f"{self.url}/{repo_id}/commit/{sha_of(files)}", "commitOid": sha_of(files)}
        if create_pr:
            answer["pullRequestUrl"] = f"{self.url}/{repo_id}/discussions/{branch.rpartition('/')[2]}"
        return 200, answer, {}

    @staticmethod
    def file(repository, branch, name) -> tuple[int, Any, dict[str, str]]:
        if name not in repository.branches.get(branch, {}):
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        files = repository.branches[branch]
        return (
            200,
            files[name],
            {"ETag": f'"{hashlib.sha256(files[name]).hexdigest()}"', "X-Repo-Commit": sha_of(files)},
        )


def sha_of(files: dict[str, bytes]) -> str:
    """Returns what stands for the hash of a commit: 40 hexadecimal digits."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@contextlib.contextmanager
def serve_hub() -> Iterator[Hub]:
    """Runs the stand-in on a free port of this machine."""
    hub = Hub()

    class Handler(http.server.BaseHTTPRequestHandler):
        def reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            status, content, headers = hub.answer(self.command, self.path, body, token)
            if not isinstance(content, bytes):
                content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_HEAD = do_POST = do_PUT = reply

        def log_message(self, *arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
