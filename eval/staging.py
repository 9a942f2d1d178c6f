"""Puts local datasets where lmms-eval's unmodified tasks find them: under their hub names, below the working directory.

The datasets library keys its cache of a local folder by the README alone, so a second folder, or the same one written
anew, would silently be answered with the questions of the first. The staged README therefore carries a version.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from encoders.errors import DataError

README = "README.md"


def check_datasets(data: Path, folders: Iterable[str]) -> None:
    """Raise DataError naming the first of the dataset folders that is not below `data`."""
    for folder in folders:
        if not (data / folder).is_dir():
            raise DataError(f"{data / folder} is missing; --data names the folder that holds {folder}")
        if not (data / folder / README).is_file():
            raise DataError(f"{data / folder / README} is missing; it lists the configs and splits of the dataset")


@contextmanager
def staged(data: Path | None, folders: Iterable[str]) -> Iterator[None]:
    """Work in a temporary directory that links the dataset folders of `data` (none: the tasks ask the hub).

    What tasks write into the working directory, such as submission files, goes away with it.
    """
    with TemporaryDirectory(prefix="eval-mllm-") as stage:
        if data is not None:
            check_datasets(data, folders)
            for folder in folders:
                _stage(data / folder, Path(stage) / folder)
        with chdir(stage):
            yield


def _stage(source: Path, target: Path) -> None:
    from huggingface_hub import DatasetCard

    version = hashlib.sha256()
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            stat = file.stat()
            version.update(f"{name} {file.resolve()} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).symlink_to(file.resolve())
    card = DatasetCard.load(source / README, ignore_metadata_errors=True)
    configs = card.data.get("configs")
    if not configs:
        raise DataError(f"{source / README} lists no configs; take it from the dataset's repository")
    for config in configs:
        config["description"] = version.hexdigest()
    (target / README).unlink()
    card.save(target / README)
