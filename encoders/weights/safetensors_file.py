"""Writing safetensors whose bytes depend on nothing but their content."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def write(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Save contiguous copies of `tensors`; `{"format": "pt"}`, which transformers asks for, is added to `metadata`."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **metadata})
    _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """The library writes metadata in the random order of a hash map; sorted, the header keeps its length."""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > length:
            raise ValueError(f"{file}: the header does not fit its place once sorted")
        stream.seek(8)
        stream.write(text.ljust(length))  # padded with spaces, as the format has it
