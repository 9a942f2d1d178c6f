"""Foreign weights files: every honest layout gives the same tensors, and nothing that a hostile one holds is run."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from encoders.errors import ModelError
from encoders.weights.files import Weights, inside


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.canary),)


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"visual.proj": torch.randn(4, 3), "visual.ln.weight": torch.randn(4), "logit_scale": torch.tensor(2.5)}


LAYOUTS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "safetensors": lambda tensors, file: save_file(tensors, file),
    "zip": lambda tensors, file: torch.save(tensors, file),
    "checkpoint": lambda tensors, file: torch.save(
        {"epoch": 3, "name": "run", "state_dict": tensors, "optimizer": {"state": {0: {"step": torch.ones(())}}}}, file
    ),
    "model": lambda tensors, file: torch.save({"model": tensors}, file),
    "parameters": lambda tensors, file: torch.save({n: nn.Parameter(t) for n, t in tensors.items()}, file),
    "strided": lambda tensors, file: torch.save(
        {n: t.repeat_interleave(2, -1)[..., ::2] if t.dim() else t for n, t in tensors.items()}, file
    ),
}
FILES = {"safetensors": "w.safetensors", "zip": "w.bin"}


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(layout: str, prefix: str, tmp_path: Path) -> None:
    file = tmp_path / FILES.get(layout, "w.pt")
    LAYOUTS[layout]({prefix + name: tensor for name, tensor in state().items()}, file)
    weights = Weights(file)
    assert set(weights) == set(state())
    assert weights.shape("visual.proj") == (4, 3)
    assert weights.files() == [file]
    for name, tensor in state().items():
        torch.testing.assert_close(weights.tensor(name), tensor, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_any_float_is_read_as_float32(layout: str, dtype: torch.dtype, tmp_path: Path) -> None:
    file = tmp_path / FILES[layout]
    stored = {name: tensor.to(dtype) for name, tensor in state().items()}
    LAYOUTS[layout](stored, file)
    for name, tensor in stored.items():
        assert Weights(file).tensor(name).dtype == torch.float32
        assert Weights(file).tensor(name).equal(tensor.float())


def test_a_tensor_outlives_its_file(tmp_path: Path) -> None:
    file = tmp_path / "w.pt"
    torch.save(state(), file)
    read = Weights(file).tensor("visual.proj")
    file.write_bytes(bytes(file.stat().st_size))
    assert read.equal(state()["visual.proj"])


def bare_pickle(file: Path, canary: Path) -> None:
    file.write_bytes(pickle.dumps({"w": Trap(canary)}))


def in_zip(file: Path, canary: Path) -> None:
    torch.save({"state_dict": state(), "args": Trap(canary)}, file)


def old_torch(file: Path, canary: Path) -> None:
    torch.save({"w": Trap(canary)}, file, _use_new_zipfile_serialization=False)


def in_tar(file: Path, canary: Path) -> None:
    with tarfile.open(file, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            content = pickle.dumps(Trap(canary))
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def torchscript(file: Path, canary: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)


def compressed(file: Path, canary: Path) -> None:
    """A zip bomb would look so."""
    plain = file.with_name("plain")
    torch.save(state(), plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))


def git_lfs(file: Path, canary: Path) -> None:
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 12\n")


def gzipped(file: Path, canary: Path) -> None:
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("pickle"), io.BytesIO())


HOSTILE = {
    bare_pickle: "bare pickle",
    in_zip: r"mkdir",
    old_torch: "format before 1.6",
    in_tar: "tar or gzip archive",
    gzipped: "tar or gzip archive",
    torchscript: "TorchScript archive, which holds code",
    compressed: "compressed",
    git_lfs: "git lfs pull",
}


@pytest.mark.parametrize("make", HOSTILE, ids=lambda make: make.__name__)
def test_what_could_run_is_refused_by_name_and_nothing_runs(make: Callable[[Path, Path], None], tmp_path: Path) -> None:
    for name, reason in (("weights.pt", HOSTILE[make]), ("model.safetensors", ".")):  # whatever it is called
        file, canary = tmp_path / name, tmp_path / "canary"
        make(file, canary)
        with pytest.raises(ModelError, match=reason) as refusal:
            Weights(file)
        assert str(file) in str(refusal.value)
        assert not canary.exists()


@pytest.mark.parametrize("length", [2**62, 2**30, 120 * 2**20])
def test_an_oversized_header_is_refused_before_it_is_read(length: int, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", length) + b"{")
        stream.truncate(130 * 2**20)  # sparse
    with pytest.raises(ModelError, match=r"w\.safetensors.*header"):
        Weights(file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layout", ["safetensors", "zip"])
def test_a_value_that_is_not_finite_is_named(layout: str, value: float, tmp_path: Path) -> None:
    file, tensors = tmp_path / FILES[layout], state()
    tensors["visual.proj"][2, 1] = value
    LAYOUTS[layout](tensors, file)
    weights = Weights(file)
    assert weights.tensor("visual.ln.weight").isfinite().all()
    with pytest.raises(ModelError, match=r"w\.\w+: tensor visual\.proj holds NaN or infinity"):
        weights.tensor("visual.proj")


def test_what_is_missing_or_twice_there_or_no_number_is_named(tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1), "ids": torch.arange(3)}, file)
    with pytest.raises(ModelError, match="holds no tensor b"):
        Weights(file).tensor("b")
    with pytest.raises(ModelError, match="ids is stored as I64"):
        Weights(file).tensor("ids")
    save_file({"a": torch.ones(1), "module.a": torch.zeros(1)}, file)
    with pytest.raises(ModelError, match="twice"):
        Weights(file)


@pytest.mark.parametrize(
    "weight_map",
    [{"a": "w.safetensors.index.json"}, {"a": 3}, {"a": 3, "b": "x"}, {"a": "../w.safetensors"}, {"a": ".."}, ["a"], 1],
)
def test_an_index_that_names_anything_but_weights_beside_it_is_refused(weight_map: Any, tmp_path: Path) -> None:
    save_file(state(), tmp_path / "w.safetensors")
    (tmp_path / "deep").mkdir()
    file = tmp_path / "deep" / "w.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"w\.safetensors\.index\.json (names .*not a file|is not an index)"):
        Weights(file)
    file.write_text(json.dumps({"weight_map": dict.fromkeys(state(), "w.safetensors")}))
    save_file(state(), tmp_path / "deep" / "w.safetensors")
    assert set(Weights(file)) == set(state())


def test_a_link_out_of_the_folder_is_refused_but_not_the_hubs_own(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("mine")
    folder = tmp_path / "models--a--b" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").symlink_to(secret)
    with pytest.raises(ModelError, match=r"config\.json is a link that leads out of its folder"):
        inside(folder, "config.json")
    with pytest.raises(ModelError, match="leads out"):
        inside(folder, "../../../secret")
    blob = folder.parent.parent / "blobs" / "f00"
    blob.parent.mkdir()
    blob.write_text("{}")
    (folder / "README.md").symlink_to(Path("../../blobs/f00"))
    assert inside(folder, "README.md").read_text() == "{}"
    assert not inside(folder, "absent").exists()
