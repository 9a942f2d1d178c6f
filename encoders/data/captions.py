"""Cutting captions into pieces: pure functions of a caption and a random generator."""

import re

import numpy as np

_STOPS = re.compile(r"[.!\n]+")


def sentences(caption: str) -> list[str]:
    """The caption's sentences: split at runs of full stops, exclamation marks and newlines, empty ones dropped."""
    return [piece for part in _STOPS.split(caption) if (piece := part.strip())]


def draw_sentence(caption: str, rng: np.random.Generator) -> str | None:
    """One sentence drawn at random (the short piece of the main CLIPS recipe), or None if the caption has none."""
    pieces = sentences(caption)
    return pieces[rng.integers(len(pieces))] if pieces else None
