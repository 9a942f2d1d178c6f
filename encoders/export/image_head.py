"""What turns a CLIPVisionModel's output into the image embedding, as two files beside it: encoder.json says how to
pool, image_projection.safetensors holds the matrix. `pooler_output` is the class token, whatever the encoder pools.

Shapes: B batch, N patches, D width, E joint embedding.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPVisionModel

from encoders.errors import ModelError

FACTS_FILE, PROJECTION_FILE = "encoder.json", "image_projection.safetensors"  # the latter where there is a projection
POOLS = (("class", False), ("mean", False), ("mean", True))  # (pool, norm_after_pool)
PROJECTION = "visual_projection.weight"  # (E,D), CLIPModel's name for it


def read_facts(folder: Path) -> dict[str, Any]:
    """encoder.json of an exported folder. Raises ModelError if it is missing or not what export writes."""
    file = folder / FACTS_FILE
    try:
        facts: dict[str, Any] = json.loads(file.read_text())
        pool, embed_dim = (facts["vision"]["pool"], facts["vision"]["norm_after_pool"]), facts["embed_dim"]
        if pool not in POOLS or not isinstance(embed_dim, int | None):
            raise ValueError(f"pool, norm_after_pool and embed_dim are {(*pool, embed_dim)}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{file} does not describe an exported encoder ({error!r}); export it again") from error
    return facts


def image_embedding(folder: Path, tower: CLIPVisionModel, output: Any) -> Tensor:
    """`output` of the folder's tower -> image embeddings (B,E), not normalised; (B,D) without a projection.

    Raises ModelError if the side files are missing or do not fit the tower.
    """
    facts = read_facts(folder)
    pooled = _pool(facts["vision"], tower, output)
    return pooled if facts["embed_dim"] is None else pooled @ _projection(folder, pooled).T  # (B,D) -> (B,E)


def _pool(vision: dict[str, Any], tower: CLIPVisionModel, output: Any) -> Tensor:
    if vision["pool"] == "class":
        class_token: Tensor = output.pooler_output
        return class_token
    norm, patches = tower.post_layernorm, output.last_hidden_state[:, 1:]  # (B,1+N,D) -> (B,N,D)
    pooled: Tensor = norm(patches.mean(1)) if vision["norm_after_pool"] else norm(patches).mean(1)  # (B,D)
    return pooled


def _projection(folder: Path, pooled: Tensor) -> Tensor:
    file = folder / PROJECTION_FILE
    try:
        projection = load_file(file)[PROJECTION]
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{file} does not hold {PROJECTION} ({error!r}); export the encoder again") from error
    if projection.shape[-1] != pooled.shape[-1]:
        raise ModelError(f"{file} takes width {projection.shape[-1]}, the tower has {pooled.shape[-1]}")
    return projection.to(pooled.dtype)
