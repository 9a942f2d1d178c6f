"""`view-encoder PATH --image X`: what an encoder makes of a picture, patch by patch, as one PNG.

Beside the input as the encoder's processor crops it stand the patch tokens, their first three principal components as
red, green and blue, and, for a phrase, how similar every patch is to it. docs/swap.md says how to read them.
"""

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from encoders.errors import DataError, SwapError, UsageError, run_command
from eval.viewing.drawing import enlarged, heat_map, sheet

if TYPE_CHECKING:  # these import torch: too long for --help
    from eval.viewing.patch_tokens import Encoder


def parser() -> argparse.ArgumentParser:
    """The options of view-encoder."""
    options = argparse.ArgumentParser(prog="view-encoder", description=__doc__)
    what = "an encoder run, an exported encoder, a folder of transformers or open_clip, a LLaVA folder, or a Hub id"
    options.add_argument("path", metavar="PATH", help=what)
    options.add_argument("--image", type=Path, required=True, metavar="FILE", help="the picture to look at")
    options.add_argument("--vs", metavar="OTHER", help="another encoder, drawn below in colours that compare")
    options.add_argument("--phrase", metavar="TEXT", help="also draw every patch's similarity to TEXT")
    options.add_argument(
        "--layer", type=int, metavar="N", help="index of the hidden state (default: -2, or what a LLaVA says it reads)"
    )
    options.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture to write")
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Draw as told by the command line. Raises a SwapError for everything the user can mend."""
    args = parser().parse_args(argv)
    if args.out.suffix != ".png":
        raise UsageError(f"--out {args.out} must end in .png")
    if args.phrase is not None and not args.phrase.strip():
        raise UsageError("--phrase is empty; leave it out, or name what to look for")
    if not args.image.is_file():
        raise DataError(f"--image {args.image} does not exist")
    drawn, facts = view([args.path, *([args.vs] if args.vs is not None else [])], args.image, args.phrase, args.layer)
    aside = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        drawn.save(aside, "PNG")
        aside.replace(args.out)
    except OSError as error:
        with suppress(OSError):  # of a folder that could not be made
            aside.unlink()
        raise UsageError(f"--out {args.out} cannot be written ({error}); name another file") from error
    print("\n".join([*facts, f"picture: {args.out}"]))


def view(
    sources: Sequence[str], image: Path, phrase: str | None = None, layer: int | None = None
) -> tuple[Image.Image, list[str]]:
    """The sheet, one row per encoder, and what there is to say of each in words.

    Raises DataError if `image` is no picture, UsageError or ModelError for an encoder that cannot be opened, ModelError
    if a phrase is given and no encoder has a text tower.
    """
    from eval.viewing.patch_tokens import aligned, components, open_encoder, read_picture

    picture = read_picture(str(image), image)
    rows, facts, unable, first, seen = [], [], [], None, None
    for source in sources:
        encoder = open_encoder(source, layer)
        pixels = encoder.pixels(picture)
        found = components([encoder.tokens(pixels)])
        facts += _facts(encoder, found.shares, found.unusual)
        if first is not None:
            found, agreement = aligned(first, found)
            facts.append(f"  rotated to the colours of {sources[0]}; agreement {agreement:.2f} (1: the same picture)")
        first = first or found
        shown = encoder.shown(pixels)
        if seen is not None and _differ(seen, shown):
            facts.append("  its processor crops the picture in another way, so that places are not the same")
        seen = seen or shown
        title = f"{encoder.config.image_size} px, {encoder.grid} x {encoder.grid} patches"
        panels = [(title, enlarged(shown)), (f"hidden_states[{encoder.layer}]", enlarged(found.images()[0]))]
        if phrase is not None:
            try:
                near = encoder.similarity(pixels, phrase)
            except UsageError:
                raise
            except SwapError as error:
                unable.append(error)
                facts.append(f"  {error}")
                near = None
            if near is not None:
                low, high = float(near.min()), float(near.max())
                facts.append(f"  similarity to {phrase!r}: {low:.3f} to {high:.3f}, mean {float(near.mean()):.3f}")
                panels.append((f"{phrase}: {low:.2f} to {high:.2f}", heat_map(near, shown)))
        rows.append((source, panels))
    if len(unable) == len(sources):
        raise unable[0]
    return sheet(rows), facts


def _facts(encoder: "Encoder", shares: tuple[float, ...], unusual: int) -> list[str]:
    config = encoder.config
    lines = [
        f"{encoder.name}: hidden_states[{encoder.layer}] of {config.num_hidden_layers} layers, {encoder.grid} x "
        f"{encoder.grid} patches of {config.patch_size} px, width {config.hidden_size}",
        f"  the three components hold {', '.join(f'{100 * share:.1f}' for share in shares)} % of the variance",
    ]
    return lines + ([f"  {unusual} tokens of unusual norm were left out of the fit"] if unusual else [])


def _differ(one: Image.Image, other: Image.Image) -> bool:
    """Whether two inputs show other parts of a picture: small, they should hardly differ."""
    small = [image.resize((16, 16), Image.Resampling.BOX).tobytes() for image in (one, other)]
    return sum(abs(a - b) for a, b in zip(*small, strict=True)) / len(small[0]) > 8  # of 255


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
