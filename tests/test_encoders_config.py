"""Encoder configs check themselves: sizes that make no tower are refused where they are stated."""

import json
from pathlib import Path
from typing import Any

import pytest

from encoders.config import CaptionerConfig, EncoderConfig, TextConfig, VisionConfig
from encoders.errors import ModelError, UsageError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"image_size": 0}, r"image_size 0 has no room for a patch of 16"),
    "negative picture": ({"image_size": -16}, r"image_size -16 has no room"),
    "picture below a patch": ({"image_size": 8}, r"image_size 8 has no room"),
    "no multiple": ({"image_size": 230}, r"the nearest sizes are 224 and 240"),
    "no patch": ({"patch_size": 0}, r"vision\.patch_size is 0"),
    "no layer": ({"layers": 0}, r"vision\.layers is 0"),
    "no head": ({"heads": 0}, r"vision\.heads is 0"),
    "no epsilon": ({"norm_eps": 0.0}, r"norm_eps 0\.0 must be above 0"),
    "epsilon that is no number": ({"norm_eps": float("nan")}, r"norm_eps nan must be above 0"),
    "heads that do not divide": ({"heads": 7}, r"width 768 is not a multiple of vision\.heads 7"),
    "odd width of a fixed table": ({"width": 6, "heads": 3, "position_table": "sincos2d"}, "multiple of 4"),
    "norm of a class token": ({"norm_after_pool": True}, "belongs to pool: mean"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_image_towers_that_cannot_be_are_refused(name: str) -> None:
    VisionConfig()
    given, reason = REFUSED[name]
    with pytest.raises(UsageError, match=reason):
        VisionConfig(**given)


@pytest.mark.parametrize("config_class", [TextConfig, CaptionerConfig])
def test_a_tower_of_nothing_is_refused(config_class: Any) -> None:
    for name in ("width", "layers", "heads"):
        with pytest.raises(UsageError, match=f"{name}.* must be at least 1"):
            config_class(**{name: 0})


@pytest.mark.parametrize(
    "content",
    [
        *([1, 2], None, "text", {"vision": [1]}, {"vision": 3}, {"objective": ["a"]}, {"text": {"heads": 0}}),
        *({"preprocess": {"crop_area": [0.5]}}, {"vision": {"image_size": 230}}, {"unknown": 1}),
    ],
    ids=str,
)
def test_a_file_that_is_no_encoder_config_is_named(content: Any, tmp_path: Path) -> None:
    """Whatever it holds: never a traceback."""
    (tmp_path / "encoder.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"encoder\.json is not the config of an encoder run"):
        EncoderConfig.read(tmp_path / "encoder.json")
