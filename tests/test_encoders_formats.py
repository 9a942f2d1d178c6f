"""One sample contract: the same content through every format gives every step the same samples and tensors, and what
is wrong is counted exactly, whatever the format."""

import ast
import copy
import csv
import hashlib
import io
import json
import os
import re
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pair_shards import add, sample
from PIL import Image
from test_encoders_data import CONFIG, texts, tokenizer

from encoders.data import tables
from encoders.data.formats import open_samples
from encoders.data.index import FAULTS as FAULTS_OF_TARS
from encoders.data.order import StepOrder
from encoders.data.pairs import TrainingPairs, collate
from encoders.data.samples import BadSample
from encoders.data.spec import MAPPINGS, DataSpec, read_columns
from encoders.errors import DataError, UsageError

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
MAPPED = {
    "url": "image: [jpg]\njoin: {sample: json.url, table: Image Path}\nweb: web\nshort: short\nlong: long\n",
    "files": "image: file\nkey: key\nweb: web\nshort: short\nlong: long\n",
    "img2dataset": "image: [jpg]\nweb: txt\nshort: json.s\nlong: {synthetic: json.l}\n",
}


def rows(count: int) -> list[Row]:
    return [{"key": f"{i:05d}", **sample(i, 20)} for i in range(count)]


def as_tars(folder: Path, rows: list[Row]) -> DataSpec:
    """The embedded world's layout, in shards of 300."""
    for shard in range(0, len(rows), 300):
        with open_tar(folder / f"{shard:05d}.tar") as tar:
            for row in rows[shard : shard + 300]:
                add(tar, f"{row['key']}.jpg", row["image"])
                add(
                    tar,
                    f"{row['key']}.json",
                    json.dumps({name: row[name] for name in ("web", "short", "long")}).encode(),
                )
    return DataSpec(folder)


def as_img2dataset(folder: Path, rows: list[Row]) -> DataSpec:
    with open_tar(folder / "00000.tar") as tar:
        for row in rows:
            add(tar, f"{row['key']}.jpg", row["image"])
            add(tar, f"{row['key']}.txt", row["web"].encode())
            add(tar, f"{row['key']}.json", json.dumps({"s": row["short"], "l": row["long"]}).encode())
    return DataSpec(folder, mapping=mapping(folder, "img2dataset"))


def as_tars_and_csv(folder: Path, rows: list[Row]) -> DataSpec:
    """Captions in a CSV in another order, found by URL."""
    with open_tar(folder / "00000.tar") as tar:
        for row in rows:
            add(tar, f"{row['key']}.jpg", row["image"])
            add(tar, f"{row['key']}.json", json.dumps({"url": f"http://x/{row['key']}"}).encode())
    table = [{"Image Path": f"http://x/{row['key']}", **captions(row)} for row in reversed(rows)]
    write_csv(folder / "captions.csv", table)
    return DataSpec(folder, mapping=mapping(folder, "url"), captions=folder / "captions.csv")


def as_csv_and_files(folder: Path, rows: list[Row]) -> DataSpec:
    for row in rows:
        (folder / f"{row['key']}.jpg").write_bytes(row["image"])
    table = [{"key": row["key"], "file": f"{row['key']}.jpg", **captions(row)} for row in rows]
    write_csv(folder / "table.csv", table)
    return DataSpec(folder / "table.csv", "csv", mapping(folder, "files"), images=folder)


def as_parquet(folder: Path, rows: list[Row]) -> DataSpec:
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table.slice(0, len(rows) // 3), folder / "a.parquet", row_group_size=70)
    pyarrow.parquet.write_table(table.slice(len(rows) // 3), folder / "b.parquet", row_group_size=200)
    return DataSpec(folder, "parquet", "table")


def as_dataset(folder: Path, rows: list[Row]) -> DataSpec:
    datasets = pytest.importorskip("datasets")
    features = {name: datasets.Value("string") for name in ("key", "web", "short", "long")}
    data = datasets.Dataset.from_list(rows, features=datasets.Features({**features, "image": datasets.Image()}))
    data.save_to_disk(str(folder / "data"))
    return DataSpec(folder / "data", "dataset", "table")


FORMATS: dict[str, Callable[[Path, list[Row]], DataSpec]] = {
    "tar": as_tars,
    "img2dataset": as_img2dataset,
    "tar+csv": as_tars_and_csv,
    "csv": as_csv_and_files,
    "parquet": as_parquet,
    "dataset": as_dataset,
}


def open_tar(file: Path) -> tarfile.TarFile:
    return tarfile.open(file, "w")


def captions(row: Row) -> Row:
    return {name: row[name] for name in ("web", "short", "long")}


def write_csv(file: Path, table: list[Row]) -> None:
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(table[0]))
        writer.writeheader()
        writer.writerows(table)


def mapping(folder: Path, name: str) -> str:
    file = folder / f"{name}.yaml"
    file.write_text(MAPPED[name])
    return str(file)


def written(name: str, folder: Path, content: list[Row]) -> TrainingPairs:
    folder.mkdir()
    return TrainingPairs(open_samples(FORMATS[name](folder, content)), CONFIG, tokenizer(), texts, 0)


def digest(data: TrainingPairs) -> tuple[str, list[str]]:
    """sha256 of an epoch's tensors, and the keys, in the order in which they are trained on."""
    found, keys = hashlib.sha256(), []
    for items in StepOrder(data.samples.sizes, 50, len(data) // 50, 0, rank=0, world=1):
        batch = collate([data[item] for item in items], CONFIG)
        assert not batch["bad"]
        for name in ("images", "web_ids", "piece_ids", "targets"):
            found.update(batch[name].numpy().tobytes())
        keys += [data.samples.key(i) for i in batch["sample_ids"]]
    return found.hexdigest(), keys


def test_a_thousand_samples_are_the_same_through_every_format(tmp_path: Path) -> None:
    content = rows(1000)
    content[7]["long"] = 'Two lines\nwith "quotes", commas; and ünïcode.'
    found = {name: digest(written(name, tmp_path / name, content)) for name in FORMATS}
    assert len(set(found["tar"][1])) == 1000
    for name in FORMATS:
        assert found[name] == found["tar"], name


def bomb() -> bytes:
    """A PNG of a few hundred bytes that announces 50,000 x 50,000 pixels."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(10_000))), (b"IEND", b"")]
    packed = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def picture(kind: str, width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, height), 50).save(stream, kind)
    return stream.getvalue()


FAULTS: dict[str, tuple[str, Any, str]] = {
    "garbage": ("image", b"no picture at all", "undecodable image"),
    "truncated": ("image", sample(0, 40)["image"][:300], "undecodable image"),
    "bomb": ("image", bomb(), "oversized image"),
    "empty image": ("image", b"", "no image"),
    "cut png": ("image", picture("PNG", 40, 40)[:-40], "undecodable image"),
    "gif": ("image", picture("GIF", 40, 40), "undecodable image"),
    "sliver": ("image", picture("PNG", 300, 1), "oversized image"),
    "empty web": ("web", "", "no web caption"),
    "blank short": ("short", " \t", "no short caption"),
    "empty long": ("long", "", "no long caption"),
}


@pytest.mark.parametrize("share", [0.0, 0.01, 0.1, 0.5])
@pytest.mark.parametrize("name", FORMATS)
def test_reported_faults_are_the_injected_ones(name: str, share: float, tmp_path: Path) -> None:
    content = rows(200)
    rng = np.random.default_rng(0)
    injected = {}
    for place, i in enumerate(rng.permutation(200)[: round(200 * share)].tolist()):
        field, value, reason = list(FAULTS.values())[place % len(FAULTS)]
        content[i][field] = value
        injected[content[i]["key"]] = reason
    data = written(name, tmp_path / "data", content)
    seen, bad = 0, []
    for items in StepOrder(data.samples.sizes, 10, 20, 0, rank=0, world=1):
        batch = collate([data[item] for item in items], CONFIG)
        assert len(batch["images"]) == 10
        seen += len(batch["sample_ids"])
        bad += batch["bad"]
    assert {report["key"]: report["reason"] for report in bad} == injected
    assert len(bad) == len(injected)
    assert seen == 200
    assert len(FAULTS) == 10
    again = data[0, bad[0]["id"]]["bad"] if bad else []
    assert again == bad[:1]  # the spare is a function of seed, epoch and id


def test_captions_are_joined_by_content_and_never_by_place(tmp_path: Path) -> None:
    spec = as_tars_and_csv(tmp_path, rows(6))
    lines = (tmp_path / "captions.csv").read_text().splitlines()
    (tmp_path / "captions.csv").write_text("\n".join([*lines[:3], lines[2], *lines[4:6], lines[6] + ",too,many"]))
    samples = open_samples(spec)
    reasons = {}
    for i in range(6):
        try:
            assert samples[i].web.endswith(f"IMG_{i}")
        except BadSample as error:
            reasons[error.key] = error.reason
    assert reasons == {"00004": "several caption rows", "00003": "no caption row", "00000": "damaged caption row"}


def test_damaged_tables_give_what_is_intact(tmp_path: Path) -> None:
    spec = as_parquet(tmp_path, rows(300))
    file = tmp_path / "b.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:-4] + b"????")
    samples = open_samples(spec)
    assert len(samples) == 101
    assert samples[99].web.endswith("IMG_99")
    with pytest.raises(BadSample, match=r"b\.parquet: sample 'row 100': damaged row"):
        samples[100]
    group = pyarrow.parquet.ParquetFile(io.BytesIO(whole)).metadata.row_group(0).column(1)
    broken = bytearray(whole)
    broken[group.data_page_offset : group.data_page_offset + 40] = bytes(40)
    file.write_bytes(broken)
    samples = open_samples(spec)
    assert len(samples) == 300
    assert samples[99].web.endswith("IMG_99")
    with pytest.raises(BadSample, match="damaged row"):
        samples[100]


@pytest.mark.parametrize("content", [b'00004,"never closed\n', b'00004,"a"b,w,s,l\n', b"00004,a,w\n"])
def test_a_broken_row_of_a_csv_costs_no_other(content: bytes, tmp_path: Path) -> None:
    table = as_csv_and_files(tmp_path, rows(9))
    lines = table.path.read_bytes().splitlines(keepends=True)
    table.path.write_bytes(b"".join([*lines[:5], content, *lines[6:]]))
    samples = open_samples(table)
    found = [samples.key(i) for i in range(len(samples))]
    assert found == [*(f"{i:05d}" for i in range(4)), "row 4", *(f"{i:05d}" for i in range(5, 9))]
    assert [samples[i].key for i in range(9) if i != 4] == found[:4] + found[5:]
    with pytest.raises(BadSample, match="sample 'row 4': damaged row"):
        samples[4]


def test_an_empty_csv_and_one_that_changes_in_use_are_told(tmp_path: Path) -> None:
    spec = as_csv_and_files(tmp_path, rows(9))
    samples = open_samples(spec)
    travelled = copy.deepcopy(samples)  # by the protocol of pickle, as to a worker, which opens the file anew
    content = spec.path.read_bytes()
    spec.path.write_bytes(content + content.splitlines(keepends=True)[3])
    for one in (samples, travelled):
        with pytest.raises(DataError, match=r"table\.csv is not what it was"):
            one[2]
    spec.path.write_bytes(b"")
    with pytest.raises(DataError, match="has no column .*; it has no header"):
        open_samples(spec)


@pytest.mark.parametrize("name", ["csv", "parquet", "dataset", "tar+csv"])
def test_a_copy_made_later_is_the_same_set(name: str, tmp_path: Path) -> None:
    spec = FORMATS[name](tmp_path, rows(20))
    before = open_samples(spec).fingerprint()
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        os.utime(file, (10**9, 10**9))
    assert open_samples(spec).fingerprint() == before
    (tmp_path / "smaller").mkdir()
    assert open_samples(FORMATS[name](tmp_path / "smaller", rows(19))).fingerprint() != before


def test_row_groups_of_a_window_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 rows in 30 groups, of which a worker keeps ten: an epoch reads each group once, not once for every row."""
    content = rows(300)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(content), tmp_path / "a.parquet", row_group_size=10)
    spec = DataSpec(tmp_path, "parquet", "table")
    assert open_samples(spec).window == 2**18
    row = sum(len(str(content[0][name]).encode()) for name in ("key", "web", "short", "long")) + len(
        content[0]["image"]
    )
    monkeypatch.setattr(tables, "GROUPS_BYTES", 100 * row)
    samples = open_samples(spec)
    assert 30 < samples.window < 60
    opened: list[int] = []
    read = pyarrow.parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        pyarrow.parquet.ParquetFile, "read_row_group", lambda file, i, **o: opened.append(i) or read(file, i, **o)
    )
    for items in StepOrder(samples.sizes, 10, 30, 0, rank=0, world=1, window=samples.window):
        for _, index in items:
            samples[index]
    assert sorted(opened) == list(range(30))


def test_a_bad_sample_can_be_sent_to_another_process() -> None:
    error = BadSample("no image", "0.tar", "k", "found None")
    sent = copy.copy(error)  # by the protocol of pickle
    assert str(sent) == str(error) == "0.tar: sample 'k': no image (found None)"
    assert (sent.reason, sent.shard, sent.key, sent.detail) == ("no image", "0.tar", "k", "found None")


def test_every_reason_is_in_the_table_of_the_docs() -> None:
    section = (ROOT / "docs" / "data.md").read_text().partition("## Bad samples")[2].partition("\n## ")[0]
    table = [line.split(" | ")[0] for line in section.splitlines() if line.startswith("| `")]
    documented = set(re.findall(r"`([a-z ]+)`", "".join(table)))
    raised: set[str] = set(FAULTS_OF_TARS) - {""}
    for file in (ROOT / "encoders").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BadSample":
                raised |= patterns(node.args[0])
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "reason":
                raised |= patterns(node.value)
    for reason in raised:
        assert any(re.fullmatch(reason, one) for one in documented), reason
    for one in documented:
        assert any(re.fullmatch(reason, one) for reason in raised), one


def patterns(reason: ast.expr) -> set[str]:
    """Of an expression that gives a reason; a variable gives none."""
    match reason:
        case ast.Constant():
            return {reason.value}
        case ast.JoinedStr():
            return {"".join(part.value if isinstance(part, ast.Constant) else r"[\w.]+" for part in reason.values)}
        case ast.IfExp():
            return patterns(reason.body) | patterns(reason.orelse)
    return set()


def test_image_paths_stay_in_their_folder(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").write_bytes(sample(0, 20)["image"])
    (tmp_path / "images" / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    paths = ["../secret.jpg", str(tmp_path / "secret.jpg"), "link.jpg", "missing.jpg", "a\0b"]
    write_csv(tmp_path / "t.csv", [{"key": "k", "file": path, "web": "w", "short": "s", "long": "l"} for path in paths])
    samples = open_samples(DataSpec(tmp_path / "t.csv", "csv", mapping(tmp_path, "files"), images=tmp_path / "images"))
    for i in range(len(paths)):
        with pytest.raises(BadSample, match="no image"):
            samples[i]


def test_ready_mappings_can_be_read_and_mistakes_are_told(tmp_path: Path) -> None:
    for file in MAPPINGS.glob("*.yaml"):
        assert read_columns(file.stem).web
    assert read_columns("recap_datacomp_1b").long == {"LLaVA-1.5-LLaMA3-8B": "json.re_caption"}
    wrong = tmp_path / "wrong.yaml"
    for content in (
        "image: [jpg]",
        "image: [jpg]\nweb: txt\nlang: x",
        "[1]",
        "image: [3]\nweb: txt",
        "a: [",
        "image: jpg\nweb: {}",
    ):
        wrong.write_text(content)
        with pytest.raises(UsageError, match="wrong.yaml"):
            read_columns(str(wrong))
    with pytest.raises(UsageError, match="ready: .*img2dataset"):
        read_columns("img2datasets")
    spec = as_parquet(tmp_path, rows(3))
    with pytest.raises(UsageError, match="has no `join`"):
        open_samples(DataSpec(tmp_path, captions=tmp_path / "x.csv"))
    with pytest.raises(DataError, match=r"a\.parquet has no column jpg, txt"):
        open_samples(DataSpec(spec.path, "parquet", mapping(tmp_path, "img2dataset")))
