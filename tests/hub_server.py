"""A stand-in for the Hugging Face Hub on loopback, to test uploads and downloads.

The real huggingface_hub (0.35 with requests, 1.x with httpx) works with it over HTTP,
and LeRobot on top. The client reads its settings when it is imported, so they are given
to a new process:

    with HubServer() as hub:
        hub.add_repo("somebody/cubes", folder, tag="v3.0")
        hub.fail("POST", "/commit/", 503)  # the next commit; see Failure
        settings = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        settings |= {"HF_TOKEN": "hf_writer", "HF_HOME": ...}
        subprocess.run([sys.executable, ...], env={**os.environ, **settings})
        assert hub.repos["somebody/cubes"].files("v3.0") == {...} and not hub.unknown

It serves what these clients ask for of dataset repositories: no xet, no multipart
uploads, no pull requests, and no reading of .gitignore or of what README.md says.
Nothing is written to disk.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote

LFS_SUFFIXES = {".jpg", ".mp4", ".parquet", ".png", ".safetensors"}
API, PAGE = "/api/datasets/(?P<repo>[^/]+/[^/]+)", "/datasets/(?P<repo>[^/]+/[^/]+?)"
ROUTES: list[tuple[re.Pattern[str], bool, Callable]] = []


class HubError(Exception):
    """The answer is an error. The client chooses its exception by `code`, if any."""

    def __init__(
        self, status: int, message: str, code: str = "", **headers: str
    ) -> None:
        super().__init__(f"{status} {message}")
        self.status, self.body = status, {"error": message}
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


@dataclass
class Failure:
    """What happens to requests whose method and path match the regexes.

    The path is matched unquoted and without its query. `how` is an HTTP status to
    answer with (and `headers`), or what becomes of the connection:
    "drop": it is closed once the request is read, and nothing is done,
    "lose": it is closed in place of the answer, when all has been done,
    "cut": it is closed halfway through the request's body or, without one, through the
    answer's.
    The first `after` such requests are spared, then the next `times` fail (None: all).
    """

    method: str
    pattern: str
    how: int | str
    times: int | None = 1
    after: int = 0
    headers: dict[str, str] | None = None


@dataclass
class Commit:
    title: str
    author: str
    files: dict[str, bytes]
    oid: str = field(default_factory=lambda: secrets.token_hex(20))


@dataclass
class Repo:
    """A dataset repository, with its commits in the order they were made."""

    name: str
    private: bool = False
    gated: str | bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    # all uploads, committed or not, by sha256
    lfs: dict[str, bytes] = field(default_factory=dict)

    def commit(self, revision: str = "main") -> Commit:
        """The commit that a branch, a tag or an oid names, or else HubError."""
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.oid == oid:
                return commit
        raise HubError(404, f"Invalid rev id: {quote(revision)}", "RevisionNotFound")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commit(revision).files

    def add_commit(
        self, files: dict[str, bytes], title: str, author: str, branch: str
    ) -> Commit:
        self.commits.append(Commit(title, author, files))
        self.branches[branch] = self.commits[-1].oid
        return self.commits[-1]


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (Path(path).suffix in LFS_SUFFIXES or size > 1 << 20)


def describe(path: str, data: bytes) -> dict[str, Any]:
    """A file as the Hub lists it, with git's id of it: for LFS, of the pointer."""
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data)}
    if is_lfs(path, len(data)):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
        version = "version https://git-lfs.github.com/spec/v1"
        oid = entry["lfs"]["oid"]
        data = f"{version}\noid sha256:{oid}\nsize {len(data)}\n".encode()
        entry["lfs"]["pointerSize"] = len(data)
    return {**entry, "oid": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


def content_id(path: str, data: bytes) -> str:
    """What the client compares to see whether a file has changed."""
    entry = describe(path, data)
    return entry.get("lfs", entry)["oid"]


class HubServer(ThreadingHTTPServer):
    """The stand-in. It serves at `url` from when it is made until it is closed."""

    request_queue_size = 64  # a client opens eight connections at once

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {
            "hf_writer": "somebody",
            "hf_reader": "somebody",
            "hf_other": "other",
        }
        self.roles = {"hf_reader": "read"}  # of a token, where it is not "write"
        self.orgs: dict[str, list[str]] = {}  # those that a user may write to
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str]] = []  # (method, path) of those carried out
        # (method, path, how) of those made to fail
        self.failed: list[tuple[str, str, int | str]] = []
        # those not served, or not well; must be empty after a test
        self.unknown: list[str] = []
        self.failures: list[Failure] = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        # if a connection is open
        self.failures.insert(0, Failure(".*", "", "drop", times=None))
        self.shutdown()
        self.server_close()

    def __exit__(self, *error) -> None:
        self.close()

    def handle_error(self, request, client_address) -> None:
        """Says nothing of a client that went away: that is what is tested."""

    def add_repo(
        self,
        name: str,
        folder: Path | None = None,
        private: bool = False,
        tag: str | None = None,
    ) -> Repo:
        """Creates a repository as the Hub does, with the folder's files if given."""
        repo, author = Repo(name, private), name.split("/")[0]
        files = {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}
        repo.add_commit(files, "initial commit", author, "main")
        if folder:
            paths = [path for path in Path(folder).rglob("*") if path.is_file()]
            local = {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}
            repo.add_commit({**files, **local}, "Upload folder", author, "main")
            large = [data for path, data in local.items() if is_lfs(path, len(data))]
            repo.lfs = {hashlib.sha256(data).hexdigest(): data for data in large}
        if tag:
            repo.tags[tag] = repo.branches["main"]
        with self.lock:
            self.repos[name] = repo
        return repo

    def fail(self, *how, **more) -> None:
        """Takes what Failure does: method, pattern, how, times=1, after=0, headers."""
        with self.lock:
            self.failures.append(Failure(*how, **more))

    def heal(self) -> None:
        with self.lock:
            self.failures.clear()

    def failure(self, method: str, path: str) -> Failure | None:
        """What is to happen to this request, which counts for it."""
        with self.lock:
            for failure in self.failures:
                if not re.fullmatch(failure.method, method):
                    continue
                if not re.search(failure.pattern, path):
                    continue
                if failure.after:
                    failure.after -= 1
                elif failure.times != 0:
                    failure.times = failure.times and failure.times - 1
                    self.failed.append((method, path, failure.how))
                    return failure
        return None

    def owns(self, user: str | None, name: str) -> bool:
        owner = name.split("/")[0]
        return user is not None and owner in (user, *self.orgs.get(user, ()))


def route(pattern: str, write: bool = False) -> Callable:
    """Lets a method of Handler answer "METHOD path"; `write`: to the owner only."""

    def register(function: Callable) -> Callable:
        ROUTES.append((re.compile(pattern), write, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Serves one connection.

    Routes return the answer's body, and may set status and headers.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: HubServer

    def log_message(self, *args) -> None:
        pass

    def handle_request(self) -> None:
        raw_path, _, query = self.path.partition("?")
        path, length = unquote(raw_path), int(self.headers.get("Content-Length") or 0)
        failure = self.server.failure(self.command, path)
        how = failure and failure.how
        half = 2 if how == "cut" else 1
        # all of it, or an early answer is a reset
        self.body = self.rfile.read(length // half)
        if len(self.body) < length or how == "drop":
            self.close_connection = True
            return
        self.status, self.answer_headers, self.query = 200, {}, parse_qs(query)
        if isinstance(how, int):
            self.status, self.answer_headers = how, failure.headers or {}
            body = {"error": f"{how}, as the test asked for"}
        else:
            body = self.carry_out(path, raw_path)
        self.close_connection |= how in ("lose", "cut")
        if how == "lose":
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = "application/" + ("octet-stream" if body is content else "json")
        about = {"Content-Length": str(len(content)), "Content-Type": kind}
        self.send_response(self.status)
        for header in {**about, **self.answer_headers}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // half])

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = handle_request  # noqa: N815

    def carry_out(self, path: str, raw_path: str) -> Any:
        with self.server.lock:
            try:
                return self.routed(path, f"{self.command} {raw_path}")
            except HubError as error:
                self.status, self.answer_headers = error.status, error.headers
                return error.body
            except Exception as error:  # a mistake in this file
                self.server.unknown.append(f"{self.command} {path}: {error!r}")
                self.status = 500
                return {"error": repr(error)}

    def routed(self, path: str, request: str) -> Any:
        for pattern, write, function in ROUTES:  # noqa: B007 (used below)
            if (match := pattern.fullmatch(request)) and "create_pr" not in self.query:
                break
        else:
            self.server.unknown.append(f"{self.command} {path}")
            raise HubError(404, "The stand-in for the Hub does not serve this")
        self.server.requests.append((self.command, path))
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.server.tokens.get(token)
        self.role = self.server.roles.get(token, "write")
        found = match.groupdict()
        groups = {key: unquote(value) for key, value in found.items() if value}
        if "repo" in groups:
            groups["repo"] = self.accessible(groups["repo"], write)
        return function(self, **groups)

    def accessible(self, name: str, write: bool = False) -> Repo:
        repo, owned = self.server.repos.get(name), self.server.owns(self.user, name)
        # from https the client takes any 401 for a missing repository; from http it
        # needs the code
        if repo is None or (repo.private and not owned) or (write and not self.user):
            status = 404 if self.user else 401
            raise HubError(status, "Repository not found", "RepoNotFound")
        if write and not (owned and self.role == "write"):
            raise HubError(403, "Authorization error.")
        return repo

    def check_gate(self, repo: Repo) -> None:
        if repo.gated and not self.server.owns(self.user, repo.name):
            status = 403 if self.user else 401
            raise HubError(status, "Access is restricted", "GatedRepo")

    # --------------------------------------------------------------------- repositories
    @route("GET /api/whoami-v2")
    def whoami(self) -> Any:
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        names = self.server.orgs.get(self.user, ())
        orgs = [{"type": "org", "name": name} for name in names]
        token = {"displayName": "", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": self.user, "orgs": orgs, "auth": auth}

    # 1.x asks once, unless HF_HUB_DISABLE_TELEMETRY=1
    @route("GET /api/agent-harnesses")
    def agent_harnesses(self) -> Any:
        return {"standardEnvVars": [], "harnesses": {}}

    @route("POST /api/validate-yaml")
    def validate_yaml(self) -> Any:
        return {"errors": [], "warnings": []}

    @route("POST /api/repos/create")
    def create_repo(self) -> Any:
        order = json.loads(self.body)
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        name = f"{order.get('organization') or self.user}/{order['name']}"
        if not self.server.owns(self.user, name) or self.role != "write":
            error = "You don't have the rights to create a dataset under the namespace"
            raise HubError(403, error)
        if order.get("type") != "dataset":
            raise HubError(400, "The stand-in for the Hub has datasets only")
        self.status = 409 if name in self.server.repos else 201
        if self.status == 201:
            # 0.35 sends "private", 1.x "visibility"
            private = order.get("private", order.get("visibility") == "private")
            self.server.add_repo(name, private=private)
        url = f"{self.server.url}/datasets/{name}"
        return {"url": url, "error": "You already created it"}

    @route(f"GET {API}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo: Repo, revision: str = "main") -> Any:
        commit = repo.commit(revision)
        about = {"id": repo.name, "sha": commit.oid, "private": repo.private}
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        return {**about, "gated": repo.gated, "tags": [], "siblings": siblings}

    @route(f"GET {API}/auth-check(?P<write>/write)?")
    def auth_check(self, repo: Repo, write: str = "") -> Any:
        self.check_gate(self.accessible(repo.name, write=bool(write)))
        return {}

    @route(f"GET {API}/refs")
    def refs(self, repo: Repo) -> Any:
        def listed(refs: dict[str, str], prefix: str) -> list[dict[str, str]]:
            return [
                {"name": name, "ref": prefix + name, "targetCommit": oid}
                for name, oid in refs.items()
            ]

        branches = listed(repo.branches, "refs/heads/")
        tags = listed(repo.tags, "refs/tags/")
        return {"branches": branches, "tags": tags, "converts": [], "pullRequests": []}

    @route(f"POST {API}/tag/(?P<revision>[^/]+)", write=True)
    def create_tag(self, repo: Repo, revision: str) -> Any:
        tag = json.loads(self.body)["tag"]
        return self.add_ref(repo.tags, tag, repo.commit(revision))

    @route(f"POST {API}/branch/(?P<branch>[^/]+)", write=True)
    def create_branch(self, repo: Repo, branch: str) -> Any:
        start = json.loads(self.body).get("startingPoint", "main")
        return self.add_ref(repo.branches, branch, repo.commit(start))

    def add_ref(self, refs: dict[str, str], name: str, commit: Commit) -> Any:
        if name in refs:
            raise HubError(409, f"Reference already exists: {quote(name)}")
        refs[name] = commit.oid
        return {}

    @route(f"DELETE {API}/(?P<kind>tag|branch)/(?P<name>[^/]+)", write=True)
    def delete_ref(self, repo: Repo, kind: str, name: str) -> Any:
        if (repo.tags if kind == "tag" else repo.branches).pop(name, None) is None:
            raise HubError(404, f"Invalid rev id: {quote(name)}", "RevisionNotFound")
        return {}

    # -------------------------------------------------------------------------- reading
    @route(f"GET {API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
    def tree(self, repo: Repo, revision: str, folder: str = "") -> Any:
        deep = self.query.get("recursive", [""])[0].lower() == "true"
        prefix, entries = f"{folder}/" if folder else "", self.entries(repo, revision)
        found = [entry for entry in entries if entry["path"].startswith(prefix)]
        if folder and not found:
            raise HubError(404, f"{quote(folder)} does not exist", "EntryNotFound")
        start = len(prefix)
        return [entry for entry in found if deep or "/" not in entry["path"][start:]]

    @route(f"POST {API}/paths-info/(?P<revision>[^/]+)")
    def paths_info(self, repo: Repo, revision: str) -> Any:
        paths = parse_qs(self.body.decode())["paths"]
        entries = self.entries(repo, revision)
        return [entry for entry in entries if entry["path"] in paths]

    def entries(self, repo: Repo, revision: str) -> list[dict[str, Any]]:
        files = repo.files(revision)
        folders = {parent.as_posix() for path in files for parent in Path(path).parents}
        listed = [
            {"type": "directory", "path": folder, "oid": "0" * 40, "size": 0}
            for folder in folders - {"."}
        ]
        listed += [describe(path, data) for path, data in files.items()]
        return sorted(listed, key=lambda entry: entry["path"])

    @route(f"(GET|HEAD) {PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: Repo, revision: str, path: str) -> Any:
        self.check_gate(repo)
        commit = repo.commit(revision)
        about = {"X-Repo-Commit": commit.oid}
        if (data := commit.files.get(path)) is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **about)
        size, about["ETag"] = len(data), f'"{content_id(path, data)}"'
        if is_lfs(path, size):
            about |= {"X-Linked-Etag": about["ETag"], "X-Linked-Size": str(size)}
        if part := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(part[1]), min(int(part[2] or size), size - 1) + 1
            if start >= size:
                about = {"Content-Range": f"bytes */{size}"}
                raise HubError(416, "Range not satisfiable", **about)
            about["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
            self.status, data = 206, data[start:stop]
        self.answer_headers = about
        return data

    # -------------------------------------------------------------------------- writing
    @route(f"POST {API}/preupload/(?P<revision>[^/]+)", write=True)
    def preupload(self, repo: Repo, revision: str) -> Any:
        there, files = repo.files(revision), []
        for file in json.loads(self.body)["files"]:
            path, size = file["path"], file["size"]
            mode = "lfs" if is_lfs(path, size) else "regular"
            oid = content_id(path, there[path]) if path in there else None
            about = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append({**about, "oid": oid})
        return {"files": files}

    @route(rf"POST {PAGE}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, repo: Repo) -> Any:
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.lfs:  # an object that is there gets no actions
                address = f"{self.server.url}/lfs/{repo.name}/{item['oid']}"
                item["actions"] = {"upload": {"href": address}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT /lfs/(?P<name>[^/]+/[^/]+)/(?P<oid>.+)")  # like S3, without a token
    def lfs_upload(self, name: str, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise HubError(400, "The content does not match its sha256")
        self.server.repos[name].lfs[oid] = self.body
        return b""

    @route(f"POST {API}/commit/(?P<revision>[^/]+)", write=True)
    def commit(self, repo: Repo, revision: str) -> Any:
        if revision not in repo.branches:
            error = f"Invalid rev id: {quote(revision)}"
            raise HubError(404, error, "RevisionNotFound")
        files, title = dict(repo.files(revision)), ""
        for line in filter(None, self.body.split(b"\n")):
            key, value = json.loads(line).values()
            path = value.get("path", "")
            if key == "header":
                title = value["summary"]
                head = repo.branches[revision]
                if value.get("parentCommit", head) != head:
                    raise HubError(412, "A commit has happened since")
            elif key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in repo.lfs:
                files[path] = repo.lfs[value["oid"]]
            elif key == "deletedFolder":
                gone = f"{path.rstrip('/')}/"
                files = {p: d for p, d in files.items() if not p.startswith(gone)}
            elif key != "deletedFile":
                raise HubError(400, f"{key} {quote(path)} cannot be committed")
            elif files.pop(path, None) is None:
                error = "A file with this name doesn't exist"
                raise HubError(404, error, "EntryNotFound")
        oid = repo.add_commit(files, title, self.user, revision).oid
        page = f"{self.server.url}/datasets/{repo.name}"
        return {"commitOid": oid, "commitUrl": f"{page}/commit/{oid}"}
