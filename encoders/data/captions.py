"""Cutting captions into pieces: pure functions of captions and a random generator.

`cut` shortens a synthetic caption the ways CLIPS compares (arXiv 2411.16828, section 3.2); `dreamlip_texts` draws
DreamLIP's positives (arXiv 2403.17007) from all captions of a sample.
"""

import re
from collections.abc import Sequence

import numpy as np

from encoders.config import DreamlipOptions
from encoders.data.samples import BadSample, Sample
from encoders.data.tokenizers import CaptionTokenizer

_STOPS = re.compile(r"[.!\n]+|</s>")


def sentences(caption: str) -> list[str]:
    """The caption's sentences: split at runs of full stops, exclamation marks and newlines and at `</s>`, stripped,
    empty ones dropped. Without any of these the caption is one sentence."""
    return [piece for part in _STOPS.split(caption) if (piece := part.strip())]


def any_of(sample: Sample, name: str, rng: np.random.Generator) -> str:
    """The sample's short or long caption, of one captioner drawn uniformly. Raises BadSample if it has none."""
    texts = list({"short": sample.short, "long": sample.long}[name].values())
    if not texts:
        raise BadSample(f"no {name} caption", sample.shard, sample.key, "this objective learns from it")
    return texts[rng.integers(len(texts))] if len(texts) > 1 else texts[0]


def merged(pieces: Sequence[str], n: int) -> list[str]:
    """Each `n` consecutive pieces joined to one; the last may be of fewer."""
    return [". ".join(pieces[start : start + n]) for start in range(0, len(pieces), n)]


def cut(
    kind: str, caption: str, tokenizer: CaptionTokenizer, length: int | None, rng: np.random.Generator
) -> list[int]:
    """Ids of the words that are left of a caption by `ClipsOptions.cut`; `length` is L, None for `sentence`.

    Empty if the caption has no sentence.
    """
    pieces = sentences(caption)
    if not pieces:
        return []
    if kind == "sentence":
        return tokenizer.words(one_sentence(pieces, rng))
    assert length is not None  # ClipsOptions refuses the other cuts without one
    if kind == "sub_caption":
        return sub_caption([tokenizer.words(piece) for piece in pieces], length, rng)
    words = tokenizer.words(caption)
    if kind == "truncation":
        return truncation(words, length)
    return {"random_mask": random_mask, "block_mask": block_mask}[kind](words, length, rng)


def one_sentence(pieces: Sequence[str], rng: np.random.Generator) -> str:
    """One of the sentences, all equally likely."""
    return pieces[int(rng.integers(len(pieces)))]


def sub_caption(pieces: Sequence[Sequence[int]], length: int, rng: np.random.Generator) -> list[int]:
    """Sentences (ids of their words) drawn without replacement and appended until there are `length` ids, of which the
    first `length` are kept; a caption with fewer gives all of them, in the order drawn."""
    piece: list[int] = []
    for index in rng.permutation(len(pieces)):
        piece += pieces[index]
        if len(piece) >= length:
            break
    return piece[:length]


def truncation(words: Sequence[int], length: int) -> list[int]:
    """The first `length` ids."""
    return list(words[:length])


def random_mask(words: Sequence[int], length: int, rng: np.random.Generator) -> list[int]:
    """`length` ids from places drawn at random, their order kept; all if there are no more."""
    if len(words) <= length:
        return list(words)
    return [words[place] for place in np.sort(rng.choice(len(words), length, replace=False))]


def block_mask(words: Sequence[int], length: int, rng: np.random.Generator) -> list[int]:
    """`length` consecutive ids from a start drawn at random; all if there are no more."""
    start = int(rng.integers(max(len(words) - length, 0) + 1))
    return list(words[start : start + length])


def dreamlip_texts(sample: Sample, options: DreamlipOptions, rng: np.random.Generator) -> list[str]:
    """The positives of a picture: K texts drawn from its pool, after the raw caption if that is always one.

    Raises BadSample if the pool is empty or lacks a captioner that the options name.
    """
    always = [sample.web] if options.raw == "always" else []
    if options.k == 0:
        return always
    texts = pool(sample, options)
    if not texts:
        raise BadSample("empty caption pool", sample.shard, sample.key, "no caption that feeds it has a sentence")
    return always + draw(texts, options.k, rng)


def pool(sample: Sample, options: DreamlipOptions) -> list[str]:
    """The texts to draw from: the raw caption (raw: pool), the sentences of short captions, and long captions as
    (merged) sub-captions or whole. Raises BadSample if a captioner that the options name has no caption here."""
    texts = [sample.web] if options.raw == "pool" else []
    if options.short:
        texts += [sentence for caption in _chosen("short", sample, options) for sentence in sentences(caption)]
    if options.long == "whole":
        texts += _chosen("long", sample, options)
    elif options.long == "split":
        for caption in _chosen("long", sample, options):
            texts += merged(sentences(caption), options.merge)
    return texts


def draw(texts: Sequence[str], k: int, rng: np.random.Generator) -> list[str]:
    """`k` of the texts: without replacement if there are enough, else with."""
    return [texts[place] for place in rng.choice(len(texts), k, replace=len(texts) < k)]


def _chosen(name: str, sample: Sample, options: DreamlipOptions) -> list[str]:
    """The sample's short or long captions by the captioners of the options."""
    captions = {"short": sample.short, "long": sample.long}[name]
    missing = [captioner for captioner in options.captioners or () if captioner not in captions]
    if not captions:
        raise BadSample(f"no {name} caption", sample.shard, sample.key, f"dreamlip.{name} lets it feed the pool")
    if missing:
        detail = f"dreamlip.captioners names {', '.join(missing)}; there are {', '.join(captions)}"
        raise BadSample(f"no {name} caption", sample.shard, sample.key, detail)
    return [captions[captioner] for captioner in options.captioners or captions]
