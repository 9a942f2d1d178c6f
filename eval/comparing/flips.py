"""The gallery's choice: answers that are right with one model and wrong with the other."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from eval.comparing.results import Row

FLIPS_SHOWN = 8
RIGHT = 0.5  # of a score between 0 and 1; of a caption's CIDEr


@dataclass(frozen=True)
class Flip:
    """A question that one of two runs answers correctly. `answers`: the baseline's, then the other run's.

    `image_id` is that of its first picture, empty if it has none.
    """

    index: int
    image_id: str
    category: str
    prompt: str
    target: str
    answers: tuple[str, str]
    scores: tuple[float, float]
    gained: bool


@dataclass(frozen=True)
class Flips:
    """How many answers of one run went from wrong to right and back, and some of them drawn at random."""

    gained: int
    lost: int
    shown: list[Flip]


def choose_flips(before: Sequence[Row], after: Sequence[Row], shown: int, seed: int) -> Flips:
    """Answers that changed sides; of them, if there are enough, as many gains as losses, each of another picture."""
    changed = [
        Flip(
            index=old["index"],
            image_id=str(old["image_id"]).partition("_")[0],
            category=str(old["category"]),
            prompt=str(old["prompt"]),
            target=str(old["target"]),
            answers=(str(old["answer"]), str(new["answer"])),
            scores=(float(old["correct"]), float(new["correct"])),
            gained=new["correct"] >= RIGHT,
        )
        for old, new in zip(before, after, strict=True)
        if None not in (old["correct"], new["correct"]) and (old["correct"] >= RIGHT) != (new["correct"] >= RIGHT)
    ]
    order = [changed[at] for at in np.random.default_rng(seed).permutation(len(changed))]
    turn: Counter[str | bool] = Counter()
    keyed = []
    for flip in order:
        keyed.append((turn[flip.image_id], turn[flip.gained], flip))
        turn.update([flip.image_id, flip.gained])
    chosen = [flip for _, _, flip in sorted(keyed, key=lambda item: item[:2])[:shown]]
    gained = sum(flip.gained for flip in changed)
    return Flips(gained, len(changed) - gained, sorted(chosen, key=lambda flip: (not flip.gained, flip.index)))
