"""fetch-benches against a Hub on loopback: only what is needed, once, whole or refused; then a run without network."""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bench_sets import OWNER, mme, picture, write_benches, write_repository
from hub_repos import Blob, Repo
from hub_server import HubServer, serve

from encoders.errors import DataError, UsageError
from eval import run
from eval.benches.benchmarks import BENCHES, Bench, bench_of
from eval.benches.staging import FETCHED, LOCAL, located, table_files
from eval.fetch import fetch, main


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_benches(tmp_path_factory.mktemp("originals"))


@pytest.fixture
def hub(originals: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Holds all sets, and in each a file that nobody needs."""
    with serve("hf_" + "loopback" * 4) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        for folder in (originals / OWNER).iterdir():
            push(server, folder)
        yield server


def push(server: HubServer, folder: Path) -> str:
    """A commit that holds a folder's files and others: what a Hub repository has and no task reads."""
    name = f"{OWNER}/{folder.name}"
    files = {
        file.relative_to(folder).as_posix(): Blob(file.read_bytes(), lfs=file.suffix == ".parquet")
        for file in folder.rglob("*")
        if file.is_file()
    }
    files["data/train-00000-of-00001.parquet"] = Blob(b"gigabytes", lfs=True)
    return server.repos.setdefault(name, Repo(private=False)).commit("main", files)


def unpinned(*names: str) -> list[Bench]:
    """Benches that take the newest commit: the loopback Hub has none of the commits of the real one."""
    return [replace(bench_of(name), revision="") for name in names]


def files_below(folder: Path) -> set[str]:
    return {
        file.relative_to(folder).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    }


def asked_for(hub: HubServer) -> list[str]:
    return [path for method, path in hub.log if method == "GET" and path.endswith(".parquet")]


def test_only_the_needed_splits_come_once_and_without_a_token(hub: HubServer, originals: Path, tmp_path: Path) -> None:
    benches = unpinned(*BENCHES)
    records = fetch(benches, tmp_path)
    assert files_below(tmp_path) == files_below(originals) | {FETCHED}
    assert json.loads((tmp_path / FETCHED).read_text())["repositories"] == records
    for name, record in records.items():
        assert record["revision"] == hub.repos[name].refs["main"]
        assert record["complete"]
    assert len(records[f"{OWNER}/GQA"]["files"]) == 2

    hub.log.clear()
    hub.trouble = lambda method, path, before: 503
    assert fetch(benches, tmp_path) == records
    assert hub.log == []
    sources = located(benches, tmp_path)
    assert {name: source.revision for name, source in sources.items()} == {
        name: record["revision"] for name, record in records.items()
    }
    assert located(benches, originals)[f"{OWNER}/POPE"].revision == LOCAL


def test_an_interrupted_download_is_refused_and_goes_on(hub: HubServer, tmp_path: Path) -> None:
    bench = unpinned("gqa")
    hub.trouble = lambda method, path, before: (
        404 if "testdev_balanced_images/" in path and path.endswith("parquet") else None
    )
    with pytest.raises(DataError, match="GQA cannot be fetched|GQA .*revision"):
        fetch(bench, tmp_path)
    with pytest.raises(DataError, match="not finished; run fetch-benches"):
        located(bench, tmp_path)
    hub.trouble = lambda method, path, before: None
    before = asked_for(hub)
    fetch(bench, tmp_path)
    again = asked_for(hub)[len(before) :]
    assert [path.rsplit("/", 2)[1] for path in again] == ["testdev_balanced_images"]
    assert len(table_files(located(bench, tmp_path)[f"{OWNER}/GQA"], bench[0].tables[1])) == 1


def test_another_commit_replaces_the_files_of_the_first(hub: HubServer, tmp_path: Path) -> None:
    bench, other = unpinned("mme")[0], tmp_path / "other" / "MME"
    first = fetch([bench], tmp_path / "to")[f"{OWNER}/MME"]
    write_repository(other, {("default", "test"): mme()[:4]})
    (other / "data" / "test-00000-of-00001.parquet").rename(other / "data" / "test-00000-of-00003.parquet")
    commit = push(hub, other)
    assert fetch([bench], tmp_path / "to")[f"{OWNER}/MME"] == first  # what is whole stays as it is
    renewed = fetch([bench], tmp_path / "to", revision="main")[f"{OWNER}/MME"]
    assert renewed["revision"] == commit
    # The old file fits the README's pattern too and would double the questions.
    assert [file.name for file in table_files(located([bench], tmp_path / "to")[f"{OWNER}/MME"], bench.tables[0])] == [
        "test-00000-of-00003.parquet"
    ]
    back = fetch([bench], tmp_path / "to", revision=first["revision"])[f"{OWNER}/MME"]
    assert back == first


def test_a_second_split_leaves_the_first(hub: HubServer, tmp_path: Path, originals: Path) -> None:
    (whole := tmp_path / "whole" / "POPE").mkdir(parents=True)
    rows = [{"question": "Is it?", "answer": "no", "question_id": "1", "category": "a", "image": picture(0)}]
    write_repository(whole, {("default", "test"): rows, ("Full", "adversarial"): rows})
    push(hub, whole)
    fetch(unpinned("pope"), tmp_path / "to")
    record = fetch(unpinned("pope_adv"), tmp_path / "to")[f"{OWNER}/POPE"]
    assert record["tables"] == [["Full", "adversarial"], ["default", "test"]]
    assert record["files"] == ["Full/adversarial-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]


def test_a_commit_that_is_named_stays_whatever_else_is_fetched_of_its_repository(
    hub: HubServer, tmp_path: Path, originals: Path
) -> None:
    """A bench of ours names the commit that its figures are known for; lmms-eval's own tasks name none."""
    rows = [{"question": "Is it?", "answer": "no", "question_id": "1", "category": "a", "image": picture(0)}]
    (whole := tmp_path / "whole" / "POPE").mkdir(parents=True)
    write_repository(whole, {("default", "test"): rows, ("Full", "adversarial"): rows})
    known = push(hub, whole)
    push(hub, originals / OWNER / "POPE")
    (pope,), (other,) = [replace(bench_of("pope"), revision=known)], unpinned("pope_adv")
    for number, order in enumerate(([pope, other], [other, pope])):
        assert fetch(order, tmp_path / f"together{number}")[f"{OWNER}/POPE"]["revision"] == known
    fetch([pope], tmp_path / "apart")
    assert fetch([other], tmp_path / "apart")[f"{OWNER}/POPE"]["revision"] == known


def test_files_that_went_or_were_there_before_are_told(hub: HubServer, tmp_path: Path, originals: Path) -> None:
    bench, folder = unpinned("mme"), tmp_path / OWNER / "MME"
    (folder / "data").mkdir(parents=True)
    stranger = folder / "data" / "test-00000-of-00001-older.parquet"
    shutil.copy(originals / OWNER / "MME" / "data" / "test-00000-of-00001.parquet", stranger)
    with pytest.raises(DataError, match="holds data/test-00000-of-00001-older.parquet, which is not of this commit"):
        fetch(bench, tmp_path)
    stranger.unlink()
    (name,) = fetch(bench, tmp_path)[f"{OWNER}/MME"]["files"]
    (folder / name).unlink()
    with pytest.raises(DataError, match="test-00000-of-00001.parquet was fetched but is gone; run fetch-benches"):
        located(bench, tmp_path)
    fetch(bench, tmp_path)
    assert located(bench, tmp_path)


def trouble(hub: HubServer, what: str) -> None:
    if what == "gated":
        hub.repos[f"{OWNER}/MME"].gated = True
    elif what == "gone":
        del hub.repos[f"{OWNER}/MME"]
    elif what == "no split":
        hub.repos[f"{OWNER}/MME"].commit("main", {"README.md": Blob(b"---\nconfigs: []\n---\n", lfs=False)})
    elif what == "down":
        hub.trouble = lambda method, path, before: 503
    elif what == "cut":
        hub.trouble = lambda method, path, before: "cut"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "gated",
            "MME is gated: accept its conditions on https://huggingface.co/datasets/lmms-lab-encoder/MME.*HF_TOKEN",
        ),
        ("gone", "MME is not on the Hub, or private"),
        ("no split", "MME .*'test' of config 'default' is there"),
        ("down", "MME cannot be fetched .*503.*--data"),
        ("cut", "MME cannot be fetched .*--data"),
    ],
)
def test_what_cannot_be_had_is_said_with_the_remedy(
    hub: HubServer, tmp_path: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its attempts
    trouble(hub, what)
    with pytest.raises(DataError, match=message):
        fetch(unpinned("mme"), tmp_path)
    with pytest.raises(DataError):
        located(unpinned("mme"), tmp_path)


def test_a_gated_set_comes_with_a_token(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trouble(hub, "gated")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert fetch(unpinned("mme"), tmp_path)[f"{OWNER}/MME"]["complete"]
    assert hub.token not in (tmp_path / FETCHED).read_text()


def test_the_command(hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="--revision names a commit of one repository"):
        main(["--bench", "mme,pope", "--revision", "main"])
    with pytest.raises(DataError, match="POPE has no revision '4db1276663dfa5eb8ad16a52d24c31a09e470896'.*--revision"):
        main(["--bench", "pope", "--to", str(tmp_path)])
    main(["--bench", "pope", "--to", str(tmp_path), "--revision", "main"])
    assert f"--data {tmp_path}" in capsys.readouterr().out


def test_what_was_fetched_is_scored_with_all_sockets_blocked(
    hub: HubServer, tmp_path: Path, tiny_llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, bench in BENCHES.items() if "java" not in bench.requires or shutil.which("java")]
    benches = unpinned(*names)
    fetch(benches, tmp_path / "data")
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    monkeypatch.setattr(socket.socket, "connect", blocked)
    assert "HF_TOKEN" not in os.environ
    out = tmp_path / "results"
    options = ["--bench", ",".join(names), "--model", str(tiny_llava), "--data", str(tmp_path / "data")]
    run.main([*options, "--out", str(out), "--dtype", "float32", "--device", "cpu", "--limit", "2"])
    found = json.loads((out / "results.json").read_text())["benches"]
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    for bench in benches:
        entry = found[bench.name]
        assert sum(row["bench"] == bench.name for row in rows) == entry["questions"] == 2
        assert set(bench.headline) & set(entry["metrics"])
        assert entry["dataset"]["revision"] == hub.repos[bench.tables[0].repository].refs["main"]
    several = next(row for row in rows if row["question_id"] == "validation_Art_2")
    assert len(several["image_id"].split("_")) == 3


def blocked(*args: Any, **options: Any) -> Any:
    raise AssertionError(f"a network was asked for: {args}")
