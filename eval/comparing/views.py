"""The pictures that show, in the report, what each arm's encoder makes of a few sample images."""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from encoders import manifest
from encoders.errors import SwapError
from eval.comparing.comparison import Comparison
from eval.comparing.results import Arm, load_picture
from eval.viewing.drawing import PANEL

if TYPE_CHECKING:  # these import torch: too long for --help
    from torch import Tensor

    from eval.viewing.patch_tokens import Encoder

PATCH_CAPTION = (
    "Left the picture as the encoder's processor crops it, right its patch tokens at the layer that the LLaVA reads: "
    "their first three principal components as red, green and blue. Like colours are patches that the encoder tells "
    "apart least. The components are fitted over all pictures of an encoder together; those of a further encoder are "
    "rotated to agree with the first one's, so that colours can be compared."
)


@dataclass(frozen=True)
class Views:
    """A PNG per arm and image, or in `missing` why there are none."""

    pictures: list[list[bytes]] = field(default_factory=list)
    caption: str = PATCH_CAPTION
    missing: str = ""


def draw_views(arms: Sequence[Arm], comparison: Comparison, count: int) -> Views:
    """Draw `count` images, of those in the gallery if it has any, through the towers of the LLaVAs that were evaluated.

    The models may be gone or be of a kind that cannot be drawn: the scores stand without pictures, so the report then
    says why they are missing.
    """
    models = [Path(arm.runs[0].results["model"]["path"]) for arm in arms]
    if gone := [model for model in models if not (model / "config.json").is_file()]:
        return Views(missing=f"the model folder {gone[0]} is no longer there")
    evaluated = [arm.runs[0].results["model"]["fingerprint"] for arm in arms]
    if other := [model for model, known in zip(models, evaluated, strict=True) if manifest.fingerprint(model) != known]:
        return Views(missing=f"the model folder {other[0]} was changed after its evaluation")
    try:
        return Views(patch_pictures(models, _images(arms[0], comparison, count)))
    except SwapError as error:
        return Views(missing=str(error))


def _images(baseline: Arm, comparison: Comparison, count: int) -> list[bytes]:
    chosen = list(comparison.pictures.values())[:count]
    if chosen:
        return chosen
    run = baseline.runs[0]
    ids = dict.fromkeys(
        image_id for rows in run.rows.values() for row in rows.values() for image_id in row["image_id"].split("_")[:1]
    )
    return [load_picture(run.path, image_id) for image_id in list(ids)[:count] if image_id]


def patch_pictures(encoders: Sequence[Path], images: Sequence[bytes]) -> list[list[bytes]]:
    """For the report: per encoder (a LLaVA folder, an exported encoder, ...) and picture one PNG as PATCH_CAPTION says.

    One encoder is held in memory at a time. Raises DataError for a picture that cannot be read, ModelError or
    UsageError for an encoder that cannot be opened.
    """
    from eval.viewing.patch_tokens import aligned, components, open_encoder, read_picture

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
