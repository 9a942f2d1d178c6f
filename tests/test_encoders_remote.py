"""Shards that lie elsewhere: listed by URL, fetched whole into a bounded folder, read as local ones are."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import fsspec
import numpy as np
import pytest
from pair_shards import write_shards

from encoders.data.index import SetIndex
from encoders.data.remote import index_urls
from encoders.data.samples import BadSample
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


def test_counts_are_taken_from_stats_and_not_from_the_shards(bucket: str, tmp_path: Path) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/00001_stats.json", b'{"successes": 5}')
    found = SetIndex.load(listed(tmp_path, bucket))
    assert found is not None
    assert found.counts.tolist() == [6, 5, 6, 6]
    with pytest.raises(DataError, match=r"00001\.tar holds 6 samples, not 5; index it again"):
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


def test_the_cache_is_bounded_and_the_oldest_goes_first(folder: Path, bucket: str, tmp_path: Path) -> None:
    size = max(file.stat().st_size for file in folder.glob("*.tar"))
    file = listed(tmp_path, bucket)
    samples = TarSamples(file, cache=tmp_path / "cache", cache_gb=2.5 * size / 2**30)
    everything = [samples[i] for i in range(24)]
    kept = list((tmp_path / "cache" / "shards").glob("*.tar"))
    assert len(kept) == 2
    assert [samples[i] for i in range(24)] == everything  # removed copies stay readable for who has them open
    again = TarSamples(file, cache=tmp_path / "cache", cache_gb=2.5 * size / 2**30)
    assert [again[i] for i in range(24)] == everything
    with pytest.raises(DataError, match="does not fit into a cache"):
        TarSamples(file, cache=tmp_path / "small", cache_gb=0.5 * size / 2**30)[0]


def test_shards_are_fetched_ahead(bucket: str, tmp_path: Path) -> None:
    samples = TarSamples(listed(tmp_path, bucket), cache=tmp_path / "cache")
    samples.fetch_ahead(np.array([2, 0]))
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "cache" / "shards").glob("*.tar"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fsspec.filesystem("memory").rm("/bucket/00002.tar")
    assert samples[12].key == "00002"  # read from the copy
    fsspec.filesystem("memory").rm("/bucket/00003.tar")
    with pytest.raises(BadSample, match=r"00003\.tar: .*missing shard"):
        samples[18]
    fsspec.filesystem("memory").pipe_file("/bucket/00001.tar", b"another size")
    with pytest.raises(DataError, match="has 12 bytes, not .*index it again"):
        samples[6]


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
    for shard in range(4):
        (folder / f"{shard:05d}_stats.json").write_text('{"successes": 6}')
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Flaky, directory=str(folder))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}/{shard:05d}.tar" for shard in range(4)]
        samples = TarSamples(listed(tmp_path, *urls), cache=tmp_path / "cache")
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
