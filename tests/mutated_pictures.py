"""Run by test_encoders_transforms: decode damaged pictures of all kinds, then these files; say how it went, as JSON.

mutated_pictures.py COUNT SEED FILE...
"""

import io
import json
import re
import struct
import sys
import time
import zlib
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from encoders.data.pairs import decode_sample
from encoders.data.samples import BadSample, Sample
from encoders.data.transforms import picture_size

KINDS = {
    "JPEG": [{"quality": 90}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}, {"restart_marker_blocks": 2}],
    "PNG": [{}, {"mode": "P"}, {"mode": "RGBA"}, {"mode": "1"}, {"mode": "I;16"}],
    "WEBP": [{"lossless": True}, {"quality": 60}, {"mode": "RGBA"}],
}
INSERTED = (b"\xff", b"\0", b"\xff\xd8", b"\xff\xc2", b"\xff\xda", b"\xff\xd9", b"IDAT", b"IEND", b"ALPH")
WEBP_KINDS = (b"VP8 ", b"VP8L", b"VP8X", b"VP8\x9d", b"ALPH", b"ANIM")
PNG_KINDS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"fdAT", b"fcTL", b"acTL", b"IEND", b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def pictures() -> list[bytes]:
    noise = np.random.default_rng(0).integers(256, size=(7, 9, 4), dtype=np.uint8)
    soft = Image.fromarray(noise, "RGBA").resize((61, 47), Image.Resampling.BICUBIC)
    found = []
    for kind, variants in KINDS.items():
        for options in variants:
            mode = options.get("mode", "RGB")
            grey = Image.fromarray(np.arange(61 * 47, dtype=np.uint16).reshape(47, 61) * 20)
            stream = io.BytesIO()
            picture = grey if mode == "I;16" else soft.convert(mode)
            picture.save(stream, kind, **{name: value for name, value in options.items() if name != "mode"})
            found.append(stream.getvalue())
    return found


def mutated(whole: bytes, rng: np.random.Generator) -> bytes:
    """Most changes hit the first bytes, where headers are; half of the PNGs keep sums that fit their content."""
    if whole.startswith(b"\x89PNG") and rng.random() < 0.5:
        return rebuilt(whole, rng)
    content = bytearray(whole)
    if whole.startswith(b"RIFF") and rng.random() < 0.2:
        content[12:16] = WEBP_KINDS[rng.integers(len(WEBP_KINDS))]
    for _ in range(rng.integers(1, 6)):
        place = int(rng.integers(min(len(content), 120) if rng.random() < 0.5 else len(content)))
        match rng.integers(5):
            case 0:
                content[place] = rng.integers(256)
            case 1:
                content[place] ^= 1 << rng.integers(8)
            case 2:
                del content[place : place + rng.integers(1, 200)]
            case 3:
                content[place:place] = INSERTED[rng.integers(len(INSERTED))]
            case 4:
                content[place:place] = content[place : place + rng.integers(1, 200)]
        content = content or bytearray(1)
    return bytes(content)


def rebuilt(whole: bytes, rng: np.random.Generator) -> bytes:
    """A PNG with chunks changed, renamed, moved, doubled or left out."""
    chunks, place = [], 8
    while place < len(whole):
        end = place + 8 + struct.unpack_from(">I", whole, place)[0]
        chunks.append((whole[place + 4 : place + 8], whole[place + 8 : end]))
        place = end + 4
    for _ in range(rng.integers(1, 4)):
        kind, content = chunks[place := int(rng.integers(len(chunks)))]
        match rng.integers(6):
            case 0:
                changed = bytearray(content or b"\0")
                changed[rng.integers(len(changed))] = rng.integers(256)
                chunks[place] = kind, bytes(changed)
            case 1:
                chunks[place] = PNG_KINDS[rng.integers(len(PNG_KINDS))], content
            case 2:
                chunks[place] = kind, content[: rng.integers(len(content) + 1)]
            case 3:
                chunks.insert(int(rng.integers(len(chunks) + 1)), (kind, content))
            case 4 if len(chunks) > 1:
                del chunks[place]
            case 5:
                header = struct.pack(">IIBBBBB", *rng.integers(1, 20_000, size=2), 8, 2, 0, 0, 0)
                chunks.insert(int(rng.integers(3)), (b"IHDR", header))
    return whole[:8] + b"".join(chunk(kind, content) for kind, content in chunks)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A PNG's chunk with the sum that it needs."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def peak_mib() -> float:
    """Of this process alone: `ru_maxrss` begins with what the parent had."""
    [kib] = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return int(kib) / 2**10


def main() -> None:
    count, seed = map(int, sys.argv[1:3])
    rng, sources = np.random.default_rng(seed), pictures()
    found: Counter[str] = Counter()
    slowest, before = 0.0, peak_mib()
    mutants = (mutated(sources[i % len(sources)], rng) for i in range(count))
    for image in chain(mutants, (Path(file).read_bytes() for file in sys.argv[3:])):
        began = time.process_time()
        try:
            shape = decode_sample(Sample("", "mutants", image, "", {}, {})).shape
            assert shape == (3, *picture_size(image))
            found["decoded"] += 1
        except BadSample as error:
            found[error.reason] += 1
        slowest = max(slowest, time.process_time() - began)
    print(json.dumps({**found, "slowest_s": round(slowest, 3), "grown_mib": round(peak_mib() - before)}))


if __name__ == "__main__":
    main()
