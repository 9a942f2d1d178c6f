"""Strict loading of transformers folders: a wrong key is an error here, not a random weight, and nothing is loaded that
the folder does not hold."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from encoders.errors import ModelError
from encoders.export.fold import warn_of_float16

ATTENTIONS = (None, "eager", "sdpa")
"""What a config may ask for; others make transformers fetch a compiled kernel from the Hub."""
ADAPTER = "adapter_config.json"


def load_strict(model_class: Any, folder: Path, dtype: torch.dtype) -> Any:
    """`model_class.from_pretrained` that accepts only a folder of that type with exactly its weights, on the CPU.

    Raises ModelError naming the missing, unexpected or wrongly shaped keys: by itself it would fill them at random.
    Warns of a folded vision tower in float16.
    """
    config = read_config(folder, model_class.config_class.model_type)
    refuse_what_else_loads(folder, config)
    if not any((folder / name).is_file() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise ModelError(f"{folder} holds no model.safetensors (or its index); save the model as safetensors first")
    model, info = model_class.from_pretrained(
        folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True
    )
    wrong = [
        f"{key}: saved as {list(saved)}, config asks {list(asked)}" for key, saved, asked in info["mismatched_keys"]
    ]
    warn_of_float16(config, dtype)
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "of another shape": wrong}
    found = [f"{len(keys)} {what} ({'; '.join(sorted(keys)[:3])})" for what, keys in problems.items() if keys]
    if found:
        raise ModelError(f"{folder}: config.json and weights disagree: {', '.join(found)}; write the folder again")
    return model


def refuse_what_else_loads(folder: Path, config: Any) -> None:
    """Raise ModelError for what makes `from_pretrained` load more, or other, than the weights beside `config`."""
    if (folder / ADAPTER).exists():
        raise ModelError(
            f"{folder} holds {ADAPTER} beside config.json: transformers would load that adapter, whatever it names, "
            "on top of the weights; merge it into them, or move it out of the folder"
        )
    for key, value in _entries(config):
        if key == "quantization_config" and value is not None:
            raise ModelError(
                f"{folder / 'config.json'} has a quantization_config: its weights are packed for a kernel that has to "
                "be fetched or installed, and neither train nor compare here; use the model as it was before "
                "quantisation"
            )
        if key.endswith("attn_implementation"):
            asked = list(value.values()) if isinstance(value, dict) else [value]
            if odd := [name for name in asked if name not in ATTENTIONS]:
                raise ModelError(
                    f"{folder / 'config.json'} asks for {key} {odd[0]!r}, code that transformers may fetch from the "
                    f"Hub; remove the entry: {' and '.join(name for name in ATTENTIONS if name)} need none"
                )


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Every key of a config and of what is nested in it."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield key, value
            yield from _entries(value)


def read_config(folder: Path, model_type: str) -> dict[str, Any]:
    """A model folder's config.json. Raises ModelError if there is none, or if it is of another `model_type`."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder} has no config.json: not a model folder")
    try:
        config = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{file} must hold an object of keys and values")
    if config.get("model_type") != model_type:
        raise ModelError(
            f"{file}: model_type is {config.get('model_type')!r}, needed is {model_type!r}"
            + ("; run export-encoder on it first" if model_type == "clip_vision_model" else "")
        )
    return config
