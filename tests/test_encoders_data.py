"""Shards, order, batches and transforms; every kind of bad input has its message."""

import io
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pair_shards import sample, write_shards
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import CLIPImageProcessor

from encoders.config import EncoderConfig, JitterConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.data.pairs import Texts, TrainingPairs, collate, evaluation_set
from encoders.data.samples import BadSample, Sample
from encoders.data.shards import TarSamples
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import _draw_crop, colour_jitter, decode, eval_transform, train_transform
from encoders.errors import DataError

CONFIG = EncoderConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_width=64),
    text=TextConfig(vocab_size=200, length=12, width=32, layers=1, heads=2),
)


def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(["a red square is here", "one blue square, two green"] * 3, 80, "bert")


def texts(sample: Sample, tokenizer: CaptionTokenizer, config: EncoderConfig, rng: np.random.Generator) -> Texts:
    """One text, two texts and a target."""
    return {
        "web_ids": tokenizer.encode(sample.web, config.text.length),
        "piece_ids": [tokenizer.encode(text, config.text.length) for text in (*sample.short.values(), "a red")],
        "targets": tokenizer.encode_target(sample.web, 30),
    }


def pairs(folder: Path, seed: int = 0, config: EncoderConfig = CONFIG) -> TrainingPairs:
    return TrainingPairs(TarSamples(folder), config, tokenizer(), texts, seed)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "shards", 10))
    assert len(samples) == 10
    got = {s.key: s for s in (samples[i] for i in range(10))}
    for index in range(10):
        expected = sample(index, 40)
        found = got[f"{index:05d}"]
        assert (found.image, found.web) == (expected["image"], expected["web"])
        assert (found.short, found.long) == ({"synthetic": expected["short"]}, {"synthetic": expected["long"]})


def test_captions_of_several_captioners_keep_their_names_and_order(tmp_path: Path) -> None:
    long = {"sharegpt": "One. Two.", "llava": "Three."}
    samples = TarSamples(write_shards(tmp_path / "shards", 1, shards=1, long={0: long}))
    assert list(samples[0].long.items()) == list(long.items())
    assert samples[0].short == {"synthetic": "A red square."}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("web", None, "no web caption .found None"),
        ("web", "\t ", "no web caption"),
        ("web", {"llava": "text"}, "no web caption"),
        ("web", "half a pair \ud83d", "unreadable web caption"),
        ("short", 7, "no short caption .found 7"),
        ("short", ["A square."], "no short caption"),
        ("long", {}, "no long caption"),
        ("long", {"llava": "One.", "sharegpt": ""}, "no long caption .found ''"),
        ("long", {"llava": None}, "no long caption"),
    ],
)
def test_unusable_captions_are_bad_samples(name: str, value: Any, message: str, tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "shards", 1, shards=1, **{name: {0: value}}))
    with pytest.raises(BadSample, match=f"00000.tar: sample '00000': {message}"):
        samples[0]


def test_forked_workers_read_what_the_parent_reads(tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "shards", 200, shards=1))
    alone = [samples[i].image for i in range(200)]  # opens the shard before the workers are forked
    loader = DataLoader(samples, batch_size=1, num_workers=4, collate_fn=lambda one: one[0].image)
    assert list(loader) == alone


def test_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        TarSamples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        TarSamples(tmp_path / "empty")


def test_draws_depend_on_seed_epoch_and_sample_only(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 12)
    first, again = pairs(folder), pairs(folder)
    assert first[0, 5]["images"].equal(again[0, 5]["images"])  # `again` has drawn nothing before
    crops = {first[epoch, 2]["images"].numpy().tobytes() for epoch in range(6)}
    assert len(crops) == 6
    sizes = {_crop_box(seed) for seed in range(20)}
    assert len(sizes) > 15


def test_a_crop_that_cannot_be_drawn_is_torchvisions() -> None:
    """Of 3:2 pictures no 95 % have an aspect of at most 4:3: the largest crop that has, not a square."""
    config = PreprocessConfig(crop_area=(0.95, 1.0), crop_aspect=(3 / 4, 4 / 3))
    for height, width in ((320, 480), (480, 320), (300, 301)):
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop(8, scale=(2.0, 2.1), ratio=config.crop_aspect)  # twice the picture always misses
        expected = theirs.make_params([torch.zeros(3, height, width)])
        impossible = SimpleNamespace(crop_area=(2.0, 2.1), crop_aspect=config.crop_aspect)
        assert _draw_crop(height, width, impossible, np.random.default_rng(0)) == tuple(
            expected[name] for name in ("top", "left", "height", "width")
        )
    assert _draw_crop(320, 480, config, np.random.default_rng(0)) == (0, 26, 320, 427)


def _crop_box(seed: int) -> tuple[int, ...]:
    box = _draw_crop(96, 128, PreprocessConfig(), np.random.default_rng(seed))
    assert box[0] + box[2] <= 96
    assert box[1] + box[3] <= 128
    assert 0.39 <= box[2] * box[3] / (96 * 128) <= 1
    return box


def test_bad_samples_are_named_and_their_slots_take_spares(tmp_path: Path) -> None:
    broken = sample(3, 40)["image"][:200]
    folder = write_shards(
        tmp_path / "shards", 40, image={3: broken, 6: b"GIF89a"}, web={4: " "}, long={8: {"llava": 5}}
    )
    data = pairs(folder)
    keys = [data.samples.key(i) for i in range(40)]
    batch = collate([data[0, i] for i in range(40)], CONFIG)
    assert batch["images"].shape == (40, 3, 32, 32)  # the batch stays full
    found = {(report["key"], report["reason"].split(" (")[0]) for report in batch["bad"]}
    assert {("00003", "undecodable image"), ("00006", "undecodable image")} <= found
    assert {("00004", "no web caption"), ("00008", "no long caption")} <= found
    assert all(report["spare"] in keys and report["shard"].endswith(".tar") for report in batch["bad"])
    with pytest.raises(DataError, match="held-out .*00004.*must be whole"):
        evaluation_set(data.samples, CONFIG, tokenizer())


def test_all_bad_is_an_error_not_a_hang(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 4, image=dict.fromkeys(range(4), b"no picture"))
    with pytest.raises(DataError, match="are all bad"):
        pairs(folder)[0, 0]


def test_batches_hold_padded_texts_with_their_lengths(tmp_path: Path) -> None:
    data = pairs(write_shards(tmp_path / "shards", 4, web={1: "red", 2: "a " * 50}))
    examples = [data[0, i] for i in (1, 0, 3)]
    batch = collate(examples, CONFIG)
    assert [key.split("_lengths")[0] for key in batch] == [
        *("images", "web_ids", "web", "piece_ids", "piece", "targets", "sample_ids", "bad")
    ]
    assert batch["web_ids"].shape == (3, 12)
    assert batch["piece_ids"].shape == (3, 2, 12)
    assert batch["images"].dtype == torch.uint8
    for row, example in enumerate(examples):
        web = example["web_ids"]
        assert batch["web_lengths"][row] == len(web)
        assert batch["web_ids"][row].tolist() == [*web[:-1], *[0] * (12 - len(web)), web[-1]]
        for k, piece in enumerate(example["piece_ids"]):  # lengths are image-major, as (B,K) flattens
            assert batch["piece_lengths"][2 * row + k] == len(piece)
            assert batch["piece_ids"][row, k].tolist() == [*piece[:-1], *[0] * (12 - len(piece)), piece[-1]]
        target = example["targets"]
        assert batch["targets"][row].tolist() == target + [-100] * (batch["targets"].shape[1] - len(target))
    assert batch["targets"].shape[1] == max(len(example["targets"]) for example in examples)
    assert isinstance(batch["web_lengths"], list)
    assert batch["sample_ids"] == [1, 0, 3]


def test_evaluation_queries_are_the_first_short_captions(tmp_path: Path) -> None:
    short = {1: {"sharegpt": "A red square is here", "llava": "One."}}
    held_out = evaluation_set(
        TarSamples(write_shards(tmp_path / "shards", 3, shards=1, short=short)), CONFIG, tokenizer()
    )
    assert held_out["captions"] == ["A red square.", "A red square is here", "A blue square."]
    rows = [tokenizer().encode(caption, 12) for caption in held_out["captions"]]
    assert held_out["short_lengths"] == [len(row) for row in rows]
    assert held_out["short_ids"].shape == (3, 12)
    assert held_out["short_ids"][1, : len(rows[1]) - 1].tolist() == rows[1][:-1]
    assert held_out["keys"] == ["00000", "00001", "00002"]


def test_evaluation_pixels_equal_the_exported_processor() -> None:
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(256, size=(50, 70, 3), dtype=np.uint8)).resize((210, 150))
    stream = io.BytesIO()
    picture.save(stream, "JPEG")
    decoded = decode(stream.getvalue())
    assert decoded.permute(1, 2, 0).numpy().tobytes() == np.asarray(Image.open(stream).convert("RGB")).tobytes()
    for mode, resample in (("bilinear", 2), ("bicubic", 3)):
        config = PreprocessConfig(interpolation=mode)
        processor = CLIPImageProcessor(
            size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, resample=resample, do_normalize=False
        )
        theirs = processor(decoded, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(eval_transform(decoded, 64, config) / 255, theirs, rtol=0, atol=1e-6)
    assert train_transform(decoded, 64, PreprocessConfig(), rng).shape == (3, 64, 64)


def picture(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(256, size=(3, 24, 24), dtype=np.uint8))


@pytest.mark.parametrize("seed", range(8))
def test_jitter_equals_torchvisions_for_the_drawn_factors(seed: int) -> None:
    config = JitterConfig(probability=1, brightness=0.3, contrast=0.5, saturation=1.5, hue=0.1, grey_probability=0)
    drawn = np.random.default_rng(seed)
    drawn.random()
    order = drawn.permutation(4)
    factors = [drawn.uniform(low, high) for low, high in ((0.7, 1.3), (0.5, 1.5), (0, 2.5), (-0.1, 0.1))]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    reference = v2.ColorJitter(0.3, 0.5, 1.5, 0.1)
    limits = (reference.brightness, reference.contrast, reference.saturation, reference.hue)
    assert all(low <= factor <= high for factor, (low, high) in zip(factors, limits, strict=True))
    expected = reference.transform(picture(seed), {"fn_idx": order, **dict(zip(names, factors, strict=True))})
    found = colour_jitter(picture(seed), config, np.random.default_rng(seed))
    assert found.dtype == torch.uint8
    assert found.equal(expected)
    grey = colour_jitter(picture(seed), replace(config, grey_probability=1), np.random.default_rng(seed))
    assert grey.equal(v2.Grayscale(3)(expected))


def test_jitter_comes_as_often_as_configured() -> None:
    config = JitterConfig()
    results = [colour_jitter(picture(0), config, np.random.default_rng(seed)) for seed in range(400)]
    grey = sum(bool((result == result[:1]).all()) for result in results)
    same = sum(result.equal(picture(0)) for result in results)
    assert 50 <= grey <= 110  # 20 %, five deviations
    assert 34 <= same <= 94  # 0.2 * 0.8 = 16 %


def test_jitter_is_a_function_of_the_sample_and_off_changes_no_draw(tmp_path: Path) -> None:
    image, off = picture(1), PreprocessConfig()
    ours, crop_only = np.random.default_rng(3), np.random.default_rng(3)
    plain = train_transform(image, 16, off, ours)
    _draw_crop(24, 24, off, crop_only)
    assert ours.random() == crop_only.random()
    never = replace(off, jitter=JitterConfig(probability=0, grey_probability=0))
    assert train_transform(image, 16, never, np.random.default_rng(3)).equal(plain)
    folder = write_shards(tmp_path / "shards", 6)
    jittered = replace(CONFIG, preprocess=replace(off, jitter=JitterConfig(probability=1)))
    one, again, without = pairs(folder, config=jittered), pairs(folder, config=jittered), pairs(folder)
    assert one[2, 4]["images"].equal(again[2, 4]["images"])
    assert not one[2, 4]["images"].equal(one[3, 4]["images"])
    assert not one[2, 4]["images"].equal(without[2, 4]["images"])
