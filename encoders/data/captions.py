"""Cutting captions into pieces: pure functions of a caption and a random generator."""

import re
from collections.abc import Sequence

import numpy as np

_STOPS = re.compile(r"[.!\n]+")


def sentences(caption: str) -> list[str]:
    """The caption's sentences: split at runs of full stops, exclamation marks and newlines, empty ones dropped."""
    return [piece for part in _STOPS.split(caption) if (piece := part.strip())]


def short_piece(pieces: Sequence[Sequence[int]], length: int | None, rng: np.random.Generator) -> list[int]:
    """The short piece of a synthetic caption, from the token ids of its sentences.

    length None: one sentence drawn at random, as in the main CLIPS recipe. Otherwise the sub-caption cut (CLIPS section
    3.2): sentences are drawn without replacement and appended until there are `length` tokens, of which the first
    `length` are kept; a caption with fewer gives all of them, shuffled. No sentence: an empty list.
    """
    piece: list[int] = []
    for index in rng.permutation(len(pieces)):
        piece += pieces[index]
        if length is None or len(piece) >= length:
            break
    return piece[:length]
