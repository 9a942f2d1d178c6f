"""What an export could get wrong, one mistake at a time: each is caught by the certificate or by strict loading."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_runs import CLIPS, write_run
from safetensors.torch import load_file, save_file
from torch import Tensor

from encoders import manifest
from encoders.errors import ModelError, ParityError
from encoders.export import parity
from encoders.export.command import export
from encoders.export.parity import Expected, certify
from encoders.sources.source import open_source

State = dict[str, Tensor]
Mistake = tuple[Callable[[Path], None], str]  # what it does to a folder, and what the refusal says
LAYER = "vision_model.encoder.layers"
TABLE = "vision_model.embeddings.position_embedding.weight"
KERNEL = "vision_model.embeddings.patch_embedding.weight"
BEFORE = "vision_model.pre_layrnorm"


def config(**changes: Any) -> Mistake:
    return lambda folder: _edit_json(folder / "config.json", changes), f"config.json: {next(iter(changes), '')} is"


def pictures(**changes: Any) -> Mistake:
    return lambda folder: _edit_json(folder / "preprocessor_config.json", changes), "makes pixels"


def pooling(**changes: Any) -> Mistake:
    def change(folder: Path) -> None:
        facts = json.loads((folder / "encoder.json").read_text())
        manifest.write_json(folder / "encoder.json", facts | {"vision": facts["vision"] | changes})

    return change, "at image_embeds"


def weights(
    change: Callable[[State], object], says: str = "at hidden_states[-2]", file: str = "model.safetensors"
) -> Mistake:
    def apply(folder: Path) -> None:
        state = load_file(folder / file)
        changed = change(state)
        state = changed if isinstance(changed, dict) else state
        save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / file, metadata={"format": "pt"})

    return apply, says


def _edit_json(file: Path, changes: dict[str, Any]) -> None:
    manifest.write_json(file, json.loads(file.read_text()) | changes)


def swap(a: str, b: str) -> Callable[[State], None]:
    def exchange(state: State) -> None:
        for kind in ("weight", "bias"):
            x, y = f"{LAYER}.{a}.{kind}", f"{LAYER}.{b}.{kind}"
            state[x], state[y] = state[y], state[x]

    return exchange


def split_by_head(state: State) -> None:
    """The fused projection read as (heads, q k v, d) where it is (q k v, heads, d)."""
    for kind in ("weight", "bias"):
        names = [f"{LAYER}.0.self_attn.{x}_proj.{kind}" for x in "qkv"]
        joined = torch.cat([state[name] for name in names])
        parts = joined.unflatten(0, (2, 3, 16)).transpose(0, 1).flatten(1, 2)
        state.update(zip(names, parts, strict=True))


def rows(order: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    """Another order of the patches' positions, given as a grid (6,6,D)."""

    def reorder(state: State) -> None:
        table = state[TABLE]
        state[TABLE] = torch.cat([table[:1], order(table[1:].unflatten(0, (6, 6))).flatten(0, 1)])

    return reorder


def norm_lost(name: str) -> Callable[[State], None]:
    return lambda state: state.update({f"{name}.weight": torch.ones(32), f"{name}.bias": torch.zeros(32)})


def dropped(name: str) -> Callable[[State], Tensor]:
    return lambda state: state.pop(name)


def scaled(name: str, factor: float) -> Callable[[State], None]:
    return lambda state: state.update({name: state[name] * factor})


def one_nan(state: State) -> None:
    state[f"{LAYER}.1.mlp.fc1.bias"][3] = torch.nan


def less_folded(state: State) -> None:
    for name in (TABLE, KERNEL, "vision_model.embeddings.class_embedding"):
        state[name] = state[name] * 2.0**12
    state[f"{BEFORE}.weight"] = state[f"{BEFORE}.weight"] * 2.0**-12


OPENAI_MEAN, OPENAI_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
MISTAKES: dict[str, Mistake] = {
    "quick_gelu for gelu": config(hidden_act="quick_gelu"),
    "gelu's tanh form for gelu": config(hidden_act="gelu_pytorch_tanh"),
    "eps 1e-5 for 1e-6": config(layer_norm_eps=1e-5),
    "number of heads": config(num_attention_heads=4),
    "a smaller image_size on these weights": config(image_size=40),
    "patch size": config(patch_size=12),
    "one layer fewer": config(num_hidden_layers=2),
    "one layer more": config(num_hidden_layers=4),
    "width of the MLP": config(intermediate_size=128),
    "another model type": config(model_type="siglip_vision_model"),
    "half of the precision": config(dtype="float16", torch_dtype="float16"),
    "query and key exchanged": weights(swap("0.self_attn.q_proj", "0.self_attn.k_proj")),
    "query and value exchanged": weights(swap("1.self_attn.q_proj", "1.self_attn.v_proj")),
    "fused projection split by heads": weights(split_by_head),
    "output projection transposed": weights(
        lambda s: s.update({(k := f"{LAYER}.2.self_attn.out_proj.weight"): s[k].T}), "at last_hidden_state"
    ),
    "patch kernel transposed": weights(lambda s: s.update({KERNEL: s[KERNEL].mT})),
    "patch kernel for BGR": weights(lambda s: s.update({KERNEL: s[KERNEL].flip(1)})),
    "norm before the blocks lost": weights(norm_lost(BEFORE)),
    "norm before the blocks missing": weights(dropped(f"{BEFORE}.weight"), "1 missing (pre_layrnorm.weight)"),
    "final norm lost": weights(norm_lost("vision_model.post_layernorm"), "at pooler_output"),
    "norms of a block exchanged": weights(swap("1.layer_norm1", "1.layer_norm2")),
    "blocks in another order": weights(swap("0.mlp.fc1", "1.mlp.fc1")),
    "a bias left out": weights(lambda s: s.update({f"{LAYER}.1.mlp.fc2.bias": torch.zeros(32)})),
    "grid by columns": weights(rows(lambda grid: grid.transpose(0, 1))),
    "grid upside down": weights(rows(lambda grid: grid.flip(0))),
    "class position last": weights(lambda s: s.update({TABLE: s[TABLE].roll(-1, 0)})),
    "class embedding lost": weights(lambda s: s["vision_model.embeddings.class_embedding"].zero_()),
    "weights rounded to bfloat16": weights(lambda s: {name: value.bfloat16().float() for name, value in s.items()}),
    "names without their prefix": weights(
        lambda s: {k.removeprefix("vision_model."): v for k, v in s.items()}, "must be called vision_model.embeddings"
    ),
    "names of another library": weights(
        lambda s: {k.replace("vision_model", "visual"): v for k, v in s.items()}, "must be called vision_model.visual"
    ),
    "a tensor that is not finite": weights(one_nan, "'max_abs_error': nan"),
    "OpenAI's mean and std": pictures(image_mean=OPENAI_MEAN, image_std=OPENAI_STD),
    "mean and std exchanged": pictures(image_mean=[0.2, 0.3, 0.25], image_std=[0.4, 0.5, 0.6]),
    "bilinear for bicubic": pictures(resample=2),
    "squash for crop": pictures(size={"height": 48, "width": 48}),
    "pixels not divided by 255": pictures(do_rescale=False),
    "pixels divided by 254": pictures(rescale_factor=1 / 254),
    "pixels not normalised": pictures(do_normalize=False),
    "another crop": pictures(crop_size={"height": 40, "width": 40}),
    "another pool": pooling(pool="mean"),
    "projection of other numbers": weights(
        lambda s: s["visual_projection.weight"].neg_(), "at image_embeds", "image_projection.safetensors"
    ),
    "projection transposed": weights(
        lambda s: {k: v.T for k, v in s.items()}, "takes width 16", "image_projection.safetensors"
    ),
}
FOLD_MISTAKES: dict[str, Mistake] = {
    "norm of the fold left at one": weights(norm_lost(BEFORE)),
    "eps the fold was not made for": config(layer_norm_eps=1e-5),
    "embeddings not small enough": weights(less_folded),
    "embeddings scaled, norm not": weights(scaled(KERNEL, 0.5)),
    "fold not marked": config(folded=False),
    "norm before the pool for after": pooling(norm_after_pool=False),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Expected, Path]]:
    """One encoder with a norm before its blocks and one without: what is expected of their folders, and these."""
    made = {}
    for name, vision in {"plain": {"norm_eps": 1e-6}, "folded": CLIPS}.items():
        place = tmp_path_factory.mktemp(name)
        run = write_run(place / "run", **vision)
        export(run, place / "encoder")
        made[name] = parity.expect(open_source(str(run))), place / "encoder"
    return made


CONTROLS: dict[str, Mistake] = {
    "config": config(),
    "pictures": pictures(),
    "pooling": pooling(),
    "weights": weights(lambda s: None),
    "projection": weights(lambda s: None, file="image_projection.safetensors"),
}
"""Each way of editing, changing nothing: what is caught below is the mistake and not the edit."""


@pytest.mark.parametrize("kind", ["plain", "folded"])
def test_an_edit_that_changes_nothing_passes(
    exported: dict[str, tuple[Expected, Path]], tmp_path: Path, kind: str
) -> None:
    expected, original = exported[kind]
    shutil.copytree(original, tmp_path / "encoder")
    for edit, _ in CONTROLS.values():
        edit(tmp_path / "encoder")
    assert certify(expected, tmp_path / "encoder")["keys"] == {"missing": 0, "unexpected": 0}


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [*(("plain", name) for name in MISTAKES), *(("folded", name) for name in FOLD_MISTAKES)],
)
def test_mistake_is_caught(exported: dict[str, tuple[Expected, Path]], tmp_path: Path, kind: str, mistake: str) -> None:
    expected, original = exported[kind]
    folder = tmp_path / "encoder"
    shutil.copytree(original, folder)
    make, says = (MISTAKES if kind == "plain" else FOLD_MISTAKES)[mistake]
    make(folder)
    with pytest.raises((ParityError, ModelError), match=re.escape(says)):
        certify(expected, folder)
