"""The contract between stages: complete or absent, and any change is noticed."""

from pathlib import Path

import pytest

from encoders import manifest
from encoders.errors import DataError


def write(out: Path, content: str = "weights", overwrite: bool = False, **parents: Path) -> manifest.Manifest:
    with manifest.create(out, "encoder", {"size": 64}, parents, overwrite) as draft:
        (draft.path / "model.bin").write_text(content)
        (draft.path / "sub").mkdir()
        (draft.path / "sub" / "more.txt").write_text("more")
        draft.metrics["score"] = 1.5
    return manifest.read(out, "encoder")


def test_round_trip(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    write(parent, "other")
    made = write(tmp_path / "out", run=parent)
    assert set(made.files) == {"model.bin", "sub/more.txt"}
    assert (made.config, made.metrics) == ({"size": 64}, {"score": 1.5})
    assert made.parents["run"].fingerprint == manifest.fingerprint(parent)
    assert made.versions["torch"][0].isdigit()
    assert manifest.verify(tmp_path / "out", full=True) == made


def test_fingerprint_is_content_not_place_or_date(tmp_path: Path) -> None:
    same = [write(tmp_path / name).fingerprint for name in ("a", "b")]
    assert same[0] == same[1]
    assert write(tmp_path / "c", "weightz").fingerprint != same[0]


def test_a_failing_stage_leaves_nothing_or_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def fail() -> None:
        with pytest.raises(RuntimeError), manifest.create(out, "encoder", {}, overwrite=True) as draft:
            (draft.path / "model.bin").write_text("half")
            raise RuntimeError

    fail()
    assert not list(tmp_path.iterdir())
    before = write(out)
    fail()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert manifest.verify(out, full=True) == before


def test_changes_are_noticed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(out)
    (out / "model.bin").write_text("weightZ")  # same size, new mtime
    with pytest.raises(DataError, match=r"model\.bin is not the file"):
        manifest.verify(out)
    (out / "model.bin").write_text("weights")  # touched, but the content is right
    manifest.verify(out)
    (out / "sub" / "more.txt").unlink()
    with pytest.raises(DataError, match=r"more\.txt is missing"):
        manifest.verify(out)


def test_what_is_no_artifact_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        manifest.read(tmp_path / "nothing")
    with pytest.raises(DataError, match="its stage did not finish"):
        manifest.read(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(DataError, match="is not a manifest"):
        manifest.read(tmp_path)
