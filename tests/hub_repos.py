"""Git-like repositories in memory: what the loopback hub (hub_server.py) keeps."""

import hashlib
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Blob:
    """A file's content; `lfs` ones are known by their sha256, the others by git's sha1."""

    content: bytes
    lfs: bool

    @property
    def oid(self) -> str:
        if self.lfs:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repo:
    """Commits by id; `refs` names the newest of each branch."""

    private: bool
    gated: bool = False
    """Its files, unlike their names, are for those with a token."""
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    history: list[dict[str, bytes]] = field(default_factory=list)
    """What `main` held after each of its commits."""

    def commit(self, ref: str, files: dict[str, Blob]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted((n, b.oid) for n, b in files.items())}".encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        if ref == "main":
            self.history.append({name: blob.content for name, blob in files.items()})
        return oid

    def files(self, revision: str) -> dict[str, Blob]:
        return self.commits[self.refs.get(revision, revision)]
