"""What CLIPImageProcessor does to a picture, by its config: in words, and which size comes out.

Old configs write sizes as numbers, newer ones as objects; what they leave out are CLIPImageProcessor's defaults.
"""

from dataclasses import dataclass
from pathlib import Path

from encoders.inspection.fields import Fields

FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}  # Pillow's numbers

Size = tuple[int, int]
"""Height and width."""


@dataclass(frozen=True)
class Pictures:
    """None where nothing is stated."""

    resize: str | None = None
    size: Size | None = None
    """Of what comes out, where every picture comes out alike."""
    uneven: bool = False
    """Whether a picture that is not square stays so."""
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def read_pictures(folder: Path) -> Pictures:
    """From preprocessor_config.json, or what transformers 5 nests in processor_config.json. Raises ModelError for a
    value of the wrong kind."""
    if (folder / "preprocessor_config.json").is_file():
        config: Fields | None = Fields.read(folder / "preprocessor_config.json")
    elif (folder / "processor_config.json").is_file():
        config = Fields.read(folder / "processor_config.json").section("image_processor")
    else:
        config = None
    return Pictures() if config is None else _pictures(config)


def _pictures(config: Fields) -> Pictures:
    no_crop = config.flag("do_center_crop") is False
    crop = None if no_crop else _exact(config, "crop_size")
    whole, edge = _exact(config, "size"), _shortest_edge(config)
    if config.flag("do_resize") is False:
        way, size, uneven = "none" + (" + center crop" if crop else ""), crop, no_crop
    elif edge is not None:
        way, size, uneven = "shortest edge" + (" + center crop" if crop else ""), crop, no_crop
    elif whole is not None:
        cropped = crop is not None and crop != whole
        way, size, uneven = "squash" + (" + center crop" if cropped else ""), crop or whole, False
    else:
        return Pictures(size=crop, mean=config.numbers("image_mean"), std=config.numbers("image_std"))
    number = config.whole("resample")
    return Pictures(
        resize=f"{'filter not stated' if number is None else FILTERS.get(number, f'filter {number}')}, {way}",
        size=size,
        uneven=uneven,
        mean=config.numbers("image_mean"),
        std=config.numbers("image_std"),
    )


def _exact(config: Fields, key: str) -> Size | None:
    if isinstance(config.values.get(key), int):
        side = config.whole(key) if key == "crop_size" else None  # a `size` of one number is a shortest edge
        return None if side is None else (side, side)
    size = config.section(key)
    height, width = (size.whole("height"), size.whole("width")) if size else (None, None)
    return None if height is None or width is None else (height, width)


def _shortest_edge(config: Fields) -> int | None:
    if isinstance(config.values.get("size"), int):
        return config.whole("size")
    size = config.section("size")
    return size.whole("shortest_edge") if size else None
