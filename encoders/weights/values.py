"""The few questions about a tensor's values that need no torch: are they finite, is this norm a folded one."""

import math
import struct
from collections.abc import Iterator, Mapping

from encoders.errors import ModelError
from encoders.weights.headers import TensorHeader

# The exponent bits: all of them set means NaN or infinity.
EXPONENTS = {"F64": 0x7FF0 << 48, "F32": 0x7F800000, "F16": 0x7C00, "BF16": 0x7F80}
WHOLE = ("I64", "I32", "I16", "I8", "U8", "BOOL")
BLOCK = 2**16  # bytes looked at together: stays in the cache, and malloc reuses what is that small (4 times the speed)


def non_finite(tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    """How many values are NaN or infinite, by tensor, where any is. Reads everything.

    Raises ModelError for a number format whose bits are not known here.
    """
    found = {name: _count(name, tensor) for name, tensor in tensors.items()}
    return {name: count for name, count in found.items() if count}


def _count(name: str, tensor: TensorHeader) -> int:
    import numpy as np

    if tensor.dtype in WHOLE:
        return 0
    if tensor.dtype not in EXPONENTS:
        raise ModelError(
            f"{tensor.file}: {name} is stored as {tensor.dtype}, whose values cannot be checked; use float32"
        )
    mask, size = EXPONENTS[tensor.dtype], 8 if tensor.dtype == "F64" else 4 if tensor.dtype == "F32" else 2
    count = 0
    for block in _blocks(tensor):
        bits = np.frombuffer(block, dtype=f"<u{size}")
        exponents = bits & bits.dtype.type(mask)
        if exponents.max() == mask:
            count += int(np.count_nonzero(exponents == mask))
    return count


def _blocks(tensor: TensorHeader) -> Iterator[bytes]:
    left = tensor.size
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.start)
        while left:
            block = stream.read(min(BLOCK, left))
            left -= len(block)
            yield block


def is_folded(weight: TensorHeader, bias: TensorHeader) -> bool:
    """Whether a norm (weight (D,), bias (D,)) is no trained one but the large constant that stands for its absence
    (encoders/export/fold.py): one power of two above 1, without bias."""
    weights, biases = set(_values(weight)), set(_values(bias))
    return len(weights) == 1 and biases == {0.0} and max(weights) > 1 and math.frexp(max(weights))[0] == 0.5


def _values(tensor: TensorHeader) -> list[float]:
    raw = b"".join(_blocks(tensor))
    if tensor.dtype == "BF16":  # the upper half of a float32
        raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
    kind = {"F64": "d", "F32": "f", "BF16": "f", "F16": "e"}.get(tensor.dtype)
    if kind is None:
        raise ModelError(f"{tensor.file} holds a norm stored as {tensor.dtype}; needed are floating-point weights")
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(kind)}{kind}", raw))
