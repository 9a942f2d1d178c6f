"""A tower without a norm before its blocks as one with it: CLIPVisionModel always has `pre_layrnorm`.

The embeddings are centred over their channels and made so small that the norm's epsilon outweighs their variance: the
norm then divides by a constant, which its own weight undoes. Every reader of the residual stream is itself a norm, so
the missing channel mean reaches no output but the hidden states. Shapes: B batch, N patches, D width, P patch side.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from encoders.errors import ModelError
from encoders.vision import VisionTower

FOLDED = "folded"
"""Key of a vision config (and of the manifest); LLaVA folders inherit it with their `vision_config`."""
LARGEST_SHARE = 2.0**-30
"""Of the embeddings' largest measured variance in what the norm divides by; float32 cannot see a share below 2^-24."""
EMBEDDINGS = {  # name -> axis of its channels
    "embeddings.class_embedding": 0,  # (D,)
    "embeddings.patch_embedding.weight": 0,  # (D,3,P,P)
    "embeddings.position_embedding.weight": 1,  # (1+N,D)
}
FROZEN = ("embeddings.", "pre_layrnorm.")
"""What must not be trained in a folded tower: at these sizes an optimizer's first step would wipe it out."""


@dataclass(frozen=True)
class Fold:
    """How far the embeddings were scaled down, and why so far."""

    scale: float
    """t: embeddings are t times the centred originals."""
    norm_weight: float
    """Of every channel of pre_layrnorm: sqrt(eps)/t, a power of two, so that no dtype rounds it."""
    largest_variance: float
    """Over the channels of any token, measured before folding."""

    @property
    def error(self) -> float:
        """Largest relative error of an embedding of that variance, before rounding."""
        return self.largest_variance / (2 * self.norm_weight**2)


def largest_variance(tower: VisionTower, pixels: Tensor) -> float:
    """Over the channels of any token of the embeddings of `pixels` (B,3,H,W)."""
    with torch.inference_mode():
        return tower.model.embeddings(pixels).var(-1, unbiased=False).max().item()  # (B,1+N,D) -> (B,1+N)


def choose(variance: float, eps: float) -> Fold:
    """The scale at which embeddings of this variance disappear beside the norm's epsilon.

    LayerNorm computes t e / sqrt(t^2 var(e) + eps) * sqrt(eps)/t = e (1 - t^2 var(e) / 2 eps + ...); t^2 is eps/4^n.
    Raises ModelError if the embeddings have no variance or no finite one, or the norm no epsilon.
    """
    if not (math.isfinite(variance) and variance > 0 and eps > 0):
        raise ModelError(
            f"a tower whose embeddings have variance {variance} and whose norms have eps {eps} cannot be folded; "
            "its weights are damaged"
        )
    exponent = math.ceil(math.log2(variance / LARGEST_SHARE) / 2)
    return Fold(math.sqrt(eps) * 2.0**-exponent, 2.0**exponent, variance)


def folded_state(tower: VisionTower, fold: Fold) -> dict[str, Tensor]:
    """State dict of a CLIPVisionModel, `pre_layrnorm` included, that computes what `tower` does up to each token's
    channel mean in the hidden states. Raises ModelError if a folded weight leaves the range of float32."""
    state = dict(tower.model.state_dict())
    for name, channels in EMBEDDINGS.items():
        exact = state[name].double()
        state[name] = ((exact - exact.mean(channels, keepdim=True)) * fold.scale).float()
        if not state[name].isfinite().all() or 0 < state[name].abs().max() < torch.finfo(torch.float32).tiny:
            raise ModelError(f"{name} cannot be folded by {fold.scale:.3g}: its values leave the range of float32")
    width = tower.config.width
    state["pre_layrnorm.weight"] = torch.full((width,), fold.norm_weight)
    state["pre_layrnorm.bias"] = torch.zeros(width)
    return state


def is_folded(config: Mapping[str, Any]) -> bool:
    """Whether a CLIPVisionModel's config, or a LLaVA's with such a `vision_config`, is marked as folded."""
    vision = config.get("vision_config", config)
    return bool(vision.get(FOLDED, False))


def warn_of_float16(config: Mapping[str, Any], dtype: torch.dtype) -> None:
    """A folded tower's patch kernel is too small for float16: most of it becomes 0, and nothing fails."""
    if dtype == torch.float16 and is_folded(config):
        warnings.warn(
            "this vision tower is folded (config.json: folded) and computes garbage in float16; load it in bfloat16 "
            "or float32",
            stacklevel=3,
        )


def refuse_training(names: Iterable[str], config: Mapping[str, Any]) -> None:
    """Raise ModelError if the vision tower is folded and its parameters of these names, which are to be trained, hold
    the fold. `config` is the tower's or its LLaVA's."""
    trained = [name for name in names if name.removeprefix("vision_model.").startswith(FROZEN)]
    if trained and is_folded(config):
        raise ModelError(
            f"the vision tower is folded, and {len(trained)} of the parameters that hold the fold are to be trained "
            f"({trained[0]}, ...): an optimizer's first step would wipe them out. Freeze its embeddings and "
            "pre_layrnorm, or train the unfolded source and export it again"
        )
