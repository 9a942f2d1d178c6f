"""`view-encoder PATH --image X`: what an encoder makes of a picture, patch by patch, as one PNG.

Beside the input as the encoder's processor crops it stand the patch tokens, their first three principal components as
red, green and blue, and, for a phrase, how similar every patch is to it. docs/swap.md says how to read them.
"""

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from encoders.errors import DataError, SwapError, UsageError, run_command

if TYPE_CHECKING:  # these import torch: too long for --help
    from torch import Tensor

    from eval.patch_tokens import Encoder

PANEL, GAP, LINE = 384, 16, 26  # pixels: a panel's side, the space around it, a line of text
PAPER, INK = "#faf9f6", "#1c1e24"
RAMP = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))  # from far to near
PATCH_CAPTION = (
    "Left the picture as the encoder's processor crops it, right its patch tokens at the layer that the LLaVA reads: "
    "their first three principal components as red, green and blue. Like colours are patches that the encoder tells "
    "apart least. The components are fitted over all pictures of an encoder together; those of a further encoder are "
    "rotated to agree with the first one's, so that colours can be compared."
)


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
    sheet, facts = view([args.path, *([args.vs] if args.vs is not None else [])], args.image, args.phrase, args.layer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    aside = args.out.with_name(f".{args.out.name}.{os.getpid()}.partial")
    sheet.save(aside, "PNG")
    aside.replace(args.out)
    print("\n".join([*facts, f"picture: {args.out}"]))


def view(
    sources: Sequence[str], image: Path, phrase: str | None = None, layer: int | None = None
) -> tuple[Image.Image, list[str]]:
    """The sheet, one row per encoder, and what there is to say of each in words.

    Raises DataError if `image` is no picture, UsageError or ModelError for an encoder that cannot be opened, ModelError
    if a phrase is given and no encoder has a text tower.
    """
    from eval.patch_tokens import aligned, components, open_encoder, read_picture

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
        panels = [(title, _enlarged(shown)), (f"hidden_states[{encoder.layer}]", _enlarged(found.images()[0]))]
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


def patch_pictures(encoders: Sequence[Path], images: Sequence[bytes]) -> list[list[bytes]]:
    """For the report: per encoder (a LLaVA folder, an exported encoder, ...) and picture one PNG as PATCH_CAPTION says.

    One encoder is held in memory at a time. Raises DataError for a picture that cannot be read, ModelError or
    UsageError for an encoder that cannot be opened.
    """
    from eval.patch_tokens import aligned, components, open_encoder, read_picture

    pictures = [read_picture(f"picture {place}", image) for place, image in enumerate(images)]
    drawn, first = [], None
    for path in encoders:
        encoder = open_encoder(path)
        inputs = [encoder.pixels(picture) for picture in pictures]
        found = components([encoder.tokens(pixels) for pixels in inputs])
        if first is not None:
            found, _ = aligned(first, found)
        first = first or found
        drawn.append([_pair(encoder, *one) for one in zip(inputs, found.images(), strict=True)])
    return drawn


def _pair(encoder: "Encoder", pixels: "Tensor", patches: Image.Image) -> bytes:
    both = Image.new("RGB", (PANEL, PANEL // 2))
    half = (PANEL // 2, PANEL // 2)
    both.paste(encoder.shown(pixels).resize(half, Image.Resampling.LANCZOS), (0, 0))
    both.paste(patches.resize(half, Image.Resampling.NEAREST), (PANEL // 2, 0))
    stream = io.BytesIO()
    both.save(stream, "PNG")
    return stream.getvalue()


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


def heat_map(near: "Tensor", shown: Image.Image) -> Image.Image:
    """Similarities (g,g), from their smallest to their largest, over a pale grey copy of the input."""
    values = (near - near.min()) / (near.max() - near.min()).clamp(min=1e-12)
    image = Image.new("RGB", (near.shape[1], near.shape[0]))
    image.putdata([_ramp(value) for value in values.flatten().tolist()])
    return Image.blend(_enlarged(shown.convert("L").convert("RGB")), _enlarged(image), 0.65)


def _ramp(value: float) -> tuple[int, ...]:
    place = value * (len(RAMP) - 1)
    at = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - at)) for a, b in zip(RAMP[at], RAMP[at + 1], strict=True))


def _enlarged(image: Image.Image) -> Image.Image:
    """A panel of it; what is smaller keeps its pixels, so that every patch can be told."""
    kind = Image.Resampling.NEAREST if image.width < PANEL // 2 else Image.Resampling.LANCZOS
    return image.resize((PANEL, PANEL), kind)


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]]) -> Image.Image:
    """Rows of titled panels under their own titles."""
    across = max(len(panels) for _, panels in rows)
    tall = 2 * LINE + PANEL + GAP
    page = Image.new("RGB", (across * (PANEL + GAP) + GAP, len(rows) * tall + GAP), PAPER)
    draw = ImageDraw.Draw(page)
    for number, (name, panels) in enumerate(rows):
        top = number * tall + GAP // 2
        _write(draw, (GAP, top), name, across * (PANEL + GAP) - GAP, 18)
        for column, (title, panel) in enumerate(panels):
            left = GAP + column * (PANEL + GAP)
            _write(draw, (left, top + LINE), title, PANEL, 15)
            page.paste(panel, (left, top + 2 * LINE))
    return page


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, room: int, size: int) -> None:
    """One line, cut to the room there is."""
    font = ImageFont.load_default(size)
    line = " ".join(text.split())
    while draw.textlength(line, font) > room:
        line = line.removesuffix("…")[:-1] + "…"
    draw.text(place, line, INK, font)


def cli() -> None:
    """Console entry point."""
    run_command(main)


if __name__ == "__main__":
    cli()
