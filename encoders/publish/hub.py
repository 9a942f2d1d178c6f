"""Publishing: an artifact that passed every check becomes one commit of a Hub repository, or nothing at all.

The remote tree is compared first, so only what changed is sent and nothing happens if nothing did. The commit names its
parent: if someone else committed meanwhile it fails. Uploads and retries are huggingface_hub's.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from encoders import manifest
from encoders.errors import DataError, ModelError, SwapError, UsageError
from encoders.manifest import MANIFEST
from encoders.publish.publishable import ADDED_BY_HAND, CARD, Publishable, check, read, sha256

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_OURS = (".gitattributes", CARD, *ADDED_BY_HAND)
"""What a repository may hold before the first publication."""


class HubError(SwapError):
    """The Hub could not be reached or refused; the repository holds the old or the new commit, never a mixture."""

    exit_code = 7


@dataclass(frozen=True)
class Plan:
    """What publishing does, or did; as text, what the command prints."""

    repo: str
    kind: str
    files: dict[str, int]
    """Everything the artifact holds there: bytes by path."""
    upload: tuple[str, ...]
    """Of these, what the repository lacks or holds otherwise."""
    delete: tuple[str, ...]
    """Files of the artifact published before that are none of this one."""
    left_out: tuple[str, ...]
    private: bool
    commit: str | None = None
    """Address of the commit or pull request; None if nothing was committed."""

    def __str__(self) -> str:
        marks = {name: "upload" if name in self.upload else "same" for name in self.files}
        lines = [f"  {marks[name]:<6} {count:>15,} B  {name}" for name, count in sorted(self.files.items())]
        lines += [f"  {'delete':<6} {'':>17}  {name}" for name in self.delete]
        lines += [f"  left out: {', '.join(self.left_out)}"] if self.left_out else []
        sent = sum(self.files[name] for name in self.upload)
        visibility = "private" if self.private else "public"
        head = f"{self.kind} -> {self.repo} ({visibility}): {len(self.upload)} of {len(self.files)} files, {sent:,} B"
        return "\n".join([head, *lines])


@dataclass(frozen=True)
class Remote:
    """A repository as it is now."""

    commit: str | None
    private: bool
    oids: dict[str, str]
    """By path: sha256 of what Git LFS holds, else git's own sha1."""
    large: frozenset[str]
    """Paths that Git LFS holds."""
    kind: str | None
    """What was published there; None if nothing was."""
    files: dict[str, str]
    """sha256 by name, as its manifest has it; empty before the first publication."""


def publish(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    dry_run: bool = False,
    create_pr: bool = False,
    instead: Mapping[str, bytes] | None = None,
) -> Plan:
    """Make `repo` ("ORG/NAME", new ones private unless `public`) hold the artifact in `folder`, in one commit.

    `dry_run` reads the repository and sends nothing; `create_pr` proposes the commit (each time anew); `instead` holds
    files that replace the folder's. Prints and returns the plan. Raises what `publishable.check` raises, UsageError if
    the repository holds something else or was edited there, HubError if the Hub fails.
    """
    from huggingface_hub import HfApi

    check_name(repo)
    artifact = check(folder, repo, instead)
    api = HfApi()
    remote = _remote(api, repo)
    plan = _plan(artifact, repo, remote, public)
    if remote is not None:
        _refuse_to_overwrite(api, plan, remote, folder)
    print(plan)
    if not plan.upload and not plan.delete:
        print(f"{repo} is up to date; nothing was sent")
        return plan
    if dry_run:
        print("dry run: nothing was sent")
        return plan
    again = f"`publish-model {folder} {repo}` finds out and finishes"
    with _explained(f"{repo} was not changed, or has the whole new commit; {again}"):
        return _commit(api, artifact, plan, remote, create_pr)


def check_name(repo: str) -> None:
    """Raise UsageError unless `repo` is ORG/NAME as the Hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError(f"{repo!r} does not name a repository ({error})") from error
    if "/" not in repo:
        raise UsageError(f"{repo!r} does not name a repository; write it as ORG/NAME")


def _plan(artifact: Publishable, repo: str, remote: Remote | None, public: bool) -> Plan:
    files = {name: entry.size for name, entry in artifact.entries.items()}
    if remote is None:
        return Plan(repo, artifact.kind, files, tuple(files), (), artifact.left_out, not public)
    if ".gitignore" in remote.oids:
        raise UsageError(f"{repo} has a .gitignore, by which the Hub may drop files silently; remove it there")
    if remote.kind is None and (others := sorted(remote.oids.keys() - set(NOT_OURS))):
        raise UsageError(
            f"{repo} holds files that this toolkit did not publish ({', '.join(others[:3])}); choose another name"
        )
    if remote.kind not in (None, artifact.kind):
        raise UsageError(f"{repo} holds a published {remote.kind!r}, not {artifact.kind!r}; choose another name")
    if not remote.private and not public:
        raise UsageError(f"{repo} exists and is public; pass --public if everyone may see this artifact")
    upload = tuple(name for name in files if _oid(artifact, name, remote) != remote.oids.get(name))
    delete = tuple(name for name in remote.files if name in remote.oids and name not in files)
    return Plan(repo, artifact.kind, files, upload, delete, artifact.left_out, remote.private)


def _oid(artifact: Publishable, name: str, remote: Remote) -> str:
    """What identifies the content in the form in which the repository holds that path."""
    if name in remote.large:
        return artifact.entries[name].sha256
    if name not in remote.oids:
        return ""
    raw = read(artifact.contents[name])
    return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


def _refuse_to_overwrite(api: "HfApi", plan: Plan, remote: Remote, folder: Path) -> None:
    """Raise UsageError if the commit would replace or delete a file that is not as it was published."""
    for name in (*plan.upload, *plan.delete):
        if name not in remote.oids or name == MANIFEST:
            continue
        if name in remote.large:
            there = remote.oids[name]
        else:
            with _explained(f"{plan.repo} could not be read"):
                there = sha256(Path(api.hf_hub_download(plan.repo, name, revision=remote.commit)))
        if there != remote.files.get(name):
            raise UsageError(
                f"{plan.repo} holds a {name} that was not published from here, or was edited there; to keep it, put it "
                f"into {folder} (hf download {plan.repo} {name} --local-dir {folder}); to replace it, delete it on the "
                "Hub first"
            )


def _remote(api: "HfApi", repo: str) -> Remote | None:
    """None if there is no such repository (or none that this token may see)."""
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    with _explained(f"{repo} could not be read"):
        try:
            info = api.model_info(repo)
        except RepositoryNotFoundError:
            api.whoami()  # the Hub answers the same to who may not see it: fails without a login
            return None
        tree = [
            entry
            for entry in api.list_repo_tree(repo, revision=info.sha, recursive=True)
            if isinstance(entry, RepoFile)
        ]
        oids = {entry.path: entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in tree}
        seal = None
        if MANIFEST in oids:
            seal = _manifest(Path(api.hf_hub_download(repo, MANIFEST, revision=info.sha)).parent)
    files = {name: entry.sha256 for name, entry in seal.files.items()} if seal else {}
    large = frozenset(entry.path for entry in tree if entry.lfs)
    return Remote(info.sha, bool(info.private), oids, large, seal.kind if seal else None, files)


def _manifest(folder: Path) -> manifest.Manifest | None:
    """None if the file of that name is none of ours."""
    try:
        return manifest.read(folder)
    except (DataError, AttributeError):
        return None


def _commit(api: "HfApi", artifact: Publishable, plan: Plan, remote: Remote | None, create_pr: bool) -> Plan:
    """One commit on top of what `plan` was made from. Raises ModelError if the Hub refuses the card."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard

    if CARD in plan.upload:
        try:
            ModelCard(read(artifact.contents[CARD]).decode()).validate()
        except ValueError as error:
            raise ModelError(
                f"{plan.repo}: the Hub refuses the metadata of {CARD} ({error}); nothing was sent"
            ) from error
    if remote is None:
        api.create_repo(plan.repo, private=plan.private)
    parent = remote.commit if remote else api.model_info(plan.repo).sha
    changes = [CommitOperationAdd(name, artifact.contents[name]) for name in plan.upload]
    deletions = [CommitOperationDelete(name, is_folder=False) for name in plan.delete]
    made = api.create_commit(
        plan.repo,
        [*changes, *deletions],
        commit_message=f"Publish {artifact.kind} with encoder-swap",
        parent_commit=parent,
        create_pr=create_pr,
    )
    address = made.pr_url or made.commit_url
    print(f"published {address}")
    return replace(plan, commit=address)


@contextmanager
def _explained(consequence: str) -> Iterator[None]:
    """Failures of the network and answers of the Hub as one line."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        # Uploads wrap what happened in a RuntimeError.
        cause = (error.__cause__ or error) if isinstance(error, RuntimeError) else error
        refused = isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403)
        if refused or isinstance(cause, LocalTokenNotFoundError):
            consequence += "; log in with `hf auth login` or set HF_TOKEN to a token that may write there"
        raise HubError(f"{consequence} ({type(cause).__name__}: {' '.join(str(cause).split())})") from error
