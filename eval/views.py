"""The pictures that show, in the report, what each arm's encoder makes of a few sample images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from encoders import manifest
from encoders.errors import SwapError
from eval.comparison import Comparison
from eval.results import Arm, load_picture
from eval.view import PATCH_CAPTION, patch_pictures


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
