"""Finds the dataset folders of the benches and puts them where lmms-eval's unmodified tasks look for them.

That is under their Hub names, below the working directory. The datasets library keys its cache of a local folder by the
README alone, so a second folder, or the same one written anew, would silently be answered with the questions of the
first. The staged README therefore carries a version, and lists only the splits that are asked for.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from encoders.errors import DataError
from eval.benches.benchmarks import Bench, Table
from eval.benches.dataset_card import README, data_files, front_matter, trimmed

FETCHED = "benches.json"  # what fetch-benches writes beside the folders
LOCAL = "local"


@dataclass(frozen=True)
class Source:
    """A dataset folder, and the commit of the repository that it was fetched from ("local": not known)."""

    path: Path
    revision: str = LOCAL


def located(benches: Sequence[Bench], data: Path | None) -> dict[str, Source]:
    """The folder of every dataset repository that the benches read.

    They stand below `data`; without it below a folder of the HF cache, into which what is missing is fetched first.
    Raises DataError if one is missing or its download was not finished.
    """
    if data is None:
        from eval.benches.download import default_folder, fetch

        data = default_folder()
        fetch(benches, data)
    fetched = read_fetched(data)
    check_datasets(data, [folder for bench in benches for folder in bench.folders])
    sources = {}
    for folder in dict.fromkeys(folder for bench in benches for folder in bench.folders):
        record = fetched.get(folder, {"revision": LOCAL, "complete": True})
        if not record["complete"]:
            raise DataError(f"{data / folder}: its download was not finished; run fetch-benches --to {data} again")
        for name in record.get("files", ()):
            if not (data / folder / name).is_file():
                raise DataError(f"{data / folder / name} was fetched but is gone; run fetch-benches --to {data} again")
        sources[folder] = Source(data / folder, record["revision"])
    return sources


def check_datasets(data: Path, folders: Iterable[str]) -> None:
    """Raise DataError naming the first of the dataset folders that is not below `data`."""
    for folder in folders:
        if not (data / folder).is_dir():
            raise DataError(
                f"{data / folder} is missing; --data names the folder that holds {folder}; "
                f"fetch-benches --to {data} gets it from the Hub"
            )
        if not (data / folder / README).is_file():
            raise DataError(f"{data / folder / README} is missing; it lists the configs and splits of the dataset")


def table_files(source: Source, table: Table) -> list[Path]:
    """The files of a table in its folder. Raises DataError naming what the folder lacks."""
    try:
        card = front_matter((source.path / README).read_text(encoding="utf-8"))
        names = [file.relative_to(source.path).as_posix() for file in _visible(source.path)]
        return [source.path / name for name in data_files(card, names, table)]
    except (DataError, UnicodeDecodeError) as error:
        raise DataError(f"{source.path}: {error}; take {table.repository} from its repository again") from error


@contextmanager
def staged(benches: Sequence[Bench], sources: Mapping[str, Source]) -> Iterator[None]:
    """Work in a temporary directory that links the tables of the benches.

    What tasks write into the working directory, such as submission files, goes away with it.
    """
    tables: dict[str, list[Table]] = {}
    for table in dict.fromkeys(table for bench in benches for table in bench.tables):
        tables.setdefault(table.repository, []).append(table)
    with TemporaryDirectory(prefix="eval-mllm-") as stage:
        for repository, wanted in tables.items():
            _stage(sources[repository], wanted, Path(stage) / repository)
        with chdir(stage):
            yield


def read_fetched(data: Path) -> dict[str, dict[str, Any]]:
    """What fetch-benches recorded of each repository below a folder; empty if it did not write it."""
    file = data / FETCHED
    if not file.is_file():
        return {}
    try:
        return dict(json.loads(file.read_text())["repositories"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file} is damaged ({error}); remove it and run fetch-benches --to {data} again") from error


def _stage(source: Source, tables: Sequence[Table], target: Path) -> None:
    version = hashlib.sha256()
    # Two benches may read the same split and need other columns of it.
    unique = {(table.config, table.split): table for table in tables}
    files = {table: table_files(source, table) for table in unique.values()}
    names = {table: [file.relative_to(source.path).as_posix() for file in found] for table, found in files.items()}
    for file in sorted({file for found in files.values() for file in found}):
        name, stat = file.relative_to(source.path), file.stat()
        version.update(f"{name} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).symlink_to(file.resolve())
    card = front_matter((source.path / README).read_text(encoding="utf-8"))
    (target / README).write_text(trimmed(card, names, version.hexdigest()), encoding="utf-8")


def _visible(folder: Path) -> Iterator[Path]:
    """The files of a folder but for hidden ones, such as the Hub client's notes."""
    for file in sorted(folder.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts):
            yield file
