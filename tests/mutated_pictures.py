"""Run by test_encoders_transforms: decode damaged pictures of all kinds and say how it went, as JSON.

mutated_pictures.py COUNT SEED
"""

import io
import json
import resource
import sys
import time
from collections import Counter

import numpy as np
from PIL import Image

from encoders.data.pairs import decode_sample
from encoders.data.samples import BadSample, Sample

KINDS = {
    "JPEG": [{"quality": 90}, {"progressive": True}, {"mode": "CMYK"}, {"mode": "L"}, {"restart_marker_blocks": 2}],
    "PNG": [{}, {"mode": "P"}, {"mode": "RGBA"}, {"mode": "1"}, {"mode": "I;16"}],
    "WEBP": [{"lossless": True}, {"quality": 60}, {"mode": "RGBA"}],
}
INSERTED = (b"\xff", b"\0", b"\xff\xd8", b"\xff\xc2", b"\xff\xda", b"\xff\xd9", b"IDAT", b"IEND", b"ALPH")


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
    """Most changes hit the first bytes, where headers are."""
    content = bytearray(whole)
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


def main() -> None:
    count, seed = map(int, sys.argv[1:])
    rng, sources = np.random.default_rng(seed), pictures()
    found: Counter[str] = Counter()
    slowest = 0.0
    for i in range(count):
        image = mutated(sources[i % len(sources)], rng)
        began = time.process_time()
        try:
            decode_sample(Sample(str(i), "mutants", image, "", {}, {}))
            found["decoded"] += 1
        except BadSample as error:
            found[error.reason] += 1
        slowest = max(slowest, time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({**found, "slowest_s": round(slowest, 3), "peak_mib": round(peak)}))


if __name__ == "__main__":
    main()
