"""Towers: what is trained is stock CLIPVisionModel; position tables resize as open_clip resizes them."""

import math
from dataclasses import fields, replace
from functools import partial
from typing import get_args

import open_clip
import pytest
import torch
from open_clip.model import resize_pos_embed

from encoders.config import (
    OPTIONS,
    CaptionerConfig,
    ClipsOptions,
    DreamlipOptions,
    EncoderConfig,
    JitterConfig,
    ObjectiveName,
    PreprocessConfig,
    VisionConfig,
)
from encoders.errors import UsageError
from encoders.objectives import OBJECTIVES
from encoders.vision import VisionTower, resize_table, sincos2d_table

TINY = VisionConfig(image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_width=64)


def test_tower_returns_patch_tokens_and_projected_class_token() -> None:
    torch.manual_seed(0)
    tower = VisionTower(TINY, 16)
    pixels = torch.randn(3, 3, 32, 32)
    patches, pooled = tower(pixels)
    hf = tower.model(pixels, output_hidden_states=True)
    assert patches.equal(hf.hidden_states[-1][:, 1:])
    expected = tower.model.post_layernorm(hf.hidden_states[-1][:, 0]) @ tower.projection.weight.T
    torch.testing.assert_close(pooled, expected)


@pytest.mark.parametrize("norm_after_pool", [True, False])
def test_the_papers_tower_has_no_norm_before_its_blocks_and_pools_patches(norm_after_pool: bool) -> None:
    """The CLIPS tower against open_clip's ViT with the flags of the released checkpoints."""
    torch.manual_seed(0)
    config = replace(TINY, pre_norm=False, pool="mean", norm_after_pool=norm_after_pool, norm_eps=1e-6)
    tower = VisionTower(config, 16)
    reference = open_clip.transformer.VisionTransformer(
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2.0,
        output_dim=16,
        no_ln_pre=True,
        pool_type="avg",
        final_ln_after_pool=norm_after_pool,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
    )
    hf = tower.model.state_dict()
    state = {
        "class_embedding": hf["embeddings.class_embedding"],
        "positional_embedding": hf["embeddings.position_embedding.weight"],
        "conv1.weight": hf["embeddings.patch_embedding.weight"],
        "ln_post.weight": hf["post_layernorm.weight"],
        "ln_post.bias": hf["post_layernorm.bias"],
        "proj": tower.projection.weight.T,
    }
    for i in range(2):
        ours, theirs = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
        for kind in ("weight", "bias"):
            parts = [hf[f"{ours}.self_attn.{name}_proj.{kind}"] for name in "qkv"]
            state[f"{theirs}.attn.in_proj_{kind}"] = torch.cat(parts)
            state[f"{theirs}.attn.out_proj.{kind}"] = hf[f"{ours}.self_attn.out_proj.{kind}"]
            state[f"{theirs}.mlp.c_fc.{kind}"] = hf[f"{ours}.mlp.fc1.{kind}"]
            state[f"{theirs}.mlp.c_proj.{kind}"] = hf[f"{ours}.mlp.fc2.{kind}"]
            for n in (1, 2):
                state[f"{theirs}.ln_{n}.{kind}"] = hf[f"{ours}.layer_norm{n}.{kind}"]
    reference.load_state_dict(state)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(tower(pixels)[1], reference(pixels), rtol=1e-5, atol=1e-5)


def test_patches_in_the_joint_space_are_what_the_class_token_would_be() -> None:
    tower = VisionTower(TINY, 16)
    patches, _ = tower(torch.randn(2, 3, 32, 32))
    projected = tower.project_patches(patches)
    torch.testing.assert_close(projected[1, 5], tower.model.post_layernorm(patches[1, 5]) @ tower.projection.weight.T)


def test_resize_equals_open_clip_and_leaves_the_class_position() -> None:
    table = torch.randn(1 + 16, 32)

    class Reference:  # what open_clip's function reads of a model
        class visual:
            grid_size = (6, 6)

    state = {"visual.positional_embedding": table.clone()}
    resize_pos_embed(state, Reference)
    ours = resize_table(table, 6)
    torch.testing.assert_close(ours, state["visual.positional_embedding"])
    assert ours[0].equal(table[0])
    assert resize_table(table, 4).equal(table)


@pytest.mark.parametrize("kind", ["learned", "sincos2d"])
def test_resized_tower_takes_the_new_size_and_only_it(kind: str) -> None:
    config = VisionConfig(**{**vars(TINY), "position_table": kind})
    tower = VisionTower(config, 16)
    before = tower.position_table.detach().clone()
    tower.resize(48)
    assert tower.config.image_size == tower.model.config.image_size == 48
    assert tower(torch.randn(1, 3, 48, 48))[0].shape == (1, 36, 32)
    with pytest.raises(ValueError, match="32"):
        tower(torch.randn(1, 3, 32, 32))
    assert tower.position_table.requires_grad == (kind == "learned")
    expected = resize_table(before, 6) if kind == "learned" else sincos2d_table(6, 32)
    assert tower.position_table.equal(expected)


def test_sincos_table_follows_its_formula() -> None:
    grid, width = 3, 16
    table = sincos2d_table(grid, width)
    assert table[0].abs().sum() == 0
    for y in range(grid):
        for x in range(grid):
            row = table[1 + y * grid + x].tolist()
            omegas = [10000 ** -(i / (width / 4 - 1)) for i in range(width // 4)]
            expected = [
                f(v * o) for v, f in ((x, math.sin), (x, math.cos), (y, math.sin), (y, math.cos)) for o in omegas
            ]
            assert row == pytest.approx(expected, abs=1e-6)


def test_impossible_configs_are_refused_with_the_way_out() -> None:
    with pytest.raises(
        UsageError, match=r"65 is not a multiple of vision\.patch_size 16; the nearest sizes are 64 and 80"
    ):
        VisionConfig(image_size=65)
    with pytest.raises(UsageError, match="needs a captioner"):
        EncoderConfig(objective="clips")
    with pytest.raises(UsageError, match=r"takes no `dreamlip:` section; its own is `mix:`"):
        EncoderConfig(objective="clipa", dreamlip=DreamlipOptions())
    with pytest.raises(UsageError, match=r"needs a causal text tower: text\.kind: clip"):
        EncoderConfig(objective="coca", captioner=CaptionerConfig())
    with pytest.raises(UsageError, match="no caption feeds the pool"):
        DreamlipOptions(short=False, long="never")


def test_config_round_trip(tmp_path) -> None:
    import json

    config = EncoderConfig(
        objective="clips",
        embed_dim=16,
        vision=TINY,
        captioner=CaptionerConfig(),
        clips=ClipsOptions(cut="block_mask", cut_tokens=9),
        preprocess=PreprocessConfig(jitter=JitterConfig(hue=0.0)),
    )
    (tmp_path / "encoder.json").write_text(json.dumps(config.to_dict()))
    assert EncoderConfig.read(tmp_path / "encoder.json") == config


def test_every_objective_is_registered_with_its_options() -> None:
    names = set(get_args(ObjectiveName))
    assert names == set(OPTIONS) == set(OBJECTIVES)
    assert set(OPTIONS.values()) <= {entry.name for entry in fields(EncoderConfig)}
