"""transformers itself, run from the source's own folder: what our reading of a CLIP folder has to repeat.

Shapes: B batch, N patches, D width, E joint embedding, L text slots, S image size.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from encoders.errors import ModelError
from encoders.export import image_head
from encoders.sources.hf import read_json
from encoders.weights.files import inside


def pixels(folder: Path, picture: Tensor) -> Tensor:
    """A uint8 picture (3,H,W) -> normalised pixels (1,3,S,S), by the folder's own image processor."""
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder, backend="torchvision", local_files_only=True)
    made: Tensor = processor(picture, return_tensors="pt")["pixel_values"]
    return made


def text_embeddings(folder: Path, ids: Tensor) -> Tensor:
    """The text tower's embeddings (B,E), not normalised, of ids (B,L), by transformers from the folder itself."""
    from transformers import CLIPModel

    model = _load(CLIPModel, folder, "vision_model.")
    with torch.inference_mode():
        embeddings: Tensor = model.text_projection(model.text_model(input_ids=ids).pooler_output)
        return embeddings


def image_outputs(folder: Path, has_projection: bool, pixels: Tensor) -> dict[str, Tensor]:
    """The image tower's outputs for normalised pixels (B,3,H,W), by transformers from the folder itself."""
    from transformers import CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection

    model_class: Any = CLIPVisionModelWithProjection if has_projection else CLIPVisionModel
    if read_json(folder, "config.json")["model_type"] == "clip" and has_projection:
        model_class = CLIPModel
    model = _load(model_class, folder, "text_")
    tower = model.vision_model if has_projection else model
    with torch.inference_mode():
        output = tower(pixel_values=pixels, output_hidden_states=True)
        outputs = {
            "hidden_states[-2]": output.hidden_states[-2],
            "last_hidden_state": output.last_hidden_state,
            "pooler_output": output.pooler_output,
        }
        if has_projection:
            outputs["image_embeds"] = model.visual_projection(output.pooler_output)
        elif inside(folder, image_head.FACTS_FILE).is_file():
            outputs["image_embeds"] = image_head.image_embedding(folder, model, output)
        return outputs


def _load(model_class: Any, folder: Path, unused: str) -> Any:
    """In float32; what begins with `unused` need not be there. Raises ModelError if anything else is amiss."""
    model, info = model_class.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
    )
    lost = [*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])]
    if lost := sorted(name for name in lost if not name.startswith((unused, "logit_scale"))):
        raise ModelError(f"{folder}: transformers misses {', '.join(lost[:3])} in the weights")
    return model.eval()
