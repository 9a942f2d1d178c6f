"""Strict loading of transformers folders: a wrong key is an error here, not a random weight."""

from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from encoders.errors import ModelError

Model = TypeVar("Model", bound=PreTrainedModel)


def load_strict(model_class: type[Model], folder: Path, dtype: torch.dtype) -> Model:
    """`model_class.from_pretrained`, on the CPU. Raises ModelError if any weight is missing, unexpected or of the wrong
    shape (transformers itself only warns and goes on with random weights), or if the folder cannot be read."""
    try:
        loaded: Any = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"{folder} cannot be loaded as {model_class.__name__}: {error}") from error
    model, info = loaded
    wrong = {problem: sorted(map(str, names)) for problem, names in info.items() if names}
    if wrong:
        shown = "; ".join(f"{problem}: {', '.join(names[:3])} ({len(names)})" for problem, names in wrong.items())
        raise ModelError(
            f"{folder}: its weights are not those of the {model_class.__name__} its config states: {shown}"
        )
    return model
