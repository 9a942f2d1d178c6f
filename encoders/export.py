"""`export-encoder RUN OUT`: an encoder run -> a plain `CLIPVisionModel` folder with proof that it computes the same.

Writes config.json, model.safetensors (`vision_model.*` keys, which transformers 4 and 5 both read), the image
processor, parity.json and a model card. The tower is read back from disk and compared before the folder gets its name.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from encoders import manifest
from encoders.errors import ModelError, ParityError, run_command

if TYPE_CHECKING:
    from torch import Tensor

    from encoders.dual_encoder import DualEncoder

MAX_RELATIVE_ERROR = 1e-5
PARITY_IMAGES = 4
LAYERS = ("hidden_states[-2]", "last_hidden_state", "pooler_output")


def cli() -> None:
    """Console entry point."""
    parser = argparse.ArgumentParser(prog="export-encoder", description=__doc__)
    parser.add_argument("source", type=Path, metavar="RUN", help="a finished encoder run (train/pretrain.py)")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an encoder that OUT already holds")
    arguments = parser.parse_args()
    run_command(lambda: export(arguments.source, arguments.out, overwrite=arguments.overwrite))


def export(run: Path, out: Path, overwrite: bool = False) -> None:
    """Write the run's image tower to `out`.

    Raises DataError if `run` is not a finished encoder run, ModelError if its files disagree or its tower has no norm
    before the blocks, UsageError if `out` is
    taken, ParityError if what was written does not compute what was trained.
    """
    manifest.read(run, "encoder-run")
    manifest.refuse_to_clobber(out, "encoder", overwrite)
    from encoders import encoder_run

    model, _ = encoder_run.load(run)
    if not model.config.vision.pre_norm:
        raise ModelError(
            f"{run} has no norm before its blocks (vision.pre_norm: false), which CLIPVisionModel always has; such a "
            "tower cannot be exported yet: train with pre_norm: true what is to go into an MLLM"
        )
    with manifest.create(out, "encoder", model.config.to_dict(), {"run": run}, overwrite) as draft:
        write_folder(model, draft.path)
        parity = certify(model, draft.path)
        manifest.write_json(draft.path / "parity.json", parity)
        (draft.path / "README.md").write_text(model_card(model, parity, manifest.read(run)))
        draft.metrics["parity"] = parity
    worst = max(layer["max_relative_error"] for layer in parity["layers"].values())
    print(f"wrote {out}: CLIPVisionModel at {model.config.vision.image_size} px, parity {worst:.1e} (bound 1e-05)")


def write_folder(model: "DualEncoder", folder: Path) -> None:
    """config.json, model.safetensors and preprocessor_config.json of the image tower."""
    from safetensors.torch import save_file

    tower = model.vision.model
    # Written here and not by save_pretrained: transformers 5 drops the prefix, and 4.x then loads a random tower.
    weights = {f"vision_model.{name}": tensor.detach().float().contiguous() for name, tensor in _portable(tower)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = tower.config.to_dict()
    config |= {"architectures": ["CLIPVisionModel"], "dtype": "float32", "torch_dtype": "float32"}
    for name in ("_attn_implementation", "_name_or_path", "attn_implementation"):
        config.pop(name, None)
    manifest.write_json(folder / "config.json", config)
    manifest.write_json(folder / "preprocessor_config.json", processor_config(model))


def _portable(tower: Any) -> list[tuple[str, "Tensor"]]:
    return [(name.removeprefix("vision_model."), tensor) for name, tensor in tower.state_dict().items()]


def processor_config(model: "DualEncoder") -> dict[str, Any]:
    """CLIPImageProcessor settings that repeat the training model's evaluation transform."""
    preprocess, size = model.config.preprocess, model.config.vision.image_size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": size},
        "resample": {"bilinear": 2, "bicubic": 3}[preprocess.interpolation],
        "do_center_crop": True,
        "crop_size": {"height": size, "width": size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def certify(model: "DualEncoder", folder: Path) -> dict[str, Any]:
    """Compare the exported folder, loaded by transformers, with the training model on fixed images in float32.

    Returns per layer the largest absolute error, the same relative to the largest activation, and the lowest cosine.
    Raises ParityError above the bound, ModelError if a weight is missing, unexpected or of the wrong shape.
    """
    import torch
    from transformers import CLIPVisionModel

    from encoders.pretrained import load_strict

    exported = load_strict(CLIPVisionModel, folder, torch.float32)
    pixels = model.normalise(fixed_images(model.config.vision.image_size))
    with torch.inference_mode():
        ours = _layers(model.vision.model.eval()(pixel_values=pixels, output_hidden_states=True))
        theirs = _layers(exported.eval()(pixel_values=pixels, output_hidden_states=True))
    layers = {name: _difference(ours[name], theirs[name]) for name in LAYERS}
    for name, layer in layers.items():
        if not layer["max_relative_error"] <= MAX_RELATIVE_ERROR:
            raise ParityError(
                f"export differs from the training model at {name}: {layer}, bound {MAX_RELATIVE_ERROR} of the largest "
                "activation; nothing was written"
            )
    bound = {"bound": MAX_RELATIVE_ERROR, "images": PARITY_IMAGES, "dtype": "float32"}
    return {"layers": layers, "keys": {"missing": 0, "unexpected": 0}, **bound}


def fixed_images(size: int) -> "Tensor":
    """Smooth, coloured, noisy pictures, the same for everyone: uint8 (4,3,size,size)."""
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(PARITY_IMAGES, 3, 5, 5, generator=generator)
    smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    noise = 0.05 * torch.randn(PARITY_IMAGES, 3, size, size, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round().to(torch.uint8)


def _layers(output: Any) -> dict[str, "Tensor"]:
    return dict(zip(LAYERS, (output.hidden_states[-2], output.last_hidden_state, output.pooler_output), strict=True))


def _difference(ours: "Tensor", theirs: "Tensor") -> dict[str, float]:
    import torch.nn.functional as F

    error = (ours - theirs).abs().max().item()
    cosine = F.cosine_similarity(ours.double(), theirs.double(), dim=-1).min().item()
    return {"max_abs_error": error, "max_relative_error": error / ours.abs().max().item(), "min_cosine": cosine}


def model_card(model: "DualEncoder", parity: dict[str, Any], run: manifest.Manifest) -> str:
    """README.md of the exported folder: what it is, how to load it, what was measured."""
    vision, config = model.config.vision, model.config
    rows = "\n".join(
        f"| {name} | {layer['max_abs_error']:.2e} | {layer['max_relative_error']:.2e} | {layer['min_cosine']:.8f} |"
        for name, layer in parity["layers"].items()
    )
    retrieval = run.metrics.get("retrieval", {})
    figures = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in sorted(retrieval.items()) if isinstance(value, float)
    )
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags: [clip, vision, vision-encoder, llava, {config.objective}]
---

# {config.objective.upper()} vision encoder, {vision.image_size} px

A `CLIPVisionModel`: {vision.layers} layers of {vision.width}, patch {vision.patch_size}, `{vision.activation}`,
layer norm eps {vision.norm_eps}. Trained with the `{config.objective}` objective.

```python
from transformers import AutoImageProcessor, CLIPVisionModel
tower = CLIPVisionModel.from_pretrained(folder)
processor = AutoImageProcessor.from_pretrained(folder)
patches = tower(**processor(image, return_tensors="pt"), output_hidden_states=True).hidden_states[-2][:, 1:]
```

## Parity with the training model
float32, {parity["images"]} fixed images; refused above {parity["bound"]} of the largest activation.

| layer | max abs error | relative to largest activation | min cosine |
|---|---|---|---|
{rows}

## Held-out retrieval of the encoder run
| metric | value |
|---|---|
{figures}
"""


if __name__ == "__main__":
    cli()
