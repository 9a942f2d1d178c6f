"""Names, types and shapes of the tensors in a weights file, read without torch and without the tensors.

Safetensors files and torch's zip archives. An archive's pickle is walked by an unpickler that knows tensors only: it
imports nothing, calls nothing of the file's choosing, and refuses everything else by name.
"""

import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from encoders.errors import ModelError

MAX_HEADER = 10 * 2**20  # the largest CLIP needs 100 kB; a hostile one of 100 MB would cost gigabytes
LFS = b"version https://git-lfs"
SHARDS = (".safetensors", ".bin")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
STORAGES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class TensorHeader:
    """One tensor, and where in `file` its bytes lie (little endian; a strided tensor's are those of its storage)."""

    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The tensors of a model by name, and the strings written beside them."""

    tensors: dict[str, TensorHeader]
    metadata: dict[str, str]
    """Of several shards, what all of them say alike."""


def read_header(file: Path) -> Header:
    """The header of a safetensors file, of the shards of a `.safetensors.index.json`, or of torch's zip archive.

    Raises ModelError if the file is none of these, is damaged, or holds anything but tensors.
    """
    if not file.is_file():
        raise ModelError(f"{file} does not exist")
    if file.name.endswith(".index.json"):
        return _read_shards(file)
    with file.open("rb") as stream:
        magic = stream.read(len(LFS))
    if magic == LFS:
        raise ModelError(f"{file} is a pointer of Git LFS, not the weights; run `git lfs pull` beside it")
    if magic.startswith(b"PK\3\4"):
        return _read_archive(file)
    if file.suffix == ".safetensors":
        return read_safetensors(file)
    raise ModelError(
        f"{file} is neither a safetensors file nor a zip archive of torch (older archives can run code when opened); "
        "load it where you trust it and save it as safetensors"
    )


def read_safetensors(file: Path) -> Header:
    """The header of one safetensors file, checked against the file's size. Raises ModelError if it is damaged."""
    total = file.stat().st_size
    with file.open("rb") as stream:
        lead = stream.read(8)
        length = struct.unpack("<Q", lead)[0] if len(lead) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, total - 8):
            raise ModelError(f"{file} is not a safetensors file: its header claims {length} of {total} bytes")
        raw = stream.read(length)
    try:
        content = json.loads(raw)
        metadata = _strings(content.pop("__metadata__", {}))
        tensors = {name: _tensor(file, 8 + length, **entry) for name, entry in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file} has a damaged header ({error!r}); fetch or write it again") from error
    for name, tensor in tensors.items():
        _refuse_impossible(name, tensor, total)
        if tensor.dtype in BYTES and tensor.size != tensor.count * BYTES[tensor.dtype]:
            raise ModelError(f"{file}: {name} of shape {list(tensor.shape)} cannot have {tensor.size} bytes")
    return Header(tensors, metadata)


def _refuse_impossible(name: str, tensor: TensorHeader, total: int) -> None:
    numbers = (*tensor.shape, tensor.start, tensor.size)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise ModelError(f"{tensor.file}: {name} has an impossible shape or place: {numbers}")
    if tensor.start + tensor.size > total:
        raise ModelError(f"{tensor.file} is cut short: {name} ends past its {total} bytes; fetch or write it again")


def _tensor(file: Path, base: int, dtype: str, shape: list[int], data_offsets: list[int]) -> TensorHeader:
    first, last = data_offsets
    if not isinstance(dtype, str):
        raise TypeError(f"dtype {dtype!r}")
    return TensorHeader(dtype, tuple(shape), file, base + first, last - first)


def _strings(metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise TypeError(f"__metadata__ {metadata!r:.80} is no table of strings")
    return metadata


def read_index(index: Path) -> dict[str, str]:
    """Tensor -> shard of an index. Raises ModelError if it is none, or names what is no weights beside it."""
    try:
        placed: dict[str, str] = json.loads(index.read_text())["weight_map"]
        shards = set(placed.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of shards ({error!r})") from error
    for name in shards:
        if not (isinstance(name, str) and Path(name).name == name and name.endswith(SHARDS)):
            raise ModelError(f"{index} names {name!r}, which is not a file of weights beside it")
    return placed


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads of a folder: the one, else the shards that the index names. Others,
    such as shards of an earlier save, are no part of the model. Raises ModelError if there are none."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return [folder / name for name in sorted(set(read_index(index).values()))]
    raise ModelError(f"{folder} holds no model.safetensors (or its index); save the model with save_pretrained")


def _read_shards(index: Path) -> Header:
    placed = read_index(index)
    tensors: dict[str, TensorHeader] = {}
    said: list[set[tuple[str, str]]] = []
    for name in sorted(set(placed.values())):
        shard = read_header(index.parent / name)
        tensors |= shard.tensors
        said.append(set(shard.metadata.items()))
    if tensors.keys() != placed.keys():
        odd = sorted(tensors.keys() ^ placed.keys())
        raise ModelError(f"{index} and its shards disagree about {len(odd)} tensors ({', '.join(odd[:3])})")
    return Header(tensors, dict(set.intersection(*said)) if said else {})


class _Storage(NamedTuple):
    dtype: str
    key: str


class _Tensor(NamedTuple):
    storage: _Storage
    shape: tuple[int, ...]


def _rebuild_tensor(storage: _Storage, offset: int, shape: tuple[int, ...], *rest: Any) -> _Tensor:
    return _Tensor(storage, tuple(shape))


def _rebuild_parameter(data: _Tensor, *rest: Any) -> _Tensor:
    return data


class _HeaderUnpickler(pickle.Unpickler):
    """Builds stand-ins of tensors; there is no other name it resolves."""

    KNOWN: Mapping[tuple[str, str], Any] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): dtype for name, dtype in STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return self.KNOWN[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        _, dtype, key, *_ = pid
        if dtype not in BYTES:
            raise pickle.UnpicklingError(f"asks for a storage of {dtype!r}")
        return _Storage(dtype, key)


def _read_archive(file: Path) -> Header:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
                raise ValueError("compressed entries")
            if entries["data.pkl"].file_size > MAX_HEADER:
                raise ValueError(f"data.pkl of {entries['data.pkl'].file_size} bytes")
            with archive.open(entries["data.pkl"]) as pickled:
                state = _state_dict(_HeaderUnpickler(pickled).load())
            tensors = {name: _place(file, stream, entries, tensor) for name, tensor in state.items()}
    except Exception as error:  # whatever a damaged or hostile archive makes zipfile and pickle raise
        raise ModelError(
            f"{file} is not a plain archive of tensors ({error!r}); nothing of it was run. Load it where you trust it "
            "and save its state dict as safetensors"
        ) from error
    for name, header in tensors.items():
        _refuse_impossible(name, header, file.stat().st_size)
    return Header(tensors, {})


def _state_dict(content: Any) -> dict[str, _Tensor]:
    """The named tensors of a state dict, or of one inside a training checkpoint."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {name: value for name, value in content.items() if isinstance(name, str) and isinstance(value, _Tensor)}
    if not tensors:
        raise ValueError("no tensors under names")
    return tensors


def _place(file: Path, stream: BinaryIO, entries: Mapping[str, zipfile.ZipInfo], tensor: _Tensor) -> TensorHeader:
    entry = entries[f"data/{tensor.storage.key}"]
    if entry.file_size % BYTES[tensor.storage.dtype]:
        raise ValueError(f"{entry.file_size} bytes of {tensor.storage.dtype}")
    return TensorHeader(tensor.storage.dtype, tensor.shape, file, _data_start(stream, entry), entry.file_size)


def _data_start(stream: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Where an entry's bytes begin: behind its local header, whose name and extra field vary in length."""
    stream.seek(entry.header_offset + 26)
    name, extra = struct.unpack("<HH", stream.read(4))
    return int(entry.header_offset + 30 + name + extra)
