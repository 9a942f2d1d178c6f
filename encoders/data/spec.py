"""What a data set is, as data: where it lies, in which format, and which column means what. No torch import.

A mapping is a YAML file of `Columns`; ready ones lie in mappings/ and are named without their suffix.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from encoders.errors import UsageError

MAPPINGS = Path(__file__).parent / "mappings"


@dataclass(frozen=True)
class Join:
    """How a sample finds its row in the table of captions: the row's column `table` equals the sample's `sample`."""

    sample: str
    table: str


@dataclass(frozen=True)
class Columns:
    """Which column holds what. In a tar `txt` is the text of KEY.txt and `json.web` a field of KEY.json; in a table
    `web` is a column and `captions.web` a field of a structure."""

    image: tuple[str, ...]
    """Of these one holds the picture: its bytes, or in a table also its path below `DataSpec.images`."""
    web: str
    short: str | dict[str, str] | None = None
    """A column of captions (or of captions by captioner), or captioner -> column; null: the set has none."""
    long: str | dict[str, str] | None = None
    key: str | None = None
    """Of a table: the column that names a sample; null takes the row's number."""
    join: Join | None = None
    """web, short and long are columns of the table `DataSpec.captions`, whose rows are found so."""

    def texts(self) -> list[str]:
        """The columns of captions."""
        found = [self.web]
        for column in (self.short, self.long):
            found += column.values() if isinstance(column, dict) else [column] if column is not None else []
        return found


@dataclass(frozen=True)
class DataSpec:
    """A data set and how to read it."""

    path: Path
    """tar: a folder of tars, or the file of `python -m encoders.data.index`. parquet: a folder of parquet files.
    dataset: a folder of `Dataset.save_to_disk`. csv: a table of captions and image paths."""
    format: Literal["tar", "parquet", "dataset", "csv"] = "tar"
    mapping: str = "embedded_world"
    """A ready mapping's name, or a YAML file."""
    images: Path | None = None
    """Folder that a table's image paths start from."""
    captions: Path | None = None
    """CSV file of the captions, for mappings with a `join`."""
    cache: Path | None = None
    """Folder for indices, and for copies of remote shards; null puts an index beside its shards where that can be
    written to, and everything else below the user's cache folder."""
    cache_gb: float = 100.0
    """Room for copies of remote shards on each machine."""

    def __post_init__(self) -> None:
        if self.cache_gb <= 0:
            raise UsageError(f"cache_gb is {self.cache_gb} but must be positive")


def read_columns(mapping: str) -> Columns:
    """The mapping of a ready name or a YAML file. Raises UsageError if there is none or it is not one."""
    ready = {file.stem: file for file in MAPPINGS.glob("*.yaml")}
    file = ready.get(mapping, Path(mapping))
    if not file.is_file():
        raise UsageError(
            f"mapping {mapping!r} is neither a YAML file nor ready-made; ready: {', '.join(sorted(ready))}"
        )
    try:
        content = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"mapping {file} cannot be read as YAML: {error}") from error
    return _columns(content, file)


def _columns(content: Any, file: Path) -> Columns:
    known = [entry.name for entry in fields(Columns)]
    if not isinstance(content, dict) or not set(content) <= set(known) or not {"image", "web"} <= set(content):
        found = ", ".join(map(str, content)) if isinstance(content, dict) else repr(content)[:80]
        raise UsageError(f"mapping {file} needs image and web and may have {', '.join(known[2:])}; it has {found}")
    image = (content["image"],) if isinstance(content["image"], str) else tuple(content["image"] or ())
    join = content.get("join")
    if join is not None:
        if not isinstance(join, dict) or set(join) != {"sample", "table"}:
            raise UsageError(f"mapping {file}: join needs sample and table, the columns that must be equal")
        join = Join(**join)
    columns = Columns(**{**content, "image": image, "join": join})
    named = [*image, *columns.texts(), *([columns.key] if columns.key is not None else [])]
    if not image or not all(isinstance(name, str) and name for name in named):
        raise UsageError(f"mapping {file}: every column must be named by a text; found {named}")
    return columns
