"""JPEG bytes to a 224-pixel training picture on one thread, against open_clip's training transform.

    python benchmarks/loader.py [--width 500 --height 375] [--pictures 16] [--rounds 15]

Photographs are cut-outs of scikit-learn's two sample pictures, quality 90, 4:2:0. Both sides draw crops of 90-100 % of
the area and resize them bicubically; ours stays uint8, open_clip's is normalised float, as each hands it on. Decoders
are compared byte by byte with Pillow's first; simplejpeg and torchcodec take part where they are installed.
"""

import argparse
import io
import statistics
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import torch
from measure import Bar, announce, conclude, cpu_seconds, median_ratio
from open_clip.transform import image_transform
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor

from encoders.config import PreprocessConfig
from encoders.data.transforms import _draw_crop, decode, train_transform

SIZE = 224
CONFIG = PreprocessConfig(interpolation="bicubic", crop_area=(0.9, 1.0))


def photographs(width: int, height: int, count: int) -> list[bytes]:
    """JPEGs of `width` x `height`: cut-outs of two photographs at 3/4 to full scale."""
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    jpegs = []
    for number in range(count):
        photo = photos[number % len(photos)]
        scale = rng.uniform(0.75, 1) * min(photo.width / width, photo.height / height)
        w, h = int(width * scale), int(height * scale)
        x, y = rng.integers(photo.width - w + 1), rng.integers(photo.height - h + 1)
        stream = io.BytesIO()
        photo.crop((x, y, x + w, y + h)).resize((width, height), Image.Resampling.BICUBIC).save(
            stream, "JPEG", quality=90
        )
        jpegs.append(stream.getvalue())
    return jpegs


def by_pillow(jpeg: bytes) -> Tensor:
    """Pillow's pixels, uint8 (3,H,W)."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(jpeg)).convert("RGB"))).permute(2, 0, 1)


def decoders() -> dict[str, Callable[[bytes], Tensor]]:
    """Decoders by name, each to uint8 (3,H,W): ours, Pillow's and those that could replace ours."""
    found: dict[str, Callable[[bytes], Tensor]] = {"decode, ours": decode, "decode, Pillow": by_pillow}
    if find_spec("simplejpeg"):
        import simplejpeg

        def by_simplejpeg(jpeg: bytes) -> Tensor:
            return torch.from_numpy(simplejpeg.decode_jpeg(jpeg, "RGB", False, False)).permute(2, 0, 1)

        found["decode, simplejpeg"] = by_simplejpeg
    if find_spec("torchcodec"):
        from torchcodec.decoders import decode_image

        def by_torchcodec(jpeg: bytes) -> Tensor:
            return decode_image(torch.frombuffer(bytearray(jpeg), dtype=torch.uint8), mode="RGB")

        found["decode, torchcodec"] = by_torchcodec
    return found


def mean_difference(jpegs: list[bytes]) -> float:
    """Grey levels by which our crop and resize differ on average from Pillow's of the same crop."""
    differences = []
    for number, jpeg in enumerate(jpegs):
        ours = train_transform(decode(jpeg), SIZE, CONFIG, np.random.default_rng(number))
        photo = Image.open(io.BytesIO(jpeg))
        top, left, height, width = _draw_crop(photo.height, photo.width, CONFIG, np.random.default_rng(number))
        box = (left, top, left + width, top + height)
        crop = np.asarray(photo.crop(box).resize((SIZE, SIZE), Image.Resampling.BICUBIC), dtype=np.int16)
        differences.append(np.abs(ours.permute(1, 2, 0).numpy() - crop).mean())
    return float(np.mean(differences))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=375)
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    announce()
    jpegs = photographs(options.width, options.height, options.pictures) * 8  # a round of some tenths of a second
    reads = decoders()
    for name, read in reads.items():
        assert all(read(jpeg).equal(by_pillow(jpeg)) for jpeg in jpegs), f"{name} differs from Pillow"
    print(f"  {len(reads)} decoders give the bytes that Pillow gives")
    reference = image_transform(SIZE, is_train=True)
    rng = np.random.default_rng(0)
    seconds = cpu_seconds(
        {
            "open_clip's training transform": lambda: [reference(Image.open(io.BytesIO(jpeg))) for jpeg in jpegs],
            "ours": lambda: [train_transform(decode(jpeg), SIZE, CONFIG, rng) for jpeg in jpegs],
            **{name: lambda read=read: [read(jpeg) for jpeg in jpegs] for name, read in reads.items()},
        },
        options.rounds,
    )
    for name, taken in seconds.items():
        print(f"  {name}: {len(jpegs) / statistics.median(taken):,.0f} pictures/s")
    what = f"{options.width}x{options.height} -> {SIZE}"
    speed = median_ratio(seconds["open_clip's training transform"], seconds["ours"])
    bars = [
        Bar(f"{what}, pictures/s over open_clip's", speed, "at least", 2.3),
        Bar("mean difference from Pillow's crop and resize, grey levels", mean_difference(jpegs), "at most", 0.2),
    ]
    conclude(bars)


if __name__ == "__main__":
    main()
