"""Where CLIP-style image towers keep their tensors: by the names in a weights file, which layout it is and what the
shapes alone say about the tower. No torch import.

Shapes: D width, 3D queries, keys and values in one, M hidden layer's width, P patch side, R rows of the position table
(class position + patches).
"""

import math
import re
from collections.abc import Iterator, Mapping
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
Shape = tuple[str, ...]
NORM: dict[str, Shape] = {"weight": ("D",), "bias": ("D",)}
PROJECTION: dict[str, Shape] = {"weight": ("D", "D"), "bias": ("D",)}
UP: dict[str, Shape] = {"weight": ("M", "D"), "bias": ("M",)}
DOWN: dict[str, Shape] = {"weight": ("D", "M"), "bias": ("D",)}
BLOCK = {
    "encoder.layers": {
        **{"layer_norm1": NORM, "layer_norm2": NORM, "mlp.fc1": UP, "mlp.fc2": DOWN},
        **{f"self_attn.{side}_proj": PROJECTION for side in ("q", "k", "v", "out")},
    },
    "transformer.resblocks": {
        **{"ln_1": NORM, "ln_2": NORM, "mlp.c_fc": UP, "mlp.c_proj": DOWN, "attn.out_proj": PROJECTION},
        "attn": {"in_proj_weight": ("3D", "D"), "in_proj_bias": ("3D",)},
    },
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
    misshapen: tuple[str, ...]
    """What has another shape than its place in this tower needs, with both."""

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
        if kernel is not None and len(kernel.shape) == 4 and 0 not in kernel.shape:
            return _measure(layout, plain)
    return None


def _measure(layout: Layout, plain: Mapping[str, TensorHeader]) -> Tower:
    own = {n.removeprefix(layout.prefix): tensor for n, tensor in plain.items() if n.startswith(layout.prefix)}
    names = layout.names
    blocks = re.compile(re.escape(names["blocks"]) + r"\.(\d+)\.")
    layers = len({found[1] for name in own if (found := blocks.match(name))})
    before = f"{names['before']}.weight" in own
    table, hidden = own.get(names["positions"]), own.get(f"{names['blocks']}.0.{names['hidden']}")
    kernel = own[names["patches"]].shape
    sizes = {"D": kernel[0], "3D": 3 * kernel[0], "P": kernel[-1], "3": 3}
    sizes |= {"M": hidden.shape[0]} if hidden and hidden.shape else {}
    sizes |= {"R": table.shape[0]} if table and table.shape else {}
    expected = _expected(names, layers, before)
    return Tower(
        layout=layout,
        tensors=own,
        width=kernel[0],
        patch_size=kernel[-1],
        layers=layers,
        mlp_width=sizes.get("M"),
        positions=sizes.get("R"),
        pre_norm=before,
        class_token=names["class"] in own,
        missing=tuple(name for name in expected if name not in own),
        misshapen=tuple(_misshapen(own, expected, sizes)),
    )


def _expected(names: Mapping[str, str], layers: int, before: bool) -> dict[str, Shape]:
    """The shape of every tensor of a complete tower."""
    expected: dict[str, Shape] = {
        names["patches"]: ("D", "3", "P", "P"),
        names["class"]: ("D",),
        names["positions"]: ("R", "D"),
    }
    for norm in ("before", "after") if before else ("after",):
        expected |= {f"{names[norm]}.{part}": shape for part, shape in NORM.items()}
    for n in range(layers):
        for module, parts in BLOCK[names["blocks"]].items():
            expected |= {f"{names['blocks']}.{n}.{module}.{part}": shape for part, shape in parts.items()}
    return expected


def _misshapen(
    own: Mapping[str, TensorHeader], expected: Mapping[str, Shape], sizes: Mapping[str, int]
) -> Iterator[str]:
    for name, letters in expected.items():
        if name not in own:
            continue
        needed, found = [sizes.get(letter) for letter in letters], list(own[name].shape)
        if len(found) != len(needed) or any(n is not None and n != f for n, f in zip(needed, found, strict=True)):
            shape = ", ".join(str(size or letter) for size, letter in zip(needed, letters, strict=True))
            yield f"{name} has the shape {found}, needed is [{shape}]"
