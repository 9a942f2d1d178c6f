"""Towers made of weights that were read elsewhere: built empty, then given their tensors, so nothing is held twice.

Shapes: N patches, D width.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.dual_encoder import MAX_LOGIT_SCALE, DualEncoder
from encoders.errors import ModelError
from encoders.vision import VisionTower, sincos2d_table

State = Mapping[str, Tensor]
TABLE_ROUNDING = 5e-3  # of sines stored in bfloat16


def build_vision(state: State, config: VisionConfig, where: Path) -> VisionTower:
    """The image tower of a state dict. Without `projection.weight` its projection is nn.Identity.

    Raises ModelError if state dict and config disagree.
    """
    projection = state.get("projection.weight")
    with torch.device("meta"):
        tower = VisionTower(config, config.width if projection is None else len(projection))
    if projection is None:
        tower.add_module("projection", nn.Identity())
    _assign(tower, state, where)
    _fill_buffers(tower)
    return tower.eval()


def build_towers(
    vision: VisionTower, text: tuple[State, TextConfig], logit_scale: Tensor, preprocess: PreprocessConfig, where: Path
) -> DualEncoder:
    """Both towers with their temperature. Raises ModelError if the text state dict and its config disagree."""
    state, text_config = text
    config = EncoderConfig(
        embed_dim=len(state["projection.weight"]),
        vision=vision.config,
        text=text_config,
        preprocess=preprocess,
        clamp_logit_scale=logit_scale.item() <= MAX_LOGIT_SCALE + 1e-3,  # some were trained without that bound
    )
    with torch.device("meta"):
        model = DualEncoder(config)
    model.vision = vision
    _assign(model.text, state, where)
    model.logit_scale = nn.Parameter(logit_scale.reshape(()))
    for name, values in {"mean": preprocess.mean, "std": preprocess.std}.items():
        model.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
    return model.eval()


def check_table(shape: tuple[int, ...], config: VisionConfig, where: Path) -> None:
    """Raise ModelError if a position table is not that of the config's image size."""
    rows = 1 + config.grid**2
    if shape != (rows, config.width):
        raise ModelError(
            f"{where}: its position table is {list(shape)}, but image_size {config.image_size}, patch_size "
            f"{config.patch_size} and width {config.width} need {[rows, config.width]}; give the config that the "
            "weights were trained with and change the resolution afterwards (export-encoder --image-size)"
        )


def is_sincos2d(table: Tensor, config: VisionConfig) -> bool:
    """Whether a table (1+N,D) is the fixed one of the CLIPS and CLIPA towers, which is regenerated at a new size."""
    if config.width % 4:
        return False
    return torch.allclose(table, sincos2d_table(config.grid, config.width), rtol=0, atol=TABLE_ROUNDING)


def _assign(module: nn.Module, state: State, where: Path) -> None:
    try:
        module.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise ModelError(f"{where}: config and weights disagree: {error}") from error


def _fill_buffers(tower: VisionTower) -> None:
    """The position ids, which no file holds."""
    embeddings = tower.model.embeddings
    ids = torch.arange(len(tower.position_table)).expand(1, -1)
    embeddings.register_buffer("position_ids", ids, persistent=False)
