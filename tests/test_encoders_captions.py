"""Cuts and draws of captions against their definitions, checked by enumeration: what may come out, and how often."""

from collections import Counter
from collections.abc import Callable
from itertools import combinations, permutations

import numpy as np
import pytest

from encoders.config import DreamlipOptions
from encoders.data import captions
from encoders.data.captions import cut, draw, dreamlip_texts, merged, pool, sentences
from encoders.data.shards import BadSample, Sample
from encoders.data.tokenizers import CaptionTokenizer

DRAWS = 4000
LONG = "A red dog runs. Two cats sleep on grass! The sky is blue"
SAMPLE = Sample(
    key="000",
    shard="0.tar",
    image=b"",
    web="raw. IMG",
    short={"llava": "One. Two", "sharegpt": "Three"},
    long={"llava": "Four. Five. Six.", "sharegpt": "Seven!"},
)


def drawn(cutter: Callable[[np.random.Generator], list[int]]) -> Counter[tuple[int, ...]]:
    """How often each result comes out."""
    return Counter(tuple(cutter(np.random.default_rng(seed))) for seed in range(DRAWS))


def assert_even(counts: Counter[tuple[int, ...]], expected: Counter[tuple[int, ...]]) -> None:
    """The results are the expected ones, in proportion to how often each is expected (5 standard deviations)."""
    assert set(counts) == set(expected)
    for result, ways in expected.items():
        mean = DRAWS * ways / expected.total()
        assert abs(counts[result] - mean) <= 5 * mean**0.5, (result, counts[result], mean)


def test_sentences_are_split_at_stops_newlines_and_end_marks() -> None:
    caption = "A dog runs... It is brown!!  The sky\nis blue</s> a cat. \n . "
    assert sentences(caption) == ["A dog runs", "It is brown", "The sky", "is blue", "a cat"]
    assert sentences("a long caption with no end") == ["a long caption with no end"]
    assert sentences(" .\n!</s>") == []
    assert merged(["a", "b", "c", "d", "e"], 2) == ["a. b", "c. d", "e"]
    assert merged(["a", "b"], 1) == ["a", "b"]


@pytest.mark.parametrize("length", [1, 3, 6])
def test_masks_keep_order_and_are_drawn_evenly(length: int) -> None:
    words = [7, 5, 9, 2, 8, 4]
    subsets = Counter(tuple(words[i] for i in places) for places in combinations(range(6), length))
    assert_even(drawn(lambda rng: captions.random_mask(words, length, rng)), subsets)
    blocks = Counter(tuple(words[i : i + length]) for i in range(6 - length + 1))
    assert_even(drawn(lambda rng: captions.block_mask(words, length, rng)), blocks)
    assert captions.truncation(words, length) == words[:length]
    for whole in (captions.random_mask, captions.block_mask):
        assert whole(words, 99, np.random.default_rng(0)) == words
        assert whole([], 2, np.random.default_rng(0)) == []


@pytest.mark.parametrize("length", [1, 4, 8, 99])
def test_sub_captions_are_whole_sentences_until_the_length_is_reached(length: int) -> None:
    pieces = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    expected: Counter[tuple[int, ...]] = Counter()
    for order in permutations(pieces):  # the paper's rule, spelt out: draw; too long: truncate; too short: draw another
        text: list[int] = []
        rest = list(order)
        while len(text) < length and rest:
            text = text + rest.pop(0)
        expected[tuple(text[:length])] += 1
    assert_even(drawn(lambda rng: captions.sub_caption(pieces, length, rng)), expected)
    assert captions.sub_caption([], length, np.random.default_rng(0)) == []


@pytest.mark.parametrize("kind", ["sentence", "sub_caption", "truncation", "random_mask", "block_mask"])
def test_cuts_are_made_of_the_captions_own_words(kind: str) -> None:
    tokenizer = CaptionTokenizer.train([LONG], 200, "bert")
    length = None if kind == "sentence" else 4
    results = {tuple(cut(kind, LONG, tokenizer, length, np.random.default_rng(seed))) for seed in range(60)}
    whole = tokenizer.words(LONG)
    parts = [tokenizer.words(sentence) for sentence in sentences(LONG)]
    possible = {
        "sentence": {tuple(part) for part in parts},
        "sub_caption": {tuple(part[:4]) for part in parts},  # each has at least 4 words
        "truncation": {tuple(whole[:4])},
        "block_mask": {tuple(whole[i : i + 4]) for i in range(len(whole) - 3)},
        "random_mask": set(combinations(whole, 4)),
    }[kind]
    assert results <= possible
    assert len(results) >= min(len(possible), 55)
    assert cut(kind, "...\n", tokenizer, length, np.random.default_rng(0)) == []
    again = [cut(kind, LONG, tokenizer, length, np.random.default_rng(5)) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["One", "Two", "Three", "Four", "Five", "Six", "Seven"]),
        ({"raw": "pool"}, ["raw. IMG", "One", "Two", "Three", "Four", "Five", "Six", "Seven"]),
        ({"short": False, "merge": 2}, ["Four. Five", "Six", "Seven"]),
        ({"short": False, "long": "whole"}, ["Four. Five. Six.", "Seven!"]),
        ({"long": "never"}, ["One", "Two", "Three"]),
        ({"captioners": ("sharegpt",), "raw": "never"}, ["Three", "Seven"]),
    ],
)
def test_the_pool_holds_what_the_options_say(options: dict, expected: list[str]) -> None:
    assert pool(SAMPLE, DreamlipOptions(**options)) == expected


def test_draws_repeat_only_what_the_pool_lacks() -> None:
    texts = ["a", "b", "c", "d"]
    pairs = Counter((x, y) for x in texts for y in texts if x != y)
    assert_even(drawn(lambda rng: draw(texts, 2, rng)), pairs)  # type: ignore[arg-type, return-value]
    assert sorted(draw(texts, 4, np.random.default_rng(0))) == texts
    assert {len(draw(texts, 9, np.random.default_rng(seed))) for seed in range(5)} == {9}
    assert {text for seed in range(50) for text in draw(texts, 9, np.random.default_rng(seed))} == set(texts)


@pytest.mark.parametrize(("raw", "first"), [("always", {"raw. IMG"}), ("pool", None), ("never", None)])
def test_the_raw_caption_stands_where_the_options_say(raw: str, first: set[str] | None) -> None:
    options = DreamlipOptions(k=3, raw=raw)  # type: ignore[arg-type]
    rows = [dreamlip_texts(SAMPLE, options, np.random.default_rng(seed)) for seed in range(60)]
    assert {len(row) for row in rows} == {4 if raw == "always" else 3}
    assert first is None or {row[0] for row in rows} == first
    inside = any("raw. IMG" in row[raw == "always" :] for row in rows)
    assert inside == (raw == "pool")
    alone = DreamlipOptions(k=0, grouping_weight=0)
    assert dreamlip_texts(SAMPLE, alone, np.random.default_rng(0)) == ["raw. IMG"]


def test_empty_pools_and_absent_captioners_are_bad_samples() -> None:
    silent = Sample("7", "1.tar", b"", "raw", {"llava": "..."}, {"llava": "!"})
    with pytest.raises(BadSample, match=r"1\.tar: sample '7': empty caption pool"):
        dreamlip_texts(silent, DreamlipOptions(), np.random.default_rng(0))
    with pytest.raises(BadSample, match="no short caption .*names llama; there are llava, sharegpt"):
        pool(SAMPLE, DreamlipOptions(captioners=("llava", "llama")))
