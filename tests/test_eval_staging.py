"""Finding the files of a split as the datasets library does, and reading data written anew anew."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from bench_sets import OWNER, pope, write_repository

from encoders.errors import DataError
from eval.benches.benchmarks import BENCHES, Table
from eval.benches.dataset_card import chosen_config, data_files, front_matter
from eval.benches.lmms_tasks import load_task
from eval.benches.staging import FETCHED, Source, located, staged, table_files


def names(folder: Path, files: list[str]) -> None:
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_list([{"x": 1}]).to_parquet(folder / name)


SHARDS = ["data/test-00000-of-00002.parquet", "data/test-00001-of-00002.parquet", "data/train-0.parquet"]
LAYOUTS: dict[str, tuple[Any, list[str], str]] = {
    "glob": ([{"config_name": "default", "data_files": [{"split": "test", "path": "data/test-*"}]}], SHARDS, ""),
    "list": (
        [{"config_name": "a", "data_files": [{"split": "test", "path": [SHARDS[1], "data/train-*"]}]}],
        SHARDS,
        "a",
    ),
    "one string": ([{"config_name": "a", "data_files": "data/*.parquet"}], SHARDS, "a"),
    "deep": (
        [{"config_name": "a", "data_files": [{"split": "test", "path": "**/test-*"}]}],
        ["x/test-0.parquet", "x/y/test-0.parquet", "test-0.parquet", "x/train-0.parquet"],
        "a",
    ),
    "shallow": (
        [{"config_name": "a", "data_files": [{"split": "test", "path": "*/test-?.parquet"}]}],
        ["x/test-0.parquet", "x/y/test-0.parquet", "x/test-10.parquet"],
        "a",
    ),
    "brackets": (
        [{"config_name": "a", "data_files": [{"split": "test", "path": "t-[0-9].parquet"}]}],
        ["t-0.parquet", "t-x.parquet"],
        "a",
    ),
    "data_dir": (
        [{"config_name": "a", "data_dir": "one"}, {"config_name": "b", "data_dir": "two", "default": True}],
        ["one/test-0.parquet", "two/test-0.parquet", "two/train-0.parquet"],
        "",
    ),
    "no configs": (None, SHARDS, ""),
    "split folders": (None, ["test/0.parquet", "train/0.parquet"], ""),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_are_those_that_the_datasets_library_takes(layout: str, tmp_path: Path) -> None:
    configs, files, config = LAYOUTS[layout]
    names(tmp_path, files)
    front: Mapping[str, Any] = {"license": "mit"} if configs is None else {"configs": configs}
    (tmp_path / "README.md").write_text(f"---\n{yaml.safe_dump(front)}---\n\ntext\n")
    builder = datasets.load_dataset_builder(str(tmp_path), config or None)
    assert builder.config.data_files
    for split, theirs in builder.config.data_files.items():
        wanted = sorted(Path(file).resolve() for file in theirs)
        ours = table_files(Source(tmp_path), Table("owner/name", config, str(split)))
        assert [file.resolve() for file in ours] == wanted


def test_what_a_card_lacks_is_said() -> None:
    card = {
        "configs": [{"config_name": "a", "data_files": [{"split": "test", "path": "test-*"}]}, {"config_name": "b"}]
    }
    with pytest.raises(DataError, match="no config 'c', but a, b"):
        chosen_config(card, "c")
    with pytest.raises(DataError, match="no config 'default', but a, b"):
        chosen_config(card, "")
    with pytest.raises(DataError, match="no split 'val' in config 'a', but test"):
        data_files(card, ["test-0"], Table("o/n", "a", "val"))
    with pytest.raises(DataError, match=r"none of test-\* that its README.md lists for split 'test'"):
        data_files(card, ["train-0"], Table("o/n", "a", "test"))
    assert front_matter("no front matter\n---\nconfigs: 1\n---\n") == {}
    with pytest.raises(DataError, match="no YAML"):
        front_matter("---\na: [\n---\n")


def test_data_written_anew_is_read_anew(tmp_path: Path) -> None:
    """The datasets library would give the questions of the first folder to all that look like it."""
    asked = []
    bench = BENCHES["pope"]
    for place, question in (("a", "Is it old?"), ("a", "Is it new?"), ("b", "Is it elsewhere?")):
        rows = [row | {"question": question} for row in pope()]
        write_repository(tmp_path / place / OWNER / "POPE", {("default", "test"): rows}, absent={"Full": "popular"})
        with staged([bench], located([bench], tmp_path / place)):
            asked.append(load_task(bench).eval_docs[0]["question"])
    assert asked == ["Is it old?", "Is it new?", "Is it elsewhere?"]


def test_a_damaged_record_of_what_was_fetched_is_named(tmp_path: Path) -> None:
    write_repository(tmp_path / OWNER / "POPE", {("default", "test"): pope()})
    (tmp_path / FETCHED).write_text("{")
    with pytest.raises(DataError, match=f"{FETCHED} is damaged"):
        located([BENCHES["pope"]], tmp_path)
