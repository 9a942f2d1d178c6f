"""Weights of others, read so that nothing of theirs runs: safetensors files, their shards, torch's zip archives.

A file is looked at before it is opened; what can carry code, leads out of its folder or holds a value that is not
finite is refused by name. Tensors come one at a time, in float32, without the prefixes that training wrappers leave.
"""

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from encoders.errors import ModelError
from encoders.weights.headers import TensorHeader, read_header

WRAPPERS = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
FLOATS = ("F64", "F32", "F16", "BF16")
ZIP, PICKLE, GZIP, LFS = b"PK\3\4", b"\x80", b"\x1f\x8b", b"version https://git-lfs"
TAR, TAR_PLACE = b"ustar", 257
INSTEAD = "nothing of it was run; load it where you trust it and save its state dict as safetensors"


class Weights:
    """The tensors of a weights file, or of the shards behind a `.safetensors.index.json`, by name.

    Raises ModelError if the file cannot be read safely.
    """

    def __init__(self, file: Path):
        self.file = file
        refuse_what_can_run(file)
        header = read_header(file).tensors
        self._stored = {_unwrapped(name): name for name in header}
        if len(self._stored) != len(header):
            raise ModelError(f"{file} holds a tensor twice, with and without a prefix of {' or '.join(WRAPPERS)}")
        self.headers: dict[str, TensorHeader] = {name: header[stored] for name, stored in self._stored.items()}
        self._archives: dict[Path, dict[str, Tensor]] = {}

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def shape(self, name: str) -> tuple[int, ...]:
        """Raises ModelError if there is no such tensor."""
        return self._header(name).shape

    def tensor(self, name: str) -> Tensor:
        """One tensor as float32, a copy of its own. Raises ModelError if it is missing, no floating-point numbers or
        not finite."""
        header = self._header(name)
        if header.dtype not in FLOATS:
            raise ModelError(f"{header.file}: {name} is stored as {header.dtype}; needed are floating-point weights")
        value = self._read(header.file, self._stored[name]).to(torch.float32, copy=True).contiguous()
        if not torch.isfinite(value).all():
            raise ModelError(f"{header.file}: tensor {name} holds NaN or infinity; these weights are broken")
        return value

    def files(self) -> list[Path]:
        """Where the tensors lie: the file itself, or its shards."""
        return sorted({header.file for header in self.headers.values()})

    def release(self) -> None:
        """Let go of the mapped files, whose pages count as memory; they are mapped again when next read."""
        self._archives.clear()

    def _header(self, name: str) -> TensorHeader:
        if name not in self.headers:
            raise ModelError(f"{self.file} holds no tensor {name}; its config and its weights do not belong together")
        return self.headers[name]

    def _read(self, file: Path, stored: str) -> Tensor:
        try:
            if not _is_zip(file):
                with safe_open(file, framework="pt") as opened:
                    value: Tensor = opened.get_tensor(stored)
                return value
            if file not in self._archives:
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
                self._archives[file] = _state_dict(content)
            return self._archives[file][stored]
        except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, ValueError, KeyError) as error:
            raise ModelError(f"{file}: {stored} cannot be read ({error}); fetch the file again") from error


def refuse_what_can_run(file: Path) -> None:
    """Raise ModelError, saying what `file` is, if it is of a kind that can carry code or is no weights at all."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist")
    with file.open("rb") as stream:
        start = stream.read(TAR_PLACE + len(TAR))
    if start.startswith(LFS):
        raise ModelError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` beside it")
    if start.startswith(ZIP) and zipfile.is_zipfile(file):
        if file.suffix == ".safetensors":  # torch.load goes by the name
            raise ModelError(f"{file} is not what its name says but an archive of torch; name it .bin or .pt")
        with zipfile.ZipFile(file) as archive:
            inner = {name.partition("/")[2] for name in archive.namelist()}
        if "constants.pkl" in inner or any(name.startswith("code/") for name in inner):
            raise ModelError(
                f"{file} is a TorchScript archive, which holds code; {INSTEAD}. OpenAI's own models are on the Hub as "
                "plain weights (openai/clip-vit-large-patch14, ...)"
            )
        return
    if start[8:9] == b"{":  # safetensors: a length, which may begin with any byte, and JSON
        return
    if start.startswith(PICKLE):
        raise ModelError(f"{file} is a bare pickle (or torch's format before 1.6), which can run code; {INSTEAD}")
    if start.startswith(GZIP) or start[TAR_PLACE:] == TAR:
        raise ModelError(f"{file} is a tar or gzip archive (torch's oldest format), which can hold code; {INSTEAD}")


def inside(folder: Path, name: str) -> Path:
    """`folder/name`. Raises ModelError if it is a link that leads out of the folder; only into the Hub's own cache,
    whose snapshots are links to the blobs beside them, may it lead."""
    file = folder / name
    root = folder.resolve()
    roots = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    target = file.resolve()
    if file.exists() and not any(target.is_relative_to(allowed) for allowed in roots):
        raise ModelError(f"{file} is a link that leads out of its folder, to {target}; put the file itself there")
    return file


def _unwrapped(name: str) -> str:
    while wrapper := next((w for w in WRAPPERS if name.startswith(w)), None):
        name = name.removeprefix(wrapper)
    return name


def _is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(ZIP)) == ZIP


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict of a training checkpoint, where `read_header` found it."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    state: dict[str, Tensor] = content
    return state
