"""Towers: what is trained is stock CLIPVisionModel; position tables resize as open_clip resizes them."""

import math

import pytest
import torch
from open_clip.model import resize_pos_embed

from encoders.config import EncoderConfig, TextConfig, VisionConfig
from encoders.errors import UsageError
from encoders.objectives import build
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


def test_text_is_pooled_at_the_last_position_and_sees_both_ways() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(
        embed_dim=16, vision=TINY, text=TextConfig(vocab_size=30, length=6, width=32, layers=1, heads=2)
    )
    text = build(config).text
    ids = torch.randint(5, 30, (2, 6))
    states, pooled = text(ids)
    torch.testing.assert_close(pooled, text.projection(text.norm(states[:, -1])))
    changed = ids.clone()
    changed[:, 4] = 3
    assert not torch.allclose(text(changed)[0][:, 0], states[:, 0])  # an early position sees a late one


def test_config_round_trip(tmp_path) -> None:
    import json

    config = EncoderConfig(embed_dim=16, vision=TINY)
    (tmp_path / "encoder.json").write_text(json.dumps(config.to_dict()))
    assert EncoderConfig.read(tmp_path / "encoder.json") == config
