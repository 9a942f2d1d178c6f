"""Tables as random-access sets of samples: parquet files, Hugging Face data sets on disk, CSV files with image paths.

Each kind brings its rows; what a row means is told by the mapping, as for tars.
"""

import hashlib
from collections import OrderedDict
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from encoders.data.captions_table import CsvFile
from encoders.data.order import WINDOW
from encoders.data.samples import MAX_IMAGE, BadSample, Sample, build
from encoders.data.spec import Columns
from encoders.errors import DataError, UsageError

GROUPS_BYTES = 2**30  # of decoded row groups that a process keeps


class Rows(Protocol):
    """The rows of a table by number. Picklable."""

    sizes: np.ndarray
    """Rows of each part that is best read together, int64."""
    window: int
    """Rows whose parts can be in use at a time."""

    def row(self, index: int) -> dict[str, Any]:
        """A row's columns. Raises ValueError if it cannot be read."""

    def where(self, index: int) -> str:
        """The file a row lies in."""

    def fingerprint(self) -> str: ...


class TableSamples:
    """The samples of a table. Image paths are taken below `images` and never from outside of it."""

    def __init__(self, rows: Rows, columns: Columns, images: Path | None):
        self._rows, self.columns = rows, columns
        self.images = images.resolve() if images is not None else None
        self._total = int(rows.sizes.sum())

    @property
    def sizes(self) -> np.ndarray:
        """Samples of each part, int64 (parts,)."""
        return self._rows.sizes

    @property
    def window(self) -> int:
        """Samples whose parts can be in use at a time."""
        return self._rows.window

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, index: int) -> Sample:
        """Raises BadSample if the row is damaged or incomplete."""
        row, shard = self._read(index), self._rows.where(index)
        key = self._key(row, index)

        def field(column: str) -> Any:
            value = _look_up(row, column)
            return {name: one for name, one in value.items() if one is not None} if isinstance(value, dict) else value

        return build(self.columns, lambda column: self._image(field(column), shard, key), field, shard, key)

    def shard(self, index: int) -> str:
        """The name of the file a sample lies in."""
        return self._rows.where(index)

    def key(self, index: int) -> str:
        """The text in the mapping's key column; of a row that has none, or that cannot be read, the row's number."""
        if self.columns.key is None:
            return str(index)
        try:
            return self._key(self._read(index), index)
        except BadSample as error:
            return error.key

    def fetch_ahead(self, shards: np.ndarray) -> None:
        """Nothing: tables lie on this machine."""

    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self._rows.fingerprint()} {self.columns}".encode()).hexdigest()

    def _read(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        try:
            return self._rows.row(index)
        except ValueError as error:
            raise BadSample("damaged row", self._rows.where(index), self._key({}, index), str(error)) from error

    def _key(self, row: dict[str, Any], index: int) -> str:
        if self.columns.key is None:
            return str(index)
        value = _look_up(row, self.columns.key)
        if value is None or value == "":
            return f"row {index}"  # not the number alone, which may be another row's key
        return str(value).encode(errors="backslashreplace").decode()  # bytes of a CSV that are no text

    def _image(self, value: Any, shard: str, key: str) -> bytes | None:
        """A picture's bytes from a cell: bytes, a path, or the datasets library's pair of both."""
        match value:
            case None | bytes():
                return value
            case {"bytes": bytes(content)}:
                return content
            case str(path) | {"path": str(path)}:
                return self._file(path, shard, key)
        raise BadSample("no image", shard, key, f"found {value!r:.80}")

    def _file(self, path: str, shard: str, key: str) -> bytes:
        if self.images is None:
            raise BadSample(
                "no image", shard, key, f"{path!r:.120} is a path; name the folder it starts from as `images`"
            )
        try:
            file = (self.images / path).resolve()
            if not file.is_relative_to(self.images):
                raise BadSample("no image", shard, key, f"{path!r:.120} leads out of {self.images}")
            if file.stat().st_size > MAX_IMAGE:
                raise BadSample("oversized image", shard, key, f"{file.stat().st_size} bytes, more than {MAX_IMAGE}")
            return file.read_bytes()
        except (OSError, ValueError) as error:
            raise BadSample("no image", shard, key, str(error)) from error


class ParquetRows:
    """The rows of a folder of parquet files, by file name and place. A part is a row group; a file that cannot be
    opened is one damaged row."""

    def __init__(self, folder: Path, columns: list[str]):
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError as error:
            raise UsageError("format parquet needs the extra: pip install 'encoder-swap[tables]'") from error

        self.files = sorted(folder.glob("*.parquet")) if folder.is_dir() else []
        if not self.files:
            raise DataError(f"{folder} is no folder of parquet files; name one that is")
        self.columns = columns
        groups: list[tuple[int, int, int, int]] = []  # file, group in it (-1: damaged), rows, bytes of the columns
        for number, file in enumerate(self.files):
            try:
                with pyarrow.parquet.ParquetFile(file) as opened:
                    self.columns = _present(columns, opened.schema_arrow.names, file)
                    found = [opened.metadata.row_group(i) for i in range(opened.metadata.num_row_groups)]
                groups += [(number, i, group.num_rows, self._bytes(group)) for i, group in enumerate(found)]
            except (pyarrow.ArrowException, OSError):
                groups.append((number, -1, 1, 0))
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self.sizes = self._groups[:, 2].copy()
        self._ends = np.cumsum(self.sizes)
        # Half, for a window may end with part of a group, and the next one begins while some workers are still in it.
        per_row = self._groups[:, 3].sum() / max(self.sizes.sum(), 1)
        self.window = int(np.clip(GROUPS_BYTES / 2 / max(per_row, 1), 1, WINDOW))
        self._loaded: OrderedDict[int, Any] = OrderedDict()

    def row(self, index: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._ends, index, side="right"))
        table = self._load(group)
        if isinstance(table, ValueError):
            raise table
        row = table.slice(index - int(self._ends[group]) + int(self.sizes[group]), 1).to_pylist()
        return dict(row[0])

    def where(self, index: int) -> str:
        return self.files[self._groups[np.searchsorted(self._ends, index, side="right"), 0]].name

    def fingerprint(self) -> str:
        named = [(file.name, file.stat().st_size) for file in self.files]
        return hashlib.sha256(f"{named} {self._groups.tolist()}".encode()).hexdigest()

    def _bytes(self, group: Any) -> int:
        """What the columns of a row group take when they are read."""
        chunks = (group.column(i) for i in range(group.num_columns))
        inside = tuple(f"{column}." for column in self.columns)  # a structure's column is stored by its fields
        return sum(one.total_uncompressed_size for one in chunks if f"{one.path_in_schema}.".startswith(inside))

    def _load(self, group: int) -> Any:
        """A row group's table, or the ValueError that says why there is none."""
        import pyarrow
        import pyarrow.parquet

        if group in self._loaded:
            self._loaded.move_to_end(group)
            return self._loaded[group]
        number, place, count, _ = self._groups[group].tolist()
        try:
            with pyarrow.parquet.ParquetFile(self.files[number]) as opened:
                table = opened.read_row_group(place, columns=self.columns, use_threads=False)
            table.validate(full=True)
            found = (
                table if len(table) == count else ValueError(f"row group {place} has {len(table)} rows, not {count}")
            )
        except (pyarrow.ArrowException, OSError) as error:
            found = ValueError(f"row group {place}: {error}"[:300])
        self._loaded[group] = found
        taken = [0 if isinstance(one, ValueError) else one.nbytes for one in self._loaded.values()]
        while len(taken) > 1 and sum(taken) > GROUPS_BYTES:
            self._loaded.popitem(last=False)
            del taken[0]
        return found

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_loaded": OrderedDict()}


class DatasetRows:
    """The rows of a folder of `datasets.Dataset.save_to_disk`, mapped into memory."""

    window = WINDOW

    def __init__(self, folder: Path, columns: list[str]):
        try:
            import datasets
        except ImportError as error:
            raise UsageError("format dataset needs the extra: pip install 'encoder-swap[tables]'") from error
        if not (folder / "dataset_info.json").is_file():
            hint = "; it holds several splits: name one of them" if (folder / "dataset_dict.json").is_file() else ""
            raise DataError(f"{folder} is no folder of Dataset.save_to_disk{hint}")
        try:
            data = datasets.load_from_disk(str(folder))
        except Exception as error:  # the library raises of every kind
            raise DataError(f"{folder} cannot be loaded as a data set ({type(error).__name__}: {error})") from error
        data = data.select_columns(_present(columns, data.column_names, folder))
        for name, feature in data.features.items():
            if isinstance(feature, datasets.Image):
                data = data.cast_column(name, datasets.Image(decode=False))
            elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):
                data = data.cast_column(name, datasets.List(datasets.Image(decode=False)))
        self.folder, self._data = folder, data
        self.sizes = np.array([len(chunk) for chunk in data.data.column(0).chunks], dtype=np.int64)

    def row(self, index: int) -> dict[str, Any]:
        import pyarrow

        try:
            return dict(self._data[index])
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(str(error)) from error

    def where(self, index: int) -> str:
        return self.folder.name

    def fingerprint(self) -> str:
        files = sorted(file for file in self.folder.iterdir() if file.is_file())
        named = [(file.name, file.stat().st_size) for file in files]
        return hashlib.sha256(f"{named} {len(self._data)}".encode()).hexdigest()


class CsvRows:
    """The rows of a CSV file."""

    window = WINDOW

    def __init__(self, file: Path, columns: list[str], cache: Path | None):
        self._csv = CsvFile(file, columns, None, cache)
        self.sizes = np.array([len(self._csv)], dtype=np.int64)

    def row(self, index: int) -> dict[str, Any]:
        return dict(self._csv.read(index))

    def where(self, index: int) -> str:
        return self._csv.file.name

    def fingerprint(self) -> str:
        return self._csv.fingerprint()


def _present(columns: list[str], found: list[str], where: Path) -> list[str]:
    """The columns to read; for a field of a structure the structure. Raises DataError if one is not there."""
    tops = [column if column in found else column.partition(".")[0] for column in columns]
    missing = [column for column, top in zip(columns, tops, strict=True) if top not in found]
    if missing:
        raise DataError(f"{where} has no column {', '.join(missing)}; it has {', '.join(found)[:300]}")
    return list(dict.fromkeys(tops))


def _look_up(row: dict[str, Any], column: str) -> Any:
    """A column, or a field of a structure: `captions.web`. A dot may also be part of a column's name."""
    if column in row:
        return row[column]
    top, _, name = column.partition(".")
    value = row.get(top)
    return value.get(name) if isinstance(value, dict) else None
