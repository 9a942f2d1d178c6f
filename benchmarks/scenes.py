"""Scenes per second on one core, as shards on disk, against drawing every emoji by Pillow's font anew.

    python benchmarks/scenes.py [--image-size 224] [--scenes 1000] [--rounds 5]

Both write the same tars; only the kept drawings differ. Prints medians of rounds taken in turn, after one to warm up.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image

from encoders.data.scenes.render import Renderer
from encoders.data.scenes.world import ScenesConfig, World
from encoders.data.scenes.writer import write_shards


class Forgetful(Renderer):
    """The rival: a renderer that draws each emoji from the font whenever it is needed."""

    def _sprite(self, name: str, side: int) -> Image.Image:
        self._sprites.clear()
        return super()._sprite(name, side)


def scenes_per_second(renderer: Renderer, world: World, scenes: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        write_shards(Path(folder) / "shards", world, renderer, "train", scenes, lambda numbers, _: numbers)
        return scenes / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    world = World(ScenesConfig(image_size=options.image_size, max_objects=6))
    renderers = {kind: kind(world.classes, options.image_size) for kind in (Renderer, Forgetful)}
    rates: dict[type, list[float]] = {kind: [] for kind in renderers}
    for _ in range(options.rounds + 1):
        for kind, renderer in renderers.items():
            rates[kind].append(scenes_per_second(renderer, world, options.scenes))
    ours, theirs = (statistics.median(rates[kind][1:]) for kind in (Renderer, Forgetful))
    print(f"{options.image_size} px, up to 6 objects, one core: {ours:.0f} scenes/s; ", end="")
    print(f"every emoji drawn anew {theirs:.0f} scenes/s; {ours / theirs:.1f}x")


if __name__ == "__main__":
    main()
