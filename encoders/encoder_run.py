"""The files of a finished encoder run: encoder.json, model.safetensors, tokenizer.json. Written by training, read by
resolution fine-tuning, export and evaluation."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from encoders import manifest
from encoders.config import EncoderConfig
from encoders.data.tokenizers import FILE as TOKENIZER_FILE
from encoders.data.tokenizers import CaptionTokenizer
from encoders.dual_encoder import DualEncoder
from encoders.errors import ModelError
from encoders.objective import Objective
from encoders.objectives import build

CONFIG_FILE, WEIGHTS_FILE = "encoder.json", "model.safetensors"
FILES = (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE)


def save(folder: Path, model: DualEncoder, tokenizer: CaptionTokenizer) -> None:
    """Write the three files; the caller seals the run's manifest."""
    manifest.write_json(folder / CONFIG_FILE, model.config.to_dict())
    tokenizer.save(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE, metadata={"format": "pt"})


def load(folder: Path) -> tuple[Objective, CaptionTokenizer]:
    """The trained model in float32 on the CPU, with its tokenizer.

    Raises DataError if the run did not finish or is not an encoder run, ModelError if config and weights disagree.
    """
    manifest.read(folder, "encoder-run")
    model = build(EncoderConfig.read(folder / CONFIG_FILE))
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS_FILE} cannot be read ({error}); train the run again") from error
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ModelError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree: {error}") from error
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise ModelError(f"{folder / WEIGHTS_FILE}: tensor {name} is not finite; do not use this run")
    return model.eval(), CaptionTokenizer.read(folder, model.config.text.kind)
