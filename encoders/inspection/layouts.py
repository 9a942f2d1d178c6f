"""Where CLIP-style image towers keep their tensors: by the names in a weights file, which layout it is and what the
shapes alone say about the tower. No torch import.

Shapes: D width, M width of the hidden layer, P patch side, R rows of the position table (class position + patches).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from encoders.weights.headers import TensorHeader

HF = {
    "patches": "embeddings.patch_embedding.weight",  # (D,3,P,P)
    "class": "embeddings.class_embedding",  # (D,)
    "positions": "embeddings.position_embedding.weight",  # (R,D)
    "before": "pre_layrnorm",  # transformers' own spelling
    "after": "post_layernorm",
    "blocks": "encoder.layers",
    "hidden": "mlp.fc1.weight",  # (M,D)
}
OPEN_CLIP = {
    "patches": "conv1.weight",
    "class": "class_embedding",
    "positions": "positional_embedding",
    "before": "ln_pre",
    "after": "ln_post",
    "blocks": "transformer.resblocks",
    "hidden": "mlp.c_fc.weight",
}
ATTENTION = tuple(f"self_attn.{side}_proj" for side in ("q", "k", "v", "out"))
BLOCK = {
    "encoder.layers": [
        f"{name}.{part}"
        for name in ("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2", *ATTENTION)
        for part in ("weight", "bias")
    ],
    "transformer.resblocks": ["attn.in_proj_weight", "attn.in_proj_bias"]
    + [
        f"{name}.{part}"
        for name in ("ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
        for part in ("weight", "bias")
    ],
}
DDP = "module."


@dataclass(frozen=True)
class Layout:
    """A way to name an image tower's tensors: `prefix` before the names of HF or OPEN_CLIP."""

    title: str
    prefix: str
    names: Mapping[str, str]


# The first whose patch kernel is there, so prefixed before bare.
LAYOUTS = (
    Layout("vision_model.*", "vision_model.", HF),
    Layout("vision_tower.vision_model.*", "vision_tower.vision_model.", HF),
    Layout("vision_tower.* (LLaVA of transformers >= 5.6)", "vision_tower.", HF),
    Layout("vision.model.* (encoder run)", "vision.model.", HF),
    Layout("visual.* (open_clip)", "visual.", OPEN_CLIP),
    Layout("bare (CLIPVisionModel of transformers >= 5.6)", "", HF),
    Layout("bare (open_clip image tower)", "", OPEN_CLIP),
)


@dataclass(frozen=True)
class Tower:
    """What the names and shapes of a weights file say about its image tower."""

    layout: Layout
    tensors: dict[str, TensorHeader]
    """The tower's own, without the layout's prefix."""
    width: int
    patch_size: int
    layers: int
    mlp_width: int | None
    positions: int | None
    pre_norm: bool
    class_token: bool
    missing: tuple[str, ...]
    """Names that a complete tower of this many layers has and the file lacks; a norm before the blocks is optional."""

    @property
    def grid(self) -> int | None:
        """Patches along one side, if the table is a class position and a square."""
        if self.positions is None:
            return None
        side = math.isqrt(max(self.positions - 1, 0))
        return side if side > 0 and side * side == self.positions - 1 else None


def find_tower(tensors: Mapping[str, TensorHeader]) -> Tower | None:
    """The image tower among the tensors of a file; None if it is in no known layout."""
    plain = {name.removeprefix(DDP): tensor for name, tensor in tensors.items()}
    for layout in LAYOUTS:
        kernel = plain.get(layout.prefix + layout.names["patches"])
        if kernel is not None and len(kernel.shape) == 4:
            return _measure(layout, plain)
    return None


def _measure(layout: Layout, plain: Mapping[str, TensorHeader]) -> Tower:
    own = {n.removeprefix(layout.prefix): tensor for n, tensor in plain.items() if n.startswith(layout.prefix)}
    names = layout.names
    blocks = re.compile(re.escape(names["blocks"]) + r"\.(\d+)\.")
    layers = len({found[1] for name in own if (found := blocks.match(name))})
    before = f"{names['before']}.weight" in own
    expected = [
        names["patches"],
        names["positions"],
        names["class"],
        f"{names['after']}.weight",
        f"{names['after']}.bias",
    ]
    expected += [f"{names['before']}.bias"] if before else []
    expected += [f"{names['blocks']}.{n}.{part}" for n in range(layers) for part in BLOCK[names["blocks"]]]
    table, hidden = own.get(names["positions"]), own.get(f"{names['blocks']}.0.{names['hidden']}")
    kernel = own[names["patches"]].shape
    return Tower(
        layout=layout,
        tensors=own,
        width=kernel[0],
        patch_size=kernel[-1],
        layers=layers,
        mlp_width=hidden.shape[0] if hidden else None,
        positions=table.shape[0] if table and table.shape else None,
        pre_norm=before,
        class_token=names["class"] in own,
        missing=tuple(name for name in expected if name not in own),
    )
