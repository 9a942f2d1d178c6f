"""Tiny webdataset shards for tests: a coloured square a sample, captions that name its colour."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

from PIL import Image

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "white": (240, 240, 240)}


def write_shards(folder: Path, samples: int, shards: int = 2, side: int = 40, **replace: dict[int, Any]) -> Path:
    """`samples` samples over `shards` tars. `replace` maps a field (image, web, ...) to {index: other content}; a
    caption of None is left out."""
    folder.mkdir(parents=True)
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for index in range(shard, samples, shards):
                fields = sample(index, side) | {name: new[index] for name, new in replace.items() if index in new}
                add(tar, f"{index:05d}.jpg", fields.pop("image"))
                captions = {name: caption for name, caption in fields.items() if caption is not None}
                add(tar, f"{index:05d}.json", json.dumps(captions).encode())
    return folder


def sample(index: int, side: int) -> dict[str, Any]:
    name = list(COLOURS)[index % len(COLOURS)]
    shade = tuple(max(0, value - index // 4 % 30) for value in COLOURS[name])
    stream = io.BytesIO()
    size = (side, side + index % 3)
    ramp = Image.linear_gradient("L").resize(size).convert("RGB")  # so that crops differ
    Image.blend(Image.new("RGB", size, shade), ramp, 0.3).save(stream, "JPEG", quality=90)
    long = f"The picture is {name}. There is one square. Its place is {index % 7} steps away."
    return {"image": stream.getvalue(), "web": f"{name} IMG_{index}", "short": f"A {name} square.", "long": long}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
