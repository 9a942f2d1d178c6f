"""Panels, heat maps and the sheet that view-encoder and the report draw."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:  # too long an import for --help
    from torch import Tensor

PANEL, GAP, LINE = 384, 16, 26  # pixels: a panel's side, the space around it, a line of text
PAPER, INK = "#faf9f6", "#1c1e24"
RAMP = ((13, 8, 135), (126, 3, 168), (204, 71, 120), (248, 149, 64), (240, 249, 33))  # from far to near


def heat_map(near: "Tensor", shown: Image.Image) -> Image.Image:
    """Similarities (g,g), from their smallest to their largest, over a pale grey copy of the input."""
    values = (near - near.min()) / (near.max() - near.min()).clamp(min=1e-12)
    image = Image.new("RGB", (near.shape[1], near.shape[0]))
    image.putdata([_ramp(value) for value in values.flatten().tolist()])
    return Image.blend(enlarged(shown.convert("L").convert("RGB")), enlarged(image), 0.65)


def _ramp(value: float) -> tuple[int, ...]:
    place = value * (len(RAMP) - 1)
    at = min(int(place), len(RAMP) - 2)
    return tuple(round(a + (b - a) * (place - at)) for a, b in zip(RAMP[at], RAMP[at + 1], strict=True))


def enlarged(image: Image.Image) -> Image.Image:
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
