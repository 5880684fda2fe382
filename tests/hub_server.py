"""A stand-in for the Hugging Face Hub on loopback, to test uploads and downloads.

The real huggingface_hub (0.35 with requests, 1.x with httpx) talks to it over HTTP, and
LeRobot on top. The client reads HF_ENDPOINT when it is imported; conftest.py sets it.
Dataset repositories are served, each with one branch, and what the tests ask of them.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

LFS_SUFFIXES = {".mp4", ".parquet"}
API = "/api/datasets/(?P<repo>[^/]+/[^/]+)"
PAGE = "/datasets/(?P<repo>[^/]+/[^/]+?)"
ROUTES = []


class HubError(Exception):
    """The answer is an error. The client chooses its exception by `code`."""

    def __init__(self, status, message, code="", **headers):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, "X-Error-Code": code, **headers}


@dataclass
class Repo:
    """A dataset repository: the files of each commit by its id, the latest last."""

    name: str
    private: bool = False
    gated: str | bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    # All uploads, committed or not, by sha256.
    lfs: dict[str, bytes] = field(default_factory=dict)

    @property
    def head(self):
        """The id of the latest commit."""
        return list(self.commits)[-1]

    def oid(self, revision):
        """The id of the commit that main, a tag or an id names, or else HubError."""
        oid = self.head if revision == "main" else self.tags.get(revision, revision)
        if oid not in self.commits:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        return oid

    def files(self, revision="main"):
        """The content of each file, by its path."""
        return self.commits[self.oid(revision)]

    def add_commit(self, files):
        """Make these all the files, and return the id of the commit."""
        oid = secrets.token_hex(20)
        self.commits[oid] = files
        return oid


def is_lfs(path, size):
    """Whether a file is uploaded by itself, before the commit."""
    return size > 0 and Path(path).suffix in LFS_SUFFIXES


def sha256(data):
    """The name of a content in LFS."""
    return hashlib.sha256(data).hexdigest()


def describe(path, data):
    """A file as the Hub lists it, with git's id of it: for LFS, of the pointer."""
    entry = {"type": "file", "path": path, "size": len(data)}
    if is_lfs(path, len(data)):
        entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
    blob = b"blob %d\0" % len(data) + data
    return {**entry, "oid": hashlib.sha1(blob).hexdigest()}


def content_id(path, data):
    """What the client compares to see whether a file has changed."""
    entry = describe(path, data)
    return entry.get("lfs", entry)["oid"]


class HubServer(ThreadingHTTPServer):
    """The stand-in. It serves at `url` from when it is made.

    `requests` and `failed` have method and path of what was carried out and of what was
    made to fail; `unknown` was not served, or not well, and is empty after a good test.
    """

    request_queue_size = 64  # A client opens eight connections at once.

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.tokens = {"hf_writer": "somebody", "hf_reader": "somebody"}
        self.readers = {"hf_reader"}  # Tokens that may not write.
        self.repos = {}  # By name.
        self.requests = []
        self.failed = []
        self.unknown = []
        self.failures = []
        self.lock = threading.RLock()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def handle_error(self, request, client_address):
        """Say nothing of a client that went away: that is what is tested."""

    def add_repo(self, name, folder=None, private=False, tag=None):
        """Create a repository as the Hub does, with the folder's files if given."""
        files = {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}
        for path in Path(folder).rglob("*") if folder else ():
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path.read_bytes()
        repo = Repo(name, private, lfs={sha256(data): data for data in files.values()})
        repo.add_commit(files)
        if tag:
            repo.tags[tag] = repo.head
        self.repos[name] = repo
        return repo

    def fail(self, method, pattern, how, times=1):
        """Make the next `times` requests fail that match; all of them if None.

        The pattern is searched for in the path without its query. `how` is an HTTP
        status to answer with, or what becomes of the connection:
        "drop": it is closed once the request is read, and nothing is done,
        "lose": it is closed in place of the answer, when all has been done.
        """
        self.failures.append([method, pattern, how, times])

    def heal(self):
        """Let no further request fail."""
        self.failures.clear()

    def next_failure(self, method, path):
        """What is to happen to this request, which counts for it."""
        for failure in self.failures:
            failing, pattern, how, times = failure
            if times != 0 and failing == method and re.search(pattern, path):
                failure[3] = times and times - 1
                self.failed.append((method, path))
                return how
        return None


def route(pattern, write=False):
    """Let a method of Handler answer "METHOD path"; `write`: to the owner only."""

    def register(function):
        ROUTES.append((re.compile(pattern), write, function))
        return function

    return register


class Handler(BaseHTTPRequestHandler):
    """Serves one connection.

    Routes return the answer's body, and may set `status` and `answer_headers`.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        """Print nothing."""

    def handle_request(self):
        """Answer a request, or let it fail."""
        raw_path, _, query = self.path.partition("?")
        path = unquote(raw_path)
        self.query = parse_qs(query)
        # All of it, or an early answer arrives as a reset.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.status = 200
        self.answer_headers = {}
        with self.server.lock:
            how = self.server.next_failure(self.command, path)
        if isinstance(how, int):
            self.status = how
            body = {"error": f"{how}, as the test asked for"}
        elif how != "drop":
            body = self.carry_out(path, raw_path)
        if how in ("drop", "lose"):
            self.close_connection = True
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(self.status)
        self.answer_headers["Content-Length"] = str(len(content))
        for header in self.answer_headers.items():
            self.send_header(*header)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request  # noqa: N815

    def carry_out(self, path, raw_path):
        """Call the route of a request, if its sender may."""
        with self.server.lock:
            try:
                for pattern, write, function in ROUTES:
                    match = pattern.fullmatch(f"{self.command} {raw_path}")
                    if match:
                        self.server.requests.append((self.command, path))
                        return function(self, **self.admit(match.groupdict(), write))
                raise LookupError("the stand-in for the Hub does not serve this")
            except HubError as error:
                self.status = error.status
                self.answer_headers = error.headers
                return {"error": str(error)}
            except Exception as error:  # A mistake in this file.
                self.server.unknown.append(f"{self.command} {path}: {error!r}")
                self.status = 500
                return {"error": repr(error)}

    def admit(self, groups, write):
        """See who asks, and turn what the path names into what routes are given."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        self.user = self.server.tokens.get(token)
        self.may_write = token not in self.server.readers
        given = {key: unquote(value) for key, value in groups.items() if value}
        if "repo" in given:
            given["repo"] = self.accessible(given["repo"], write)
        return given

    def owns(self, name):
        """Whether a repository of this name belongs to the user."""
        return self.user is not None and name.split("/")[0] == self.user

    def accessible(self, name, write=False):
        """The repository of this name, if the user may see it, or write to it."""
        repo = self.server.repos.get(name)
        is_owner = self.owns(name)
        if repo is None or (repo.private and not is_owner) or (write and not self.user):
            raise HubError(404, "Repository not found", "RepoNotFound")
        if write and not (is_owner and self.may_write):
            raise HubError(403, "Authorization error.")
        return repo

    @route("GET /api/whoami-v2")
    def whoami(self):
        """Who has this token."""
        if not self.user:
            raise HubError(401, "Invalid username or password.")
        return {"type": "user", "name": self.user, "orgs": []}

    @route("POST /api/validate-yaml")
    def validate_yaml(self):
        """The metadata of a README.md is always good."""
        return {"errors": [], "warnings": []}

    @route("(POST|DELETE) /api/repos/(create|delete)")
    def create_or_delete_repo(self):
        """Make a repository, or remove one."""
        order = json.loads(self.body)
        name = f"{order.get('organization') or self.user}/{order['name']}"
        if not self.owns(name) or not self.may_write:
            raise HubError(403, "You don't have the rights to do this here")
        if self.command == "DELETE":
            self.accessible(name)
            del self.server.repos[name]
            return {}
        if name in self.server.repos:
            self.status = 409
        else:
            # 0.35 sends "private", 1.x "visibility".
            private = order.get("private", order.get("visibility") == "private")
            self.server.add_repo(name, private=bool(private))
        url = f"{self.server.url}/datasets/{name}"
        return {"url": url, "error": "You already created it"}

    @route(f"GET {API}(/revision/(?P<revision>[^/]+))?")
    def info(self, repo, revision="main"):
        """What is known of a repository."""
        siblings = [{"rfilename": path} for path in sorted(repo.files(revision))]
        shown = {"private": repo.private, "gated": repo.gated, "tags": []}
        about = {"id": repo.name, "sha": repo.oid(revision), "siblings": siblings}
        return {**about, **shown}

    @route(f"GET {API}/refs")
    def refs(self, repo):
        """The tags."""
        tags = [
            {"name": name, "ref": f"refs/tags/{name}", "targetCommit": oid}
            for name, oid in repo.tags.items()
        ]
        return {"branches": [], "tags": tags, "converts": []}

    @route(f"(POST|DELETE) {API}/tag/(?P<name>[^/]+)", write=True)
    def change_tag(self, repo, name):
        """Give a tag to the commit of this name, or take the tag of this name away."""
        if self.command == "DELETE" and name not in repo.tags:
            raise HubError(404, "Invalid rev id", "RevisionNotFound")
        if self.command == "DELETE":
            del repo.tags[name]
            return {}
        tag = json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise HubError(409, "Reference already exists")
        repo.tags[tag] = repo.oid(name)
        return {}

    @route(f"GET {API}/tree/(?P<revision>[^/]+)")
    def tree(self, repo, revision):
        """All files."""
        return [describe(*file) for file in sorted(repo.files(revision).items())]

    @route(f"(GET|HEAD) {PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        """The content of a file."""
        about = {"X-Repo-Commit": repo.oid(revision)}
        data = repo.files(revision).get(path)
        if data is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **about)
        about["ETag"] = f'"{content_id(path, data)}"'
        self.answer_headers = about
        return data

    @route(f"POST {API}/preupload/(?P<revision>[^/]+)", write=True)
    def preupload(self, repo, revision):
        """How each file is to be uploaded, and what is there under its name."""
        there = repo.files(revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            oid = content_id(path, there[path]) if path in there else None
            about = {"path": path, "uploadMode": mode, "shouldIgnore": False}
            files.append({**about, "oid": oid})
        return {"files": files}

    @route(rf"POST {PAGE}\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, repo):
        """Where to put large files; one that is there already gets no action."""
        objects = json.loads(self.body)["objects"]
        for item in objects:
            if item["oid"] not in repo.lfs:
                address = f"{self.server.url}/lfs/{repo.name}/{item['oid']}"
                item["actions"] = {"upload": {"href": address}}
        return {"transfer": "basic", "objects": objects}

    @route("PUT /lfs/(?P<name>[^/]+/[^/]+)/(?P<oid>.+)")
    def lfs_upload(self, name, oid):
        """Take a large file; like S3, without a token."""
        if sha256(self.body) != oid:
            raise HubError(400, "The content does not match its sha256")
        self.server.repos[name].lfs[oid] = self.body
        return b""

    @route(f"POST {API}/commit/main", write=True)
    def commit(self, repo):
        """Change files, all at once."""
        files = dict(repo.files())
        for line in filter(None, self.body.split(b"\n")):
            key, value = json.loads(line).values()
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = repo.lfs[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            elif key != "header":
                raise ValueError(f"{key} is not served")
        oid = repo.add_commit(files)
        page = f"{self.server.url}/datasets/{repo.name}/commit/{oid}"
        return {"commitOid": oid, "commitUrl": page}
