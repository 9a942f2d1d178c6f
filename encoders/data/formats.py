"""Open a data set of any format as `Samples`."""

from pathlib import Path

from encoders.data.captions_table import CaptionTable
from encoders.data.samples import Samples
from encoders.data.shards import TarSamples
from encoders.data.spec import Columns, DataSpec, read_columns
from encoders.data.tables import CsvRows, DatasetRows, ParquetRows, Rows, TableSamples
from encoders.errors import DataError, UsageError


def open_samples(data: Path | DataSpec) -> Samples:
    """The samples of a spec; a path is a folder of tars as the embedded world writes them.

    Raises DataError if there are none or a column is missing, UsageError if the spec contradicts its mapping.
    """
    spec = data if isinstance(data, DataSpec) else DataSpec(data)
    columns = read_columns(spec.mapping)
    if spec.format == "tar":
        return TarSamples(spec.path, columns, _captions(spec, columns), spec.cache, spec.cache_gb)
    if columns.join is not None or spec.captions is not None:
        raise UsageError(f"mapping {spec.mapping}: captions are joined to tars; a {spec.format} holds its own")
    samples = TableSamples(_rows(spec, top_columns(columns)), columns, spec.images)
    if not len(samples):
        raise DataError(f"{spec.path} holds no sample")
    return samples


def _rows(spec: DataSpec, columns: list[str]) -> Rows:
    match spec.format:
        case "parquet":
            return ParquetRows(spec.path, columns)
        case "dataset":
            return DatasetRows(spec.path, columns)
        case "csv":
            return CsvRows(spec.path, columns, spec.cache)
    raise UsageError(f"unknown format {spec.format!r}; known: tar, parquet, dataset, csv")


def _captions(spec: DataSpec, columns: Columns) -> CaptionTable | None:
    if (columns.join is None) != (spec.captions is None):
        needed = "needs `captions`, the CSV file to join" if columns.join else "has no `join` for the CSV in `captions`"
        raise UsageError(f"mapping {spec.mapping} {needed}")
    if columns.join is None or spec.captions is None:
        return None
    return CaptionTable(spec.captions, columns.texts(), columns.join.table, spec.cache)


def top_columns(columns: Columns) -> list[str]:
    """The columns of a table that a mapping reads."""
    named = [*columns.image, *columns.texts(), *([columns.key] if columns.key is not None else [])]
    return list(dict.fromkeys(named))
