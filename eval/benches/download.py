"""Downloads what benches read: only the splits of their tasks, one commit per repository, going on where it stopped."""

import errno
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

from encoders import manifest
from encoders.errors import DataError
from eval.benches.benchmarks import Bench, Table
from eval.benches.dataset_card import README, data_files, front_matter
from eval.benches.staging import FETCHED, Source, read_fetched, table_files

Record = dict[str, Any]  # revision, tables ([config, split]), files, complete


def default_folder() -> Path:
    """Where datasets go if no folder is named."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "encoder-swap" / "benches"


def fetch(benches: Sequence[Bench], to: Path, revision: str | None = None) -> dict[str, Record]:
    """Download what is missing of the benches' tables below `to`; what is there already is left as it is.

    Returns what is recorded of each repository. Raises DataError if something is not to be had.
    """
    wanted: dict[str, list[Table]] = {}
    commits: dict[str, str] = {}
    for bench in benches:
        for table in bench.tables:
            wanted.setdefault(table.repository, []).append(table)
            commits.setdefault(table.repository, "")
            commits[table.repository] = revision or commits[table.repository] or bench.revision
    done = {}
    for repository, tables in wanted.items():
        record = read_fetched(to).get(repository)
        if revision is not None or not _holds(record, tables, to / repository):
            # A bench that names no commit is content with the one that is there.
            commit = commits[repository] or (record["revision"] if record is not None else "main")
            with _explained(repository, commit, to):
                record = _fetch(repository, tables, commit, to, record)
        assert record is not None
        done[repository] = record
    return done


def _fetch(repository: str, tables: Sequence[Table], revision: str, to: Path, earlier: Record | None) -> Record:
    """Bring a repository's folder to one commit, with these tables and those it had before."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.hf_api import RepoFile

    api, folder = HfApi(), to / repository
    folder.mkdir(parents=True, exist_ok=True)
    commit = api.dataset_info(repository, revision=revision).sha
    listing = api.list_repo_tree(repository, recursive=True, revision=commit, repo_type="dataset")
    sizes = {entry.path: entry.size for entry in listing if isinstance(entry, RepoFile)}
    had = {(config, split) for config, split in earlier["tables"]} if earlier else set()
    pairs = sorted([config, split] for config, split in had | {(table.config, table.split) for table in tables})
    old = set(earlier["files"]) if earlier else set()
    started = {"revision": commit, "tables": pairs, "files": sorted(old), "complete": False}
    _record(to, repository, started)
    options: dict[str, Any] = {"repo_type": "dataset", "revision": commit, "local_dir": folder}
    snapshot_download(repository, allow_patterns=[README], **options)
    card = front_matter((folder / README).read_text(encoding="utf-8")) if README in sizes else {}
    every = [Table(repository, config, split) for config, split in pairs]
    found = {name for table in every for name in data_files(card, sizes, table)}
    _check_space(repository, folder, {name: sizes[name] for name in found})
    _record(to, repository, {**started, "files": sorted(old | found)})
    snapshot_download(repository, allow_patterns=[escape(name) for name in sorted(found)], **options)
    for name in old - found:  # of another commit; a pattern of the README would take them for parts of this one
        (folder / name).unlink(missing_ok=True)
    _check_strangers(folder, every, found)
    record = {"revision": commit, "tables": pairs, "files": sorted(found), "complete": True}
    _record(to, repository, record)
    return record


def _holds(record: Record | None, tables: Sequence[Table], folder: Path) -> bool:
    """Whether all of the tables have been fetched and are still there."""
    if record is None or not record["complete"]:
        return False
    there = all((folder / name).is_file() for name in (README, *record["files"]))
    return there and all([table.config, table.split] in record["tables"] for table in tables)


def _check_strangers(folder: Path, tables: Sequence[Table], found: Collection[str]) -> None:
    """Raise DataError if the folder had files of its own that would count as parts of a table."""
    for table in tables:
        for file in table_files(Source(folder), table):
            if (name := file.relative_to(folder).as_posix()) not in found:
                raise DataError(f"{folder} holds {name}, which is not of this commit; remove it and fetch again")


def _check_space(repository: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Raise DataError if the files that are still to come do not fit on the disk."""
    missing = sum(size for name, size in sizes.items() if not (folder / name).is_file())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise DataError(
            f"{repository} needs {missing / 1e9:.1f} GB more, but {folder} has {free / 1e9:.1f} GB free; free space or "
            "name another folder with --to"
        )


def _record(to: Path, repository: str, record: Record) -> None:
    """Replace one repository's entry; whoever reads the file sees it before or after."""
    manifest.write_json(to / FETCHED, {"repositories": {**read_fetched(to), repository: record}})


@contextmanager
def _explained(repository: str, revision: str, to: Path) -> Iterator[None]:
    """Answers of the Hub and failures of the network or the disk as one line that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    login = "log in with `hf auth login` or set HF_TOKEN"
    try:
        yield
    except GatedRepoError as error:
        page = f"https://huggingface.co/datasets/{repository}"
        raise DataError(f"{repository} is gated: accept its conditions on {page}, then {login}") from error
    except RepositoryNotFoundError as error:
        raise DataError(f"{repository} is not on the Hub, or private; check the name, or {login}") from error
    except RevisionNotFoundError as error:
        raise DataError(
            f"{repository} has no revision {revision!r} on the Hub; pass --revision, main is the newest"
        ) from error
    except DataError as error:
        raise DataError(f"{repository} (revision {revision}): {error}") from error
    except (HTTPError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise DataError(f"{repository} cannot be stored in {to}: {error}; name another folder") from error
        raise DataError(
            f"{repository} cannot be fetched ({type(error).__name__}: {' '.join(str(error).split())[:300]}); run "
            f"fetch-benches on a machine with a network, copy its folder here and name it with --data"
        ) from error
