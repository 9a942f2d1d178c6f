"""On which transformers versions `CLIPVisionModel.from_pretrained` gives this tower with every weight in its place.

A rule per key layout and file form, each measured with 4.37.2, 4.46.3, 4.57.6, 5.5.4, 5.6.0 and 5.23.0 side by side
(docs/publishing.md); versions in between are assumed to do what both their neighbours do.
"""

from collections.abc import Mapping
from pathlib import Path

from encoders.inspection.layouts import HF, Tower

ALL = "4.37 to 5.23"
FLAT_SINCE = "5.6"  # transformers then dropped `vision_model.` from what CLIPVisionModel writes
NO_METADATA_SINCE = "4.57"


def loads_on(family: str, tower: Tower, metadata: Mapping[str, str], file: Path, problems: tuple[str, ...]) -> str:
    """The versions in words, or `none` with what to do."""
    prefix = tower.layout.prefix
    if tower.layout.names is not HF or prefix == "vision.model.":
        return "none as it is; export-encoder makes a CLIPVisionModel of it"
    if problems:
        return "none safely: see problems"
    if family not in ("clip_vision_model", "clip"):
        if prefix.startswith("vision_tower.") and family != "llava":
            return f"not measured for {family}"
        if prefix == "vision_tower.vision_model.":
            return f"transformers {ALL}, as part of its LLaVA"
        if prefix == "vision_tower.":
            return f"transformers >= {FLAT_SINCE}, as part of its LLaVA; older ones fill the tower at random, silently"
        return "none as it is: no config.json says that this is a CLIPVisionModel"
    if prefix == "":
        return (
            f"transformers >= {FLAT_SINCE}; older ones fill all of it at random, silently (keys lack `vision_model.`)"
        )
    if ".safetensors" in file.name and metadata.get("format") != "pt":
        return f"transformers >= {NO_METADATA_SINCE}; older ones stop at the missing metadata {{'format': 'pt'}}"
    return f"transformers {ALL}"
