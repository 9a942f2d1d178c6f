"""Shards that lie elsewhere: listed by URL, fetched whole into a bounded folder, read as local ones are."""

import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread

import fsspec
import numpy as np
import pytest
from pair_shards import add, write_shards

from encoders.data.index import SetIndex
from encoders.data.remote import Shard, expanded, index_urls
from encoders.data.samples import BadSample
from encoders.data.shard_cache import ShardCache, _locked
from encoders.data.shards import TarSamples
from encoders.errors import DataError, UsageError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of six samples."""
    return write_shards(tmp_path / "shards", 24, shards=4)


@pytest.fixture
def bucket(folder: Path) -> Iterator[str]:
    """The same in memory, two of them with img2dataset's counts."""
    memory = fsspec.filesystem("memory")
    for file in folder.glob("*.tar"):
        memory.pipe_file(f"/bucket/{file.name}", file.read_bytes())
    for name in ("00001", "00003"):
        memory.pipe_file(f"/bucket/{name}_stats.json", json.dumps({"count": 9, "successes": 6}).encode())
    yield "memory://bucket"
    memory.rm("/bucket", recursive=True)


def listed(tmp_path: Path, *patterns: str) -> Path:
    found = index_urls(patterns, iter)
    found.save(tmp_path / "list.npz")
    return tmp_path / "list.npz"


def test_remote_shards_give_what_local_ones_give(folder: Path, bucket: str, tmp_path: Path) -> None:
    local = TarSamples(folder)
    for pattern in (bucket, f"{bucket}/*.tar", f"file://{folder}", str(folder)):
        remote = TarSamples(listed(tmp_path, pattern), cache=tmp_path / "cache")
        assert remote.sizes.tolist() == [6] * 4
        assert [remote[i] for i in range(24)] == [local[i] for i in range(24)], pattern
        assert [remote.key(i) for i in range(24)] == [local.key(i) for i in range(24)]
        assert remote.fingerprint() == TarSamples(listed(tmp_path, pattern)).fingerprint()


def test_braces_are_written_out_as_webdataset_does() -> None:
    assert expanded("s3://b/{08..11}.tar") == [f"s3://b/{number}.tar" for number in ("08", "09", "10", "11")]
    assert expanded("a{0..1}/{1..2}{x}") == ["a0/1{x}", "a0/2{x}", "a1/1{x}", "a1/2{x}"]
    assert expanded("a/*.tar") == ["a/*.tar"]


def test_counts_are_taken_from_stats_and_not_from_the_shards(bucket: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/00001_stats.json", b'{"successes": 5}')
    found = SetIndex.load(listed(tmp_path, bucket))
    assert found is not None
    assert found.counts.tolist() == [6, 5, 6, 6]
    with pytest.raises(DataError, match=r"00001\.tar holds 6 samples, not 5 as \S+/00001_stats\.json says; remove"):
        TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache")[6]
    fsspec.filesystem("memory").pipe_file("/bucket/00001_stats.json", b"[]")
    with pytest.raises(DataError, match="does not say how many downloads were successes"):
        index_urls([bucket], iter)


def test_every_lost_sample_of_a_cut_shard_is_counted(folder: Path, bucket: str, tmp_path: Path) -> None:
    whole = (folder / "00001.tar").read_bytes()
    fsspec.filesystem("memory").pipe_file("/bucket/00001.tar", whole[: len(whole.rstrip(b"\0")) // 2])
    samples = TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache")
    reasons = []
    for i in range(24):
        try:
            samples[i]
        except BadSample as error:
            reasons.append((i, error.reason))
    assert len(samples) == 24
    assert reasons == [(i, "damaged tar") for i in range(12 - len(reasons), 12)]
    assert 2 <= len(reasons) <= 4


def tar_with(caption: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        add(tar, "a.jpg", b"x" * 100)
        add(tar, "a.json", json.dumps({"web": caption, "short": "s", "long": "l"}).encode())
    return stream.getvalue()


def test_a_shard_rewritten_at_its_size_is_never_read_from_the_old_copy(tmp_path: Path, bucket: str) -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/bucket/new/0.tar", tar_with("the old caption"))
    old = TarSamples(listed(tmp_path, f"{bucket}/new"), cache=tmp_path / "cache")
    assert old[0].web == "the old caption"
    memory.pipe_file("/bucket/new/0.tar", tar_with("the NEW caption"))
    assert TarSamples(tmp_path / "list.npz", cache=tmp_path / "cache")[0].web == "the old caption"  # what was listed
    with pytest.raises(DataError, match="not what it was when it was listed"):
        TarSamples(tmp_path / "list.npz", cache=tmp_path / "empty")[0]
    new = TarSamples(listed(tmp_path, f"{bucket}/new"), cache=tmp_path / "cache")
    assert new[0].web == "the NEW caption"
    assert new.fingerprint() != old.fingerprint()


def test_the_cache_is_bounded_and_the_oldest_goes_first(folder: Path, bucket: str, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    file, copies = listed(tmp_path, bucket), tmp_path / "cache" / "shards"
    copies.mkdir(parents=True)
    (copies / f"{'f' * 32}-{10 * size}.partial").touch()  # of a process that died
    samples = TarSamples(file, cache=tmp_path / "cache", cache_gb=2.5 * size / 2**30)
    local = TarSamples(folder)
    for i in (*range(0, 24, 6), *range(24)):
        assert samples[i] == local[i]
        assert len(list(copies.glob("*.tar"))) <= 2
        removed = [name for name in open_files() if name.startswith(str(copies)) and name.endswith("(deleted)")]
        assert len(removed) <= 1  # what was removed for the shard at hand
    assert not list(copies.glob("*.partial"))
    assert len(list(copies.glob("index/*.npz"))) <= 3
    assert {Path(name).name for name in open_files() if name.startswith(str(copies))} >= {
        copy.name for copy in copies.glob("*.tar")
    }
    with pytest.raises(DataError, match="does not fit into a cache"):
        TarSamples(file, cache=tmp_path / "small", cache_gb=0.5 * size / 2**30)[0]


def open_files() -> list[str]:
    links = Path("/proc/self/fd").iterdir()
    return [os.readlink(link) for link in links if os.path.lexists(link)]


def read_at_random(file: Path, cache: Path, gigabytes: float, seed: int) -> None:
    samples = TarSamples(file, cache=cache, cache_gb=gigabytes)
    for i in np.random.default_rng(seed).integers(24, size=150).tolist():
        assert samples[i].key == f"{i % 6 * 4 + i // 6:05d}"


def test_processes_that_evict_each_others_copies_read_on(folder: Path, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    arguments = (listed(tmp_path, f"file://{folder}"), tmp_path / "cache", 1.5 * size / 2**30)
    processes = [
        multiprocessing.get_context("fork").Process(target=read_at_random, args=(*arguments, i)) for i in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def test_a_missing_shard_is_asked_for_once_and_its_samples_are_named(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = fsspec.filesystem("memory")
    samples = TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache")
    memory.rm("/bucket/00001.tar")
    asked: list[str] = []
    fetch = memory.get_file
    monkeypatch.setattr(memory, "get_file", lambda path, *rest: asked.append(path) or fetch(path, *rest))
    for place in range(6):
        with pytest.raises(BadSample, match=f"00001.tar: sample 'sample {place}': missing shard"):
            samples[6 + place]
        assert samples.key(6 + place) == f"sample {place}"
    assert len(asked) == 1


def test_a_forked_child_does_not_keep_a_lock(tmp_path: Path) -> None:
    holding, let_go = Event(), Event()

    def hold() -> None:
        with _locked(tmp_path / "lock"):
            holding.set()
            let_go.wait()

    holder = Thread(target=hold)
    holder.start()
    holding.wait()
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    let_go.set()
    holder.join()
    began = time.monotonic()
    with _locked(tmp_path / "lock"):
        assert time.monotonic() - began < 20
    child.kill()
    child.join()


LEAVING = """
import sys, time
from pathlib import Path
import fsspec, numpy as np
from encoders.data.shards import TarSamples
fsspec.get_filesystem_class("file").get_file = lambda *arguments: time.sleep(600)
TarSamples(Path(sys.argv[1]), cache=Path(sys.argv[2])).fetch_ahead(np.arange(4))
time.sleep(0.2)
sys.exit(75)
"""


def test_a_process_leaves_at_once_while_shards_are_fetched(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LEAVING, str(listed(tmp_path, f"file://{folder}")), str(tmp_path / "cache")]
    assert subprocess.run(command, timeout=300).returncode == 75


def test_shards_are_fetched_ahead(bucket: str, tmp_path: Path) -> None:
    samples = TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache")
    samples.fetch_ahead(np.array([2, 0]))
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "cache" / "shards" / "index").glob("*.npz"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fsspec.filesystem("memory").rm("/bucket/00002.tar")
    assert samples[12].key == "00002"  # read from the copy
    fsspec.filesystem("memory").rm("/bucket/00003.tar")
    fsspec.filesystem("memory").pipe_file("/bucket/00001.tar", b"another size")
    with pytest.raises(DataError, match="not what it was when it was listed .*now 12.*list the set again"):
        samples[6]


def test_ranks_of_a_machine_share_the_room(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[Shard] = []
    monkeypatch.setattr(ShardCache, "_fetch_all", lambda self, coming: wanted.extend(coming) or coming.clear())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    samples = TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache", cache_gb=90_000 / 2**30)
    assert samples.index.bytes.tolist() == [20480] * 4
    samples.fetch_ahead(np.arange(4))
    assert len(wanted) == 2


class Flaky(SimpleHTTPRequestHandler):
    """A web server whose every second download fails."""

    calls = 0

    def do_GET(self) -> None:
        Flaky.calls += self.path.endswith(".tar")
        if self.path.endswith(".tar") and Flaky.calls % 2:
            self.send_error(503)
        else:
            super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


def test_a_web_server_that_fails_now_and_then_is_asked_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr("encoders.data.remote.time.sleep", lambda seconds: None)
    for shard in range(2):  # the others are counted by reading them
        (folder / f"{shard:05d}_stats.json").write_text('{"successes": 6}')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        urls = f"http://127.0.0.1:{server.server_port}/{{00000..00003}}.tar"
        samples = TarSamples(listed(tmp_path, urls), cache=tmp_path / "cache")
        assert [samples[i].key for i in range(0, 24, 6)] == ["00000", "00001", "00002", "00003"]
        server.shutdown()


def test_commands_and_unknown_places_are_refused(tmp_path: Path) -> None:
    for url in ("pipe:touch canary", "pipe://touch canary", "nonsense://x/y.tar"):
        with pytest.raises(UsageError, match="nonsense|commands are never run"):
            index_urls([url], iter)
    with pytest.raises(DataError, match="no shard there"):
        index_urls(["memory://empty/*.tar"], iter)
    (tmp_path / "list.npz").write_bytes(b"no list")
    with pytest.raises(DataError, match="is no list of shards"):
        TarSamples(tmp_path / "list.npz")


def test_the_command_writes_a_list(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "encoders.data.index", f"file://{folder}", "--out", str(tmp_path / "list.npz")]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "4 shards, 24 samples" in finished.stdout
    assert len(TarSamples(tmp_path / "list.npz", cache=tmp_path / "cache")) == 24
