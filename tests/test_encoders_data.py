"""Shards, order, captions, tokenizer and transforms; every kind of bad input has its message."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pair_shards import sample, write_shards
from PIL import Image
from torch.utils.data import DataLoader
from transformers import BertTokenizer, CLIPImageProcessor

from encoders.config import EncoderConfig, PreprocessConfig, TextConfig, VisionConfig
from encoders.data.captions import sentences, short_piece
from encoders.data.pairs import Ledger, TrainingPairs, collate, evaluation_set
from encoders.data.shards import StepOrder, TarSamples, split_name
from encoders.data.tokenizers import CaptionTokenizer
from encoders.data.transforms import decode, eval_transform, train_transform
from encoders.errors import DataError, UsageError
from encoders.objectives import Clip

CONFIG = EncoderConfig(
    vision=VisionConfig(image_size=32, patch_size=8, width=32, layers=1, heads=2, mlp_width=64),
    text=TextConfig(vocab_size=200, length=12, width=32, layers=1, heads=2),
)


def tokenizer() -> CaptionTokenizer:
    return CaptionTokenizer.train(["a red square is here", "one blue square, two green"] * 3, 80)


def pairs(folder: Path, seed: int = 0) -> TrainingPairs:
    return TrainingPairs(TarSamples(folder), CONFIG, tokenizer(), Clip.texts, seed)


def test_samples_come_back_as_they_were_written(tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "shards", 10))
    assert len(samples) == 10
    got = {s.key: s for s in (samples[i] for i in range(10))}
    for index in range(10):
        expected = sample(index, 40)
        found = got[f"{index:05d}"]
        assert (found.image, found.web, found.short, found.long) == tuple(expected.values())


def test_forked_workers_read_what_the_parent_reads(tmp_path: Path) -> None:
    samples = TarSamples(write_shards(tmp_path / "shards", 200, shards=1))
    alone = [samples[i].image for i in range(200)]  # opens the shard before the workers are forked
    loader = DataLoader(samples, batch_size=1, num_workers=4, collate_fn=lambda one: one[0].image)
    assert list(loader) == alone


def test_keys_are_split_as_webdataset_splits_them() -> None:
    names = {"./000.jpg": ("000", "jpg"), "v1.0/a.b.JPG": ("v1.0/a", "b.jpg"), "x.json": ("x", "json")}
    assert {name: split_name(name) for name in names} == names


def test_missing_empty_and_truncated_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        TarSamples(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar shard"):
        TarSamples(tmp_path / "empty")
    folder = write_shards(tmp_path / "shards", 10, shards=1)
    whole = (folder / "00000.tar").read_bytes()
    end = len(whole.rstrip(b"\0"))
    for size in (end + 600, end // 2, end // 3, 700, 512):
        (folder / "00000.tar").write_bytes(whole[: size if size < end else end // 512 * 512 + 512])
        with pytest.raises(DataError, match=r"00000\.tar .*(truncated|damaged)"):
            TarSamples(folder)


def test_order_visits_every_sample_once_an_epoch_whatever_the_ranks() -> None:
    one = list(StepOrder(50, 8, 12, seed=3, rank=0, world=1))
    epoch = [i for step in one[:6] for _, i in step]
    assert len(set(epoch)) == 48
    assert [e for e, _ in one[6]] == [1] * 8
    two = [list(StepOrder(50, 8, 12, seed=3, rank=rank, world=2, micro_batches=2)) for rank in range(2)]
    for step in range(12):
        union = {item for rank in two for micro in rank[2 * step : 2 * step + 2] for item in micro}
        assert union == set(one[step])
    late = StepOrder(50, 8, 12, seed=3, rank=0, world=1)
    late.start = 7
    assert list(late) == one[7:]
    assert list(StepOrder(50, 8, 12, seed=4, rank=0, world=1)) != one


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(UsageError, match="fewer than one batch of 64"):
        StepOrder(50, 64, 1, 0, rank=0, world=1)
    with pytest.raises(UsageError, match="does not divide"):
        StepOrder(50, 10, 1, 0, rank=0, world=4)


def test_draws_depend_on_seed_epoch_and_sample_only(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 12)
    first, again = pairs(folder), pairs(folder)
    assert first[0, 5]["images"].equal(again[0, 5]["images"])  # `again` has drawn nothing before
    crops = {first[epoch, 2]["images"].numpy().tobytes() for epoch in range(6)}
    assert len(crops) == 6
    sizes = {_crop_box(seed) for seed in range(20)}
    assert len(sizes) > 15


def _crop_box(seed: int) -> tuple[int, ...]:
    from encoders.data.transforms import _draw_crop

    box = _draw_crop(96, 128, PreprocessConfig(), np.random.default_rng(seed))
    assert box[0] + box[2] <= 96
    assert box[1] + box[3] <= 128
    assert 0.39 <= box[2] * box[3] / (96 * 128) <= 1
    return box


def test_bad_samples_are_counted_named_and_stop_the_run(tmp_path: Path) -> None:
    broken = sample(3, 40)["image"][:200]
    folder = write_shards(tmp_path / "shards", 40, image={3: broken, 6: b"GIF89a"}, web={4: " "})
    data = pairs(folder)
    keys = [entry.key for entry in data.samples.entries]
    batch = collate([data[0, i] for i in range(40)])
    assert batch["images"].shape == (40, 3, 32, 32)  # the batch stays full
    found = {(report["key"], report["reason"].split(" (")[0]) for report in batch["bad"]}
    assert {("00003", "undecodable image"), ("00006", "undecodable image"), ("00004", "no web caption")} <= found
    assert all(report["spare"] in keys and report["shard"].endswith(".tar") for report in batch["bad"])
    ledger = Ledger(max_bad_fraction=0.5)
    ledger.record(batch)
    assert ledger.by_reason()["no web caption"] == sum(r["reason"] == "no web caption" for r in batch["bad"])
    with pytest.raises(DataError, match=r"of 40 samples are bad.*max_bad_fraction 0\.01"):
        Ledger(max_bad_fraction=0.01).record(batch)
    with pytest.raises(DataError, match="held-out .*00004.*must be whole"):
        evaluation_set(data.samples, CONFIG, tokenizer())


def test_all_bad_is_an_error_not_a_hang(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "shards", 4, image=dict.fromkeys(range(4), b"no picture"))
    with pytest.raises(DataError, match="are all bad"):
        pairs(folder)[0, 0]


def test_sentences_and_draws() -> None:
    caption = "A dog runs. It is brown!  The sky\nis blue... "
    assert sentences(caption) == ["A dog runs", "It is brown", "The sky", "is blue"]


def test_short_pieces_are_whole_sentences_until_the_length_is_reached() -> None:
    pieces = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]

    def draw(length: int | None) -> set[tuple[int, ...]]:
        return {tuple(short_piece(pieces, length, np.random.default_rng(seed))) for seed in range(300)}

    assert draw(None) == {tuple(piece) for piece in pieces}
    assert {piece[0] for piece in draw(1)} == {1, 4, 5, 7}
    orders = [[*itertools.chain(*order)] for order in itertools.permutations(pieces)]
    assert draw(4) == {tuple(order[:4]) for order in orders}
    assert draw(99) == {tuple(order) for order in orders}
    assert short_piece([], 5, np.random.default_rng(0)) == []


def test_layout_of_clips_tokens_and_bert_vocabulary(tmp_path: Path) -> None:
    words = ["[PAD]", "[unused1]", "[unused2]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##gy", "runs", ","]
    vocabulary = {word: index for index, word in enumerate(words)}
    bert = BertTokenizer(vocab=vocabulary)
    bert.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = CaptionTokenizer.read(tmp_path)
    text = "A doggy, runs"
    expected = bert(text, add_special_tokens=False)["input_ids"]
    assert ours.encode(text, 12) == [1, *expected, 2, *[0] * (9 - len(expected)), 4]
    assert ours.encode("dog " * 50, 8) == [1, *[7] * 5, 2, 4]
    assert ours.encode_target("a dog", 5) == [6, 7, 2, -100, -100]
    assert ours.encode_target("a dog runs a dog", 5) == [6, 7, 9, 2, -100]  # at most T - 1 targets, the last is eos
    assert ours.decode(ours.encode(text, 12)) == "a doggy, runs"


def test_trained_vocabulary_is_a_function_of_the_captions(tmp_path: Path) -> None:
    captions = ["A dog, a cat and a red apple.", "Two dogs on grass"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        CaptionTokenizer.train(captions, 60).save(tmp_path / name)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    trained = CaptionTokenizer.read(tmp_path / "one")
    assert trained.size <= 60
    assert trained.decode(trained.encode("a dog gdo", 12)) == "a dog gdo"  # unseen words are spelt
    with pytest.raises(UsageError, match="vocab_size 20"):
        CaptionTokenizer.train(captions, 20)


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
