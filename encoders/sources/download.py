"""Fetching from the Hub: of one commit, the small files that describe a model and the one weights file that is wanted.

What huggingface_hub has in its cache is not fetched again, and does without a network.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from encoders.errors import ModelError

SMALL_FILES = ("*.json", "*.txt", "README.md")


@dataclass(frozen=True)
class Download:
    """A repository's files at one commit, as far as they were wanted."""

    folder: Path
    repo: str
    commit: str
    license: str | None


def download(repo: str, revision: str | None, choose: Callable[[frozenset[str]], tuple[str, ...]] | None) -> Download:
    """Fetch `repo` at `revision` (a branch, tag or commit; None is its main branch).

    `choose` names the weights to look for, best first, given the names of the small files; without it none are fetched.
    Raises ModelError if the repository, the revision or every one of those files is missing or out of reach.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(SMALL_FILES)))
        commit = folder.name
        wanted = choose(frozenset(file.name for file in folder.iterdir())) if choose is not None else ()
        for name in wanted:
            try:
                file = Path(hf_hub_download(repo, name, revision=commit))
                for shard in _shards(file):
                    hf_hub_download(repo, shard, revision=commit)
                break
            except LocalEntryNotFoundError:
                raise  # out of reach, which says nothing of the repository
            except EntryNotFoundError:
                continue
        else:
            if wanted:
                raise ModelError(f"{repo} on the Hub (commit {commit}) holds none of {', '.join(wanted)}")
    except (HTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        raise ModelError(
            f"{repo} is neither on this machine nor to be had from the Hub (revision {revision or 'main'}): {error}; "
            "check the path or id, the network and, for a private or gated model, your login (hf auth login)"
        ) from error
    return Download(folder, repo, commit, _license(folder / "README.md"))


def _shards(file: Path) -> list[str]:
    """The files that an index of shards names; none of any other file."""
    if not file.name.endswith(".index.json"):
        return []
    try:
        return sorted(set(json.loads(file.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{file} is not an index of shards ({error!r})") from error


def _license(card: Path) -> str | None:
    """What the model card states, if it states one."""
    from huggingface_hub import metadata_load

    if not card.is_file():
        return None
    try:
        stated = (metadata_load(card) or {}).get("license")
    except ValueError as error:
        raise ModelError(f"{card} has no valid metadata: {error}") from error
    return str(stated) if stated is not None else None
