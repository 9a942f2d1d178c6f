"""Fetching from the Hub: of one commit, the small files that describe a model and the one weights file that is wanted.

What huggingface_hub has in its cache is not fetched again, and does without a network.
"""

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.errors import ModelError
from encoders.weights.headers import read_index

SMALL_FILES = ("*.json", "*.txt", "README.md")
LICENSE_FIELDS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Download:
    """A repository's files at one commit, as far as they were wanted."""

    folder: Path
    repo: str
    commit: str
    license: dict[str, Any]
    """`license`, `license_name` and `license_link` as its card states them; empty where it states none."""
    notes: tuple[str, ...]
    """What could not be read, and why."""


def download(repo: str, revision: str | None, choose: Callable[[frozenset[str]], tuple[str, ...]] | None) -> Download:
    """Fetch `repo` at `revision` (a branch, tag or commit; None is its main branch).

    `choose` names the weights to look for, best first, given the names of the small files; without it none are fetched.
    Raises ModelError if the repository, the revision or every one of those files is missing or out of reach.
    """
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, HTTPError, LocalEntryNotFoundError

    out_of_reach: LocalEntryNotFoundError | None = None
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
            except LocalEntryNotFoundError as error:
                out_of_reach = error  # which says nothing of the repository; the next may be on this machine
            except EntryNotFoundError:
                continue
        else:
            if out_of_reach is not None:
                raise out_of_reach
            if wanted:
                raise ModelError(f"{repo} on the Hub (commit {commit}) holds none of {', '.join(wanted)}")
    except (HTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelError(
                f"{repo} cannot be stored: {error}; free space, or set HF_HOME to a larger disk"
            ) from error
        raise ModelError(
            f"{repo} is neither on this machine nor to be had from the Hub (revision {revision or 'main'}): {error}; "
            "check the path or id, the network and, for a private or gated model, your login (hf auth login)"
        ) from error
    stated, notes = _license(folder / "README.md")
    return Download(folder, repo, commit, stated, notes)


def _shards(file: Path) -> list[str]:
    """The files that an index of shards names; none of any other file."""
    return sorted(set(read_index(file).values())) if file.name.endswith(".index.json") else []


def _license(card: Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What the model card states, if it states one; and a note if the card cannot be read."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    if not card.is_file():
        return {}, ()
    try:
        stated = dict(metadata_load(card) or {})
    except (OSError, ValueError, TypeError, YAMLError) as error:
        why = str(error).splitlines()[0]
        return {}, (f"the source's license is unknown: its {card.name} has no valid metadata ({why})",)
    return {name: stated[name] for name in LICENSE_FIELDS if stated.get(name) is not None}, ()
