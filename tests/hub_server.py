"""A model hub of our own on loopback: git-like repositories behind the endpoints that huggingface_hub's client calls.

Commits are atomic and checked: a parent that moved, an LFS object that is missing or of another size or hash, a read or
write without a token are refused. `trouble` breaks chosen requests; `log` lists what was asked; `history` is the truth.
Models and datasets share one space of names.
"""

import base64
import hashlib
import json
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import yaml
from hub_repos import Blob, Repo

LICENSES = ("apache-2.0", "mit", "llama3", "unknown", "other")  # some of those that the Hub knows
ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
Trouble = Callable[[str, str, int], int | Literal["cut", "cut after"] | None]
"""(method, path, how often this was asked before) -> an HTTP status, or cut the connection before or after acting."""


class Refused(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str = ""):
        super().__init__(message)
        self.status, self.code = status, code


class HubServer(ThreadingHTTPServer):
    """`token` may read and write everything; without it only public repositories can be read."""

    daemon_threads = True

    def __init__(self, token: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.token = token
        self.part = 2**16  # LFS objects above this size are uploaded in parts
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[tuple[str, int], bytes] = {}
        self.log: list[tuple[str, str]] = []
        self.trouble: Trouble = lambda method, path, before: None
        self.lock = Lock()

    def count(self, method: str, pattern: str) -> int:
        return sum(m == method and re.search(pattern, path) is not None for m, path in self.log)


@contextmanager
def serve(token: str) -> Iterator[HubServer]:
    """A running server."""
    server = HubServer(token)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request. Methods named in ROUTES take the groups of their pattern and return the JSON to answer with."""

    server: HubServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and content in one packet: apart, each answer would wait 40 ms for an acknowledgement
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        """Silence: the server keeps its own log."""

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.server.lock:
            before = self.server.log.count((self.command, path))
            self.server.log.append((self.command, path))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.body = self._chunks()
        trouble = self.server.trouble(self.command, path, before)
        if trouble == "cut":
            return self._cut()
        try:
            if isinstance(trouble, int):
                raise Refused(trouble, "trouble was ordered")
            status, headers, content = self._route(path)
        except Refused as refused:
            error = {"error": str(refused), "errors": [{"message": str(refused)}]}
            status, headers, content = refused.status, {"X-Error-Code": refused.code}, json.dumps(error).encode()
            headers["X-Error-Message"] = str(refused)
        if trouble == "cut after":
            return self._cut()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _chunks(self) -> bytes:
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _route(self, path: str) -> tuple[int, dict[str, str], bytes]:
        for method, pattern, answer in ROUTES:
            if self.command in method.split() and (found := re.fullmatch(pattern, path)):
                given = answer(self, *found.groups())
                if isinstance(given, tuple):
                    return given
                return HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(given).encode()
        raise Refused(HTTPStatus.NOT_FOUND, f"no such endpoint: {self.command} {path}")

    def _json(self) -> Any:
        return json.loads(self.body)

    def _authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _write_access(self) -> None:
        if not self._authorised():
            raise Refused(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")

    def _repo(self, name: str) -> Repo:
        repo = self.server.repos.get(name)
        if repo is None or (repo.private and not self._authorised()):
            # As the Hub does it: who may not read a repository does not learn whether it exists.
            raise Refused(HTTPStatus.NOT_FOUND if self._authorised() else 401, "Repository not found", "RepoNotFound")
        return repo

    def _files(self, name: str, revision: str) -> dict[str, Blob]:
        try:
            return self._repo(name).files(revision)
        except KeyError:
            raise Refused(HTTPStatus.NOT_FOUND, f"no revision {revision}", "RevisionNotFound") from None

    def create(self) -> Any:
        self._write_access()
        asked = self._json()
        name = f"{asked['organization']}/{asked['name']}"
        with self.server.lock:
            if name in self.server.repos:
                raise Refused(HTTPStatus.CONFLICT, "You already created this model repo")
            repo = self.server.repos[name] = Repo(private=asked.get("visibility") == "private")
            repo.commit("main", {".gitattributes": Blob(b"*.safetensors filter=lfs\n", lfs=False)})
        return {"url": f"{self.server.url}/{name}"}

    def whoami(self) -> Any:
        self._write_access()
        return {"type": "user", "name": "someone"}

    def validate_yaml(self) -> Any:
        _, front, _ = (self._json()["content"] + "\n---\n---\n").split("---\n", 2)
        try:
            metadata = yaml.safe_load(front)
        except yaml.YAMLError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, f"YAML: {error}") from error
        if not isinstance(metadata, dict) or "license" not in metadata:
            return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
        listed = {key: value if isinstance(value, list) else [value] for key, value in metadata.items()}
        errors = [
            f'"license" must be one of the known ones, not {id}' for id in listed["license"] if id not in LICENSES
        ]
        ids = [*listed.get("base_model", []), *listed.get("datasets", [])]
        errors += [f'"{id}" is not a valid id' for id in ids if not ID.fullmatch(id)]
        if errors:
            answer = {"errors": [{"message": each} for each in errors], "warnings": []}
            return HTTPStatus.BAD_REQUEST, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        return {"errors": [], "warnings": []}

    def preupload(self, name: str, revision: str) -> Any:
        self._write_access()
        present = self._files(name, revision)
        answer = []
        for file in self._json()["files"]:
            lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > 10 * 2**20
            old = present.get(file["path"])
            mode = "lfs" if lfs else "regular"
            entry = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": old.oid if old else None}
            answer.append(entry)
        return {"files": answer}

    def lfs_batch(self, name: str) -> Any:
        self._write_access()
        self._repo(name)
        answer = []
        for wanted in self._json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            entry = {"oid": oid, "size": size}
            if oid not in self.server.objects:
                put = f"{self.server.url}/storage/{oid}"
                header = {}
                if size > (part := self.server.part):
                    header = {f"{i + 1:05}": f"{put}/{i + 1}" for i in range(-(-size // part))} | {
                        "chunk_size": str(part)
                    }
                verify = {"href": f"{self.server.url}/verify"}
                entry["actions"] = {"upload": {"href": put, "header": header}, "verify": verify}
            answer.append(entry)
        return {"objects": answer, "transfer": "basic"}

    def put_object(self, oid: str) -> Any:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(HTTPStatus.BAD_REQUEST, "content and sha256 differ")
        self.server.objects[oid] = self.body
        return {}

    def put_part(self, oid: str, part: str) -> Any:
        self.server.parts[oid, int(part)] = self.body
        return HTTPStatus.OK, {"ETag": hashlib.md5(self.body).hexdigest()}, b""

    def join_parts(self, oid: str) -> Any:
        numbers = [part["partNumber"] for part in self._json()["parts"]]
        self.body = b"".join(self.server.parts[oid, number] for number in numbers)
        return self.put_object(oid)

    def verify(self) -> Any:
        asked = self._json()
        if len(self.server.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, "the object is not as large as was said")
        return {}

    def commit(self, name: str, revision: str) -> Any:
        self._write_access()
        repo = self._repo(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        assert lines[0]["key"] == "header"
        with self.server.lock:
            parent = lines[0]["value"].get("parentCommit", repo.refs[revision])
            pull_request = "create_pr=1" in urlsplit(self.path).query
            if parent != repo.refs[revision] and not pull_request:
                raise Refused(
                    HTTPStatus.PRECONDITION_FAILED, "A commit has happened since. Please refresh and try again."
                )
            files = dict(repo.commits[parent])
            for line in lines[1:]:
                self._apply(files, line["key"], line["value"])
            number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
            oid = repo.commit(f"refs/pr/{number}" if pull_request else revision, files)
        answer = {"commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"}
        return answer | ({"pullRequestUrl": f"{self.server.url}/{name}/discussions/{number}"} if pull_request else {})

    def _apply(self, files: dict[str, Blob], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if key == "file":
            files[path] = Blob(base64.b64decode(value["content"]), lfs=False)
        elif key == "lfsFile":
            content = self.server.objects.get(value["oid"])
            if content is None or len(content) != value["size"]:
                raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, f"{path}: its LFS object was not uploaded")
            files[path] = Blob(content, lfs=True)
        elif key == "deletedFile":
            if files.pop(path, None) is None:
                raise Refused(HTTPStatus.NOT_FOUND, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise Refused(HTTPStatus.BAD_REQUEST, f"unknown operation {key}")

    def info(self, name: str, revision: str | None = None) -> Any:
        repo, files = self._repo(name), self._files(name, revision or "main")
        sha = repo.refs.get(revision or "main", revision)
        siblings = [{"rfilename": path} for path in sorted(files)]
        return {"_id": name, "id": name, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}

    def tree(self, name: str, revision: str) -> Any:
        answer = []
        for path, blob in sorted(self._files(name, revision).items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.content), "oid": blob.oid}
            if blob.lfs:
                entry["lfs"] = {"oid": blob.oid, "size": len(blob.content), "pointerSize": 134}
                entry["oid"] = hashlib.sha1(blob.oid.encode()).hexdigest()
            answer.append(entry)
        return answer

    def resolve(self, name: str, revision: str, path: str) -> Any:
        blob = self._files(name, revision).get(path)
        if self.server.repos[name].gated and not self._authorised():
            raise Refused(HTTPStatus.UNAUTHORIZED, f"Access to {name} is restricted", "GatedRepo")
        if blob is None:
            raise Refused(HTTPStatus.NOT_FOUND, f"no file {path}", "EntryNotFound")
        sha = self.server.repos[name].refs.get(revision, revision)
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.oid}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.oid}"', "X-Linked-Size": str(len(blob.content))}
        status, content = HTTPStatus.OK, blob.content
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            status, content = HTTPStatus.PARTIAL_CONTENT, content[int(found[1]) :]
        return status, headers, content


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: list[tuple[str, str, Callable[..., Any]]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", "/storage/([0-9a-f]+)", Handler.put_object),
    ("PUT", r"/storage/([0-9a-f]+)/(\d+)", Handler.put_part),
    ("POST", "/storage/([0-9a-f]+)", Handler.join_parts),
    ("POST", "/verify", Handler.verify),
    ("POST", f"/api/models/{NAME}/commit/(.+)", Handler.commit),
    ("GET", f"/api/(?:models|datasets)/{NAME}", Handler.info),
    ("GET", f"/api/(?:models|datasets)/{NAME}/revision/(.+)", Handler.info),
    ("GET", f"/api/(?:models|datasets)/{NAME}/tree/(.+)", Handler.tree),
    ("GET HEAD", f"/(?:datasets/)?{NAME}/resolve/(refs/pr/[0-9]+|[^/]+)/(.+)", Handler.resolve),
]
