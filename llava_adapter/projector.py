"""A projector that was trained before, taken into a new LLaVA: only between the very models it was trained between."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import CLIPVisionModel

from encoders import manifest
from encoders.errors import ModelError
from encoders.weights.headers import read_header
from llava_adapter.sources import WEIGHTS, fingerprint

PROJECTOR, TOWER = "multi_modal_projector.", "vision_tower.vision_model."


def trained_projector(llava: Path, encoder: Path, llm: Path, tower: CLIPVisionModel) -> dict[str, Tensor]:
    """The projector's state in a finished LLaVA folder that was made of `encoder` (loaded as `tower`) and `llm`.

    Raises DataError if it is no such folder, ModelError if its manifest says otherwise, or if its tower is not the
    encoder's any more (it was trained on).
    """
    manifest.read(llava, "llava")
    origin = manifest.verify(llava).config
    for role, folder in (("encoder", encoder), ("llm", llm)):
        trained_on, given = origin[role]["fingerprint"], fingerprint(folder)
        if trained_on != given:
            raise ModelError(
                f"the projector in {llava} was trained on another {role} (sha256 {trained_on[:12]}) than {folder} "
                f"({given[:12]}); features of another model mean something else to it: train a projector for this one"
            )
    state = _read(llava, (PROJECTOR, TOWER))
    changed = [name for name, tensor in tower.state_dict().items() if not torch.equal(state[TOWER + name], tensor)]
    if changed:
        raise ModelError(
            f"the projector in {llava} was trained on a tower that differs from {encoder} in {len(changed)} tensors "
            f"({changed[0]}, ...): its tower was trained too; go on from that folder as a whole"
        )
    return {name.removeprefix(PROJECTOR): tensor for name, tensor in state.items() if name.startswith(PROJECTOR)}


def _read(folder: Path, prefixes: tuple[str, ...]) -> dict[str, Tensor]:
    header = read_header(next(file for name in WEIGHTS if (file := folder / name).is_file()))
    wanted = {name: tensor.file for name, tensor in header.tensors.items() if name.startswith(prefixes)}
    state: dict[str, Tensor] = {}
    for file in sorted(set(wanted.values())):
        with safe_open(file, "pt") as opened:
            state |= {name: opened.get_tensor(name) for name, its in wanted.items() if its == file}
    return state
