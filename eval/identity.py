"""What was evaluated and what was asked, as fingerprints that do not depend on paths, file layouts or dates."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from encoders.errors import ModelError
from eval.benches.benchmarks import Bench
from eval.benches.staging import Source

VISION_FACTS = ("model_type", "image_size", "patch_size", "hidden_size", "num_hidden_layers", "hidden_act")


def encoder_facts(model: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Of a LLaVA folder's vision encoder: sha256 of its tensors as stored, what it is, and which features are taken.

    `config` is that of the loaded LLaVA, as a dict. The prefix that a library version stores the tower under plays no
    part. Raises ModelError if the folder holds no tower.
    """
    import torch

    from llava_adapter.save import tower_tensors

    stored: dict[str, str] = {}  # name in the tower -> hash of the tensor
    for name, tensor in tower_tensors(model):
        digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        stored[name] = digest.hexdigest()
    if not stored:
        raise ModelError(f"{model} holds no vision_tower.* tensors in *.safetensors; save the model with transformers")
    vision = config["vision_config"]
    return {
        "fingerprint": hashlib.sha256(json.dumps(stored, sort_keys=True).encode()).hexdigest(),
        "vision_config": {fact: vision[fact] for fact in VISION_FACTS if fact in vision},
        "vision_feature_layer": config["vision_feature_layer"],
        "vision_feature_select_strategy": config["vision_feature_select_strategy"],
    }


def data_fingerprint(rows: Sequence[Mapping[str, Any]]) -> str:
    """sha256 of what a benchmark asked: its questions, pictures and targets, whatever files they were read from."""
    asked = [[row[key] for key in ("index", "question_id", "image_id", "prompt", "target")] for row in rows]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def dataset_facts(bench: Bench, sources: Mapping[str, Source], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Where a benchmark's questions came from: repository, config, split, commit ("local": not known), fingerprint."""
    questions = bench.tables[0]
    return {
        "repository": questions.repository,
        "config": questions.config,
        "split": questions.split,
        "revision": sources[questions.repository].revision,
        "fingerprint": data_fingerprint(rows),
    }
