"""Whether a bench's tables hold what its task will ask of them, from parquet footers and a few columns.

lmms-eval's tasks assert these things too, but when the answers are scored, hours later.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders.errors import DataError
from eval.benches.benchmarks import Bench, Table
from eval.benches.staging import Source, table_files

if TYPE_CHECKING:
    import pyarrow

YES_NO = ("yes", "no")
CAPTIONS = "annotations_captions"
LINE_BREAK = re.compile(r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+")
SHARD = re.compile(r"-(\d{5})-of-(\d{5})")


def count_questions(bench: Bench, sources: Mapping[str, Source]) -> int:
    """How many questions a bench has in its folders.

    Raises DataError if a split, a column or a row that its task needs is missing or cannot be read.
    """
    for table in bench.tables:
        files = table_files(sources[table.repository], table)
        _check_shards(table, files)
        for file in files:
            _check_columns(bench, table, file)
    questions = bench.tables[0]
    files = table_files(sources[questions.repository], questions)
    rows = sum(_rows(file) for file in files)
    if not rows:
        raise DataError(f"{files[0]} holds no questions; {_again(questions)}")
    if bench.task in CONTENT:
        CONTENT[bench.task](bench, sources)
    return rows


def _again(table: Table) -> str:
    return f"take {table.repository} from its repository again"


def _check_shards(table: Table, files: Sequence[Path]) -> None:
    """Raise DataError if of files numbered 00000-of-00003 and so on one is not there, or there are two sets of them;
    per folder, of which a split may have one for each subject."""
    for folder in sorted({file.parent for file in files}):
        names = [file.name for file in files if file.parent == folder]
        numbered = [(int(found[1]), int(found[2])) for name in names if (found := SHARD.search(name))]
        if len(totals := {total for _, total in numbered}) > 1 or len(set(numbered)) < len(numbered):
            raise DataError(f"{folder} holds parts of two versions of {table.repository}; {_again(table)}")
        if missing := sorted(set(range(max(totals, default=0))) - {number for number, _ in numbered}):
            raise DataError(f"{folder} lacks part {missing[0]} (counted from 0) of {max(totals)}; {_again(table)}")


def _check_columns(bench: Bench, table: Table, file: Path) -> None:
    schema = _opened(file, lambda parquet: parquet.schema_arrow)
    if schema is None:
        return
    if missing := [column for column in table.columns if column not in schema.names]:
        raise DataError(
            f"{file}: {bench.name} needs the column {missing[0]!r}, but it has {', '.join(schema.names)}; "
            f"{_again(table)}"
        )


def _rows(file: Path) -> int:
    counted = _opened(file, lambda parquet: parquet.metadata.num_rows)
    return 1 if counted is None else int(counted)


def _opened(file: Path, read: "Callable[[pyarrow.parquet.ParquetFile], Any]") -> Any:
    """Something of a parquet file's footer; None for other formats, which are read only as a whole."""
    import pyarrow.parquet

    if file.suffix != ".parquet":
        return None
    if file.stat().st_size < 1024 and file.read_bytes().startswith(b"version https://git-lfs"):
        raise DataError(f"{file} is a pointer of Git LFS, not the data; run `git lfs pull` beside it, or fetch-benches")
    try:
        with pyarrow.parquet.ParquetFile(file) as parquet:
            return read(parquet)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is not whole ({error}); fetch it again") from error


def _column(source: Source, table: Table, *names: str) -> "pyarrow.Table":
    """Columns of a table, of all its files."""
    import pyarrow
    import pyarrow.parquet

    files = [file for file in table_files(source, table) if file.suffix == ".parquet"]
    return pyarrow.concat_tables([pyarrow.parquet.read_table(file, columns=list(names)) for file in files])


def _check_pairs(bench: Bench, sources: Mapping[str, Source]) -> None:
    table = bench.tables[0]
    columns = _column(sources[table.repository], table, "category", "question_id").to_pydict()
    asked = Counter(zip(columns["category"], columns["question_id"], strict=True))
    if odd := next((pair for pair, count in asked.items() if count != 2), None):
        raise DataError(
            f"{sources[table.repository].path}: MME asks two questions on each picture, but {'/'.join(odd)} has "
            f"{asked[odd]}; {_again(table)}"
        )


def _check_truths(bench: Bench, sources: Mapping[str, Source]) -> None:
    table = bench.tables[0]
    answers = _column(sources[table.repository], table, "answer").to_pydict()["answer"]
    for row, answer in enumerate(answers):
        if str(answer).strip().lower() not in YES_NO:
            raise DataError(
                f"{sources[table.repository].path}: row {row} has the answer {answer!r}, but POPE's are yes and no; "
                f"{_again(table)}"
            )


def _check_gqa_pictures(bench: Bench, sources: Mapping[str, Source]) -> None:
    questions, pictures = bench.tables
    source = sources[questions.repository]
    there = set(_column(source, pictures, "id").to_pydict()["id"])
    for row, name in enumerate(_column(source, questions, "imageId").to_pydict()["imageId"]):
        if name not in there:
            raise DataError(
                f"{source.path}: question {row} is about picture {name!r}, which is not in {pictures.config}; "
                f"{_again(questions)}"
            )


def _check_captions(bench: Bench, sources: Mapping[str, Source]) -> None:
    import pyarrow

    table = bench.tables[0]
    ids = _column(sources[table.repository], table, "image_id")["image_id"]
    if not pyarrow.types.is_integer(ids.type) or len(ids.unique()) != len(ids):
        raise DataError(
            f"{sources[table.repository].path}: NoCaps needs a number of its own for each picture, but image_id is of "
            f"type {ids.type} with {len(ids.unique())} values in {len(ids)} rows; {_again(table)}"
        )
    for row, references in enumerate(_column(sources[table.repository], table, CAPTIONS)[CAPTIONS].to_pylist()):
        # The tokenizer reads a caption a line, and has spaces for \n alone: what follows would be of other pictures.
        if broken := next((text for text in references if LINE_BREAK.search(text.replace("\n", " "))), None):
            raise DataError(
                f"{sources[table.repository].path}: row {row} has the reference {broken!r}, which is not one line; "
                f"{_again(table)}"
            )


CONTENT: dict[str, Callable[[Bench, Mapping[str, Source]], None]] = {
    "mme": _check_pairs,
    "pope": _check_truths,
    "gqa": _check_gqa_pictures,
    "nocaps_val": _check_captions,
}
