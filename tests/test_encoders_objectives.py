"""Objectives against their equations, written out here from the towers' features in float64."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from objective_batches import BERT, CAPTIONER, CLIP, CONFIGS, VISION, part, random_batch
from torch import Tensor

from encoders.config import ClipOptions, ClipsOptions, DreamlipOptions, EncoderConfig, MixOptions
from encoders.data.shards import BadSample, Sample
from encoders.data.tokenizers import CaptionTokenizer
from encoders.losses import grouped_patches
from encoders.objective import Objective
from encoders.objectives import OBJECTIVES, build
from train.pair_task import PairTask


def info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * image @ text.T
    places = torch.arange(len(image))
    return (F.cross_entropy(logits, places) + F.cross_entropy(logits.T, places)) / 2


def made(config: EncoderConfig, name: str) -> tuple[Objective, dict[str, Any], Tensor, Tensor, Tensor]:
    """Model, batch, patch tokens, image features and temperature."""
    torch.manual_seed(0)
    model = build(config).double()
    batch = random_batch(name, 5)
    patches, image = model.vision(model.normalise(batch["images"]))
    return model, batch, patches, F.normalize(image, dim=-1), model.logit_scale.exp()


def embedded(model: Objective, ids: Tensor, lengths: list[int]) -> Tensor:
    return F.normalize(model.text(ids, lengths), dim=-1)


@pytest.mark.parametrize("texts", ["both", "web", "synthetic"])
def test_clips_is_alpha_contrast_plus_beta_captioning(texts: str) -> None:
    config = replace(CONFIGS["clips"], clips=ClipsOptions(texts=texts, alpha=0.7, beta=1.3))
    model, batch, patches, image, scale = made(config, "clips")
    contrasted = {"both": ("web", "piece"), "web": ("web",), "synthetic": ("piece",)}[texts]
    losses = [info_nce(image, embedded(model, batch[f"{n}_ids"], batch[f"{n}_lengths"]), scale) for n in contrasted]
    web = model.text.with_states(batch["web_ids"], batch["web_lengths"])
    # One picture at a time; patch tokens and text states are those before the final norms.
    captions = sum(
        model.captioner(
            patches[i : i + 1],
            web._replace(states=web.states[i : i + 1], keep=web.keep[i : i + 1]),
            batch["targets"][i : i + 1],
        )
        for i in range(5)
    )
    expected = 0.7 * sum(losses) / len(losses) + 1.3 * captions / (batch["targets"] != -100).sum()
    torch.testing.assert_close(model(batch)["loss"], expected, rtol=0, atol=1e-10)


def test_captioner_reads_patch_tokens_before_the_final_norm() -> None:
    model, batch, patches, _, _ = made(CONFIGS["clips"], "clips")
    states = model.vision.model(model.normalise(batch["images"]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(patches, states[:, 1:])


@pytest.mark.parametrize("raw", ["always", "pool"])
@pytest.mark.parametrize("negatives", ["image", "batch"])
@pytest.mark.parametrize("own", [True, False])
def test_dreamlip_is_multi_positive_plus_grouping_of_the_drawn_texts(raw: str, negatives: str, own: bool) -> None:
    options = DreamlipOptions(k=3, raw=raw, grouping_weight=0.6, grouping_negatives=negatives, own_temperature=own)
    model, batch, patches, image, scale = made(replace(CONFIGS["dreamlip"], dreamlip=options), "dreamlip")
    texts = embedded(model, batch["text_ids"].flatten(0, 1), batch["text_lengths"]).view(5, 4, 16)
    contrast = sum(info_nce(image, texts[:, k], scale) for k in range(4)) / 4
    drawn = texts[:, 1:] if raw == "always" else texts
    normed = model.vision.model.post_layernorm(patches) @ model.vision.projection.weight.T
    groups = grouped_patches(F.normalize(normed, dim=-1), drawn, "minmax", 0.0)
    if own:
        with torch.no_grad():
            model.grouping_scale.fill_(1.5)
        scale = model.grouping_scale.exp()
    if negatives == "image":
        grouping = sum(info_nce(groups[i], drawn[i], scale) for i in range(5)) / 5
    else:
        grouping = info_nce(groups.flatten(0, 1), drawn.flatten(0, 1), scale)
    torch.testing.assert_close(model(batch)["loss"], contrast + 0.6 * grouping, rtol=0, atol=1e-10)


def test_coca_is_contrast_plus_next_token_prediction() -> None:
    config = replace(CONFIGS["coca"], mix=MixOptions(caption_weight=1.7))
    model, batch, patches, image, scale = made(config, "coca")
    text = model.text.with_states(batch["text_ids"], batch["text_lengths"])
    captions, count = torch.zeros((), dtype=torch.float64), 0
    for i, length in enumerate(batch["text_lengths"]):
        following = batch["text_ids"][i : i + 1, 1:length]
        captions = captions + model.captioner(patches[i : i + 1], text.states[i : i + 1, : length - 1], following)
        count += length - 1
    expected = info_nce(image, F.normalize(text.pooled, dim=-1), scale) + 1.7 * captions / count
    torch.testing.assert_close(model(batch)["loss"], expected, rtol=0, atol=1e-10)


SAMPLE = Sample("k", "s.tar", b"", "red web", {"a": "A red square."}, {"a": "First red one. Then a blue one."})
TOKENIZER = CaptionTokenizer.train([SAMPLE.web, *SAMPLE.short.values(), *SAMPLE.long.values()], 90, "bert")


def drawn(config: EncoderConfig, sample: Sample, seed: int = 0) -> dict[str, Any]:
    texts = OBJECTIVES[config.objective].texts(sample, TOKENIZER, config, np.random.default_rng(seed))
    return {
        name: [TOKENIZER.decode(row) for row in ids] if isinstance(ids[0], list) else TOKENIZER.decode(ids)
        for name, ids in texts.items()
    }


def test_texts_of_each_objective() -> None:
    text = replace(BERT, vocab_size=90, length=16)
    base = EncoderConfig(embed_dim=16, vision=VISION, text=text)
    for caption, expected in (
        ("web", "red web"),
        ("short", "a red square."),
        ("long", "first red one. then a blue one."),
    ):
        assert drawn(replace(base, clip=ClipOptions(caption)), SAMPLE) == {"text_ids": expected}
    mix = replace(base, objective="clipa", mix=MixOptions(synthetic_share=0.2))
    share = np.mean([drawn(mix, SAMPLE, seed)["text_ids"] != "red web" for seed in range(400)])
    assert 0.14 < share < 0.26
    clips = replace(base, objective="clips", captioner=replace(CAPTIONER, tokens=20))
    pieces = {drawn(clips, SAMPLE, seed)["piece_ids"] for seed in range(20)}
    assert pieces == {"first red one", "then a blue one"}
    assert drawn(clips, SAMPLE)["targets"] == "first red one. then a blue one."
    wordless = drawn(clips, replace(SAMPLE, long={"a": "..."}))
    assert wordless == {"web_ids": "red web", "piece_ids": "red web", "targets": "red web"}
    dreamlip = replace(base, objective="dreamlip", dreamlip=DreamlipOptions(k=3))
    texts = drawn(dreamlip, SAMPLE)["text_ids"]
    assert texts[0] == "red web"
    assert sorted(texts[1:]) == ["a red square", "first red one", "then a blue one"]


def test_a_caption_that_is_needed_and_missing_is_named() -> None:
    text = replace(BERT, vocab_size=90, length=16)
    base = EncoderConfig(embed_dim=16, vision=VISION, text=text)
    without = replace(SAMPLE, short={}, long={})
    assert drawn(base, without) == {"text_ids": "red web"}  # who does not need them does not mind
    for config in (
        replace(base, clip=ClipOptions("short")),
        replace(base, objective="clips", captioner=CAPTIONER),
        replace(base, objective="dreamlip"),
    ):
        with pytest.raises(BadSample, match=r"s\.tar: sample 'k': no (short|long) caption"):
            drawn(config, without)


def test_temperature_is_held_at_a_hundredth_unless_told_otherwise() -> None:
    for clamp, expected in ((True, 100.0), (False, torch.tensor(6.0).exp().item())):
        model = build(EncoderConfig(embed_dim=16, vision=VISION, text=CLIP, clamp_logit_scale=clamp))
        with torch.no_grad():
            model.logit_scale.fill_(6.0)
        assert model.scales()["logit_scale"].item() == pytest.approx(expected, rel=1e-6)


def test_several_micro_batches_are_one_contrastive_batch() -> None:
    # Not accelerate's own: its state, precision included, would stay for the tests that follow.
    accelerator: Any = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=nullcontext,
        no_sync=lambda module: nullcontext(),
        backward=lambda loss: loss.backward(),
    )
    gradients = []
    for parts in (1, 2):
        torch.manual_seed(0)
        model = build(CONFIGS["clips"]).double()
        batch = random_batch("clips", 6)
        micro_batches = [part(batch, slice(i * 6 // parts, (i + 1) * 6 // parts)) for i in range(parts)]
        PairTask.step(SimpleNamespace(model=model), model, micro_batches, accelerator)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_attention_starts_as_in_openai_clip() -> None:
    torch.manual_seed(0)
    wide = replace(VISION, width=256, heads=4, mlp_width=512, layers=3)
    model = build(EncoderConfig(embed_dim=16, vision=wide, text=replace(CLIP, width=256, heads=4, layers=3)))
    attention = model.vision.model.encoder.layers[1].self_attn
    into, out = 256**-0.5, 256**-0.5 * 6**-0.5
    for weight, std in (
        (attention.q_proj.weight, into),
        (attention.v_proj.weight, into),
        (attention.out_proj.weight, out),
        (model.text.blocks[1].qkv.weight, into),
        (model.text.blocks[1].out.weight, out),
    ):
        assert weight.std().item() == pytest.approx(std, rel=0.03)
