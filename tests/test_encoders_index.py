"""The tar index: equal to tarfile's own reading, kept while size and time stay, exact about damage, unharmed by it."""

import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pair_shards import add, write_shards

from encoders.data import index as index_module
from encoders.data.index import SetIndex, index_folder, load_arrays, save_arrays, scan, split_name
from encoders.data.remote import index_urls
from encoders.data.samples import BadSample
from encoders.data.shards import TarSamples
from encoders.data.tar_headers import members
from encoders.errors import DataError

MEMBERS = (
    *("a.jpg", "a.json", "b.jpg", "c.jpg", "c.json", "b.json", "d.jpg", "d.json", "d.jpg", "d.json"),
    *("e.jpg", "f.json", "g.txt", "h.jpg", "h.png", "h.json", "i.jpg", "i.json"),
)
FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.mark.parametrize("layout", FORMATS)
def test_headers_are_read_as_tarfile_reads_them(layout: int) -> None:
    stream = io.BytesIO()
    names = ["a.jpg", "./b/c.json", "d" * 90 + "/" + "e" * 60 + ".jpg", "v1.0/x.y.txt"]
    if layout != tarfile.USTAR_FORMAT:
        names += ["long/" * 60 + "n.json", "für/ü.jpg"]
    with tarfile.open(fileobj=stream, mode="w", format=layout) as tar:
        for i, name in enumerate(names):
            for kind, other in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.CHRTYPE, "device")):
                info = tarfile.TarInfo(f"{other}{i}")
                info.type, info.linkname = kind, "/etc/passwd"
                tar.addfile(info)
            add(tar, name, bytes(i * 300))
    length = len(stream.getvalue())
    stream.seek(0)
    with tarfile.open(fileobj=stream, mode="r:") as tar:
        expected = [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]
    assert len(expected) == len(names)
    assert [(name, *member) for name, member in members(stream, length)] == expected


def test_sizes_beyond_eight_gigabytes_are_read() -> None:
    for layout in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        info = tarfile.TarInfo("large.jpg")
        info.size = 9 * 2**30
        header = info.tobuf(layout)
        found = next(members(io.BytesIO(header), 10 * 2**30))
        assert found == ("large.jpg", (len(header), 9 * 2**30))


def test_keys_are_split_as_webdataset_splits_them() -> None:
    names = {"./000.jpg": ("000", "jpg"), "v1.0/a.b.JPG": ("v1.0/a", "b.jpg"), "x.json": ("x", "json")}
    assert {name: split_name(name) for name in names} == names


def test_what_webdataset_leaves_out_is_left_out() -> None:
    hidden = [name for i in range(3) for name in (f"._{i}.jpg", f"{i}.jpg", f"._{i}.json", f"{i}.json")]
    names = [*hidden, "README", ".DS_Store", "x/.y.json", "x/y", "x/__k.json", "z.w.txt"]
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in names:
            add(tar, name, b"{}")
        add(tar, "._cut.json", bytes(600))
    content = stream.getvalue()
    found = scan(io.BytesIO(content), len(content))
    keys = ["0", "1", "2", "x/__k", "z"]
    assert [found.key(i) for i in range(len(found))] == keys
    assert not any(found.fault(i) for i in range(len(found)))
    cut = content[: content.index(bytes(600)) + 10]
    damaged = scan(io.BytesIO(cut), len(cut))
    assert [damaged.fault(i) for i in range(len(damaged))] == ["", "", "", "", "damaged tar"]
    tariterators = pytest.importorskip("webdataset.tariterators")
    files = ({**file, "__url__": ""} for file in tariterators.tar_file_iterator(io.BytesIO(content)))
    theirs = [sample["__key__"] for sample in tariterators.group_by_keys(files)]
    assert [key for key in theirs if key != "x/"] == keys  # x/.y.json: a sample of theirs, hidden for us


def test_headers_are_read_once_and_again_for_what_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "shards", 30, shards=3)
    scanned: list[int] = []
    monkeypatch.setattr(index_module, "scan", lambda stream, length: scanned.append(length) or scan(stream, length))
    first = TarSamples(folder)
    assert len(scanned) == 3
    everything = [first[i] for i in range(30)]
    again = TarSamples(folder)
    assert [again[i] for i in range(30)] == everything
    assert again.fingerprint() == first.fingerprint()
    assert len(scanned) == 3
    os.utime(folder / "00001.tar", ns=(1, 1))
    assert TarSamples(folder).fingerprint() == first.fingerprint()  # a copy of the set may resume a run
    assert len(scanned) == 4
    (folder / "00002.tar").unlink()
    assert len(TarSamples(folder)) == 20
    assert TarSamples(folder).fingerprint() != first.fingerprint()
    (folder / ".index" / "00000.tar.npz").write_bytes(b"not an index")
    (folder / ".index" / "shards.npz").write_bytes(b"PK\x03\x04 neither")
    assert TarSamples(folder)[3] == everything[3]


def test_an_index_with_any_bit_flipped_is_read_or_made_again(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 4, shards=1)
    everything = TarSamples(folder)[3]
    rng = random.Random(0)
    for file in sorted((folder / ".index").iterdir()):
        whole = file.read_bytes()
        for _ in range(150):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 3)):
                damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            assert TarSamples(folder)[3] == everything
    save_arrays(folder / ".index" / "shards.npz", {"names": np.zeros(3)})  # of another program
    assert TarSamples(folder)[3] == everything


def test_indices_are_written_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as on two machines
    arrays = {"a": np.arange(200_000)}
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: save_arrays(tmp_path / "a.npz", arrays), range(40)))
    found = load_arrays(tmp_path / "a.npz", {"a"})
    assert found is not None
    assert (found["a"] == arrays["a"]).all()
    assert [file.name for file in tmp_path.iterdir()] == ["a.npz"]


def test_a_shard_that_changes_while_in_use_is_refused(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 10, shards=1)
    samples = TarSamples(folder)
    index_urls([str(folder)], iter).save(tmp_path / "list.npz")
    os.utime(folder / "00000.tar", ns=(1, 1))
    with pytest.raises(DataError, match=r"00000\.tar is not what it was when it was indexed; start again"):
        samples[0]
    with pytest.raises(DataError, match=r"not what it was when it was indexed; write .*list\.npz again with"):
        TarSamples(tmp_path / "list.npz")[0]
    (folder / "00000.tar").unlink()
    with pytest.raises(DataError, match=r"00000\.tar is gone since it was indexed"):
        samples[0]


def test_an_index_takes_tens_of_bytes_a_sample_and_goes_to_the_cache_if_asked(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 400, shards=1, side=4)
    samples = TarSamples(folder, cache=tmp_path / "cache")
    assert samples[0].key == "00000"
    assert not (folder / ".index").exists()
    (file,) = (tmp_path / "cache").rglob("00000.tar.npz")
    assert file.stat().st_size < 60 * 400 + 3000
    assert len(pickle.dumps(samples)) < 5000


def test_a_folder_that_cannot_be_written_to_is_indexed_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_shards(tmp_path / "shards", 4)
    locked = [folder]
    monkeypatch.setattr(os, "access", lambda path, mode: path not in locked)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert len(index_folder(folder, None)) == 2
    assert not (folder / ".index").exists()
    assert list((tmp_path / "home").rglob("shards.npz"))
    locked[:] = [folder / ".index"]  # somebody else's
    (folder / ".index").mkdir()
    assert len(index_folder(folder, None)) == 2
    assert not list((folder / ".index").iterdir())


def bad_ones(samples: TarSamples) -> dict[str, str]:
    """Key -> reason."""
    bad = {}
    for i in range(len(samples)):
        try:
            samples[i]
        except BadSample as error:
            bad[samples.key(i)] = error.reason
    return bad


def test_a_cut_tar_gives_every_sample_before_the_cut(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 8, shards=1)
    whole = (folder / "00000.tar").read_bytes()
    with tarfile.open(folder / "00000.tar") as tar:
        ends = [-(-(info.offset_data + info.size) // 512) * 512 for info in tar if info.name.endswith("json")]
        contents = [info.offset_data + info.size for info in tar if info.name.endswith("json")]
    for size in [*range(0, ends[-1] + 512, 97), *ends, *contents, ends[-1] + 511]:
        (folder / "00000.tar").write_bytes(whole[:size])
        samples = TarSamples(folder)
        bad = bad_ones(samples)
        intact = sum(end <= size for end in contents)
        assert len(samples) == intact + 1, size
        assert list(bad.values()) == ["damaged tar"], size
        assert [samples[i].key for i in range(intact)] == [f"{i:05d}" for i in range(intact)]
    for size in (ends[-1] + 512, len(whole)):
        (folder / "00000.tar").write_bytes(whole[:size])
        assert not bad_ones(TarSamples(folder))


def test_what_lies_behind_an_end_marker_is_not_lost_unseen(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 6, shards=1)
    whole = (folder / "00000.tar").read_bytes()
    (folder / "00000.tar").write_bytes(whole + whole)
    assert bad_ones(TarSamples(folder)) == {"after 00005": "damaged tar"}
    (folder / "00000.tar").write_bytes(whole + bytes(2**16))
    assert bad_ones(TarSamples(folder)) == {"after 00005": "damaged tar"}
    (folder / "00000.tar").write_bytes(whole + bytes(2**15))
    assert not bad_ones(TarSamples(folder))
    (folder / "00000.tar").write_bytes(b"<html>no tar</html>" * 100)
    assert bad_ones(TarSamples(folder)) == {"at its start": "damaged tar"}


def test_ambiguous_and_incomplete_samples_are_bad_and_only_they(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for name in MEMBERS:
            add(tar, name, b'{"web": "w", "short": "s", "long": "l"}')
    samples = TarSamples(tmp_path / "shards")
    assert len(samples) == 9
    assert bad_ones(samples) == {
        "b": "split key",
        "d": "duplicate key",
        "e": "no json",
        "f": "no image",
        "g": "no json",
        "h": "several images",
    }


def test_nothing_in_a_tar_is_run_or_unpickled(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {canary}",)

    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "0.tar", "w") as tar:
        for suffix in ("pyd", "pkl", "pickle", "pth", "npy", "jpg", "json"):
            add(tar, f"a.{suffix}", pickle.dumps(Bomb()))
        add(tar, "../../escape.json", b"{}")
    (tmp_path / "shards" / ".index").mkdir()
    array = np.empty(1, dtype=object)
    array[0] = Bomb()
    np.savez(tmp_path / "shards" / ".index" / "shards.npz", allow_pickle=True, names=array)
    assert bad_ones(TarSamples(tmp_path / "shards")) == {"a": "unreadable json", "../../escape": "no web caption"}
    assert not canary.exists()
    assert not (tmp_path.parent / "escape.json").exists()


def test_hostile_pax_records_do_not_hold_the_indexer() -> None:
    def tar(records: bytes) -> bytes:
        info, picture = tarfile.TarInfo("x"), tarfile.TarInfo("a.jpg")
        info.type, info.size, picture.size = tarfile.XHDTYPE, len(records), 512
        return info.tobuf() + records + bytes(-len(records) % 512) + picture.tobuf() + bytes(1536)

    most = tar(b"6 a=b\n" * (2**16 // 6 - 2) + b"16 path=new.jpg\n")
    began = time.process_time()
    for _ in range(10):
        assert scan(io.BytesIO(most), len(most)).key(0) == "new"
    assert time.process_time() - began < 2
    assert "an extended header of 65538 bytes" in scan(io.BytesIO(tar(b"6 a=b\n" * 10923)), 2**21).damage


def mutated(whole: bytes, rng: random.Random) -> bytes:
    """A tar with some bytes changed, most of them in headers, or with a piece removed, doubled or zeroed."""
    content = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content))
        match rng.randrange(4):
            case 0:
                content[start // 512 * 512 + rng.choice([*range(100, 160), rng.randrange(512)])] = rng.randrange(256)
            case 1:
                del content[start : start + rng.choice((1, 100, 512))]
            case 2:
                content[start:start] = content[start : start + rng.choice((1, 512, 5000))]
            case 3:
                content[start : start + 512] = bytes(512)
        content = content or bytearray(1)
    return bytes(content)


@pytest.mark.parametrize("count", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutated_tars_are_read_quickly_or_not_at_all(count: int, tmp_path: Path) -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(20):
            add(tar, f"{'deep/' * 30 * (i % 3 == 0)}{i}.jpg", bytes(700))
            add(tar, f"{'deep/' * 30 * (i % 3 == 0)}{i}.json", b"{}")
    whole, rng = stream.getvalue(), random.Random(0)
    for _ in range(count):
        content = mutated(whole, rng)
        began = time.process_time()
        found = scan(io.BytesIO(content), len(content))
        assert time.process_time() - began < 2
        for place in range(len(found)):
            for offset, size in found.parts(place).values():
                assert 0 <= offset <= offset + size <= len(content)
        assert (found.damage == "") == ("damaged tar" not in {found.fault(place) for place in range(len(found))})


def test_the_command_indexes_a_folder(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 10)
    command = [sys.executable, "-m", "encoders.data.index"]
    finished = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=True)
    assert "2 shards, 10 samples" in finished.stdout
    assert SetIndex.load(folder / ".index" / "shards.npz") is not None
    refused = subprocess.run([*command, "s3://bucket/x.tar"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "need --out FILE" in refused.stderr
