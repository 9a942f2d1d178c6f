"""Pictures to pixels: decoded as Pillow does, refused by their header where too large, cropped as torchvision does."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from mutated_pictures import chunk
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode

from encoders.config import PreprocessConfig
from encoders.data import transforms
from encoders.data.transforms import PictureTooLarge, _draw_crop, decode, picture_size, train_transform

MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1"), "WEBP": ("RGB", "RGBA")}
OPTIONS = {
    "JPEG": [{"subsampling": s, "progressive": p, "quality": q} for s in (0, 1, 2) for p in (0, 1) for q in (60, 95)],
    "PNG": [{}],
    "WEBP": [{"lossless": True}, {"quality": 70}],
}


def photo(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Soft noise: every frequency, no flat part."""
    noise = np.random.default_rng(width).integers(256, size=(9, 9, 4), dtype=np.uint8)
    return Image.fromarray(noise, "RGBA").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def by_pillow(image: bytes) -> Tensor:
    return torch.from_numpy(np.array(Image.open(io.BytesIO(image)).convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("kind", MODES)
def test_pixels_and_size_are_pillows(kind: str) -> None:
    for mode in MODES[kind]:
        for options in OPTIONS[kind]:
            for width, height in ((1, 1), (8, 1), (17, 13), (120, 77)):
                image = saved(photo(width, height, mode), kind, **options)
                assert picture_size(image) == (height, width)
                assert decode(image).equal(by_pillow(image)), (mode, options, width, height)


def test_sixteen_bits_keep_their_high_byte() -> None:
    values = np.random.default_rng(0).integers(2**16, size=(5, 7), dtype=np.uint16)
    found = decode(saved(Image.fromarray(values), "PNG"))
    assert found.dtype == torch.uint8
    assert found.numpy().tolist() == [(values >> 8).tolist()] * 3


def test_a_transparent_palette_keeps_its_colours() -> None:
    image = saved(photo(30, 20, "P"), "PNG", transparency=bytes(range(200)))
    assert decode(image).equal(by_pillow(image))


def test_a_jpegs_size_is_its_own_not_its_thumbnails() -> None:
    thumbnail = saved(photo(16, 8), "JPEG")
    image = saved(photo(60, 40), "JPEG", exif=b"Exif\0\0" + thumbnail, comment=b"\xff\xc0" * 20)
    filled = image[:2] + b"\xff\xff\xff\xff" + image[2:]  # fill bytes are allowed before a marker
    for jpeg in (image, filled):
        assert picture_size(jpeg) == (40, 60)
        assert decode(jpeg).equal(by_pillow(image))


def test_what_is_too_large_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transforms, "decode_image", lambda *_, **__: pytest.fail("it was decoded"))
    jpeg, png, webp = (bytearray(saved(photo(20, 20), kind)) for kind in ("JPEG", "PNG", "WEBP"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 60000, 50000)
    png[16:24] = struct.pack(">II", 50000, 60000)
    webp[26:30] = struct.pack("<HH", 12000, 16000)
    extended = bytearray(saved(photo(20, 20, "RGBA"), "WEBP"))
    assert extended[12:16] == b"VP8X"
    extended[24:30] = (49999).to_bytes(3, "little") + (59999).to_bytes(3, "little")
    lossless = bytearray(saved(photo(20, 20), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", 11999 | 15999 << 14)
    for image, size in ((jpeg, "50000 x 60000"), (png, "50000 x 60000"), (extended, "50000 x 60000")):
        with pytest.raises(PictureTooLarge, match=f"announces {size} pixels"):
            decode(bytes(image))
    for image in (webp, lossless):
        with pytest.raises(PictureTooLarge, match="announces 12000 x 16000 pixels"):
            decode(bytes(image))


def png(*headers: tuple[int, int], first: bytes = b"") -> bytes:
    """A PNG of one bit a pixel with these headers, of which the last is true."""
    width, height = headers[-1]
    rows = zlib.compress(bytes((width + 7) // 8 + 1) * height)
    found = [chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 1, 0, 0, 0, 0)) for header in headers]
    return b"".join([b"\x89PNG\r\n\x1a\n", first, *found, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def test_a_png_has_one_header_and_it_comes_first() -> None:
    assert decode(png((50, 40))).shape == (3, 40, 50)
    for bomb in (png((8, 8), (900, 700)), png((900, 700), first=chunk(b"tEXt", struct.pack(">II", 8, 8) + b"\0x"))):
        with pytest.raises(RuntimeError, match="a second header announces 900 x 700|does not begin with its header"):
            decode(bomb)


def test_webp_chunks_of_other_kinds_are_refused() -> None:
    """libwebp would take the file for a bare stream whose size is its own."""
    stream = b"VP8\x9d\x01\x2a" + struct.pack("<HH", 4000, 4000) + bytes(4) + struct.pack("<HH", 8, 8) + bytes(9999)
    with pytest.raises(RuntimeError, match=r"first chunk is b'VP8\\x9d'"):
        decode(b"RIFF" + struct.pack("<I", len(stream) + 4) + b"WEBP" + stream)


def scans(width: int, height: int, count: int) -> bytes:
    """A progressive CMYK JPEG of so many scans: its last one over and over."""
    image = saved(Image.new("CMYK", (width, height), (10, 90, 30, 7)), "JPEG", progressive=True)
    starts = [found.start() for found in transforms.SCAN.finditer(image)]
    assert len(starts) == image.count(b"\xff\xda") == 18  # the pattern finds what there is
    return image[:-2] + image[starts[-1] : -2] * (count - 18) + image[-2:]


def test_a_jpeg_of_many_scans_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decode(scans(90, 70, transforms.MAX_SCANS)).shape == (3, 70, 90)
    monkeypatch.setattr(transforms, "decode_image", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(PictureTooLarge, match="33 scans, more than 32"):
        decode(scans(90, 70, 33))


def test_a_picture_may_be_a_hundred_times_as_long_as_wide() -> None:
    for kind in MODES:
        assert decode(saved(photo(300, 3), kind)).shape == (3, 3, 300)
        with pytest.raises(PictureTooLarge, match="3 x 301 pixels, sides of more than 100 : 1"):
            decode(saved(photo(3, 301), kind))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "no bytes"),
        (b"GIF89a\x01\0\x01\0", "neither"),
        (b"\xff\xd8", "without a frame header"),
        (b"\xff\xd8\xff", "header is cut"),
        (b"\xff\xd8\xff\xe0\0", "header is cut"),
        (b"\xff\xd8\xff\xc0\0\x11\x08\0", "header is cut"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "header is cut"),
        (b"RIFF\0\0\0\0WEBPVP8L\0\0", "header is cut"),
        (b"RIFF\0\0\0\0WEBPVP8 ", "header is cut"),
    ],
)
def test_what_is_no_picture_is_named(image: bytes, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        decode(image)


@pytest.mark.parametrize("kind", MODES)
def test_a_cut_picture_is_an_error(kind: str) -> None:
    image = saved(photo(120, 77), kind)
    for length in (len(image) // 10, len(image) // 2, len(image) * 95 // 100, len(image) - 2):
        if (kind, length) == ("PNG", len(image) - 2):
            continue  # in the sum of its end, which nobody needs
        with pytest.raises(RuntimeError):
            decode(image[:length])


@pytest.mark.parametrize("kind", MODES)
def test_mutated_headers_never_give_pixels_of_another_size(kind: str) -> None:
    """Bytes changed, dropped and put in: the decoder raises RuntimeError, or it makes what the header announced."""
    rng = np.random.default_rng(0)
    image = saved(photo(24, 17), kind)
    decoded = 0
    for _ in range(1500):
        mutant = bytearray(image)
        for place in rng.integers(min(len(image), 200), size=rng.integers(1, 4)):
            match rng.integers(3):
                case 0:
                    mutant[place] = rng.integers(256)
                case 1:
                    del mutant[place : place + rng.integers(1, 5)]
                case 2:
                    mutant[place:place] = rng.choice([b"\xff", b"\0", b"\xff\xd0", b"\xff\0"])
        try:
            pixels = decode(bytes(mutant))
        except RuntimeError:
            continue
        assert pixels.shape == (3, *picture_size(bytes(mutant)))
        assert pixels.dtype == torch.uint8
        decoded += 1
    assert decoded > 50  # the test reaches the decoder


@pytest.mark.parametrize("count", [2000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_and_largest_pictures_neither_crash_nor_stall_nor_swell(count: int, tmp_path: Path) -> None:
    side = int(transforms.MAX_PIXELS**0.5)
    largest = {
        "scans.jpg": scans(side, side, transforms.MAX_SCANS),
        "alpha.png": saved(Image.new("RGBA", (side, side)), "PNG", compress_level=1),
    }
    for name, image in largest.items():
        (tmp_path / name).write_bytes(image)
    command = [sys.executable, str(Path(__file__).with_name("mutated_pictures.py")), str(count), "0"]
    files = [str(tmp_path / name) for name in largest]
    finished = subprocess.run([*command, *files], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert finished.returncode == 0  # a crash would be negative
    found = json.loads(finished.stdout)
    assert found["slowest_s"] < 2
    assert found["grown_mib"] < 512
    assert found["decoded"] + found["undecodable image"] + found["oversized image"] == count + len(files)
    assert min(found["decoded"], found["undecodable image"], found["oversized image"]) > count / 100
    print(finished.stdout)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("area", [(0.9, 1.0), (0.4, 1.0), (0.05, 0.1)])
def test_a_training_crop_is_torchvisions_resized_crop(interpolation: str, area: tuple[float, float]) -> None:
    config = PreprocessConfig(interpolation=interpolation, crop_area=area)  # type: ignore[arg-type]
    image = decode(saved(photo(250, 187), "JPEG"))
    for seed in range(10):
        top, left, height, width = _draw_crop(187, 250, config, np.random.default_rng(seed))
        mode = InterpolationMode(interpolation)
        expected = TF.resized_crop(image, top, left, height, width, [112, 112], interpolation=mode, antialias=True)
        found = train_transform(image, 112, config, np.random.default_rng(seed))
        assert found.equal(expected)
